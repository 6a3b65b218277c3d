"""Analysis: compare, draw and report trained runs."""
