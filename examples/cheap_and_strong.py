"""A cheap model does the task; a strong one writes its prompts. The bill is known before and limited.

Shows: `prompt_model`, `task_model` and `reflection_lm`; `dry_run`, an estimate without a request; `max_cost`.
Costs: by default nothing, as stubs answer (see stubs.py). Hosted models are sent about 230 requests (the
cheap one) and 40 (the strong one): 7 cents at the prices below.
"""

import json
from pathlib import Path

import dspy
import stubs

from mpromptune import MIPROv2

# ---- The one line to change for a real API: dspy.LM("openai/gpt-4o-mini"), dspy.LM("openai/gpt-4o") ----
CHEAP, STRONG = stubs.clerk(), stubs.editor()

# 1. Data: letters with a date and an amount.
rows = json.loads((Path(__file__).parent / "data" / "invoices.json").read_text("utf-8"))
examples = [dspy.Example(letter=row["letter"], due=row["due"], amount=row["amount"]) for row in rows]
examples = [example.with_inputs("letter") for example in examples]
trainset, valset = examples[:12], examples[12:]

# 2. The program: both fields by one request.
program = dspy.Predict(dspy.Signature("letter -> due, amount", "Find when to pay, and how much."))


# 3. The metric: half a point for each field that a program can read.
def readable(gold, pred, trace=None, pred_name=None, pred_trace=None):
    date, amount = pred.due == gold.due, pred.amount == gold.amount
    feedback = [f"The date should be written like {gold.due}."] * (not date)
    feedback += [f"The amount should be written like {gold.amount}."] * (not amount)
    return dspy.Prediction(score=(date + amount) / 2, feedback=" ".join(feedback) or "Both are right.")


# 4. The estimate, and then the same call without `dry_run`.
optimizer = MIPROv2(
    metric=readable,
    task_model=CHEAP,
    prompt_model=STRONG,
    auto="light",
    max_bootstrapped_demos=0,  # instructions only
    max_labeled_demos=0,
    num_threads=8,
    proposals="adaptive",
    reflection_lm=STRONG,
    max_calls=220,
    max_cost=0.25,  # US dollars, for all steps and both models
    prices={CHEAP.model: (0.15, 0.60), STRONG.model: (2.50, 10.00)},  # per million tokens, sent and received
    confirm=True,
)
estimate = optimizer.compile(program, trainset=trainset, valset=valset, dry_run=True)
print(estimate.with_tokens(prompt=400, completion=40))
best = optimizer.compile(program, trainset=trainset, valset=valset)

# 5. The outcome.
found = best.search_result
before, after = f"{found.baseline_score:.1%}", f"{found.best_score:.1%}"
print(f"Validation: {before} before, {after} after, {found.calls} program calls")
for step, usage in found.usage.items():
    print(f"{step + ':':<11} {usage.lm_calls} LM requests, ${usage.cost:.4f}")
print(f"In total:   ${found.usage.total.cost:.4f}; stopped by {found.stopped_by or 'nothing but the calls'}")
print(f"Winner:     {best.signature.instructions}")
print(f"Report:     {found.report('cheap_and_strong.html')}")
