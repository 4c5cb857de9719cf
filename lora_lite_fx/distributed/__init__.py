"""Adapted models in several processes; see README.md."""
