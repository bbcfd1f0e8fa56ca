"""What is put around cells: layers without recurrence, combinators, and regularising wrappers."""
