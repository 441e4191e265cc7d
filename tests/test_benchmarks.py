"""The benchmarks: methods keep to their pool and budget, truths are true, reports say what was measured."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import enumeration, local, proposal, quality, report, runner, scale
from benchmarks.methods import METHODS
from benchmarks.pipelines import Pipeline, best, compose
from benchmarks.tables import Table
from mpromptune import PromptSpace
from mpromptune.local.lm import LocalLM

N_PROMPTS, N_EXAMPLES = 12, 40
TABLES = [*quality.PER_EXAMPLE, *quality.MEANS_ONLY, *quality.OWN]


def tiny_table(name: str = "tiny", seed: int = 0, n_examples: int = N_EXAMPLES) -> Table:
    """Instructions 0..5, each without a demo and with one; better instructions lie further along."""
    rng = np.random.default_rng(seed)
    skill = np.linspace(0.2, 0.9, N_PROMPTS)
    scores = (rng.random((N_PROMPTS, n_examples)) < skill[:, None]).astype(float)
    return Table(
        name=name,
        scores=scores,
        truth=scores.mean(axis=1),
        instruction_of=np.arange(N_PROMPTS) // 2,
        demo_set_of=np.arange(N_PROMPTS) % 2,
        instruction_emb=np.stack([np.linspace(0.1, 1.0, 6), np.ones(6)], axis=1),
        demo_emb=rng.normal(size=(1, 2)),
        demo_sets=np.array([[-1], [0]]),
    )


@dataclass
class Metered:
    """A task that counts the calls it is asked for."""

    inner: Any
    calls: int = 0
    pairs: set[tuple[Any, int]] = field(default_factory=set)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def score(self, params: Mapping[str, int], example: int) -> float:
        """One program call."""
        self.calls += 1
        self.pairs.add((tuple(params.values()), example))
        return self.inner.score(params, example)


def tiny_problem(seed: int) -> Metered:
    from benchmarks.tables import draw

    return Metered(draw(tiny_table(), seed, pool=N_PROMPTS, n_val=20))


@pytest.mark.parametrize("method", METHODS)
def test_methods_stay_in_the_pool_and_the_budget(method: str) -> None:
    """What comes back is a configuration of the pool, for no more program calls than agreed."""
    problem = tiny_problem(seed=1)
    params = METHODS[method](problem, 130, 1, 4)
    assert problem.space.exists(problem.space.row(params))
    assert 0 < problem.calls <= 130


@pytest.mark.parametrize("method", ["halving", "hbbops", "search-qei"])
def test_no_pair_is_paid_for_twice(method: str) -> None:
    """Methods on shared examples measure no configuration on the same example again."""
    problem = tiny_problem(seed=2)
    METHODS[method](problem, 130, 2, 4)
    assert problem.calls == len(problem.pairs)


def test_hbbops_ends_with_the_pool() -> None:
    """A budget that no bracket can spend is not waited for."""
    problem = tiny_problem(seed=0)
    METHODS["hbbops"](problem, 10**6, 0, 4)
    assert problem.calls <= N_PROMPTS * 20


def brute_force(stages: Sequence[Any]) -> float:
    """The highest composite mean, one configuration and one example at a time."""
    examples = range(stages[0].shape[1])
    means = []
    for row in itertools.product(*(range(len(stage)) for stage in stages)):
        right = [all(stage[i, e] for stage, i in zip(stages, row, strict=True)) for e in examples]
        means.append(sum(right) / len(right))
    return max(means)


@pytest.mark.parametrize("n_stages", [2, 3])
def test_best_of_a_pipeline_is_exact(n_stages: int) -> None:
    """The matrix product finds what going through all configurations finds."""
    rng = np.random.default_rng(n_stages)
    stages = [(rng.random((5, 30)) < 0.7).astype(np.float32) for _ in range(n_stages)]
    problem = Pipeline(PromptSpace({"a": ["x"]}), tuple(stages), np.arange(3), {}, {})
    assert problem.truth(best(stages)) == pytest.approx(brute_force(stages))


def test_pipeline_scores_and_truth_agree() -> None:
    """The mean over all examples of a pipeline's scores is its truth; regret is zero at the best only."""
    tables = [tiny_table("one"), tiny_table("two", 1, n_examples=30)]
    problem = compose(tables, seed=3, pool=4, n_val=30)
    for row in problem.space.rows().tolist():
        params = problem.space.params(row)
        scores = [problem.score(params, e) for e in range(problem.n_examples)]
        assert np.mean(scores) == pytest.approx(problem.truth(row))
        assert problem.regret(params) == pytest.approx(100 * (brute_force(problem.stages) - np.mean(scores)))
    assert problem.exhaustive_regret() == 0.0


