"""Mathematics: the space of configurations, its Gaussian process, and expected improvement."""
