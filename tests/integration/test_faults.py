"""Parts of a run that fail, provoked through the real command: what is lost is counted, named, and all that is lost."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.command import Done, dots
from tests.support.refusal import TINY, Change, Place, callback, data, files, model, source, write_pool
from tests.support.tables import few

pytestmark = pytest.mark.slow

FIT = ("fit", "--config", "run.yaml")
REWARDS = '''
import os, sys, time

def fault(prompts, completions, fault, log_extra, **rest):
    """Does, of every prompt, what its column `fault` says, in its second completion."""
    scores, seen = [], {}
    for prompt, what in zip(prompts, fault):
        seen[prompt] = seen.get(prompt, 0) + 1
        scores.append(act(what, log_extra, len(prompts)) if seen[prompt] == 2 or len(prompts) == 1 else 1.0)
    return scores[:-1] if "short" in fault else scores

def act(what, log_extra, count):
    if what == "raise": raise RuntimeError("x" * 10_000_000)
    if what == "hang": time.sleep(600)
    if what == "exit": os._exit(1)
    if what == "leave": sys.exit(0)
    if what == "memory": bytearray(64 * 2**30)
    if what == "huge": log_extra("huge", ["x" * (40 * 2**20 // count)] * count)
    return {"nan": float("nan"), "inf": float("inf"), "text": "1", "none": None, "list": [1.0]}.get(what, 0.0)

def alternate(completions, **rest): return [float(number % 2) for number in range(len(completions))]
def constant(completions, **rest): return [float(os.environ["DOTS_TEST_SCORE"])] * len(completions)
'''
FAULTS = ("raise", "hang", "exit", "leave", "memory", "huge", "nan", "inf", "text", "none", "list", "short")
ENGINES = '''
import dataclasses
import numpy as np
from app.engines import Transformers

class Failing(Transformers):
    """Raises at its third call."""
    def __init__(self):
        super().__init__()
        self.calls = 0
    def generate(self, prompts, sampling, seeds):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the engine is gone")
        return super().generate(prompts, sampling, seeds)

class Silent(Transformers):
    """Every first completion is empty."""
    def generate(self, prompts, sampling, seeds):
        nothing = {"token_ids": np.zeros(0, np.int32), "logprobs": np.zeros(0, np.float32), "text": ""}
        groups = super().generate(prompts, sampling, seeds)
        return [(dataclasses.replace(group[0], **nothing), *group[1:]) for group in groups]
'''
LOG = {"class_path": "callbacks.CompletionsLog", "init_args": {"every": 1}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_faulty_rewards.py").write_text(REWARDS)
    (tmp_path / "dots_faulty_engines.py").write_text(ENGINES)
    return Place.at(tmp_path, monkeypatch, capsys)


def configured(place: Place, *changes: Change) -> None:
    """The small run with a log of all completions, where every group teaches, changed."""

    def change(config: dict[str, Any]) -> None:
        config["trainer"]["callbacks"].append(LOG)
        rewards("alternate")(config)
        for each in changes:
            each(config)

    place.config(change)


def fit(place: Place, *more: str) -> Done:
    """`dots fit` in this process."""
    code, said = place.run(*FIT, *more)
    return Done(code, "", said)


def run_folder(place: Place) -> Path:
    return place.path / "runs" / "small" / "version_0"


def summary(place: Place) -> dict[str, Any]:
    return json.loads((run_folder(place) / "summary.json").read_text())


def rewards(*names: str) -> Change:
    listed = [{"class_path": "app.rewards.Function", "init_args": {"path": f"dots_faulty_rewards.{n}"}} for n in names]
    return lambda config: model(config).update(rewards=listed)


@pytest.mark.long
def test_every_fault_of_a_reward_costs_one_score(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    write_pool(
        place.path / "pool.jsonl",
        [{"question": f"{what}?", "answer": "1", "fault": what} for what in ("fine", *FAULTS)],
    )
    configured(
        place,
        rewards("fault"),
        lambda c: model(c).update(reward_workers={"time_limit_s": 1.0, "memory_limit_mb": 2048, "num_workers": 2}),
        lambda c: data(c).update(prompts_per_step=len(FAULTS) + 1),
        lambda c: callback(c, "RolloutReplay").update(fresh_fraction=1.0),
    )
    done = fit(place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(place)["completed"] is True
    rows = pq.read_table(run_folder(place) / "completions" / "step_00000000.parquet").to_pylist()
    kept: dict[str, int] = {}
    for row in rows:
        kept[row["question"].rstrip("?")] = kept.get(row["question"].rstrip("?"), 0) + 1
    assert kept["fine"] == 2
    # Scored one at a time after a failure, a function that fails for its prompt fails for both completions.
    assert all(kept.get(what, 0) <= 1 for what in FAULTS if what != "huge")
    assert kept["huge"] == 2  # what it logs is left out, and costs no score
    assert summary(place)["failed_rewards"] >= len(FAULTS) - 2  # nor is None a failure of the reward
    assert summary(place)["unscored_completions"] >= 1
    assert "(2 took too long, " in caplog.text
    assert len(caplog.text) < 200_000


@pytest.mark.parametrize(
    ("score", "advice"),
    [
        (
            "1",
            "100% of their completions were correct, 100% were truncated at the length limit: the prompts are too easy",
        ),
        ("0", "they end before their answer. Raise model.sampling.max_completion_length"),
    ],
)
def test_prompts_that_teach_nothing_are_told_apart(
    place: Place, score: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTS_TEST_SCORE", score)
    monkeypatch.syspath_prepend(place.path)
    configured(place, rewards("constant"), lambda c: c["trainer"].update(max_steps=20))
    with pytest.warns(UserWarning, match="was informative") as warned:
        code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    lines = [str(one.message) for one in warned if "was informative" in str(one.message)]
    assert [line.split(":")[0] for line in lines] == ["Step 9", "Step 19"]
    assert all(advice in line for line in lines)


@pytest.mark.long
def test_an_engine_that_fails_leaves_the_steps_before(place: Place) -> None:
    six = lambda c: c["trainer"].update(max_steps=6)  # noqa: E731
    configured(place, six)
    assert fit(place).returncode == 0
    expected = torch.load(run_folder(place) / "checkpoints" / "last.ckpt", weights_only=True)
    shutil.rmtree(place.path / "runs")
    configured(place, six, lambda c: model(c).update(engine={"class_path": "dots_faulty_engines.Failing"}))
    with pytest.raises(RuntimeError, match="the engine is gone"):
        fit(place)
    assert summary(place)["completed"] is False
    assert (run_folder(place) / "checkpoints" / "last.ckpt").resolve().name == "step_00000002.ckpt"
    configured(place, six)
    done = fit(place, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.init_args.engine.class_path: dots_faulty_engines.Failing -> " in done.stderr
    found = torch.load(run_folder(place) / "checkpoints" / "last.ckpt", weights_only=True)
    assert summary(place)["completed"] is True
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, found["state_dict"][name]), name


@pytest.mark.long
def test_empty_completions_are_scored_and_trained_around(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(place.path)
    configured(
        place,
        lambda c: model(c).update(engine={"class_path": "dots_faulty_engines.Silent"}),
        lambda c: c["trainer"].update(max_steps=3),
    )
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    rows = pq.read_table(run_folder(place) / "completions" / "step_00000000.parquet").to_pylist()
    assert sorted(row["completion_tokens"] == 0 for row in rows) == [False, False, True, True]


SECRET = "hf_dotsverysecret0123456789"
HOSTILE_ROWS = [
    {"id": "../../../escaped", "question": "1 + 1 =", "answer": "2"},
    {"id": "/etc/dots_escaped", "question": "1 + 2 =", "answer": "3"},
    {"id": 'a/b\\c:*?"<>|', "question": "1 + 3 =", "answer": "4"},
    {"id": "..", "question": "1 + 4 =", "answer": "5"},
    {"id": "x" * 5000, "question": "1 + 5 =", "answer": "6"},
    {
        "id": "\N{SNOWMAN}\u202e\u0000",
        "question": "\N{GRINNING FACE} \u05d0\u0627 e\u0301 \u200d \u0007",
        "answer": "7",
    },
    {"id": "same", "question": "1 + 7 =", "answer": "8"},
    {"id": "same2", "question": "long " * 20_000, "answer": "9"},
    {"id": "none", "question": "1 + 9 =", "answer": None},
    {"id": "again", "question": "1 + 7 =", "answer": "8"},
]


@pytest.mark.long
def test_hostile_data_and_secrets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids never become paths, odd texts are trained on, what cannot be used is counted; keys are written nowhere."""
    for name in ("HF_TOKEN", "VLLM_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    inner = place.path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    write_pool(inner / "pool.jsonl", HOSTILE_ROWS)
    configured(
        place,
        lambda c: source(c).update(max_prompt_length=100),
        lambda c: data(c).update(prompts_per_step=7),
        lambda c: c["trainer"].update(max_steps=2),
    )
    shutil.copy(place.path / "run.yaml", inner / "run.yaml")
    outside = files(place.path).keys()
    monkeypatch.chdir(inner)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    made = files(place.path)
    assert all(name.startswith("a/b/c/") for name in made.keys() - outside)
    assert not any(part in name for name in made for part in ("escaped", "xxxx", "same"))
    for name, content in made.items():
        assert content is None or SECRET.encode() not in content, name
    rows = pq.read_table(inner / "runs/small/version_0/completions/step_00000000.parquet").to_pylist()
    assert {row["prompt_id"] for row in rows} == {row["id"] for row in HOSTILE_ROWS[:7]}


def test_weights_that_are_not_finite_are_refused(place: Place) -> None:
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    place.config(lambda c: model(c)["policy"].update(path=str(folder)))
    line = place.refused(*FIT, touches=True)
    assert "Step 0: the policy's logits are NaN or infinite" in line and "Give a policy with finite weights" in line


@pytest.mark.long
def test_an_update_that_explodes_ends_in_one_line(place: Place) -> None:
    configured(
        place,
        lambda c: model(c).update(optimization={"learning_rate": 1e10}),
        lambda c: c["trainer"].update(max_steps=30),
    )
    line = place.refused(*FIT, touches=True)
    assert "NaN or infinite" in line or "were not finite" in line
    assert summary(place)["completed"] is False


# --- Disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MB; a checkpoint of the small run takes 9."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _on(disk: Path, **more: Any) -> Change:
    return lambda c: callback(c, "RunCheckpoint").update(dirpath=str(disk / "checkpoints"), keep=1, **more)


FILL = '''
from lightning.pytorch import Callback
from pathlib import Path

class Fill(Callback):
    """Takes all room on a disk before one step, and gives it back before another."""
    def __init__(self, disk: str, step: int, until: int):
        self.file, self.step, self.until = Path(disk, "filler"), step, until
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step == self.step:
            with self.file.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(2**16)): pass
                except OSError:
                    pass
        if batch.step == self.until:
            self.file.unlink()
'''


def _fill(disk: Path, step: int, until: int) -> Change:
    one = {"class_path": "dots_fill.Fill", "init_args": {"disk": str(disk), "step": step, "until": until}}
    return lambda c: c["trainer"]["callbacks"].append(one)


@pytest.mark.long
def test_a_full_disk_costs_the_checkpoints_of_that_time(place: Place, small_disk: Path) -> None:
    (place.path / "dots_fill.py").write_text(FILL)
    configured(place, _on(small_disk), _fill(small_disk, 1, 3), lambda c: c["trainer"].update(max_steps=4))
    with pytest.warns(UserWarning, match="cannot be written") as warned:
        done = fit(place)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [str(one.message) for one in warned if "cannot be written" in str(one.message)]
    assert [Path(line.split()[1]).name for line in lines] == ["step_00000002.ckpt", "step_00000003.ckpt"]
    assert all("No space left on device" in line and "Training continues, and the next" in line for line in lines)
    there = {path.name for path in (small_disk / "checkpoints").iterdir()}
    assert there == {"step_00000004.ckpt", "step_00000004.ckpt.sha256", "last.ckpt", "run.json"}


@pytest.mark.long
@pytest.mark.parametrize("stop", [True, False], ids=["stop", "last of the run"])
def test_a_full_disk_stops_where_it_must(place: Place, small_disk: Path, stop: bool) -> None:
    (place.path / "dots_fill.py").write_text(FILL)
    how = {"on_write_error": "stop"} if stop else {}
    configured(place, _on(small_disk, **how), _fill(small_disk, 1, 9), lambda c: c["trainer"].update(max_steps=2))
    done = fit(place)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dots: error:")]
    assert "No space left on device" in line and "Free disk space or set RunCheckpoint.dirpath" in line
    last = small_disk / "checkpoints" / "last.ckpt"
    assert last.resolve().name == "step_00000001.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 1
    assert summary(place)["completed"] is False


@pytest.mark.parametrize("kind", few(["TensorBoardLogger", "CSVLogger", "none"], 1))
@pytest.mark.parametrize("step", few([0, 1], 1))
def test_a_full_disk_under_the_run_keeps_what_is_saved(place: Place, small_disk: Path, kind: str, step: int) -> None:
    """The run's folder is on the full disk, its checkpoints are not: events or rows, completions, account, curves."""
    (place.path / "dots_fill.py").write_text(FILL)

    def change(config: dict[str, Any]) -> None:
        logger = {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": str(small_disk)}}
        config["trainer"].update(max_steps=4, logger=False if kind == "none" else logger)
        config["trainer"]["default_root_dir"] = str(small_disk)
        callback(config, "RunCheckpoint").update(dirpath="kept", every=1)

    configured(place, change, _fill(small_disk, step, 9))
    done = fit(place)
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dots: error:")]
    assert "No space left on device" in line and "--ckpt_path last" in line and "Traceback" not in done.stderr
    (small_disk / "filler").unlink()
    configured(place, change)
    done = fit(place, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place.path / "kept" / "last.ckpt").resolve().name == "step_00000004.ckpt"
    version = small_disk / "lightning_logs" / "version_0"
    assert json.loads((version / "summary.json").read_text())["steps"] == 4


def test_a_disk_that_is_full_before_the_run_is_said(place: Place, small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    configured(place, lambda c: c["trainer"]["logger"]["init_args"].update(save_dir=str(small_disk)))
    line = place.refused(*FIT)
    assert f"{small_disk}/small" in line and "No space left on device" in line


def test_a_folder_that_is_read_only_is_said_before_training(place: Place, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    configured(place, _on(small_disk))
    line = place.refused(*FIT)
    assert f"Checkpoints cannot be written to {small_disk}/checkpoints (Read-only file system)" in line


@pytest.mark.long
def test_a_folder_that_goes_missing_is_made_again(place: Place) -> None:
    (place.path / "dots_gone.py").write_text(
        "import shutil\nfrom lightning.pytorch import Callback\nclass Gone(Callback):\n"
        "    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n"
        "        if batch.step == 1: shutil.rmtree('kept')\n"
    )
    configured(
        place,
        lambda c: callback(c, "RunCheckpoint").update(dirpath="kept"),
        lambda c: c["trainer"].update(max_steps=2),
        lambda c: c["trainer"]["callbacks"].append({"class_path": "dots_gone.Gone"}),
    )
    done = fit(place)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place.path / "kept" / "last.ckpt").resolve().name == "step_00000002.ckpt"


@pytest.mark.long
def test_a_file_that_may_not_grow_leaves_nothing_half_written(place: Place) -> None:
    """The limit on file sizes, as a quota would be: no mount needed."""
    size = resource.getrlimit(resource.RLIMIT_FSIZE)
    configured(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, size[1]))
    try:
        line = place.refused(*FIT, touches=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    assert "cannot be written" in line and "File too large" in line
    assert not list((run_folder(place) / "checkpoints").glob("*.ckpt"))
    assert not list((run_folder(place) / "checkpoints").glob(".*.tmp"))


# --- Checkpoints and signals -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(place: Place) -> None:
    three = lambda c: c["trainer"].update(max_steps=3)  # noqa: E731
    configured(place, three)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    checkpoints = run_folder(place) / "checkpoints"
    whole = {path.name: path.read_bytes() for path in checkpoints.glob("step_*.ckpt")}
    assert sorted(whole) == ["step_00000002.ckpt", "step_00000003.ckpt"]
    newest = checkpoints / "step_00000003.ckpt"
    newest.write_bytes(whole[newest.name][:-1])
    line = place.refused(*FIT, "--ckpt_path", "last", "--on_damaged_checkpoint", "stop")
    assert "step_00000003.ckpt is damaged" in line
    code, said = place.run(*FIT, "--ckpt_path", "last")
    assert code == 0, said[-2000:]
    expected = torch.load(_file(whole[newest.name], place.path / "whole.ckpt"), weights_only=True)["state_dict"]
    found = torch.load(newest, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    for path in checkpoints.glob("step_*.ckpt"):
        path.write_bytes(b"")
    assert "no other checkpoint in" in place.refused(*FIT, "--ckpt_path", "last")


def _file(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def test_checksums_are_those_of_sha256sum(place: Place) -> None:
    configured(place)
    assert place.run(*FIT)[0] == 0
    checked = subprocess.run(
        ["sha256sum", "--check", "step_00000001.ckpt.sha256"],
        cwd=run_folder(place) / "checkpoints",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.stdout == "step_00000001.ckpt: OK\n"


@pytest.mark.long
def test_last_starts_a_run_that_is_new(place: Place) -> None:
    configured(place)
    code, said = place.run(*FIT, "--ckpt_path", "last")
    assert code == 0, said[-2000:]
    assert "no run under runs/small yet, starting a new one" in said
    # What the run has left besides its checkpoints is kept.
    shutil.rmtree(run_folder(place) / "checkpoints")
    code, said = place.run(*FIT, "--ckpt_path", "last")
    assert code == 0, said[-2000:]
    assert "runs/small/version_0 ended without a checkpoint: starting over as a new run" in said
    assert (run_folder(place).with_name("version_1") / "checkpoints" / "last.ckpt").exists()


SIGNAL = '''
import os, signal
from lightning.pytorch import Callback

class Signal(Callback):
    """Sends a signal to its own process, in a training step or in the validation behind it."""
    def __init__(self, name: str, step: int, validating: bool = False):
        self.number, self.step, self.validating, self.seen = getattr(signal, name), step, validating, -1
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = batch.step
        if batch.step == self.step and not self.validating:
            os.kill(os.getpid(), self.number)
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.seen == self.step and self.validating:
            os.kill(os.getpid(), self.number)
'''


@pytest.mark.long
@pytest.mark.parametrize("validating", [False, True], ids=["training", "validating"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_is_told_by_the_exit_code(place: Place, name: str, validating: bool) -> None:
    (place.path / "dots_signal.py").write_text(SIGNAL)
    arguments = {"name": name, "step": 1, "validating": validating}
    usual = (
        lambda c: c["trainer"].update(max_steps=4, val_check_interval=2),
        lambda c: data(c).update(val_size=2, prompts_per_step=2),
        lambda c: callback(c, "RunCheckpoint").update(every=10),
    )
    configured(place, *usual)
    assert fit(place).returncode == 0
    expected = torch.load(run_folder(place) / "checkpoints" / "last.ckpt", weights_only=True)
    shutil.rmtree(place.path / "runs")
    configured(
        place,
        *usual,
        lambda c: c["trainer"]["callbacks"].append({"class_path": "dots_signal.Signal", "init_args": arguments}),
    )
    done = fit(place)
    assert done.returncode == 128 + getattr(signal, name), done.stderr[-2000:]
    assert f"dots: stopped by {name} after 2 of 4 updates, which are saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run_folder(place) / "checkpoints" / "last.ckpt").resolve().name == "step_00000002.ckpt"
    assert summary(place)["completed"] is False
    configured(place, *usual)
    done = fit(place, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-2000:]
    assert summary(place)["completed"] is True
    found = torch.load(run_folder(place) / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(tensor, found["state_dict"][one]) for one, tensor in expected["state_dict"].items())


@pytest.mark.long
def test_a_finished_run_that_goes_on_is_not_complete(place: Place) -> None:
    (place.path / "dots_signal.py").write_text(SIGNAL)
    configured(place)
    assert fit(place).returncode == 0
    assert summary(place)["completed"] is True
    # Nothing is left to do: it stays what it was.
    assert fit(place, "--ckpt_path", "last").returncode == 0
    assert summary(place)["completed"] is True
    kill = {"class_path": "dots_signal.Signal", "init_args": {"name": "SIGKILL", "step": 2}}
    configured(place, lambda c: c["trainer"]["callbacks"].append(kill), lambda c: c["trainer"].update(max_steps=9))
    # Only a process of its own can be killed.
    done = dots(*FIT, "--ckpt_path", "last", cwd=place.path, path=place.path, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert "trainer.max_steps: 1 -> 9" in done.stderr
    assert summary(place)["completed"] is False


def test_what_stays_the_same_is_not_listed(place: Place) -> None:
    configured(place)
    assert place.run(*FIT)[0] == 0
    code, said = place.run(*FIT, "--ckpt_path", "last")
    assert code == 0 and "with other settings" not in said
