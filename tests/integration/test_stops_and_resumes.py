"""What ends a run is saved and its last policy measured; a resume does what it announces."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli.dots import main
from tests.support.refusal import Place, callback, data, model, write_pool
from tests.support.tables import few

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
LAST = ("--ckpt_path", "last")
HELPERS = '''
import json
from lightning.pytorch import Callback

class Stop(Callback):
    """Asks the trainer to stop from one of its hooks, once two steps are done or under way."""
    def __init__(self, hook: str):
        def stop(trainer, *rest, **named):
            early = hook in ("on_train_batch_start", "on_after_backward")
            if trainer.state.fn == "fit" and trainer.global_step >= (1 if early else 2):
                trainer.should_stop = True
        setattr(self, hook, stop)

class Note(Callback):
    """Writes down what each step really did."""
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        group = trainer.optimizers[0].param_groups[0]
        replay = [one for one in trainer.callbacks if type(one).__name__ == "RolloutReplay"]
        selector = trainer.datamodule.selector
        noted = {
            "step": batch.step, "groups": len(batch.groups), "rate": group["lr"], "betas": list(group["betas"]),
            "decay": group["weight_decay"], "updates": trainer.global_step,
            "temperature": pl_module.sampling.temperature,
            "fresh": sum(one.source != "replay" for one in batch.groups),
            "length": max(len(c.token_ids) for g in batch.groups if g.source != "replay" for c in g.completions),
            "stored": len(replay[0].buffer) if replay else None, "p_easy": selector.metrics().get("selection/p_easy"),
            "references": int(batch.ledger.counts["reference/prompts"]),
            "tokens": [t for g in batch.groups for c in g.completions for t in c.token_ids.tolist()],
        }
        with open("noted.jsonl", "a") as file:
            file.write(json.dumps(noted) + "\\n")
'''

# A file of its own, because each worker imports it: Lightning would take seconds.
REWARDS = """
def alternate(completions, **rest):
    return [float(number % 2) for number in range(len(completions))]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_helpers.py").write_text(HELPERS)
    (tmp_path / "dots_scores.py").write_text(REWARDS)
    return Place.at(tmp_path, monkeypatch, capsys)


def run_of(place: Place, version: int = 0) -> Path:
    return place.path / "runs" / "small" / f"version_{version}"


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("_")[2]) for path in (folder / "checkpoints").glob("step_*.ckpt"))


