"""Run every kernel with every format on cards that are not here, and hold the results to derived bounds."""
