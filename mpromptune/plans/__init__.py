"""Evaluation plans: which examples a trial is measured on, when to stop, and who wins."""
