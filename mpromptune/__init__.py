"""m-promptune: batch Bayesian optimisation of the prompts of DSPy programs."""

from mpromptune.search import search
from mpromptune.sampler import qEISampler
from mpromptune.space import PromptSpace
