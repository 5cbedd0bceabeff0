"""How good the model is: bits per byte and samples."""
