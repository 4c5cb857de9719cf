"""What a graph depends on beside its inputs: what a model asks of the process, and what it keeps in Python."""
