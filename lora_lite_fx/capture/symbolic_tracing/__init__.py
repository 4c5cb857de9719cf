"""Capture a model without example inputs, by symbolic tracing; bring graphs that others traced into our form."""
