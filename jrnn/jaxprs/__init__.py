"""What can be known of a traced function.

`primitives` is the table of JAX's operations, `flat` the walker that turns a traced function into one list of
operations, and `affine` the reader that finds the form of a recurrent step in such a list.
"""
