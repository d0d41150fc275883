"""Optimizers that use the library's curvature. None is implemented yet; the name is reserved."""
