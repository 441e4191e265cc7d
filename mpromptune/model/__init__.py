"""Mathematics: the space of configurations, the models of their scores, and the choice of configurations."""
