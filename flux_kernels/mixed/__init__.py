"""What the commands measure, plan and quantize share: costs, plans, importance, file layouts."""
