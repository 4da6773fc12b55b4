"""`dots compare`: order of the runs, their ends, their progress, and options that cannot be used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from app.cli.dots import main
from app.studies.compare import command
from app.studies.compare.request import Arm, Budget, Request
from app.studies.compare.run_folder import RunFolder
from app.studies.compare.runner import RunProgress, overlay
from app.studies.compare.settings import differences
from datamodules.errors import UserError

SETTINGS = {"trainer": {"max_steps": 100, "val_check_interval": 5}}


def request(budget: str = "steps", names: str = "abc", seeds: tuple[int, ...] = (0, 1, 2)) -> Request:
    arms = tuple(Arm(name, (f"{name}.yaml",)) for name in names)
    return Request(("base.yaml",), arms, seeds, "a", Budget.parse(budget, 4.0), None, 3)


def order(asked: Request) -> list[str]:
    return ["".join(arm.name for arm, seed in asked.runs() if seed == one) for one in asked.seeds]


def test_arms_change_places_from_seed_to_seed() -> None:
    assert order(request()) == ["abc", "bca", "cab"]
    places = Counter((name, turn.index(name)) for turn in order(request()) for name in "abc")
    assert set(places.values()) == {1}


def test_a_baseline_that_sets_the_clock_comes_first() -> None:
    assert order(request("baseline")) == ["abc", "acb", "abc"]
    assert order(request("90")) == ["abc", "bca", "cab"]


def test_a_seed_stands_in_the_name_of_a_config() -> None:
    arm = Arm("subset", ("grpo.yaml", "subsets/ufo_{seed}.yaml"))
    assert arm.files(7) == ("grpo.yaml", "subsets/ufo_7.yaml")


def test_a_saved_request_is_read_back(tmp_path: Path) -> None:
    asked = request("12.5")
    asked.save(tmp_path)
    assert Request.load(tmp_path) == asked
    with pytest.raises(UserError, match=r"has no request.json"):
        Request.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("given", ["0", "-3", "nan", "inf", "half"])
def test_a_budget_is_a_rule_or_a_number_of_seconds(given: str) -> None:
    with pytest.raises(UserError, match=f"--budget is {given}. Give baseline"):
        Budget.parse(given, 4.0)


def test_a_clocked_run_gets_its_clock_and_more_steps(tmp_path: Path) -> None:
    asked = request("baseline")
    folder = RunFolder.of(tmp_path, "b", 1)
    timed = overlay(asked, 1, folder, SETTINGS, 61.5)
    assert timed["seed_everything"] == 1
    assert timed["trainer"]["max_steps"] == 400
    assert timed["trainer"]["callbacks+"] == [{"class_path": "callbacks.ClockBudget", "init_args": {"seconds": 61.5}}]
    assert timed["trainer"]["logger"]["init_args"]["save_dir"] == str(tmp_path / "runs" / "b")
    assert timed["trainer"]["logger"]["init_args"]["name"] == "seed_1"
    counted = overlay(asked, 1, folder, SETTINGS, None)
    assert "max_steps" not in counted["trainer"]
    assert counted["trainer"]["val_check_interval"] == 5


def log(version: Path, start: int, end: int) -> None:
    """Steps `start` to `end` of a run, each two seconds of the training clock."""
    with SummaryWriter(str(version), filename_suffix=f".{start}") as writer:
        for step in range(start, end):
            writer.add_scalar("time/training", 2.0 * (step + 1), step)


def test_progress_is_read_from_the_events_of_a_run(tmp_path: Path) -> None:
    version = tmp_path / "version_0"
    by_steps, by_clock = RunProgress(version, 80, None), RunProgress(version, 80, 100.0)
    assert by_steps.read() == by_clock.read() == 0.0
    log(version, 0, 20)
    assert (by_steps.read(), by_clock.read()) == (20 / 80, 40 / 100)
    # A run that is resumed repeats the steps after its last checkpoint in a second file.
    log(version, 15, 40)
    assert (by_steps.read(), by_clock.read()) == (40 / 80, 80 / 100)
    log(version, 40, 90)
    assert (by_steps.read(), by_clock.read()) == (1.0, 1.0)


def test_without_arms_the_base_runs_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("{}\n")
    options = command._parser().parse_args(["--base", "one.yaml", "--seeds", "3", "5", "--out", "out"])
    asked = command.read_request(options)
    assert asked.runs() == [(Arm("one", ()), 3), (Arm("one", ()), 5)]
    assert asked.budget.rule == "steps"  # so that any learning-rate schedule is possible


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "a=one.yaml", "b=one.yaml"], "--base is missing"),
        (["--base", "none.yaml", "--arms", "a=one.yaml", "b=one.yaml"], "--base: no such file none.yaml"),
        (["--base", "one.yaml", "--arms", "a", "b=one.yaml"], "--arms a: expected NAME=CONFIG"),
        (["--base", "one.yaml", "--arms", "a/b=one.yaml", "b=one.yaml"], "--arms a/b=one.yaml: expected NAME=CONFIG"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "a=one.yaml"], "--arms names a more than once"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "b=one_{seed}.yaml"], "--arms b: no such file one_0.yaml"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "b=one.yaml", "--seeds", "1", "1"], "--seeds names 1 more"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "b=one.yaml", "--baseline", "c"], "expected one of a, b"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "b=one.yaml", "--budget", "long"], "--budget is long. Give"),
        (["--base", "one.yaml", "--arms", "a=one.yaml", "b=one.yaml", "--smooth", "0"], "--smooth is 0"),
        (["--report", "nowhere"], "--report nowhere: the folder has no request.json"),
    ],
)
def test_wrong_options_are_one_line_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("{}\n")
    with pytest.raises(SystemExit) as caught:
        main(["compare", "--out", "out", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dots: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_differences_are_lines_by_name() -> None:
    def settings(callbacks: list[dict], every: int, selector: dict, rate: float, seed: int) -> dict:
        return {
            "seed_everything": seed,
            "checkpoint": {"every": every},
            "trainer": {"max_steps": 10, "callbacks": callbacks},
            "model": {"class_path": "M", "init_args": {"optimization": {"learning_rate": rate, "betas": [0.9, 0.99]}}},
            "data": {"class_path": "D", "init_args": {"selector": selector}},
        }

    references = {"class_path": "callbacks.ReferenceRollouts", "init_args": {"size": 8}}
    more = {"class_path": "callbacks.ReferenceRollouts", "init_args": {"size": 16}}
    replay = {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 64, "max_age": None}}
    uniform = {"class_path": "s.Uniform"}
    dots = {"class_path": "s.Dots", "init_args": {"alpha": 0.5, "predictor": None}}
    baseline = settings([references], 10, uniform, 1e-4, 0)
    assert differences(settings([replay, more], 1, dots, 3e-4, 1), baseline) == [
        "checkpoint.every: 10 -> 1",
        "model.optimization.learning_rate: 0.0001 -> 0.0003",
        "data.selector: Uniform() -> Dots(alpha=0.5)",
        "callbacks.ReferenceRollouts.size: 8 -> 16",
        "callbacks.RolloutReplay: none -> RolloutReplay(capacity=64)",
    ]
    assert differences(baseline, baseline) == []
