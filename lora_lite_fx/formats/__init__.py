"""Adapter files: our own, PEFT directories, lora-lite files."""
