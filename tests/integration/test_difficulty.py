"""`dots difficulty` end to end, and selection by what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from app.cli.dots import main
from app.studies.difficulty.command import SEEN
from datamodules.difficulty.attention import AttentionPredictor
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.selectors import Dots, SelectionContext
from datamodules.types import Outcomes, Prompt

ENCODER = str(Path(__file__).parents[2] / "configs" / "tiny_policy")


def write_traces(path: Path, first: int, count: int) -> Path:
    """Sums that are hard when they are long, under a policy that improves."""
    rng = generator("traces", first)
    lines = []
    for index in range(first, first + count):
        terms = 2 + index % 7
        text = "+".join(str(int(term)) for term in rng.integers(1, 10, terms)) + f"={index}?"
        rates = [rng.binomial(8, 1 / (1 + np.exp(terms - 4.5 - 0.5 * visit))) / 8 for visit in range(4)]
        lines.append(json.dumps({"question": text, "pass_rate_by_epoch": rates}))
    path.write_text("\n".join(lines) + "\n")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["difficulty", *map(str, arguments)])
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["difficulty", *map(str, arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), [("kernel_ridge", ["--learning_curve"]), ("attention", ["--folds=2"])])
def test_fit_evaluate_and_select(tmp_path, capsys, method, more):
    traces = write_traces(tmp_path / "rates.jsonl", 0, 240)
    out, cache = tmp_path / "predictor", tmp_path / "cache"
    arguments = ("--cache_dir", cache, "--references", 60)
    shown = run(
        capsys, "fit", "--outcomes", traces, "--encoder", f"statistics+{ENCODER}", "--out", out, "--method", method,
        "--epochs", 20, *more, *arguments,
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["test_questions"] == 48
    figures = {name: found["pearson"]["mean"] for name, found in results["methods"].items() if "pearson" in found}
    # The length of the sum is all there is to know, and noise of eight completions the rest.
    assert figures[method] > 0.6
    assert f"{figures[method]:.3f}" in shown
    assert "pearson" not in results["methods"]["mean of references"]
    assert (out / "reliability.png").read_bytes().startswith(b"\x89PNG")
    if "--learning_curve" in more:
        curve = json.loads((out / "learning_curve.json").read_text())
        assert {point["questions"] for point in curve if point["method"] == method} >= {48, 96, 192}
        assert {point["visits"] for point in curve if point["questions"] == 192} == {1, 2, 4}
        assert "Pearson by what was learnt from" in shown
        assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")

    # Most of the first record was learnt from in fit, and is left out.
    longer = tmp_path / "longer.jsonl"
    new = write_traces(tmp_path / "new.jsonl", 240, 120)
    longer.write_text(traces.read_text() + new.read_text())
    run(capsys, "evaluate", "--predictor", out, "--outcomes", traces, new, *arguments)
    evaluated = json.loads((out / "evaluation" / "results.json").read_text())
    learnt = len(json.loads((out / SEEN).read_text()))
    assert evaluated["settings"]["questions"] == 360
    assert evaluated["settings"]["not_learnt_from"] == 360 - learnt == 168
    assert evaluated["methods"]["predictor"]["pearson"]["mean"] > 0.6

    _select_by(out, longer, cache)


def _select_by(folder: Path, traces: Path, cache: Path) -> None:
    """`selectors.Dots` with the predictor forecasts what the predictor itself does, and better than by chance."""
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    rates = np.array([row["pass_rate_by_epoch"][1] for row in rows])
    prompts = [Prompt(str(i), i, row["question"], row["question"], (1,), {}) for i, row in enumerate(rows)]
    selector = Dots(predictor=str(folder))
    selector.setup(PromptPool.of(prompts), SelectionContext(seed=0, cache_dir=cache))
    references = np.arange(0, 360, 6)
    names = [prompts[i].id for i in references]
    full = np.full(len(references), 8)
    selector.observe(Outcomes(0, names, rates[references], full, "reference", np.zeros(len(references))))
    expected = selector.predicted()
    assert expected is not None
    rest = np.setdiff1d(np.arange(240, 360), references)
    assert np.corrcoef(expected[rest], rates[rest])[0, 1] > 0.6
    chosen = np.array([int(name) for name in selector.choose(30)])
    assert np.abs(expected[chosen] - 0.5).mean() < 0.5 * np.abs(expected - 0.5).mean()
    assert AttentionPredictor.load(folder).config.encoder == f"statistics+{ENCODER}"


def test_wrong_input_is_one_line(tmp_path, capsys):
    traces = write_traces(tmp_path / "rates.jsonl", 0, 20)
    fit = ("fit", "--encoder", "statistics", "--out", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    assert "did you mean 'evaluate'" in failure(capsys, "evaluat")
    assert "does not exist" in failure(capsys, *fit, "--outcomes", tmp_path / "none.jsonl")
    assert "cannot be split" in failure(capsys, *fit, "--outcomes", traces, "--test", 0.99)
    assert "--folds is 0" in failure(capsys, *fit, "--outcomes", traces, "--folds", 0)
    assert "not an empty folder" in failure(capsys, *fit[:4], tmp_path, "--outcomes", traces)
    assert "no difficulty predictor" in failure(capsys, "evaluate", "--predictor", tmp_path, "--outcomes", traces)
    assert not (tmp_path / "out").exists()
