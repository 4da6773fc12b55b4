"""`dots forecast` as it is typed: files, labels, budgets and errors."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import yaml

from app.cli.dots import main
from app.studies.forecast.command import forecast_parser, labels, read_options
from app.studies.forecast.validations import read_validations

WORDS = ("triangle", "prime", "matrix", "coin", "ladder", "train")


@pytest.fixture
def traces(tmp_path):
    rng = np.random.default_rng(5)
    rates = np.clip(rng.uniform(size=(30, 1)) + rng.normal(0, 0.1, size=(30, 9)), 0, 1)
    rows = [
        {"question": f"a {WORDS[i % 6]} of {i}", "pass_rate_by_epoch": (np.round(row * 8) / 8).tolist()}
        for i, row in enumerate(rates)
    ]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def study(traces, out, *options):
    main(["forecast", "--traces", str(traces), "--out", str(out), "--batch", "6", "--seeds", "2", *options])
    return json.loads((out / "forecast.json").read_text())


def test_figures_files_and_table(traces, tmp_path, capsys):
    out = tmp_path / "study"
    found = study(traces, out, "--selector", "Uniform", "--from", "3", "--shuffle", "true", "--resample", "true")
    assert list(found) == ["Uniform", "oracle"]
    uniform, oracle = found["Uniform"], found["oracle"]
    assert set(uniform["informative"]) == {"mean", "sem"}
    assert {"variance", "pearson", "brier", "distinct", "seconds_per_step"} < set(uniform)
    assert uniform["pearson"] is None and uniform["brier"] is None
    assert uniform["calibration"] is None and 0 <= oracle["calibration"] < 0.5
    assert uniform["distinct"] == 1.0 and uniform["rollouts_per_step"] == 6
    assert oracle["informative"]["mean"] > uniform["informative"]["mean"] and oracle["pearson"] > 0.8
    with (out / "forecast.csv").open() as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["selector"] == "Uniform"]
    last = [float(row["calibration"]) for row in every if (row["selector"], row["visit"]) == ("oracle", "8")]
    assert [(row["seed"], row["visit"]) for row in rows] == [(s, str(v)) for s in "01" for v in range(3, 9)]
    by_seed = [np.mean([float(row["informative"]) for row in rows if row["seed"] == s]) for s in "01"]
    assert uniform["informative"]["mean"] == pytest.approx(np.mean(by_seed))
    assert uniform["informative"]["sem"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2)
    assert oracle["calibration"] == pytest.approx(np.mean(last))
    assert (out / "forecast.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "30 questions, shuffled, visits 3 to 8, B = 6, 2 seeds, draws of 8 shown" in printed
    assert f"{uniform['informative']['mean']:.3f} +- {uniform['informative']['sem']:.3f}" in printed


def test_a_prior_is_a_column_of_the_traces_or_a_file_by_question(traces, tmp_path, capsys):
    """With the right rates known beforehand, the first forecast orders all prompts, whether shuffled or not."""
    rows = [json.loads(line) for line in traces.read_text().splitlines()]
    rated = [row | {"pass_rate": row["pass_rate_by_epoch"][0]} for row in rows]
    column, file = tmp_path / "rated.jsonl", tmp_path / "other.jsonl"
    column.write_text("".join(json.dumps(row) + "\n" for row in rated))
    file.write_text("".join(json.dumps({key: row[key] for key in ("question", "pass_rate")}) + "\n" for row in rated))
    posterior = ("--selector", "Posterior", "--selector.use_embeddings", "false", "--visits", "2", "--seeds", "1")
    first = {}
    for name, path, more in (
        ("column", column, ("--selector.prior", "pass_rate", "--shuffle", "true")),
        ("file", traces, ("--selector.prior", str(file))),
        ("none", traces, ()),
    ):
        study(path, tmp_path / name, *posterior, *more)
        with (tmp_path / name / "forecast.csv").open() as table:
            first[name] = next(row["pearson"] for row in csv.DictReader(table) if row["selector"] == "Posterior")
    assert float(first["column"]) == pytest.approx(float(first["file"]), abs=1e-6)
    assert float(first["file"]) > 0.9
    assert first["none"] == ""
    with pytest.raises(SystemExit) as stopped:
        study(column, tmp_path / "wrong", *posterior, "--selector.prior", "pass_rates")
    assert stopped.value.code == 2
    assert (
        "neither a JSONL file nor a column of the training prompts: did you mean 'pass_rate'" in capsys.readouterr().err
    )
    assert not (tmp_path / "wrong").exists()


def test_the_validations_of_a_run_are_visits(tmp_path, capsys):
    """Prompt c is missing in the last validation; rates are means over a prompt's completions, by step."""
    right = {"a": [(0, 0), (0, 1), (1, 1)], "b": [(1, 1), (0, 1), (0, 0)], "c": [(1, 1), (1, 1)]}
    (tmp_path / "run" / "completions").mkdir(parents=True)
    for visit, step in enumerate((0, 8, 100)):
        found = [(name, f"{name}?", score) for name, all_ in right.items() for score in [*all_, None][visit] or ()]
        table = pd.DataFrame(found, columns=["prompt_id", "question", "correctness"]).astype({"correctness": float})
        table.sample(frac=1, random_state=visit).to_parquet(
            tmp_path / "run" / "completions" / f"val_{step:08d}.parquet"
        )
        table.to_parquet(tmp_path / "run" / "completions" / f"step_{step:08d}.parquet")
    traces = read_validations(tmp_path / "run")
    assert {name: row.tolist() for name, row in zip(traces.questions, traces.rates, strict=True)} == {
        "a?": [0.0, 0.5, 1.0],
        "b?": [1.0, 0.5, 0.0],
    }
    main(["forecast", "--traces", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--selector", "Uniform",
          "--batch", "2", "--seeds", "1"])  # fmt: skip
    found = json.loads((tmp_path / "out" / "forecast.json").read_text())
    assert found["Uniform"]["informative"]["mean"] == pytest.approx(1 / 3)
    for step in (8, 100):
        (tmp_path / "run" / "completions" / f"val_{step:08d}.parquet").unlink()
    with pytest.raises(SystemExit) as stopped:
        study(tmp_path / "run", tmp_path / "again", "--selector", "Uniform")
    assert stopped.value.code == 2
    assert "with 1 validations (completions/val_*.parquet), expected at least 2" in capsys.readouterr().err


