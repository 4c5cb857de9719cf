"""The sites of a graph: where a frozen weight is multiplied, of which kind, and in which role."""
