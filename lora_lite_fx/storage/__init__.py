"""The forms in which a frozen weight is stored, and how it is read again."""
