"""Cells: the kinds of cell (`base`), and a file for each family."""
