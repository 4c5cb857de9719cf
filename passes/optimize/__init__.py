"""Passes that make a graph run faster or in less memory, and leave its results as they are."""
