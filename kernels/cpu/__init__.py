"""Native kernels for CPUs: C++ behind a plain C interface."""
