"""What few models need of a capture: one file per cause, each of which can be taken out."""
