"""DSPy's MIPROv2 with a concurrent, text-aware search. DSPy in, DSPy out."""