def test_the_written_config_repeats_the_study(traces, tmp_path):
    options = ["--selectors.first", "Uniform", "--selector", "Uniform", "--visits", "5"]
    once = study(traces, tmp_path / "once", *options)
    again = tmp_path / "again"
    main(["forecast", "--config", str(tmp_path / "once" / "config.yaml"), "--out", str(again)])
    repeated = json.loads((again / "forecast.json").read_text())
    for label, figures in repeated.items():
        for name in ("informative", "variance", "pearson", "brier", "distinct"):
            assert figures[name] == once[label][name]
    assert list(repeated) == ["first", "Uniform", "oracle"]


OWN = """
import numpy as np
from datamodules.selectors import Ranker

class Nearest(Ranker):
    uses_references = True

    def __init__(self, target: float = 0.5):
        super().__init__()
        self.target = target

    def setup(self, pool, context):
        super().setup(pool, context)
        self.seen = np.full(len(pool), 0.5)

    def priorities(self, n, rng):
        return -np.abs(self.seen - self.target)

    def learn(self, positions, outcomes):
        self.seen[positions] = outcomes.success_rate

    def forecast(self):
        return self.seen
"""


def test_references_are_counted_and_two_of_a_class_are_told_apart(traces, tmp_path, capsys, monkeypatch):
    (tmp_path / "own_selectors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    common = ["--references", "10", "--every", "2"]
    own = ["--selector", "own_selectors.Nearest", "--selector.target", "0.4"]
    two = [*own, "--selector=own_selectors.Nearest", "--selector.init_args.target=0.6"]
    found = study(traces, tmp_path / "study", *common, *two)
    one, other = "Nearest(target=0.4)", "Nearest(target=0.6)"
    assert list(found) == [one, f"{one}, equal budget", other, f"{other}, equal budget", "oracle"]
    assert found[one]["rollouts_per_step"] == pytest.approx(6 + 10 * 5 / 9)
    assert found[f"{one}, equal budget"]["rollouts_per_step"] == pytest.approx(3 + 6 * 5 / 9)
    printed = capsys.readouterr().out
    assert "unmeasured" in printed and "ms / step" in printed
    assert "6 references every 2 visits and 3 prompts chosen, 6 rolled out per visit" in printed
    config = yaml.safe_load((tmp_path / "study" / "config.yaml").read_text())
    assert [spec["init_args"]["target"] for spec in config["selector"]] == [0.4, 0.6]
    alone = study(traces, tmp_path / "alone", *common, "--references", "0", *own)
    assert list(alone) == ["Nearest", "oracle"]
    assert alone["Nearest"]["rollouts_per_step"] == 6


def test_labels_name_what_differs():
    composed = ["--selector", "Composed", "--selector.ranker", "Mopps", "--selector.ranker.decay", "0.5"]
    rules = ["--selector.filters+=ZeroVarianceSkip", "--selector.cool_down", "3"]
    other = ["--selector", "Composed", "--init_args.ranker", "Uniform", "--selector", "Mopps", "--selector.decay", "0"]
    given = ["--traces", "t", "--out", "o", "--selectors.mine", "Mopps", *composed, *rules, *other]
    options = read_options(forecast_parser(), given)
    assert labels(options) == {
        "mine": ("selectors", "mine"),
        "Composed(ranker=Mopps(decay=0.5), filters=[ZeroVarianceSkip], cool_down=3)": ("selector", 0),
        "Composed(ranker=Uniform)": ("selector", 1),
        "Mopps": ("selector", 2),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--selector", "Unifrm"], "--selector Unifrm is not a selector, did you mean 'Uniform'?"),
        (["--selector", "--seeds", "3"], "--selector is given without a name: choose one of"),
        (["--selector", "Dots", "--selector.alpho", "1", "--selector", "Uniform"], "Did you mean 'alpha'?"),
        (["--selector", "Dots", "--selector.alpha", "3"], "alpha is 3.0, expected a success rate in [0, 1]"),
        (["--selector", "Uniform", "--selector", "Uniform"], "Two selectors are labelled 'Uniform'"),
        (["--selectors.oracle", "Uniform"], "'oracle' is the label of the ceiling's row"),
        (
            ["--selector", "Composed", "--selector.ranker", "Mops"],
            "ranker=Mops: no class of this name is known. Did you mean 'Mopps'?",
        ),
        (["--selector", "Composed"], "selector.ranker is missing: datamodules.selectors.composed.Composed needs it"),
        ([], "No selector was given"),
        (["--selector", "Uniform", "--batch", "31"], "--batch is 31, but the pool has 30 prompts"),
        (["--selector", "Uniform", "--from", "8"], "--from is 8, but the shortest trace has 9 visits"),
        (["--selector", "Uniform", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["--selector", "Uniform", "--references", "1"], "--references is 1, expected 0 (none) or at least 2"),
        (["--selector", "Uniform", "--sead", "0"], "sead is not an option. Did you mean 'seeds'?"),
    ],
)
def test_wrong_options_are_one_line_errors(traces, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        study(traces, tmp_path / "study", *options)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dots: error: ") and error.count("\n") == 1
    assert message in error


def test_a_selector_that_cannot_start_is_named_before_any_is_replayed(traces, tmp_path, capsys, monkeypatch):
    replayed = []
    monkeypatch.setattr("app.studies.forecast.command.replay", lambda *asked, **more: replayed.append(asked))
    with pytest.raises(SystemExit) as caught:
        study(traces, tmp_path / "study", "--selector", "Uniform", "--selector", "Dots")
    assert caught.value.code == 2
    assert "selectors.Dots got no text encoder" in capsys.readouterr().err
    assert replayed == []
