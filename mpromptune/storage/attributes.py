"""Names of the trial and study attributes in which the whole state of a search lives."""

EXAMPLES = "mpromptune:examples"  # trial: indices of the validation examples measured, or being measured
SCORES = "mpromptune:scores"  # trial: their scores, in the same order
PLANNED = "mpromptune:planned"  # trial: all that it was to be measured on, where some of it has no score
REFUSED = "mpromptune:refused"  # trial: of EXAMPLES, those of which the prompt was refused
ABANDONED = "mpromptune:abandoned"  # trial: its run ended before it did
RESUMES = "mpromptune:resumes"  # trial: number of the abandoned one that it takes up
PROPOSED = "mpromptune:proposed"  # trial: params handed to a trial that has not suggested them yet
PLAN = "mpromptune:plan"  # trial: the batch that its proposal leads, and what was known then
N_EXAMPLES = "mpromptune:n_examples"  # study: size of the validation set
SETTINGS = "mpromptune:settings"  # study: the arguments on which its trials depend
GEOMETRY = "mpromptune:geometry"  # study: how far candidates are from each other by their embeddings
FORMAT = "mpromptune:format"  # study: version of what is kept in it, and the sign that it is ours
LEASE = "mpromptune:lease"  # study, among its system attributes: the run that may write to it
RUN = "mpromptune:run"  # study: what identifies the run, in named parts
DEMOS = "mpromptune:demos"  # study: what the bootstrap ended with; `DEMOS:i:j`, demo set j of predictor i
INSTRUCTIONS = "mpromptune:instructions"  # study: as DEMOS, of the proposal
USED = "mpromptune:used"  # study: `USED:step`, what a step before the search has used, as JSON
ANSWERS = "mpromptune:answer"  # study: `ANSWERS:scope:digest:n`, an LM's answer to a request of the steps
STUDENT = "mpromptune:student"  # study: `STUDENT:i`, the student's score on validation example i
USAGE = "mpromptune:usage"  # trial: what measuring it has used, as JSON
PREDICTORS = "mpromptune:predictors"  # study: the program's own names of its predictors, in order
ESTIMATE = (
    "mpromptune:estimate"  # study: what each step of the compile was to use at most, by `Usage.as_dict`
)
