"""A model becomes a graph module that shares its weights."""
