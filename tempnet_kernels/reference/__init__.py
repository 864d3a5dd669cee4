"""The definition of every operator in plain PyTorch, on any device, in float64 too."""
