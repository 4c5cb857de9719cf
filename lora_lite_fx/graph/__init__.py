"""Tools for torch.fx graphs: tensors by name, records on nodes, parts of a graph. Nothing here knows a variant."""
