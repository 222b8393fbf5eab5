"""Triton kernels for GPUs: one op a file, its reference, its kernel, its launcher in that order."""
