"""What joins the library to others: diffusers' quantizers, adapters, fused projections. Each module says what for."""
