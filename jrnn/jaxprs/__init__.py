"""What can be known of a traced function.

`primitives` is the table of JAX's operations, and `flat` the walker that turns a traced function into one list of
operations: the only module that looks into a jaxpr. The others read such lists. `affine` finds the form of a recurrent
step, `sites` the parts of any step, and `per_unit` what gates do to one unit.
"""
