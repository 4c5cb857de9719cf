"""How an adapted graph is run, as against what it computes."""
