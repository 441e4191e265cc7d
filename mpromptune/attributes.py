"""Names of the trial and study attributes in which the whole state of a search lives."""

EXAMPLES = "mpromptune:examples"  # trial: indices of the validation examples measured
SCORES = "mpromptune:scores"  # trial: their scores, in the same order
N_EXAMPLES = "mpromptune:n_examples"  # study: size of the validation set
PROPOSED = "mpromptune:proposed"  # trial: params handed to a trial that has not suggested them yet
PLAN = "mpromptune:plan"  # trial: the batch that its proposal leads, and what was known then
FORMAT = "mpromptune:format"  # study: version of what is kept in it, and the sign that it is ours
RUN = "mpromptune:run"  # study: what identifies the run, in named parts
DEMOS = "mpromptune:demos"  # study: what the bootstrap ended with; `DEMOS:i:j`, demo set j of predictor i
INSTRUCTIONS = "mpromptune:instructions"  # study: as DEMOS, of the proposal
STUDENT = "mpromptune:student"  # study: `STUDENT:i`, the student's score on validation example i