def test_stages_of_one_table_share_no_prompt() -> None:
    """A table that is used twice gives each stage prompts of its own."""
    table = tiny_table()
    problem = compose([table, table], seed=0, pool=6, n_val=10)
    prompts = [{text.split(".")[1] for text in texts} for texts in problem.space.components.values()]
    assert len(prompts[0]) == len(prompts[1]) == 6
    assert not prompts[0] & prompts[1]
    assert problem.embed(["0." + next(iter(prompts[0]))]).shape == (1, 4)


@pytest.mark.parametrize("method", ["stock-tpe", "search-qei"])
def test_methods_run_on_pipelines(method: str) -> None:
    """A composed program is a task like any other."""
    problem = Metered(compose([tiny_table("one"), tiny_table("two", 1)], seed=0, pool=5, n_val=20))
    params = METHODS[method](problem, 130, 0, 4)
    assert problem.inner.regret(params) >= 0.0
    assert problem.calls <= 130


def test_slices_have_distinct_cells_of_known_methods() -> None:
    """No cell is run twice, and every slice can be chosen."""
    for name in quality.SLICES:
        assert quality.chosen([name], TABLES, list(METHODS))
    cells = quality.chosen(list(quality.SLICES), TABLES, list(METHODS))
    assert len({json.dumps(c) for c in cells}) == len(cells)


def counted(cell: dict[str, Any], seed: int) -> dict[str, float]:
    """A measurement that leaves a trace."""
    with Path(cell["log"]).open("a") as log:
        log.write(f"{seed}\n")
    return {"regret": float(seed)}


def test_finished_cells_are_kept(tmp_path: Path) -> None:
    """A cell is run again for more seeds, or when anything that defines it differs; otherwise never."""
    log, path = tmp_path / "log", tmp_path / "rows.json"
    cell = {"method": "x", "q": 4, "log": str(log)}
    both = [cell, {**cell, "q": 8}]
    for seeds, cells, lines in ((2, [cell], 2), (2, [cell], 2), (3, [cell], 5), (2, both, 7)):
        rows = runner.run_cells(cells, counted, seeds, path, jobs=1)
        assert len(log.read_text().splitlines()) == lines
    assert [(row["q"], row["regrets"]) for row in rows] == [(4, [0, 1, 2]), (8, [0, 1])]
    assert rows[0]["regret"] == 1.0
    assert rows[0]["regret_se"] == pytest.approx(1 / 3**0.5, abs=1e-4)


def test_share_at_which_a_target_is_reached() -> None:
    """Between two shares the curve is a line; a curve that starts or stays off the target says so."""
    curve = [(0.25, 4.0), (0.5, 2.0), (1.0, 1.0)]
    assert report.share_reached(curve, 3.0) == pytest.approx(0.375)
    assert report.share_reached(curve, 5.0) == 0.25
    assert report.share_reached(curve, 0.5) is None


def test_paired_difference() -> None:
    """Its standard error is that of the differences, seed by seed."""
    mean, error = report.paired({"regrets": [1.0, 5.0, 9.0]}, {"regrets": [0.0, 3.0, 9.0]}) or (0.0, 0.0)
    assert mean == pytest.approx(1.0)
    assert error == pytest.approx(1 / 3**0.5)
    assert report.paired({"regrets": [1.0]}, {}) is None


