"""Kernels: code that exists only for speed, each next to its plain form."""
