"""The programs that run an adapted graph: derived from the graph, optimized, cached, checkpointed."""
