"""What joins the library to others: diffusers' loaders and savers, peft's adapters."""
