"""Readers of traced functions.

`primitives` is the table of JAX's operations. `flat` turns a traced function into one list of operations; it is the
only module that looks into a jaxpr, and the others read such lists. `affine` and `linear` find the form of a recurrent
step, `sites` the parts of any step, and `per_unit` the program that gates apply to every unit.
"""
