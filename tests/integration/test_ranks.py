"""A run of several processes is the run of one: the same choices, completions and updates."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from app.runs.sharded_checkpoint import whole_weights
from tests.support.command import (
    EVERY_STEP,
    Done,
    dots,
    dots_on_ranks,
    fit_arguments,
    run_of,
    scalars,
)
from tests.support.stand_in_server import Asked, Written, stand_in

pytestmark = [pytest.mark.slow, pytest.mark.ranks]

STRATEGIES = {name: ("--config", f"configs/strategy/{name}.yaml") for name in ("ddp", "fsdp2", "fsdp2_hybrid")}
BOTH = pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
SIX = ("--trainer.max_steps=6", "--trainer.val_check_interval=3")
ALL_COMPLETIONS = "--completions.every=1"
SCALARS = 1e-5
"""Relative: what adding up in another order may change."""

MISBEHAVING = """
import os, pathlib, signal, time
from callbacks.stages import Stage, StepCallback

class Misbehaving(StepCallback):
    stage = Stage.ROLL_OUT  # before the rollouts, being listed

    def __init__(self, what: str, rank: int, step: int, where: str = "start"):
        self.what, self.rank, self.step, self.where, self.now = what, rank, step, where, -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now = batch.step
        engine = pl_module.pipeline.engine
        if self.now == self.step and self.where in ("generate", "push"):
            usual = getattr(engine, self.where)
            setattr(engine, self.where, lambda *arguments: (self.strike(trainer, self.where), usual(*arguments))[1])
        self.strike(trainer, "start")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.strike(trainer, "update")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.strike(trainer, "save")

    def strike(self, trainer, where):
        if (trainer.global_rank, self.now, where) == (self.rank, self.step, self.where):
            if self.what == "raise":
                raise RuntimeError("broken on purpose")
            if self.what == "hang":
                time.sleep(600)
            if self.what == "spoil":  # a weight of this rank's part
                own = [one.to_local() for one in trainer.lightning_module.policy_model.parameters()]
                next(one for one in own if one.numel()).data.view(-1)[0] = float("inf")
                return
            pathlib.Path(__file__).with_name("struck").touch()
            os.kill(os.getpid(), getattr(signal, self.what))
"""


def misbehaving(folder: Path, what: str, *, rank: int, step: int, where: str = "start") -> str:
    """A callback that does `what` on one rank in a step, as an option of the command line.

    Args:
        what: "raise", "hang", "spoil" (makes one weight of a sharded policy infinite) or the name of a signal.
        where: in the step: "start", "generate", "update", "push" or "save".
    """
    (folder / "misbehaving.py").write_text(MISBEHAVING)
    init_args = {"what": what, "rank": rank, "step": step, "where": where}
    return "--trainer.callbacks+=" + json.dumps({"class_path": "misbehaving.Misbehaving", "init_args": init_args})


def arguments(
    folder: Path, ranks: int, *more: str, strategy: str | None = "ddp", changes: tuple[tuple[str, str], ...] = ()
) -> list[str]:
    several = () if strategy is None else (*STRATEGIES[strategy], f"--trainer.devices={ranks}")
    return [*fit_arguments(folder, changes=changes), *SIX, ALL_COMPLETIONS, *several, *more]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint, by their names in it."""
    path = run_of(folder) / "checkpoints" / "last.ckpt"
    return whole_weights(path) if path.is_dir() else torch.load(path, weights_only=True)["state_dict"]


