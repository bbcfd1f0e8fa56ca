"""Small things that every other part uses: checks of arguments, devices and meshes, the product with weights."""
