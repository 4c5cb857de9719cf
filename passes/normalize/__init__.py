"""Passes that bring a captured graph into the one form that the other passes expect."""