def orphans() -> list[list[bytes]]:
    """Reward workers whose trainer is gone."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if b"app.rewards.workers.main" in words:
                trainer = words[words.index(b"app.rewards.workers.main") + 2].decode()
                found += [words] if not Path("/proc", trainer).exists() else []
    return found


def succeeded(done: list[Done]) -> None:
    for one in done:
        assert one.returncode == 0, one.stderr[-2000:]


def completions(folder: Path) -> list[list[dict]]:
    """The rows of every step's file."""
    files = sorted((run_of(folder) / "completions").glob("step_*.parquet"))
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
            # The loss is what is left of terms of about 1 that cancel.
            close = pytest.approx(values, rel=scalars_within, abs=1e-7 if tag == "loss" else 0)
            assert ours[tag] == close, tag
        elif tag.startswith(exact):
            assert ours[tag] == values, tag


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeeded([dots(*arguments(folder, 1, strategy=None))])
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of two processes, by strategy, with a checkpoint of every step."""

    @cache
    def pair(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp(strategy)
        succeeded(dots_on_ranks(2, *arguments(folder, 2, EVERY_STEP, strategy=strategy)))
        return folder

    return pair


@BOTH
def test_two_processes_choose_and_update_as_one(alone: Path, pairs: Callable[[str], Path], strategy: str):
    assert_same_choices_and_updates(pairs(strategy), alone)
    # Dealt by tokens: no rank waits for more than a tenth of the work.
    assert max(scalars(pairs(strategy))["ranks/update_token_imbalance"].values()) <= 0.1


@pytest.mark.long
def test_processes_with_unlike_numbers_of_passes_wait_for_one_another(tmp_path: Path):
    # One completion per pass; dealt by tokens, the ranks get more or fewer of them, replayed and fresh.
    more = ("--trainer.max_steps=12", "--model.mini_batches=2", "--model.max_tokens_per_microbatch=1")
    succeeded([dots(*arguments(tmp_path / "one", 1, *more, strategy=None))])
    succeeded(dots_on_ranks(2, *arguments(tmp_path / "two", 2, *more, strategy="fsdp2"), timeout=120))
    assert_same_choices_and_updates(tmp_path / "two", tmp_path / "one")
    assert max(scalars(tmp_path / "two")["replay/fraction"].values()) > 0


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_processes_choose_and_update_as_one(alone: Path, tmp_path: Path, strategy: str):
    more = ("--trainer.callbacks.init_args.shard_size=2",) if strategy == "fsdp2_hybrid" else ()
    succeeded(dots_on_ranks(4, *arguments(tmp_path, 4, *more, strategy=strategy)))
    assert_same_choices_and_updates(tmp_path, alone)


@pytest.mark.long
def test_what_differs_in_float32_is_rounding(tmp_path: Path):
    # Adam makes a whole step of a gradient's sign, so in float32 last bits grow from update to update.
    more = ("--model.policy.dtype=float64", "--trainer.max_steps=12", "--model.mini_batches=2")
    succeeded([dots(*arguments(tmp_path / "one", 1, *more, strategy=None))])
    unrounded = "--trainer.callbacks.reduce_dtype=null"
    succeeded(dots_on_ranks(4, *arguments(tmp_path / "four", 4, *more, unrounded, strategy="fsdp2")))
    assert_same_choices_and_updates(tmp_path / "four", tmp_path / "one", scalars_within=1e-6)


@pytest.mark.long
def test_lightning_starts_the_processes_itself(alone: Path, tmp_path: Path):
    succeeded([dots(*arguments(tmp_path, 2), fresh=True)])
    assert_same_choices_and_updates(tmp_path, alone)
    assert not run_of(tmp_path).with_name("version_1").exists()


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("rank", [0, 1])
def test_a_terminated_run_goes_on_as_if_never_stopped(
    pairs: Callable[[str], Path], tmp_path: Path, rank: int, strategy: str
):
    pair = pairs(strategy)
    change = misbehaving(tmp_path, "SIGTERM", rank=rank, step=2)
    done = dots_on_ranks(2, *arguments(tmp_path, 2, change, strategy=strategy), path=tmp_path, timeout=120)
    assert all(one.returncode != -9 for one in done), done
    # The step in which the signal came was finished and saved.
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").resolve().name == "step_00000003.ckpt"
    succeeded(
        dots_on_ranks(2, *arguments(tmp_path, 2, "--ckpt_path=last", EVERY_STEP, strategy=strategy), path=tmp_path)
    )
    assert scalars(tmp_path) == scalars(pair)
    weights, others = weights_of(pair), weights_of(tmp_path)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        pytest.param("ddp", 1, marks=pytest.mark.long),
        pytest.param("fsdp2", 1, marks=pytest.mark.long),
        pytest.param("fsdp2", 4, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value),
)
def test_saved_by_two_resumed_by_others(alone: Path, tmp_path: Path, strategy: str, ranks: int):
    change = misbehaving(tmp_path, "SIGTERM", rank=1, step=2)
    dots_on_ranks(2, *arguments(tmp_path, 2, change, strategy=strategy), path=tmp_path, timeout=120)
    # One process needs no strategy, but a checkpoint that is cut is read by those who cut the policy.
    after = None if (strategy, ranks) == ("ddp", 1) else strategy
    succeeded(dots_on_ranks(ranks, *arguments(tmp_path, ranks, "--ckpt_path=last", strategy=after)))
    assert_same_choices_and_updates(tmp_path, alone)
    if strategy == "fsdp2":
        parts = run_of(tmp_path) / "checkpoints" / "last.ckpt"
        assert len(list(parts.glob("*.safetensors"))) == ranks


@pytest.mark.long
def test_shards_written_in_the_background_are_those_a_step_waits_for(pairs: Callable[[str], Path], tmp_path: Path):
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, EVERY_STEP, "--checkpoint.background=true", strategy="fsdp2")))
    for name in ("step_00000005.ckpt", "step_00000006.ckpt"):
        weights, others = (whole_weights(run_of(one) / "checkpoints" / name) for one in (pairs("fsdp2"), tmp_path))
        assert weights.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in weights.items())
    last = run_of(tmp_path) / "checkpoints" / "last.ckpt"
    assert last.resolve().name == "step_00000006.ckpt" and len(list(last.glob("*.safetensors"))) == 2
    changes = ("--ckpt_path=last", "--trainer.max_steps=7")
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, *changes, strategy="fsdp2")))
    assert max(scalars(tmp_path)["grad_norm"]) == 6


def written_by_prompt_and_seed(asked: Asked) -> Written:
    """Return a completion of three tokens that tells prompts and samples apart."""
    draw = np.random.default_rng([asked.settings["seed"] % 2**32, *asked.token_ids])
    return Written(draw.integers(5, 200, 3).tolist(), [-5.0] * 3, "length")


@pytest.mark.long
def test_two_processes_roll_out_a_step_ahead_as_one(tmp_path: Path):
    with stand_in() as server:
        server.write = written_by_prompt_and_seed
        ahead = (
            f"--model.engine={json.dumps({'class_path': 'app.engines.VllmServer', 'init_args': {'url': server.url}})}",
            "--trainer.callbacks+=callbacks.RolloutAhead", EVERY_STEP,
        )  # fmt: skip
        one, two = tmp_path / "one", tmp_path / "two"
        succeeded([dots(*arguments(one, 1, *ahead, strategy=None))])
        # Two processes, terminated after the third step, and resumed.
        (tmp_path / "two").mkdir()
        change = misbehaving(two, "SIGTERM", rank=1, step=2)
        dots_on_ranks(2, *arguments(two, 2, *ahead, change), path=two, timeout=120)
        assert (run_of(two) / "checkpoints" / "last.ckpt").resolve().name == "step_00000003.ckpt"
        succeeded(dots_on_ranks(2, *arguments(two, 2, *ahead, "--ckpt_path=last")))
    rows = completions(one)
    assert len({row["completion"] for step in rows for row in step}) > 100
    fresh = [{row["birth_step"] for row in step if row["source"] == "fresh"} for step in rows]
    assert fresh == [{0}, {0}, {1}, {2}, {3}, {4}]
    differing = {
        (number, name, row[name], other[name])
        for number, (step, others) in enumerate(zip(completions(two), rows, strict=True))
        for row, other in zip(step, others, strict=True)
        for name in row.keys() | other.keys()
        if row[name] != other[name]
    }
    assert not differing


COPYING = """
from lightning.pytorch import Callback

