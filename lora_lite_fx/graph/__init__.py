"""What this library needs of torch.fx: tensors by name, records on nodes, parts of a graph. It knows no variant."""
