"""Passes that insert, observe, merge and remove adapters."""