class Copying(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"] = {name: one.clone() for name, one in checkpoint["state_dict"].items()}
"""


def test_a_tied_policy_is_resumed_from_copies_of_its_weights(alone: Path, tmp_path: Path):
    """On a GPU Lightning saves copies on the host, one for each name of a tensor."""
    (tmp_path / "copying.py").write_text(COPYING)
    copying = "--trainer.callbacks+=copying.Copying"
    change = misbehaving(tmp_path, "SIGTERM", rank=1, step=2)
    dots_on_ranks(2, *arguments(tmp_path, 2, change, copying, strategy="fsdp2"), path=tmp_path, timeout=120)
    last = run_of(tmp_path) / "checkpoints" / "last.ckpt"
    stored = [name for file in last.glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert not [name for name in stored if "lm_head" in name]
    assert weights_of(tmp_path)["policy_model.lm_head.weight"].shape[0] > 1
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, "--ckpt_path=last", strategy="fsdp2")))
    assert_same_choices_and_updates(tmp_path, alone)


@pytest.mark.long
def test_a_checkpoint_in_one_file_is_resumed_without_a_strategy(alone: Path, tmp_path: Path):
    change = misbehaving(tmp_path, "SIGTERM", rank=1, step=2)
    whole = "--trainer.strategy.init_args.sharded_checkpoints=false"
    dots_on_ranks(2, *arguments(tmp_path, 2, whole, change, strategy="fsdp2"), path=tmp_path, timeout=120)
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").is_file()
    succeeded([dots(*arguments(tmp_path, 1, "--ckpt_path=last", strategy=None))])
    assert_same_choices_and_updates(tmp_path, alone)


def test_a_cut_checkpoint_is_exported_whole(alone: Path, pairs: Callable[[str], Path], tmp_path: Path):
    checkpoint = run_of(pairs("fsdp2")) / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir()
    config = run_of(alone) / "config.yaml"
    succeeded([dots("export", f"--config={config}", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'policy'}")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    expected = weights_of(alone)
    assert {f"policy_model.{name}" for name in exported} == set(expected)
    before = AutoModelForCausalLM.from_pretrained("configs/tiny_policy").state_dict()
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in exported.items()) > 1e-3
    for name, tensor in exported.items():
        # AdamW makes a whole step of a gradient's sign: where that is nearly 0, of its last bits too.
        torch.testing.assert_close(tensor, expected[f"policy_model.{name}"], rtol=0, atol=5e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [["--model.policy.lora={rank: 4}", "--model.optimization.learning_rate=1e-3"],
     ["--model.policy.gradient_checkpointing=true"], ["--model.mini_batches=2", "--trainer.max_steps=12"]],
    ids=["lora", "gradient_checkpointing", "mini_batches"],
)  # fmt: skip
def test_options_of_the_policy_do_the_same_when_it_is_cut(tmp_path: Path, options: list[str]):
    succeeded([dots(*arguments(tmp_path / "one", 1, *options, strategy=None))])
    succeeded(dots_on_ranks(2, *arguments(tmp_path / "two", 2, *options, strategy="fsdp2")))
    assert_same_choices_and_updates(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("what", ["raise", "SIGKILL"])
def test_a_failing_rank_ends_the_others(tmp_path: Path, what: str, strategy: str):
    change = misbehaving(tmp_path, what, rank=1, step=1)
    first, second = dots_on_ranks(2, *arguments(tmp_path, 2, change, strategy=strategy), path=tmp_path, timeout=90)
    assert second.returncode == (1 if what == "raise" else -9)
    if what == "raise":
        assert "broken on purpose" in second.stderr
        assert "on rank 1 of 2" in second.stderr
    assert first.returncode == 2
    assert "dots: error: rank 0: waiting for all ranks (rollouts), lost rank 1 (its process has ended)" in first.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("where", ["generate", "update", "push", "save"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM"])
def test_a_rank_struck_anywhere_ends_the_run_and_it_goes_on(
    pairs: Callable[[str], Path], tmp_path: Path, what: str, rank: int, where: str
):
    strike = misbehaving(tmp_path, what, rank=rank, step=3, where=where)
    done = dots_on_ranks(2, *arguments(tmp_path, 2, strike, EVERY_STEP, strategy="fsdp2"), path=tmp_path, timeout=150)
    # All have ended by themselves, but for the one that was killed.
    killed = [one.returncode == -9 for one in done]
    assert killed == [what == "SIGKILL" and other == rank for other in range(2)], done
    assert time.time() - (tmp_path / "struck").stat().st_mtime < 60
    deadline = time.monotonic() + 10
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not orphans()
    resume = arguments(tmp_path, 2, "--ckpt_path=last", EVERY_STEP, strategy="fsdp2")
    succeeded(dots_on_ranks(2, *resume, path=tmp_path))
    assert scalars(tmp_path) == scalars(pairs("fsdp2"))
    weights, others = weights_of(pairs("fsdp2")), weights_of(tmp_path)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_weights_that_are_not_finite_on_one_rank_are_never_saved(tmp_path: Path):
    spoiled = misbehaving(tmp_path, "spoil", rank=1, step=2, where="update")
    started = time.monotonic()
    done = dots_on_ranks(2, *arguments(tmp_path, 2, EVERY_STEP, spoiled, strategy="fsdp2"), path=tmp_path)
    assert time.monotonic() - started < 120
    assert [one.returncode for one in done] == [2, 2], done[0].stderr[-2000:]
    assert "Stopped at step 2: the update made the norm of the weights NaN or infinite" in done[0].stderr
    saved = sorted(path.name for path in (run_of(tmp_path) / "checkpoints").glob("step_*.ckpt"))
    assert saved[-1] == "step_00000002.ckpt"
    assert all(one.isfinite().all() for one in weights_of(tmp_path).values())


@pytest.mark.long
def test_a_hanging_rank_is_named(tmp_path: Path):
    change = misbehaving(tmp_path, "hang", rank=1, step=1)
    limit = "--trainer.strategy.init_args.timeout=0:00:40"
    done = dots(*arguments(tmp_path, 2, limit, change), path=tmp_path, timeout=200, fresh=True)
    # The one that hung is gone too: the command ended.
    assert done.returncode == 2, done.stderr[-2000:]
    assert "lost rank 1 (no message within the time limit)" in done.stderr


def test_sizes_and_strategies_are_checked_first(tmp_path: Path):
    for done in dots_on_ranks(2, *arguments(tmp_path, 2, "--model.mini_batches=8")):
        assert done.returncode == 2
        assert "2 processes (trainer.devices x trainer.num_nodes) share data.prompts_per_step=8" in done.stderr


SKETCHES = """
import numpy as np
from callbacks.stages import Stage, StepCallback

class Sketches(StepCallback):
    stage = Stage.WATCH

    def __init__(self, folder: str):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.wants_sketches = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        vectors = np.stack([one.vector for one in batch.sketches])
        np.save(f"{self.folder}/{batch.step}_of_{trainer.world_size}_{trainer.global_rank}.npy", vectors)
"""


@pytest.mark.long
@BOTH
def test_sketches_are_added_up_over_processes(tmp_path: Path, strategy: str):
    """A group's completions may be on several ranks, whose weights may be sharded."""
    (tmp_path / "sketching.py").write_text(SKETCHES)
    init_args = {"class_path": "sketching.Sketches", "init_args": {"folder": str(tmp_path)}}
    more = (f"--trainer.callbacks+={json.dumps(init_args)}", "--trainer.max_steps=2", "--model.mini_batches=2")
    succeeded([dots(*arguments(tmp_path / "one", 1, *more, strategy=None), path=tmp_path)])
    succeeded(dots_on_ranks(2, *arguments(tmp_path / "two", 2, *more, strategy=strategy), path=tmp_path))
    alone, first, second = (np.load(tmp_path / f"0_of_{name}.npy") for name in ("1_0", "2_0", "2_1"))
    assert (first == second).all()
    assert (np.linalg.norm(alone, axis=1) > 0).sum() >= 2
    assert np.linalg.norm(first - alone) < 1e-4 * np.linalg.norm(alone)
