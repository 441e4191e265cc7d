"""DSPy programs as configurations, scored here or in other processes."""
