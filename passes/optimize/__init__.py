"""Passes that change how a graph runs and not what it computes."""