def account(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def measured(folder: Path) -> list[int]:
    """Return the steps after which a run was validated."""
    return [one["step"] for one in account(folder)["evaluations"]]


def ran(place: Place, *arguments: str) -> str:
    """Return what a command that succeeded said."""
    place.capture.readouterr()
    main(list(arguments))
    captured = place.capture.readouterr()
    return captured.out + captured.err


def rare_saves(config: dict[str, Any]) -> None:
    callback(config, "RunCheckpoint").update(every=100)


def listed(class_path: str, **arguments: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["trainer"]["callbacks"].append({"class_path": class_path, "init_args": arguments})


def configured(place: Place, *changes: Callable[[dict[str, Any]], object]) -> None:
    place.config(lambda config: [change(config) for change in changes])


# --- Ends ------------------------------------------------------------------------------------------------------------

EARLY = ("lightning.pytorch.callbacks.EarlyStopping",)
ENDS: dict[str, tuple[Callable[[dict[str, Any]], None], tuple[str, ...], int]] = {
    "steps": (lambda config: None, ("--trainer.max_steps=3",), 3),
    "early stopping": (listed(*EARLY, monitor="val/accuracy", patience=1, mode="max"), ("--trainer.max_steps=9",), 2),
    "early stopping, rare validation": (
        listed(*EARLY, monitor="val/accuracy", patience=1, mode="max", check_on_train_epoch_end=False),
        ("--trainer.max_steps=9", "--trainer.val_check_interval=3"), 3,
    ),
    # The initial policy's validation does not count, since no step has been measured before it.
    "early stopping by a metric of steps": (
        listed(*EARLY, monitor="reward", patience=1, mode="max"), ("--trainer.max_steps=9",), 4,
    ),
    "part of an epoch": (
        lambda config: None, ("--trainer.max_steps=9", "--trainer.max_epochs=1", "--trainer.limit_train_batches=0.5"), 1
    ),
    "epochs": (
        lambda config: None, ("--trainer.max_steps=9", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"), 2
    ),
    "clock": (listed("callbacks.ClockBudget", seconds=1e-3), ("--trainer.max_steps=9",), 2),
}  # fmt: skip
for _hook in ("on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_validation_start",
              "on_validation_epoch_end", "on_validation_end"):  # fmt: skip
    ENDS[_hook] = (listed("dots_helpers.Stop", hook=_hook), ("--trainer.max_steps=9",), 2)


@pytest.mark.parametrize("name", few(ENDS, 2))
def test_the_step_in_which_a_run_ends_is_saved_and_measured(place: Place, name: str) -> None:
    change, options, last = ENDS[name]
    configured(place, rare_saves, change, lambda c: data(c).update(val_size=2))
    ran(place, *FIT, "--trainer.val_check_interval=2", *options)
    run = run_of(place)
    assert steps_of(run) == [last] and measured(run)[-1] == last
    assert account(run)["steps"] == last and account(run)["completed"] is True
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert [one["step"] for one in saved["callbacks"]["RunLedger"]["evaluations"]] == measured(run)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_end"])
def test_a_run_without_validation_data_is_saved(place: Place, hook: str) -> None:
    configured(
        place, lambda c: callback(c, "RunCheckpoint").update(every=2, keep=9), listed("dots_helpers.Stop", hook=hook)
    )
    ran(place, *FIT, "--trainer.max_steps=5", "--trainer.val_check_interval=1", "--data.val_size=0")
    assert steps_of(run_of(place)) == ([2] if hook == "on_train_batch_end" else [2, 4, 5])
    assert measured(run_of(place)) == []


@pytest.mark.long
def test_a_run_that_max_epochs_ended_continues_as_if_never_stopped(place: Place) -> None:
    """Its last checkpoint is written at the end of an epoch."""
    parts = ("--trainer.max_steps=99", "--trainer.limit_train_batches=2")
    configured(place, rare_saves, *USUAL[1:])
    ran(place, *FIT, *parts, "--trainer.max_epochs=2")
    ran(place, *FIT, *parts, "--trainer.max_epochs=1")
    ran(place, *FIT, *parts, "--trainer.max_epochs=2", *LAST)
    assert steps_of(run_of(place)) == [4] and steps_of(run_of(place, 1)) == [2, 4]
    whole, broken = (
        torch.load(run_of(place, number) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for number in (0, 1)
    )
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


INTERVALS = {
    (): [0, 1, 2, 3, 4],  # a tenth of four steps, at least one
    ("--trainer.val_check_interval=3",): [0, 3, 4],
    ("--trainer.val_check_interval=0.5",): [0, 2, 4],
    ("--trainer.val_check_interval=1.0",): [0, 4],
    ("--trainer.val_check_interval=9",): [0, 4],
    ("--trainer.val_check_interval=1.0", "--start_validation.enabled=false"): [4],
    ("--trainer.val_check_interval=01:00:00:00",): [0, 4],
    ("--trainer.limit_val_batches=0",): [],
}


@pytest.mark.parametrize("options", few([(one,) for one in INTERVALS], 1))
def test_when_a_run_is_validated(place: Place, options: tuple[str, ...]) -> None:
    configured(place, lambda c: data(c).update(val_size=2, val_batch_size=1))
    said = ran(place, *FIT, "--trainer.max_steps=8", "--model.mini_batches=2", *options)
    assert measured(run_of(place)) == INTERVALS[options]
    if options in ((), ("--trainer.val_check_interval=0.5",)):
        assert re.search(rf"steps between validations\D+{2 if options else 1}\b", said)


@pytest.mark.parametrize(("given", "batches"), few([("1", 1), ("0.5", 2), ("3", 3), ("1.0", 4)], 2))
def test_the_limit_of_validation_batches_is_obeyed(place: Place, given: str, batches: int) -> None:
    configured(place, lambda c: data(c).update(val_size=4, val_batch_size=1))
    ran(place, *FIT, f"--trainer.limit_val_batches={given}", "--start_validation.enabled=false")
    assert account(run_of(place))["validation"]["prompts"] == batches


@pytest.mark.parametrize("given", ["0", "0.0", "-1", "1.5"])
def test_an_interval_that_cannot_be_is_refused(place: Place, given: str) -> None:
    assert f"trainer.val_check_interval is {given}" in place.refused(*FIT, f"--trainer.val_check_interval={given}")


def test_a_run_with_a_time_limit_only(place: Place) -> None:
    configured(
        place, rare_saves, listed("callbacks.ReferenceRollouts", size=2, every=1), lambda c: data(c).update(val_size=2)
    )
    unlimited = ("--trainer.max_steps=-1", "--trainer.max_time=00:00:00:02")
    assert "a fraction up to 1.0" in place.refused(*FIT, *unlimited, "--trainer.val_check_interval=0.5")
    said = ran(place, *FIT, *unlimited)
    done = account(run_of(place))
    assert f"step {done['steps']}  reward" in said and "/-1" not in said
    assert done["steps"] > 2 and done["completed"] is True
    assert done["reference"]["prompts"] == 2 * (done["steps"] + 1)  # a set before the first step and after each
    assert steps_of(run_of(place)) == [done["steps"]] and measured(run_of(place))[-1] == done["steps"]


# --- Resumes ---------------------------------------------------------------------------------------------------------


def noted(place: Place) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.path / "noted.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(place: Place) -> Place:
    """Two steps of a run with replay and a linear schedule over ten."""
    write_pool(place.path / "pool.jsonl", [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(16)])
    configured(place, *USUAL)
    ran(place, *FIT, "--trainer.max_steps=2")
    (place.path / "noted.jsonl").unlink()
    return place


USUAL: list[Callable[[dict[str, Any]], Any]] = [
    listed("dots_helpers.Note"),
    lambda c: model(c).update(
        rewards=[{"class_path": "app.rewards.Function", "init_args": {"path": "dots_scores.alternate"}}],
        optimization={"learning_rate": 1e-4},
    ),
    lambda c: data(c).update(
        prompts_per_step=4, selector={"class_path": "datamodules.selectors.Greso", "init_args": {"p_easy": 0.5}}
    ),
]


def optimization(**options: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: model(config)["optimization"].update(options)


def no_replay(config: dict[str, Any]) -> None:
    config["trainer"]["callbacks"] = [
        one for one in config["trainer"]["callbacks"] if one["class_path"] != "callbacks.RolloutReplay"
    ]


RESUMES: dict[str, tuple[Callable[[dict[str, Any]], Any], str, dict[str, Any]]] = {
    "nothing": (lambda c: None, "", {"groups": 4, "fresh": 2, "rate": 1e-4}),
    "more prompts": (
        lambda c: data(c).update(prompts_per_step=6), "prompts_per_step: 4 -> 6", {"groups": 6, "fresh": 3}
    ),
    "fewer prompts": (
        lambda c: data(c).update(prompts_per_step=2), "prompts_per_step: 4 -> 2", {"groups": 2, "fresh": 1}
    ),
    "no replay": (no_replay, "RolloutReplay", {"groups": 4, "fresh": 4}),
    "less replay": (
        lambda c: callback(c, "RolloutReplay").update(fresh_fraction=0.75), "fresh_fraction: 0.5 -> 0.75",
        {"groups": 4, "fresh": 3},
    ),
    "smaller buffer": (
        lambda c: callback(c, "RolloutReplay").update(capacity=1), "capacity: 8 -> 1", {"groups": 4, "stored": 1}
    ),
    "learning rate": (optimization(learning_rate=3e-4), "learning_rate: 0.0001 -> 0.0003", {"rate": 3e-4}),
    "schedule": (
        optimization(schedule="linear"), "schedule: constant -> linear", {"rate": 1e-4 * (4 - 3) / 4}
    ),
    "betas": (optimization(betas=[0.8, 0.9]), "betas[0]: 0.9 -> 0.8", {"betas": [0.8, 0.9]}),
    "weight decay": (optimization(weight_decay=0.5), "weight_decay: 0.01 -> 0.5", {"decay": 0.5}),
    "mini-batches": (lambda c: model(c).update(mini_batches=2), "mini_batches: 1 -> 2", {"updates": 4}),
    "temperature": (
        lambda c: model(c)["sampling"].update(temperature=0.7), "temperature: 1.0 -> 0.7", {"temperature": 0.7}
    ),
    "length": (
        lambda c: model(c)["sampling"].update(max_completion_length=1), "max_completion_length: 3 -> 1", {"length": 1}
    ),
    "references": (
        listed("callbacks.ReferenceRollouts", size=3, every=1), "callbacks.ReferenceRollouts", {"references": 6}
    ),
    "selector's own": (
        lambda c: data(c)["selector"]["init_args"].update(p_easy=0.9),
        "p_easy: 0.5 -> 0.9 (stays as it was: the selector has moved it since)", {"p_easy": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", few(RESUMES, 2))
def test_a_resume_does_what_it_announces(trained: Place, name: str) -> None:
    change, announced, expected = RESUMES[name]
    configured(trained, *USUAL, change)
    said = ran(trained, *FIT, *LAST, "--trainer.max_steps=4")
    assert "trainer.max_steps: 2 -> 4" in said and announced in said
    first = noted(trained)[0]
    assert first["step"] == 2
    for key, value in expected.items():  # approx does not compare nested values
        assert first[key] == pytest.approx(value), key


@pytest.mark.long
def test_a_resume_between_shared_calls_is_the_whole_run(trained: Place) -> None:
    """References share the engine's call with the prompts of steps 2 and 4; the run is cut before and after these."""
    shared = listed("callbacks.ReferenceRollouts", size=3, every=2, with_training=True)
    shutil.rmtree(trained.path / "runs")
    configured(trained, *USUAL, shared)
    ran(trained, *FIT, "--trainer.max_steps=6")
    whole = noted(trained)
    assert [one["references"] > 0 for one in whole] == [True, False, True, False, True, False]
    (trained.path / "noted.jsonl").unlink()
    shutil.rmtree(trained.path / "runs")
    # A run that ends after a step rolls out no references with it, so it is stopped and not ended.
    stopped = listed("dots_helpers.Stop", hook="on_train_batch_end")
    configured(trained, *USUAL, shared, stopped)
    ran(trained, *FIT, "--trainer.max_steps=6")
    for _ in range(4):
        ran(trained, *FIT, *LAST, "--trainer.max_steps=6")
    assert noted(trained) == whole


@pytest.mark.long
def test_a_resume_with_another_seed_draws_anew(trained: Place) -> None:
    shutil.copytree(trained.path / "runs", trained.path / "again", symlinks=True)
    for seed, runs in ((0, "runs"), (1, "again")):
        said = ran(trained, *FIT, *LAST, "--trainer.max_steps=3", f"--seed_everything={seed}",
                   f"--trainer.logger.save_dir={runs}")  # fmt: skip
        assert ("seed_everything: 0 -> 1" in said) is bool(seed)
    same, other = noted(trained)
    assert same["tokens"] != other["tokens"]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "group size": (lambda c: model(c)["sampling"].update(num_generations=4), "groups of 2"),
    "held out": (lambda c: data(c).update(val_size=2), "another prompt pool"),
    "selector": (
        lambda c: data(c).update(selector={"class_path": "datamodules.selectors.Uniform"}),
        "the state of selector Greso",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", few(REFUSED, 1))
def test_a_resume_that_would_mix_two_runs_is_refused(trained: Place, name: str) -> None:
    change, expected = REFUSED[name]
    configured(trained, *USUAL, change)
    assert expected in trained.refused(*FIT, *LAST, "--trainer.max_steps=4", touches=name == "selector")


@pytest.mark.long
def test_the_patience_of_a_callback_is_said_to_stay(place: Place) -> None:
    def patient(patience: int) -> Callable[[dict[str, Any]], None]:
        return listed(*EARLY, monitor="val/accuracy", patience=patience, mode="max")

    configured(place, patient(2), lambda c: data(c).update(val_size=2))
    ran(place, *FIT)
    configured(place, patient(9), lambda c: data(c).update(val_size=2))
    said = ran(place, *FIT, *LAST, "--trainer.max_steps=9")
    assert "patience: 2 -> 9 (stays as it was: the callback saves it)" in said
    assert account(run_of(place))["steps"] == 2
    assert measured(run_of(place)) == [0, 1, 2]
