"""PEFT directories."""
