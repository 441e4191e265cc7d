"""Questions that take two searches: a program of two predictors, tuned together and resumed.

Shows: instructions and demos of two predictors, chosen together; `storage`, with which the same call goes on:
here with a larger budget, and just so after a crash. Nothing is paid twice.
Costs: by default nothing, as a stub answers (see stubs.py). A hosted model is sent about 750 requests,
220,000 tokens: 4 cents with gpt-4o-mini.
"""

import json
import tempfile
from pathlib import Path

import dspy
import stubs

from mpromptune import MIPROv2

# ---- The one line to change for a real API: LM = dspy.LM("openai/gpt-4o-mini") -------------------------
LM = stubs.detective()

# 1. Data: facts about a company, and questions. Each needs a first fact to find the second.
folder = Path(__file__).parent / "data"
facts = json.loads((folder / "office_facts.json").read_text("utf-8"))
rows = json.loads((folder / "office_questions.json").read_text("utf-8"))
examples = [
    dspy.Example(question=row["question"], answer=row["answer"]).with_inputs("question") for row in rows
]
trainset, valset = examples[:12], examples[12:36]


# 2. The program: search, note what was found, search again, answer.
def words(text):
    return set(text.lower().strip("?.").split())


def search(query, k=3):
    return sorted(facts, key=lambda fact: -len(words(fact) & words(query)))[:k]


class MultiHop(dspy.Module):
    def __init__(self, hops=2):
        super().__init__()
        self.hops = hops
        self.ask = dspy.Predict("question, notes -> query")
        self.respond = dspy.Predict("question, notes -> answer")

    def forward(self, question):
        notes = []
        for _ in range(self.hops):
            notes += search(self.ask(question=question, notes="\n".join(notes)).query)
        return self.respond(question=question, notes="\n".join(notes)).copy(notes=notes)


# 3. The metric: 1 for exactly the expected word, half a point where it is one of several.
def exact(gold, pred, trace=None, pred_name=None, pred_trace=None):
    if pred.answer == gold.answer:
        return dspy.Prediction(score=1.0, feedback="Right.")
    if gold.answer in pred.answer:
        return dspy.Prediction(score=0.5, feedback="The answer is more than the one word that is wanted.")
    return dspy.Prediction(score=0.0, feedback="The notes do not contain the answer.")


# 4. The compile, twice. The second call repeats nothing that the first has paid for.
dspy.configure(lm=LM)
storage = Path(tempfile.mkdtemp()) / "multi_hop.log"  # in your own work, a path that stays the same


def compiled(max_calls):
    optimizer = MIPROv2(
        metric=exact, auto="light", max_bootstrapped_demos=1, max_labeled_demos=2, num_threads=8
    )
    options = {"sampler": "qei", "storage": str(storage), "max_calls": max_calls, "confirm": True}
    return optimizer.compile(MultiHop(), trainset=trainset, valset=valset, **options)


first = compiled(max_calls=100).search_result
best = compiled(max_calls=240)

# 5. The outcome.
found = best.search_result
before, halfway, after = f"{found.baseline_score:.1%}", f"{first.best_score:.1%}", f"{found.best_score:.1%}"
print(f"First call:  {before} before, {halfway} after, {first.calls} program calls")
print(f"Second call: {before} before, {after} after, {found.calls - first.calls} more program calls")
for name, predictor in best.named_predictors():
    print(f"{name + ':':<12} {predictor.signature.instructions} ({len(predictor.demos)} demos)")
print(f"Report:      {found.report('multi_hop.html')}")
