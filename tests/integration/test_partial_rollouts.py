"""Completions that are cut and continued by newer policies, in real runs: right values, nothing lost or doubled."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from app.engines import Sampling, Transformers
from app.engines.ahead import Groups
from app.update.optimization import Optimization
from callbacks import RolloutAhead, RolloutReplay, RunLedger, WeightSync
from datamodules.selectors import Uniform
from datamodules.types import Completion, Prompt
from tests.support.command import EVERY_STEP, Done, dots, dots_on_ranks, fit_arguments, kill_when, run_of
from tests.support.policies import TINY
from tests.support.refusal import Change, Place, model, write_pool
from tests.support.scripted_run import HALF, QUARTER, names, scripted_run
from tests.support.stand_in_server import COMPLETION, Asked, Written, stand_in
from tests.support.tables import few

FIT = ("fit", "--config", "run.yaml")


class Choosing(Uniform):
    """Uniform selection that notes its choices."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[str] = []

    def choose(self, n: int, exclude: Collection[str] = (), refill: bool = False) -> list[str]:
        found = super().choose(n, exclude, refill)
        self.chosen += found
        return found


class Recording(Transformers):
    """The policy as its own engine, which keeps the weights of every version and all that it generates."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        self.drawn: list[tuple[tuple[int, ...], Completion]] = []

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        self.held[version] = {name: one.detach().clone() for name, one in named_tensors}
        super().push([], version, since)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        groups = super().generate(prompts, sampling, seeds, limits)
        self.drawn += [(one.token_ids, each) for one, group in zip(prompts, groups, strict=True) for each in group]
        return groups


def segments_of(engine: Recording, prompt: Prompt, completion: Completion) -> list[Completion]:
    """Return the segments that the engine has generated of a completion, the first one first."""
    found: list[Completion] = []
    ids = completion.token_ids.tolist()
    while sum(len(one.token_ids) for one in found) < len(ids):
        done = sum(len(one.token_ids) for one in found)
        prefix = (*prompt.token_ids, *ids[:done])
        found.append(
            next(
                one
                for read, one in engine.drawn
                if read == prefix
                and one.token_ids.tolist() == ids[done : done + len(one.token_ids)]
                and np.array_equal(one.logprobs, completion.logprobs[done : done + len(one.token_ids)])
            )
        )
    return found


def test_every_token_has_the_log_probability_of_the_policy_that_generated_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, selector, ledger = Recording(), Choosing(), RunLedger()
    ahead = RolloutAhead(staleness=2, partial_rollout_tokens=4, oversample=1.5)
    run = scripted_run(
        tmp_path, monkeypatch, [HALF, QUARTER] * 8, [WeightSync(), ahead, ledger], selector=selector, steps=6,
        engine=engine, max_completion_length=14, optimization=Optimization(learning_rate=3e-4),
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(TINY).eval()
    versions_seen: Counter[int] = Counter()
    trained_tokens = 0
    for number, step in enumerate(run.steps):
        assert len(step.groups) == 4 and names(step.groups) == step.prompts
        for group in step.groups:
            assert 0 <= number - group.birth_step <= 2
            for completion in group.completions:
                parts = segments_of(engine, group.prompt, completion)
                versions_seen[len({one.policy_version for one in parts})] += 1
                trained_tokens += len(completion.token_ids)
                assert completion.policy_version == parts[0].policy_version == group.birth_step
                assert completion.finish_reason == parts[-1].finish_reason
                assert completion.finish_reason == "stop" or len(completion.token_ids) == 14
                assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
                ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids.tolist()]])
                first, right = len(group.prompt.token_ids), []
                for one in parts:
                    policy.load_state_dict(engine.held[one.policy_version], strict=False)
                    with torch.no_grad():
                        scores = policy(ids).logits[0, first - 1 : first - 1 + len(one.token_ids)].log_softmax(-1)
                    right.append(scores.gather(1, ids[0, first : first + len(one.token_ids), None]).squeeze(1))
                    first += len(one.token_ids)
                np.testing.assert_allclose(completion.logprobs, torch.cat(right).numpy(), atol=1e-4)
    assert versions_seen[2] > 5, versions_seen  # many were continued by a newer policy
    assert max(number - group.birth_step for number, step in enumerate(run.steps) for group in step.groups) == 2
    # Every prompt chosen and every token generated is trained on or still there, once.
    left = ahead._flights
    assert Counter(selector.chosen) == Counter(
        [*(name for step in run.steps for name in names(step.groups)), *(one.group.prompt.id for one in left)]
    )
    drawn = sum(len(one.token_ids) for _, one in engine.drawn)
    assert drawn == trained_tokens + sum(one.group.completion_tokens for one in left)
    assert not left  # the last steps begin only what they need
    ages = [[number - group.birth_step for group in step.groups] for number, step in enumerate(run.steps)]
    for step, its in zip(run.steps, ages, strict=True):
        assert step.metrics["rollout_ahead/age_mean"] == pytest.approx(np.mean(its))
        assert step.metrics["rollout_ahead/age_max"] == max(its)
    continued = sum(
        len(part.token_ids)
        for step in run.steps
        for group in step.groups
        for completion in group.completions
        for part in segments_of(engine, group.prompt, completion)[1:]
    )
    assert ledger.total.counts["continued_tokens"] == continued > 0
    assert run.steps[0].metrics["rollout_ahead/in_flight"] + run.steps[0].metrics["rollout_ahead/waiting"] == 2
    assert ledger.total.counts["train/tokens"] == trained_tokens


@pytest.mark.parametrize(
    ("staleness", "tokens", "oversample", "replay"), few([(2, 3, 3.0, True), (3, 2, 2.0, False), (4, 5, 1.0, True)], 1)
)
def test_every_prompt_chosen_is_trained_on_or_waits_or_ages_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int, tokens: int, oversample: float, replay: bool
) -> None:
    selector, ledger = Choosing(), RunLedger()
    ahead = RolloutAhead(staleness, tokens, oversample)
    callbacks = [WeightSync(), ahead, ledger, *([RolloutReplay(fresh_fraction=0.5, capacity=9)] if replay else [])]
    run = scripted_run(
        tmp_path, monkeypatch, [HALF, QUARTER] * 10, callbacks, selector=selector, steps=7, max_completion_length=12,
        optimization=Optimization(learning_rate=3e-4),
    )  # fmt: skip
    fates: Counter[str] = Counter(one.group.prompt.id for one in ahead._flights)
    aged_out = 0
    for number, step in enumerate(run.steps):
        fresh = [group for group in step.groups if group.source == "fresh"]
        assert len(step.groups) == 4
        assert all(number - group.birth_step <= staleness for group in fresh)
        assert all(number + 1 - group.birth_step > staleness for group in step.surplus)
        fates.update(names(fresh) + names(step.surplus))
        aged_out += len(step.surplus)
        assert step.metrics["rollout_ahead/aged_out"] == len(step.surplus)
        assert len({*names(fresh)}) == len(fresh)
    assert fates == Counter(selector.chosen)
    assert ledger.total.counts["aged_out_groups"] == aged_out
    if (staleness, oversample) == (2, 3.0):
        assert aged_out > 3
    if not replay:
        assert ledger.total.counts["wasted/prompts"] == aged_out


def staleness_zero(config: dict[str, Any]) -> None:
    cut(config, staleness=0)


def cut(config: dict[str, Any], staleness: int = 2) -> None:
    """A small run that cuts completions, with its checkpoints and completions kept."""
    model(config)["sampling"] = {"num_generations": 3, "max_completion_length": 16, "temperature": 1.5}
    model(config)["optimization"] = {"learning_rate": 3.0e-3}
    config["data"]["init_args"]["prompts_per_step"] = 3
    config["trainer"]["max_steps"] = 6
    options = {"staleness": staleness, "partial_rollout_tokens": 4, "oversample": 2.0}
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.RolloutAhead", "init_args": options}]
    config["checkpoint"] = {"every": 1, "keep": 9}
    config["completions"] = {"every": 1}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    made = Place.at(tmp_path, monkeypatch, capsys)
    write_pool(tmp_path / "pool.jsonl", [{"question": f"{i} + 7 =", "answer": str(i + 7)} for i in range(12)])
    return made


def completions(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of a run by file."""
    return {file.name: pq.read_table(file).to_pylist() for file in sorted((run / "completions").glob("step_*"))}


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def same(found: Path, expected: Path) -> None:
    """Assert that a run has trained on the completions of another one, as far as it has steps, to the same weights."""
    rows, others = completions(found), completions(expected)
    assert rows and all(rows[name] == others[name] for name in rows)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_resumed_between_segments_is_the_run_that_was_not_stopped(place: Place) -> None:
    place.config(cut)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    runs = place.path / "runs" / "small"
    saved = {step: runs / "version_0" / "checkpoints" / f"step_{step:08d}.ckpt" for step in range(1, 6)}
    states = {step: torch.load(path, weights_only=True)["callbacks"]["RolloutAhead"] for step, path in saved.items()}
    cut_at = [step for step, state in states.items() if not all(state.get("in_flight", {"scored": []})["scored"])]
    assert len(cut_at) >= 2
    for number, step in enumerate((cut_at[0], cut_at[-1]), start=1):
        code, said = place.run(*FIT, "--ckpt_path", str(saved[step]))
        assert code == 0, said[-2000:]
        again = runs / f"version_{number}"
        assert len(completions(again)) == 6 - step
        same(again, runs / "version_0")
    # A resume that permits less trains on nothing older, and rolls out what it can't use any more.
    place.config(staleness_zero)
    with pytest.warns(UserWarning, match="has no effect with a staleness of 0"):
        code, said = place.run(*FIT, "--ckpt_path", str(saved[cut_at[0]]))
    assert code == 0, said[-2000:]
    for name, rows in completions(runs / "version_3").items():
        assert {row["birth_step"] for row in rows if row["advantage"] is not None} == {int(name[5:13])}


