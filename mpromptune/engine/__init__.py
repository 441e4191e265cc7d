"""The search: ask, measure, tell. Knows Optuna, and no DSPy."""
