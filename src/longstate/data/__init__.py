"""Data as the programs read it."""
