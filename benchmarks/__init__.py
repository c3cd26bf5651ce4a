"""Benchmarks: every figure that the documents claim, as a script that prints it."""
