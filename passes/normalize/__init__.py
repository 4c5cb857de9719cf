"""Passes that bring a captured graph into the one form that the others know."""
