"""Insert adapters into the graphs that `torch.compile` captures, with the same passes as `rewrite`."""
