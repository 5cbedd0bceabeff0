"""How good the model is: bits per byte, the CORE metric, samples."""
