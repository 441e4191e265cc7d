"""The public names of the earlier package: ``qEI.qEISampler`` and ``qEI.Sampler``."""

from mpromptune.sampling.sampler import qEISampler

Sampler = qEISampler

__all__ = ["Sampler", "qEISampler"]
