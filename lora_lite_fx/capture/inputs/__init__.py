"""Make example inputs for a model from what its config and its signature say."""
