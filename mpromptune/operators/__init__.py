"""Proposers for DSPy programs: each writes new instructions or demo sets while the search runs."""
