"""`backend`: the same passes on the graphs that torch.compile captures."""
