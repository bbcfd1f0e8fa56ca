"""Layers made of layers, layers without recurrence, and wrappers that regularise a cell."""
