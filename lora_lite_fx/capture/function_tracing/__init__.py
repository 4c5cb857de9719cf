"""Run and trace functions, such as the `forward` of a variant, on stand-ins without data."""