def test_without_staleness_a_run_is_the_run_without_the_callback(place: Place) -> None:
    place.config(staleness_zero)
    with pytest.warns(UserWarning, match="has no effect with a staleness of 0"):
        code, said = place.run(*FIT)
    assert code == 0, said[-2000:]

    def without(config: dict[str, Any]) -> None:
        cut(config)
        config["trainer"]["callbacks"] = []

    place.config(without)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    same(place.path / "runs/small/version_1", place.path / "runs/small/version_0")


def written(asked: Asked) -> Written:
    """Return a completion that depends on prompt and seed alone, and ends after any token with the same probability."""
    draw = np.random.default_rng([asked.settings["seed"] % 2**32, *asked.token_ids])
    length, limit = int(draw.geometric(0.15)), asked.settings["max_tokens"]
    tokens = draw.integers(5, 200, min(length, limit)).tolist()
    return Written(tokens, [-5.0] * len(tokens), "stop" if length <= limit else "length")


def by_server(url: str) -> Change:
    def change(config: dict[str, Any]) -> None:
        cut(config)
        model(config)["engine"] = {"class_path": "app.engines.VllmServer", "init_args": {"url": url, "max_restarts": 1}}

    return change


def test_a_killed_run_and_a_lost_server_lose_and_double_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engines.server.fleet._SETTLE_S", 0.0)
    runs = place.path / "runs" / "small"
    with stand_in() as server:
        server.write = written
        place.config(by_server(server.url))
        code, said = place.run(*FIT)
        assert code == 0, said[-2000:]
        asked = server.completions
        expected = completions(runs / "version_0")
        assert {row["policy_version"] for row in expected["step_00000003.parquet"]} <= {1, 2, 3}
        kill_when(runs / "version_1" / "checkpoints" / "step_00000003.ckpt", *FIT, cwd=place.path)
        code, said = place.run(*FIT, "--ckpt_path", "last")
        assert code == 0, said[-2000:]
        same(runs / "version_1", runs / "version_0")
        # A server that fails once: only what it did not answer is generated again.
        before = server.completions

        def failing(handler: Any, body: dict[str, Any]) -> object:
            if server.completions != before + 30:
                return server.answer(handler.path, body)
            handler.send_response(500)
            handler.send_header("Content-Length", "4")
            handler.end_headers()
            handler.wfile.write(b"oops")
            return None

        server.spoiled[COMPLETION] = failing
        code, said = place.run(*FIT)
        assert code == 0, said[-2000:]
        assert server.completions - before == asked + 1
    found = completions(runs / "version_2")
    for name, rows in expected.items():
        assert [(row["prompt_id"], row["completion"]) for row in found[name]] == [
            (row["prompt_id"], row["completion"]) for row in rows
        ]
    versions = [
        (row["policy_version"], other["policy_version"])
        for name in expected
        for row, other in zip(found[name], expected[name], strict=True)
        if row["policy_version"] != other["policy_version"]
    ]
    # Its first segment may be that one, and is then of the policy after the update.
    assert len(versions) <= 1 and all(now == before + 1 for now, before in versions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"staleness": -1}, "RolloutAhead.staleness is -1, expected 0 or more steps"),
        ({"staleness": 2, "partial_rollout_tokens": 0}, "partial_rollout_tokens is 0, expected at least 1, or null"),
        ({"oversample": 0.5}, "RolloutAhead.oversample is 0.5, expected at least 1"),
        ({"staleness": 2}, "callbacks.RolloutAhead is used with engines.Transformers"),
        ({"partial_rollout_tokens": 4}, "callbacks.RolloutAhead is used with engines.Transformers"),
    ],
)
def test_options_that_cannot_be(place: Place, options: dict[str, Any], said: str) -> None:
    ahead = {"class_path": "callbacks.RolloutAhead", "init_args": options}
    place.config(lambda config: config["trainer"].update(callbacks=[ahead]))
    assert said in place.refused(*FIT)


