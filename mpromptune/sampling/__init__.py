"""Samplers: qEISampler, and Optuna's own made fit for a search."""
