"""Run every kernel with every format on absent cards, and hold the results to derived bounds."""