KILLER = '''
import os, random, signal, threading
from lightning.pytorch import Callback

class Killer(Callback):
    """Kills the process of a rank some seconds after its first step has begun."""
    def __init__(self, rank: int, delay: float):
        self.rank, self.delay, self.armed = rank, delay, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and not self.armed:
            self.armed = True
            timer = threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
'''
KILLS = int(os.environ.get("DOTS_TEST_KILLS", "10"))


def slowly(asked: Asked) -> Written:
    time.sleep(0.02)  # so that kills hit requests too
    return written(asked)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.timeout(1800)
def test_two_processes_killed_at_random_moments_end_as_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "dots_stale_killer.py").write_text(KILLER)
    draw, log = random.Random(0), []
    options = {"staleness": 2, "partial_rollout_tokens": 8}
    with stand_in() as server:
        server.write = slowly
        engine = {"class_path": "app.engines.VllmServer", "init_args": {"url": server.url}}

        def arguments(folder: Path, *more: str) -> list[str]:
            ahead = json.dumps({"class_path": "callbacks.RolloutAhead", "init_args": options})
            return [
                *fit_arguments(folder, f"--model.engine={json.dumps(engine)}", f"--trainer.callbacks+={ahead}"),
                EVERY_STEP, "--completions.every=1", "--trainer.limit_val_batches=0",
                f"--trainer.max_steps={2 * KILLS + 4}", *more,
            ]  # fmt: skip

        def on_two(folder: Path, *more: str) -> list[Done]:
            ranks = ("--config", "configs/strategy/ddp.yaml", "--trainer.devices=2")
            return dots_on_ranks(2, *arguments(folder, *ranks, *more), path=tmp_path, timeout=240)

        one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
        done = dots(*arguments(one))
        assert done.returncode == 0, done.stderr[-2000:]
        for process in on_two(two):
            assert process.returncode == 0, process.stderr[-2000:]
        account = json.loads((run_of(two) / "summary.json").read_text())
        step_seconds = account["training_seconds"] / account["steps"]
        for number in range(KILLS):
            rank, delay = number % 2, draw.uniform(0, 2 * step_seconds)
            arguments_of_kill = json.dumps({"rank": rank, "delay": delay})
            kill = f'--trainer.callbacks+={{"class_path":"dots_stale_killer.Killer","init_args":{arguments_of_kill}}}'
            codes = [process.returncode for process in on_two(broken, "--ckpt_path=last", kill)]
            saved = sorted((run_of(broken) / "checkpoints").glob("step_*.ckpt"))
            log.append(f"rank {rank} after {delay:.2f} s: {codes}, {saved[-1].stem if saved else 'nothing saved'}")
            if codes == [0, 0]:
                break
        print(*log, sep="\n")
        for process in on_two(broken, "--ckpt_path=last"):
            assert process.returncode == 0, process.stderr[-2000:]
    assert sum("-9" in line for line in log) >= KILLS - 2, log
    rows = completions(run_of(one))
    ages = [row["step"] - row["birth_step"] for its in rows.values() for row in its if row["source"] == "fresh"]
    assert set(ages) == {0, 1, 2}
    for folder in (two, broken):
        assert not differing(completions(run_of(folder)), rows)
    same(run_of(broken), run_of(two))


def differing(found: dict[str, list[dict[str, Any]]], expected: dict[str, list[dict[str, Any]]]) -> set[Any]:
    """Return what differs between the completions of two runs."""
    assert found.keys() == expected.keys()
    return {
        (name, column, row[column], other[column])
        for name in expected
        for row, other in zip(found[name], expected[name], strict=True)
        for column in row.keys() | other.keys()
        if row[column] != other[column]
    }
