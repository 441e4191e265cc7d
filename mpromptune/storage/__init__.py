"""Studies in Optuna's storage: storages, the lease of a study, and the data that it contains."""
