"""Triton kernels of the RoI operators, imported only where a tensor is computed with them."""
