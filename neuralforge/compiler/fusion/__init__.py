"""Fusion: groups of elementwise operators and reductions, and the C code that runs each at once."""
