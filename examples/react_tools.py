"""An agent with tools (`dspy.ReAct`), whose instructions are also rewritten while the search runs.

Shows: `proposals="adaptive"` with a metric whose feedback says what went wrong; who wrote the winner.
Costs: by default nothing, as a stub answers (see stubs.py). A hosted model is sent about 650 requests,
600,000 tokens: 10 cents with gpt-4o-mini.
"""

import json
from pathlib import Path

import dspy
import stubs

from mpromptune import MIPROv2

# ---- The one line to change for a real API: LM = dspy.LM("openai/gpt-4o-mini") -------------------------
LM = stubs.agent()

# 1. Data: questions about orders of a shop, with the total in euros.
rows = json.loads((Path(__file__).parent / "data" / "shop_questions.json").read_text("utf-8"))
examples = [dspy.Example(row).with_inputs("question") for row in rows]
trainset, valset = examples[:8], examples[8:28]


# 2. The tools and the program. DSPy shows the agent the docstrings.
PRICES = {
    "lamp": 34,
    "chair": 58,
    "desk": 120,
    "rug": 75,
    "clock": 22,
    "mirror": 47,
    "vase": 64,
    "basket": 13,
}
FEES = {"Porto": 9, "Ghent": 6, "Turin": 8, "Krakow": 11, "Cork": 14, "Basel": 7}


def price(item: str) -> int:
    """The price of one item in euros; the name of the item is in the singular."""
    return PRICES[item]


def delivery(city: str) -> int:
    """The fee for one delivery to a city in euros."""
    return FEES[city]


def calculate(expression: str) -> int:
    """The value of an expression of numbers with + and *."""
    terms = [[int(factor) for factor in term.split("*")] for term in expression.split("+")]
    return sum(term[0] * (term[1] if len(term) > 1 else 1) for term in terms)


agent = dspy.ReAct("question -> answer", tools=[price, delivery, calculate], max_iters=5)


# 3. The metric: a third each for looking up the fee, for calculating with the tool, and for the right total.
#    What the feedback says goes to the LM that rewrites instructions.
def right_way(gold, pred, trace=None, pred_name=None, pred_trace=None):
    used = {tool for name, tool in pred.trajectory.items() if name.startswith("tool_name_")}
    feedback = ["The fee for the delivery was never looked up."] * ("delivery" not in used)
    feedback += ["The sum is wrong, as it was not done with a tool."] * ("calculate" not in used)
    right = pred.answer.strip().removesuffix(" euros") == gold.answer
    score = (("delivery" in used) + ("calculate" in used) + right) / 3
    return dspy.Prediction(score=score, feedback=" ".join(feedback) or "All tools were used.")


# 4. The compile: instructions only, as demos of an agent are long. Each request for a new instruction takes
#    the place of a program call.
dspy.configure(lm=LM)
optimizer = MIPROv2(
    metric=right_way, auto="light", max_bootstrapped_demos=0, max_labeled_demos=0, num_threads=8
)
best = optimizer.compile(
    agent,
    trainset=trainset,
    valset=valset,
    proposals="adaptive",
    proposers=["reflect", "merge"],
    max_calls=130,
    confirm=True,
)

# 5. The outcome.
found = best.search_result
before, after = f"{found.baseline_score:.1%}", f"{found.best_score:.1%}"
print(f"Validation: {before} before, {after} after, {found.calls} program calls")
for proposal in found.proposals:
    if isinstance(proposal.written, str):
        print(f"{proposal.proposer + ':':<11} ...{proposal.written[-70:]}")
print(f"Winner:     ...{best.react.signature.instructions[-70:]}")
print(f"Report:     {found.report('react_tools.html')}")
