"""What a few models need while they are captured: one file for each cause, each removable. See README.md."""
