"""Helpers that every other part uses: checks of arguments, devices and meshes, the matmul with weights."""
