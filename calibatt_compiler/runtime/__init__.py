"""Between the compiled graph and the kernels: which step it is, and which kernel serves it."""
