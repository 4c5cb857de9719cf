"""Define an adapter: its variant (config and maths), its tensors, its place in a model."""