def result_files(folder: Path) -> None:
    """One file of each kind, with round figures."""

    def row(method: str, regret: float, table: str = "t_one", **other: Any) -> dict[str, Any]:
        figures = {"excess": regret, "exhaustive": 0.0, "regret": regret, "regret_se": 0.5}
        return {**quality.cell(method, table), **figures, "regrets": [regret, regret + 1], **other}

    rows = [row("stock-tpe", 4.0), row("search-qei", 1.0), row("search-qei-index", 2.0)]
    rows += [row("search-qei", 6.0, share=0.5), row("search-qei", 3.0, q=8)]
    rows += [row("search-qei", 2.5, shuffled=True), row("stock-tpe", 3.0, few_shot=True)]
    (folder / "quality.json").write_text(json.dumps(rows))
    programs = [{**row(m, r), "program": "t_one+t_two"} for m, r in (("stock-tpe", 8.0), ("search-qei", 2.0))]
    (folder / "pipelines.json").write_text(json.dumps(programs))
    cell = {"combinations": 72, "trials": 10, "limit": 60.0, "memory": 1.0}
    seconds = {"ours": 0.1, "tpe": 0.05, "gp": None}
    (folder / "proposal.json").write_text(
        json.dumps([{**cell, "sampler": name, "seconds": s, "cpu": s} for name, s in seconds.items()])
    )


def test_report_of_a_small_file(tmp_path: Path) -> None:
    """Ratios, shares, slices and differences are those of the rows."""
    result_files(tmp_path)
    text = {title: table for _, title, table in report.sections(tmp_path)}
    assert "| t one | 4.00 ± 0.50 | 2.00 ± 0.50 | 1.00 ± 0.50 | 0.00 |" in next(iter(text.values()))
    assert "| geometric mean, per-example tables | 0.50 | 0.25 |" in text["Excess over exhaustive evaluation"]
    assert "| t one | search-qei | 6.00 ± 0.50 | 1.00 ± 0.50 | 0.70 |" in text["Budgets"]
    assert "| t one | search-qei | 1.00 ± 0.50 | 3.00 ± 0.50 |" in text["Configurations in a round"]
    assert "| +0.50 ± 0.00 |" in text["Shuffled embeddings"]
    assert "| t one + t two | 8.00 ± 0.50 | 2.00 ± 0.50 | 0.25 |" in text["Programs of several predictors"]
    assert "| 0.100 s, 1 MB | 0.050 s, 1 MB | over 60 s | 2.00 | < 0.002 | < 0.002 |" in text["Four asks"]


