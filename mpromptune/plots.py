"""Figures of a search, similar to ``optuna.visualization``; needs ``m-promptune[plots]``."""

from mpromptune.show.plots import plot_effects, plot_examples, plot_growth, plot_leaders, plot_map, plot_usage

__all__ = ["plot_effects", "plot_examples", "plot_growth", "plot_leaders", "plot_map", "plot_usage"]
