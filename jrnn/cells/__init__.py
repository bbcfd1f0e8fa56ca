"""What one step is: the kinds of cell (`base`) and a file per family."""
