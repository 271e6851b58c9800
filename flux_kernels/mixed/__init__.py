"""What the commands measure, plan and quantize hand each other: costs, plans, importance, covariance, low-rank fits, and the layout of a file."""
