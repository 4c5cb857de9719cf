"""Hand an adapted model over to where people serve: one function for each runtime, each in a file of its own."""
