"""Answers from retrieved passages, scored by a language model as judge.

Shows: a judge with feedback in the metric; its requests are counted like all others, in the ledger and in
every limit; prices of your own.
Costs: by default nothing, as a stub answers (see stubs.py). A hosted model is sent about 500 requests,
180,000 tokens: 3 cents at the prices below.
"""

import json
from pathlib import Path

import dspy
import stubs

from mpromptune import MIPROv2

# ---- The one line to change for a real API: LM = dspy.LM("openai/gpt-4o-mini") -------------------------
LM = stubs.reader()

# 1. Data: the rules of a library, and questions of visitors with reference answers.
folder = Path(__file__).parent / "data"
passages = json.loads((folder / "library.json").read_text("utf-8"))
rows = json.loads((folder / "library_questions.json").read_text("utf-8"))
examples = [dspy.Example(question=row["question"], reference=row["answer"]) for row in rows]
examples = [example.with_inputs("question") for example in examples]
trainset, valset = examples[:12], examples[12:]


# 2. The program: retrieve two passages by the words they share with the question, and answer from them.
def words(text):
    return {word.strip("?.,'").removesuffix("s") for word in text.lower().split() if len(word) > 3}


def retrieve(question, k=2):
    return sorted(passages, key=lambda passage: -len(words(passage) & words(question)))[:k]


class Rag(dspy.Module):
    def __init__(self):
        super().__init__()
        self.respond = dspy.Predict("context, question -> answer")

    def forward(self, question):
        return self.respond(context="\n".join(retrieve(question)), question=question)


# 3. The metric: half a point each for a complete and a faithful answer, by the judgement of an LM.
class Judge(dspy.Signature):
    """Judge an answer by the reference answer and by the passages that it was made from."""

    context: str = dspy.InputField()
    question: str = dspy.InputField()
    reference: str = dspy.InputField()
    answer: str = dspy.InputField()
    complete: bool = dspy.OutputField(desc="whether the answer says what the reference says")
    faithful: bool = dspy.OutputField(desc="whether the passages support all that the answer says")


judge = dspy.Predict(Judge)


def judged(gold, pred, trace=None, pred_name=None, pred_trace=None):
    context = "\n".join(retrieve(gold.question))
    said = judge(context=context, question=gold.question, reference=gold.reference, answer=pred.answer)
    feedback = ["The answer is incomplete."] * (not said.complete)
    feedback += ["It has something that is not supported by the passages."] * (not said.faithful)
    return dspy.Prediction(score=(said.complete + said.faithful) / 2, feedback=" ".join(feedback) or "Good.")


# 4. The compile. `max_cost` holds for all requests together: program, judge, and those that write prompts.
dspy.configure(lm=LM)
optimizer = MIPROv2(metric=judged, auto="light", max_bootstrapped_demos=2, max_labeled_demos=2, num_threads=8)
best = optimizer.compile(
    Rag(),
    trainset=trainset,
    valset=valset,
    sampler="qei",
    max_calls=240,
    max_cost=0.50,
    prices={LM.model: (0.15, 0.60)},  # US dollars per million tokens, sent and received
    confirm=True,
)

# 5. The outcome. A program call is one request of the program and one of the judge.
found = best.search_result
search, total = found.usage["search"], found.usage.total
print(f"Validation: {found.baseline_score:.1%} before, {found.best_score:.1%} after")
print(
    f"Search:     {search.program_calls} program calls, {search.lm_calls} LM requests with those of the judge"
)
print(f"All steps:  {total.lm_calls} LM requests, {total.tokens} tokens, ${total.cost:.4f}")
print(f"Winner:     {best.respond.signature.instructions}")
print(f"Report:     {found.report('rag.html')}")
