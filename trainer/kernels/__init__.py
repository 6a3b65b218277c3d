"""Kernels: code that exists only for speed, each beside its plain form."""