def test_report_prints_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables need no picture library."""
    result_files(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), "--no-plots"])
    report.main()
    assert "### Four asks" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


def test_pictures_are_drawn(tmp_path: Path) -> None:
    """One small file for each kind of result."""
    pytest.importorskip("matplotlib")
    from benchmarks.plots import PICTURES, plot_all

    result_files(tmp_path)
    paths = list(plot_all(tmp_path))
    sources = {source for _, source, _ in PICTURES if (tmp_path / f"{source}.json").exists()}
    assert {path.stem for path in paths} >= sources
    assert all(0 < path.stat().st_size < 100_000 for path in paths)


@pytest.mark.parametrize("combinations", proposal.SIZES)
def test_proposal_spaces_have_their_size(combinations: int) -> None:
    """Spaces are as large as the rows say."""
    assert proposal.prompt_space(combinations).size == combinations


@pytest.mark.parametrize("sampler", proposal.SAMPLERS)
def test_a_study_is_filled_and_asked(sampler: str) -> None:
    """The made-up study has the trials wanted, each on examples new to its configuration."""
    space = proposal.prompt_space(72)
    study = proposal.filled_study(proposal.make_sampler(sampler, space, 0), space, 60, 0)
    assert len(study.trials) == 60
    seen = [(tuple(t.params.values()), e) for t in study.trials for e in t.user_attrs["mpromptune:examples"]]
    assert len(set(seen)) == len(seen) == 600
    assert min(proposal.four_asks(study, space)) > 0.0
    assert len(study.trials) == 64


def scale_rows() -> list[dict[str, Any]]:
    """Made-up figures: CPU time as the square root of the trials, and the same for every space."""
    sizes = {"10^2": 100.0, "10^9": 2.0**30}
    return [
        {"configurations": name, "trials": n, "size": size, "seconds": 1.0, "cpu": n**0.5, "memory": 100.0}
        for name, size in sizes.items()
        for n in (10, 500, 5000)
    ]


def test_scale_table_has_slopes(tmp_path: Path) -> None:
    """On a log-log plot the square root has slope 1/2, a constant 0; the picture is drawn."""
    (tmp_path / "scale.json").write_text(json.dumps(scale_rows()))
    ((_, _, table),) = report.sections(tmp_path)
    lines = table.splitlines()
    assert lines[2].startswith("| 10^2 | 3.16 s, 100 MB |")
    assert lines[2].endswith("| 0.50 |")
    assert [float(cell) for cell in lines[-1].split("|")[2:-2]] == pytest.approx([0.0] * 3, abs=0.005)
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plot_all

    assert [path.name for path in plot_all(tmp_path)] == ["scale.png"]


def test_a_scale_cell_measures_a_round() -> None:
    """Seconds, CPU seconds, memory and the exact size of the space."""
    figures = scale.measure({"configurations": "10^6", "trials": 6})
    assert figures["size"] == 32**4
    assert figures["cpu"] > 0.0
    assert figures["memory"] >= 0.0


def test_enumeration_is_paired_by_seed() -> None:
    """Local search minus enumeration over the same seeds; the same space by all three ways."""
    rows = [
        {"program": "a+b", "method": "enumerated", "seeds": 2, "regret": 1.0, "regret_se": 0.5},
        {"program": "a+b", "method": "local", "seeds": 2, "regret": 1.5, "regret_se": 0.5},
    ]
    rows[0]["regrets"], rows[1]["regrets"] = [0.0, 2.0], [1.0, 2.0]
    assert report.enumeration_table(rows).splitlines()[-1].endswith("| +0.50 ± 0.50 |")
    tables = [tiny_table("one"), tiny_table("two", 1), tiny_table("three", 2)]
    for method in enumeration.METHODS.values():
        problem = Metered(compose(tables, seed=0, pool=4, n_val=20))
        assert problem.space.exists(problem.space.row(method(problem, 60, 0, 4)))
        assert problem.calls <= 60


def test_local_compiles_are_summarised_over_seeds() -> None:
    """Mean and standard error of each method; the accuracy before is that of all rows."""
    figures = [(0, "stock", 80.0), (1, "stock", 84.0), (0, "qei", 90.0)]
    rows: list[dict[str, Any]] = [
        {"seed": seed, "task": "words", "predictors": 1, "method": method, "before": 26.0, "after": after}
        for seed, method, after in figures
    ]
    rows[0]["seconds"] = 40.5
    (line,) = local.summary(rows).splitlines()[2:]
    assert line == "| words | 1 | 2 / 1 / 0 | 26.0 ± 0.0 | 82.0 ± 2.0 | 90.0 |  | 40.5 /  |"


def test_groups_of_local_compiles_are_taken_up_again(tmp_path: Path) -> None:
    """Cells that the file has are not measured once more."""
    log, path = tmp_path / "log", tmp_path / "rows.json"
    groups = [[{"seed": seed, "method": m, "log": str(log)} for m in ("a", "b")] for seed in range(3)]
    for some, lines in ((groups[:1], 2), (groups, 6)):
        local.run(some, traced, path, jobs=2)
        assert len(log.read_text().splitlines()) == lines
    assert sorted((row["seed"], row["after"]) for row in runner.read(path)) == [
        (seed, seed) for seed in (0, 0, 1, 1, 2, 2)
    ]


def test_a_compile_that_fails_ends_the_local_benchmark(tmp_path: Path) -> None:
    """The error is raised, with one process for several groups too."""
    groups = [[{"seed": seed}] for seed in range(3)]
    with pytest.raises(KeyError, match="log"):
        local.run(groups, traced, tmp_path / "rows.json", jobs=1)


def traced(cell: dict[str, Any]) -> dict[str, float]:
    """A compile that leaves a trace."""
    return {"after": counted(cell, cell["seed"])["regret"]}


def test_answers_are_remembered_for_equal_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature and rollouts change nothing, stop texts do."""
    asked: list[Any] = []
    monkeypatch.setattr(LocalLM, "forward", lambda lm, *given, **settings: asked.append(given) or len(asked))
    monkeypatch.setattr(local.Remembering, "answers", {})
    lm = object.__new__(local.Remembering)
    lm.model, lm.kwargs = "local:x", {"stop": "a"}
    answers = [lm.forward("p"), lm.forward("p", temperature=1.0, rollout_id=2), lm.forward("p", stop="b")]
    assert answers == [1, 1, 2]
