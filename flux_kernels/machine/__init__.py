"""What this machine has and runs best: doctor, tune, warmup, and the clocks they use."""
