"""Checkpoints that are written while the next steps train hold what those hold that a step waits for."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from app.runs.background import Background, copied
from app.runs.checkpoint_files import check
from app.runs.checkpoint_io import StreamedCheckpoints
from app.update.learner import Learner
from callbacks.upkeep.checkpoint import RunCheckpoint
from tests.support.refusal import Place, callback, model
from tests.support.trainers import trainer_with

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
STEPS = 4


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def fitted(place: Place, background: bool) -> Path:
    def change(config: dict[str, Any]) -> None:
        config["trainer"]["max_steps"] = STEPS
        callback(config, "RunCheckpoint").update(keep=STEPS, background=background)
        odd = {"class_path": "app.rewards.Function", "init_args": {"path": "odd_reward.py:odd", "correctness": True}}
        model(config)["rewards"] = [odd]

    (place.path / "odd_reward.py").write_text(
        "def odd(completions, completion_ids, **_):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    place.config(change)
    code, out, said = place.run_with_output(*FIT)
    assert code == 0, said[-3000:]
    line = next(line for line in out.splitlines() if line.startswith("run folder: "))
    return place.path / line.removeprefix("run folder: ") / "checkpoints"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested containers by path."""
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for number, one in enumerate(value) for k, v in flat(one, f"{name}/{number}").items()}
    return {name: value}


def assert_same_state(found: Path, expected: Path) -> None:
    a, b = (flat(torch.load(path, weights_only=True)) for path in (found, expected))
    timed = {name for name in a if any(word in name for word in ("seconds", "clock", "time", "RunLedger/before"))}
    assert a.keys() == b.keys()
    assert len(a) > 100
    for name in a.keys() - timed:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)
        else:
            assert a[name] == b[name], name


def test_every_checkpoint_is_the_state_after_its_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = fitted(place, background=False)
    # The first checkpoint is written only after the next step has changed the weights.
    updated, write, updates, written_late = threading.Event(), StreamedCheckpoints._write, [0], []
    minibatches = Learner.minibatches_of

    def counted(self: Learner, *arguments: Any, **options: Any) -> Any:
        updates[0] += 1
        if updates[0] == 3:  # the update of the second step is done
            updated.set()
        return minibatches(self, *arguments, **options)

    def late(self: StreamedCheckpoints, checkpoint: dict[str, Any], path: Path) -> None:
        if path.name == ".step_00000001.ckpt.tmp":
            assert threading.current_thread() is not threading.main_thread()
            written_late.append(updated.wait(60))
        write(self, checkpoint, path)

    monkeypatch.setattr(RunCheckpoint, "_wait", _only_at_the_end)
    monkeypatch.setattr(Learner, "minibatches_of", counted)
    monkeypatch.setattr(StreamedCheckpoints, "_write", late)
    background = fitted(place, background=True)
    assert background != waited
    assert written_late == [True]
    for step in range(1, STEPS + 1):
        name = f"step_{step:08d}.ckpt"
        check(background / name)
        assert_same_state(background / name, waited / name)
        digest, _, sealed = (background / f"{name}.sha256").read_text().strip().partition("  ")
        assert (digest, sealed) == (hashlib.sha256((background / name).read_bytes()).hexdigest(), name)
    assert (background / "last.ckpt").resolve().name == f"step_{STEPS:08d}.ckpt"
    assert not list(background.glob(".*.tmp"))


_wait = RunCheckpoint._wait


def _only_at_the_end(self: RunCheckpoint, trainer: Any, ends: bool = False) -> None:
    """The next checkpoint waits for the one before; here several are under way, so that a step is surely behind."""
    if ends or self._step > 2:
        _wait(self, trainer, ends)


class Full:
    """A trainer whose disk is full while `full` is set."""

    def __init__(self) -> None:
        self.full = True
        self.trainer = trainer_with(save_checkpoint=self.save, loggers=[])

    def save(self, path: Path, weights_only: bool, storage_options: Background) -> None:
        storage_options.submit(partial(self.write, path, self.full))

    def write(self, path: Path, full: bool) -> None:
        path.write_bytes(b"half")
        if full:
            raise OSError(28, "No space left on device")


def test_a_failed_write_is_said_at_the_next_and_leaves_nothing(tmp_path: Path) -> None:
    disk, one = Full(), RunCheckpoint(every=3, dirpath=str(tmp_path), background=True)
    module: Any = type("Module", (), {"ranks": type("Alone", (), {"barrier": lambda self, where: None})()})()
    module.diverged = False

    def save(step: int) -> None:
        one._step = one._due = step
        one._save(disk.trainer, module)

    save(3)
    with pytest.warns(UserWarning, match=r"step_00000003.ckpt cannot be written \(.*No space left.*due in 3 steps"):
        save(6)
    disk.full = False
    with pytest.warns(UserWarning, match=r"step_00000006.ckpt cannot be written"):
        save(9)
    one._wait(disk.trainer)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last.ckpt", "step_00000009.ckpt", "step_00000009.ckpt.sha256"]
    disk.full = True
    save(12)
    with pytest.warns(UserWarning, match=r"step_00000012.ckpt cannot be written .* then resume\."):
        one.on_exception(disk.trainer, module, KeyboardInterrupt())  # what ended the run is not hidden


def test_a_copy_shares_memory_as_its_original_does_and_with_nothing_else() -> None:
    head = torch.arange(6.0).reshape(2, 3)
    state = {"embedding": head, "head": head, "row": head[1], "other": [torch.ones(2), {"list": [1, 2]}], "text": "a"}
    copy = copied(state)
    head += 1
    state["other"][1]["list"].append(3)  # type: ignore[index, union-attr, call-overload]
    assert torch.equal(copy["embedding"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copy["row"], torch.tensor([3.0, 4.0, 5.0]))
    assert copy["embedding"].data_ptr() == copy["head"].data_ptr() != head.data_ptr()
    assert copy["other"][1] == {"list": [1, 2]} and copy["text"] == "a"  # type: ignore[index]


def test_after_an_error_nothing_that_follows_is_done_until_it_is_said() -> None:
    done: list[str] = []
    background = Background()
    background.submit(lambda: done.append("first"))
    background.submit(lambda: 1 / 0)
    background.submit(lambda: done.append("published"))
    with pytest.raises(ZeroDivisionError):
        background.wait()
    assert done == ["first"]
    background.submit(lambda: done.append("next"))
    background.wait()
    assert done == ["first", "next"]
