"""Capture a deep model by a few of its layers: cut its stacks of layers, prove that they repeat, stamp the others."""
