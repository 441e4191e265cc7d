"""The demo: a DSPy program compiled on a model on this machine, on recorded answers, or on any model."""
