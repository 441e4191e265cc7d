"""Studies in Optuna's storage: where they are kept, and what is written in them."""
