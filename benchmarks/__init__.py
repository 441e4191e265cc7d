"""Benchmarks: one command each, results committed under `benchmarks/results`."""
