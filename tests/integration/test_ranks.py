"""A run of several processes is the run of one: the same choices, completions and updates."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.integration.command import (
    EVERY_STEP,
    Done,
    dots,
    dots_on_ranks,
    fit_arguments,
    last_checkpoint,
    run_of,
    scalars,
)

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

DDP = ("--config", "configs/strategy/ddp.yaml")
SIX = ("--trainer.max_steps=6", "--trainer.val_check_interval=3")
ALL_COMPLETIONS = ("callbacks.CompletionsLog", "callbacks.CompletionsLog\n      init_args: {every: 1}")
SCALARS = 1e-5
"""Relative: what adding up in another order may change."""

MISBEHAVING = """
import os, signal, time
from lightning.pytorch import Callback

class Misbehaving(Callback):
    def __init__(self, what: str, rank: int, step: int):
        self.what, self.rank, self.step = what, rank, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and batch.step == self.step:
            if self.what == "raise":
                raise RuntimeError("broken on purpose")
            if self.what == "hang":
                time.sleep(600)
            os.kill(os.getpid(), getattr(signal, self.what))
"""


def misbehaving(folder: Path, what: str, *, rank: int, step: int) -> tuple[str, str]:
    """A callback that does `what` on one rank before a step, as a change of the quickstart's callbacks."""
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    arguments = f"{{what: {what}, rank: {rank}, step: {step}}}"
    ours = f"misbehaving.Misbehaving\n      init_args: {arguments}\n    - class_path: callbacks.Rollouts"
    return "callbacks.Rollouts", ours


def arguments(folder: Path, ranks: int, *more: str, changes: tuple[tuple[str, str], ...] = ()) -> list[str]:
    several = (*DDP, f"--trainer.devices={ranks}") if ranks > 1 else ()
    return [*fit_arguments(folder, changes=[ALL_COMPLETIONS, *changes]), *SIX, *several, *more]


def succeeded(done: list[Done]) -> None:
    for one in done:
        assert one.returncode == 0, one.stderr[-2000:]


def completions(folder: Path) -> list[list[dict]]:
    """The rows of every step's file."""
    files = sorted((run_of(folder) / "completions").glob("*.parquet"))
    return [pq.read_table(file).to_pylist() for file in files]


def assert_same_choices_and_updates(found: Path, expected: Path, scalars_within: float = SCALARS) -> None:
    assert len(completions(expected)) == 6
    assert completions(found) == completions(expected)
    ours, others = scalars(found), scalars(expected)
    assert set(ours) - set(others) <= {"ranks/update_token_imbalance"}
    # What a step chose and saw is the same number; what the weights enter by, nearly so.
    exact = ("selection/", "replay/size", "replay/age", "reward", "completions/", "val/", "num_tokens", "difficulty/")
    for tag, values in others.items():
        if tag in ("loss", "grad_norm", "entropy"):
            assert ours[tag] == pytest.approx(values, rel=scalars_within), tag
        elif tag.startswith(exact):
            assert ours[tag] == values, tag


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeeded([dots(*arguments(folder, 1))])
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    succeeded(dots_on_ranks(2, *arguments(folder, 2, changes=(EVERY_STEP,))))
    return folder


def test_two_processes_choose_and_update_as_one(alone: Path, pair: Path):
    assert_same_choices_and_updates(pair, alone)
    # Dealt by tokens: no rank waits for more than a tenth of the work.
    assert max(scalars(pair)["ranks/update_token_imbalance"].values()) <= 0.1


@pytest.mark.long
def test_four_processes_choose_and_update_as_one(alone: Path, tmp_path: Path):
    succeeded(dots_on_ranks(4, *arguments(tmp_path, 4)))
    assert_same_choices_and_updates(tmp_path, alone)


@pytest.mark.long
def test_lightning_starts_the_processes_itself(alone: Path, tmp_path: Path):
    succeeded([dots(*arguments(tmp_path, 2), fresh=True)])
    assert_same_choices_and_updates(tmp_path, alone)
    assert not run_of(tmp_path).with_name("version_1").exists()


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_terminated_run_goes_on_as_if_never_stopped(pair: Path, tmp_path: Path, rank: int):
    change = misbehaving(tmp_path, "SIGTERM", rank=rank, step=2)
    done = dots_on_ranks(2, *arguments(tmp_path, 2, changes=(change,)), path=tmp_path, timeout=120)
    assert all(one.returncode != -9 for one in done), done
    # The step in which the signal came was finished and saved.
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").resolve().name == "step_00000003.ckpt"
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, "--ckpt_path=last", changes=(EVERY_STEP,)), path=tmp_path))
    assert scalars(tmp_path) == scalars(pair)
    weights, others = last_checkpoint(pair)["state_dict"], last_checkpoint(tmp_path)["state_dict"]
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.long
def test_saved_by_two_resumed_by_one(pair: Path, alone: Path, tmp_path: Path):
    change = misbehaving(tmp_path, "SIGTERM", rank=1, step=2)
    dots_on_ranks(2, *arguments(tmp_path, 2, changes=(change,)), path=tmp_path, timeout=120)
    succeeded([dots(*arguments(tmp_path, 1, "--ckpt_path=last"))])
    assert_same_choices_and_updates(tmp_path, alone)


@pytest.mark.long
@pytest.mark.parametrize("what", ["raise", "SIGKILL"])
def test_a_failing_rank_ends_the_others(tmp_path: Path, what: str):
    change = misbehaving(tmp_path, what, rank=1, step=1)
    first, second = dots_on_ranks(2, *arguments(tmp_path, 2, changes=(change,)), path=tmp_path, timeout=90)
    assert second.returncode == (1 if what == "raise" else -9)
    if what == "raise":
        assert "broken on purpose" in second.stderr
        assert "on rank 1 of 2" in second.stderr
    assert first.returncode == 2
    assert "dots: error: rank 0: waiting for all ranks (rollouts), lost rank 1 (its process has ended)" in first.stderr


@pytest.mark.long
def test_a_hanging_rank_is_named(tmp_path: Path):
    change = misbehaving(tmp_path, "hang", rank=1, step=1)
    limit = "--trainer.strategy.init_args.timeout=0:00:40"
    done = dots(*arguments(tmp_path, 2, limit, changes=(change,)), path=tmp_path, timeout=200, fresh=True)
    # The one that hung is gone too: the command ended.
    assert done.returncode == 2, done.stderr[-2000:]
    assert "lost rank 1 (no word within the time limit)" in done.stderr


def test_sizes_and_strategies_are_checked_first(tmp_path: Path):
    for done in dots_on_ranks(2, *arguments(tmp_path, 2, "--model.mini_batches=8")):
        assert done.returncode == 2
        assert "2 processes (trainer.devices x trainer.num_nodes) and data.prompts_per_step=8" in done.stderr
