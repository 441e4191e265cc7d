"""The demo: a DSPy program compiled against recorded answers, or live."""
