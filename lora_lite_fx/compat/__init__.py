"""Hold what is private of other libraries: see the README of this folder."""
