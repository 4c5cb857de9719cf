"""The rows of the batch: which dimension of a value counts them, and in which order."""
