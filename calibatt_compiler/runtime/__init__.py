"""What runs between the compiled graph and the kernels: which step it is, which kernel serves it."""
