"""Names of the trial and study attributes in which the whole state of a search lives."""

EXAMPLES = "mpromptune:examples"  # trial: indices of the validation examples measured
SCORES = "mpromptune:scores"  # trial: their scores, in the same order
N_EXAMPLES = "mpromptune:n_examples"  # study: size of the validation set
PROPOSED = "mpromptune:proposed"  # trial: params handed to a trial that has not suggested them yet
PLAN = "mpromptune:plan"  # trial: the batch that its proposal leads, and what was known then
USAGE = "mpromptune:usage"  # trial: what measuring it has used, as JSON
