"""The front doors: rewrite, wrap, merge, remove."""
