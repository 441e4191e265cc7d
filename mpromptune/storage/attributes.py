"""Names of the trial and study attributes that contain the whole state of a search."""

EXAMPLES = "mpromptune:examples"  # trial: indices of the validation examples measured; planned, if it is open
SCORES = "mpromptune:scores"  # trial: their scores, in the same order
PLANNED = "mpromptune:planned"  # trial: all examples that it was asked on, if some of them have no score
REFUSED = "mpromptune:refused"  # trial: those of EXAMPLES on which the prompt was refused
ABANDONED = "mpromptune:abandoned"  # trial: its run ended before it did
RESUMES = "mpromptune:resumes"  # trial: number of the abandoned trial that it continues
PROPOSED = "mpromptune:proposed"  # trial: params proposed for a trial that has not suggested them yet
PLAN = "mpromptune:plan"  # trial: the batch that its proposal begins, and the trials known then
PROPOSAL = "mpromptune:proposal"  # trial: the proposal of the candidate that it measures first, as JSON
N_EXAMPLES = "mpromptune:n_examples"  # study: size of the validation set
SETTINGS = "mpromptune:settings"  # study: the arguments on which its trials depend
GEOMETRY = "mpromptune:geometry"  # study: distances between candidates by their embeddings
FORMAT = "mpromptune:format"  # study: version of its format; it also marks studies of this package
LEASE = "mpromptune:lease"  # study, in its system attributes: the run that may write to it
RUN = "mpromptune:run"  # study: the arguments that identify the run, in named parts
DEMOS = "mpromptune:demos"  # study: the result of the bootstrap; `DEMOS:i:j`, demo set j of predictor i
INSTRUCTIONS = "mpromptune:instructions"  # study: the result of the proposal, like DEMOS
USED = "mpromptune:used"  # study: `USED:step`, the usage of a step before the search, as JSON
ANSWERS = "mpromptune:answer"  # study: `ANSWERS:scope:digest:n`, an LM's answer to a request of the steps
NOTE = "mpromptune:note"  # trial: `NOTE:example`, what the score function said beside the score, as JSON
USAGE = "mpromptune:usage"  # trial: its usage, as JSON
PREDICTORS = "mpromptune:predictors"  # study: the names of the predictors in the program, in order
ESTIMATE = "mpromptune:estimate"  # study: the upper estimate of each step's usage, by `Usage.as_dict`
