"""Scores that are missing, failed or odd, and rewards that attack their worker, through the real command."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from app.reporting.curves import read_scalars
from tests.support.refusal import Change, Place, data, model, write_pool
from tests.support.tables import few

FIT = ("fit", "--config", "run.yaml")
REWARDS = '''
import ctypes, itertools, os, signal, struct, subprocess, sys, time
import numpy as np

def sums(completions, task, **rest):
    """1, 0, 1, 0... for sums."""
    return [float(row % 2 == 0) if one == "sum" else None for row, one in enumerate(task)]
def words(completions, task, **rest): return [1.0 if one == "word" else None for one in task]
def never(completions, **rest): return [None] * len(completions)
def seldom(completions, trainer_state, **rest):
    """Nothing has a score at first and in the third step, and then one completion in two."""
    silent = trainer_state.global_step in (0, 2)
    return [None if silent or row % 2 else float(row % 4 == 0) for row in range(len(completions))]

def right(text): return sum(map(ord, text)) % 2 == 0
def even(completions, **rest): return [float(right(text)) for text in completions]
def even_or_raise(completions, **rest):
    if not all(right(text) for text in completions): raise ValueError("this answer is wrong")
    return [1.0] * len(completions)
def even_or_nan(completions, **rest): return [1.0 if right(text) else float("nan") for text in completions]
def even_or_hang(completions, **rest):
    if not all(right(text) for text in completions): time.sleep(60)
    return [1.0] * len(completions)

def no_column(completions, gold, **rest): return [1.0] * len(completions)
def no_columns(completions, tests, timeout): return [1.0] * len(completions)
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def looked_up(completions, **rest): return [float(gold in text) for text, gold in zip(completions, rest["gold"])]
def imports(completions, **rest): import no_such_package
def scalar(completions, **rest): return 1.0
def mapping(completions, **rest): return {1: "a", 0: "b"}
def texts(completions, **rest): return ["1.0"] * len(completions)
def one_score(completions, **rest): return [1.0]

def picky_about_the_trial(completions, answer, **rest):
    """Fails on what no policy writes: the bare reference answer."""
    if completions == answer: raise IndexError("odd completion")
    return [float(row % 2) for row in range(len(completions))]
def key_of_the_text(completions, answer, **rest):
    if completions == answer: {}[completions[0]]
    return [float(row % 2) for row in range(len(completions))]
def hangs_on_the_trial(completions, answer, **rest):
    if completions == answer: time.sleep(60)
    return [float(row % 2) for row in range(len(completions))]

def later(completions, trainer_state, **rest):
    if trainer_state.global_step >= 2: raise RuntimeError("the judge is gone")
    return [float(row % 2) for row in range(len(completions))]
def huge_later(completions, trainer_state, **rest):
    scale = 1e25 if trainer_state.global_step >= 2 else 1.0
    return [scale * (-1) ** row for row in range(len(completions))]
def exits_later(completions, trainer_state, **rest):
    if trainer_state.global_step >= 2: os._exit(0)
    return [float(row % 2) for row in range(len(completions))]
def hangs_later(completions, trainer_state, **rest):
    if trainer_state.global_step >= 2: time.sleep(60)
    return [float(row % 2) for row in range(len(completions))]
def validation_only(completions, prompts, **rest):
    if not any(p.startswith(("0", "1", "2", "3")) for p in prompts): raise RuntimeError("no validation, please")
    return [float(row % 2) for row in range(len(completions))]

def judge(completions, marks, **rest):
    for mark in marks:
        time.sleep(0.15)
        with open(mark, "a") as file: file.write("x")
    return [float(row % 2) for row in range(len(completions))]
def yielding_judge(completions, marks, **rest):
    for row, mark in enumerate(marks):
        time.sleep(0.15)
        with open(mark, "a") as file: file.write("x")
        yield float(row % 2)

def fine(n): return [1.0, 0.0][:n]
def with_a_child(n, child_first):
    if pid := os.fork():
        time.sleep(0.2 * child_first)
        return fine(n)
    time.sleep(0.2 * (not child_first))
    return [9.0] * n
def garbage(first, last, data):
    for descriptor in range(first, last):
        try: os.write(descriptor, data)
        except OSError: pass
def orphan():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0: os.execvp("sleep", ["sleep", "617"])
        os._exit(0)
def emptied(*lists):
    for one in lists:
        while one: one.pop(0)
def logs(log_metric):
    for name, value in [("m", 1e308), ("m", 1e308), ("i", float("inf")), ("i", -float("inf")), ("n", float("nan")),
                        (5, 1), (None, 1), ("a" * 1000, 1), (chr(0xD800), 1), ("", 1), ("t", "x"),
                        ("o", 10**400), ("ok", 2)]:
        log_metric(name, value)
    for number in range(5000): log_metric(f"many{number}", 1)
class Evil:
    def __str__(self): raise RuntimeError("no text")
    __repr__ = __float__ = __str__
class EvilError(Exception): __str__ = Evil.__str__

ATTACKS = {
    "fine": lambda n, c, r, m, x: fine(n),
    "child first": lambda n, c, r, m, x: with_a_child(n, True),
    "child last": lambda n, c, r, m, x: with_a_child(n, False),
    "empties": lambda n, c, r, m, x: emptied(c, *(v for v in r.values() if isinstance(v, list))) or fine(n),
    "empties and returns it": lambda n, c, r, m, x: emptied(c) or c,
    "grows": lambda n, c, r, m, x: [c.extend(c) for _ in range(5)] and fine(n),
    "low descriptors": lambda n, c, r, m, x: garbage(3, 256, b"x" * 64) or fine(n),
    "descriptors": lambda n, c, r, m, x: garbage(3, 2048, b"x" * 64) or fine(n),
    "half a reply": lambda n, c, r, m, x: garbage(3, 2048, struct.pack("!4sQQ", b"dots", 1, 10**6)) or fine(n),
    "huge reply": lambda n, c, r, m, x: garbage(3, 2048, struct.pack("!4sQQ", b"dots", 1, 10**15)) or fine(n),
    "closes": lambda n, c, r, m, x: os.closerange(3, 4096) or fine(n),
    "exits": lambda n, c, r, m, x: os._exit(0),
    "stops": lambda n, c, r, m, x: os.kill(os.getpid(), signal.SIGSTOP),
    "crashes": lambda n, c, r, m, x: ctypes.string_at(0),
    "interrupts": lambda n, c, r, m, x: (_ for _ in ()).throw(KeyboardInterrupt()),
    "evil error": lambda n, c, r, m, x: (_ for _ in ()).throw(EvilError()),
    "recurses": lambda n, c, r, m, x: ATTACKS["recurses"](n, c, r, m, x),
    "session": lambda n, c, r, m, x: subprocess.Popen(["sleep", "617"], start_new_session=True) and fine(n),
    "orphan": lambda n, c, r, m, x: orphan() or fine(n),
    "logs": lambda n, c, r, m, x: logs(m) or fine(n),
    "logs too much": lambda n, c, r, m, x: x("big", ["x" * 2**25] * n) or fine(n),
    "logs columns": lambda n, c, r, m, x: [x("note", list("ab")[:n]), x("odd", [1, "a"][:n]), x("reward", [7] * n),
                                           x("long", [2**70] * n), x(5, [1] * n), x("evil", [Evil()] * n)] and fine(n),
    "array": lambda n, c, r, m, x: np.array(fine(n), dtype=np.float16),
    "truth": lambda n, c, r, m, x: [True, False][:n],
    "yields": lambda n, c, r, m, x: iter(fine(n)),
    "yields for ever": lambda n, c, r, m, x: itertools.repeat(1.0),
    "many": lambda n, c, r, m, x: [1.0] * 10**6,
    "mapping": lambda n, c, r, m, x: dict.fromkeys(range(n), 1.0),
    "evil values": lambda n, c, r, m, x: [Evil()] * n,
    "beyond floats": lambda n, c, r, m, x: [10**400] * n,
    "large": lambda n, c, r, m, x: [1e25] * n,
    "large, both signs": lambda n, c, r, m, x: [1e30 * (-1) ** row for row in range(n)],
    "at the limit": lambda n, c, r, m, x: [1e6, -1e6][:n],
    "columns": lambda n, c, r, m, x: [1.0, 0.0][:n] if r["self"][0] == "s" and r["name"][0] == "n" else None,
}
def attack(completions, attack, log_metric, log_extra, **rest):
    return ATTACKS[attack[0]](len(completions), completions, rest, log_metric, log_extra)
'''
KEPT = {
    name: [1.0, 0.0]
    for name in (
        "fine", "child first", "child last", "empties", "grows", "low descriptors", "session", "orphan", "logs",
        "logs too much", "logs columns", "array", "truth", "yields", "columns",
    )
} | {"at the limit": [1e6, -1e6]}  # fmt: skip
LOST = (
    "empties and returns it", "descriptors", "half a reply", "huge reply", "closes", "exits", "stops", "crashes",
    "interrupts", "evil error", "recurses", "yields for ever", "many", "mapping", "evil values", "beyond floats",
    "large", "large, both signs",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_odd_rewards.py").write_text(REWARDS)
    return Place.at(tmp_path, monkeypatch, capsys)


def function(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": "app.rewards.Function", "init_args": {"path": f"dots_odd_rewards.{name}", **options}}


def configured(place: Place, rewards: list[dict[str, Any]], *changes: Change, steps: int = 2) -> None:
    """The small run with these rewards, without replay, with a table of every step's completions."""

    def change(config: dict[str, Any]) -> None:
        config["trainer"].update(max_steps=steps)
        config["trainer"]["callbacks"] = [
            {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1}},
            {"class_path": "callbacks.CompletionsLog", "init_args": {"every": 1}},
        ]
        model(config).update(rewards=rewards)
        for each in changes:
            each(config)

    place.config(change)


def workers(**options: float) -> Change:
    return lambda config: model(config).update(reward_workers=options)


def run_folder(place: Place) -> Path:
    return place.path / "runs" / "small" / "version_0"


def summary(place: Place) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((run_folder(place) / "summary.json").read_text(), parse_constant=refuse)


def metrics(place: Place) -> dict[str, list[float]]:
    """Every logged scalar by name, a value per step."""
    return {name: list(values) for name, (_, values) in read_scalars(run_folder(place)).items()}


def table(place: Place, step: int = 0) -> list[dict[str, Any]]:
    return pq.read_table(run_folder(place) / "completions" / f"step_{step:08d}.parquet").to_pylist()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == "dots.rewards" and "aceback" not in one.message]


TASKS = [{"question": f"{row} + 1 =", "answer": "8", "task": "sum" if row % 4 else "word"} for row in range(24)]


@pytest.mark.parametrize(("failure", "marked"), [("drop", None), ("zero", True), ("zero", None)])
def test_each_task_is_trained_and_measured_by_its_own_reward(place: Place, failure: str, marked: bool | None) -> None:
    write_pool(place.path / "pool.jsonl", TASKS)
    configured(
        place,
        [function("sums", correctness=marked), function("words", correctness=marked), function("never", weight=5.0)],
        lambda c: model(c).update(on_reward_failure=failure),
        lambda c: data(c).update(val_size=12, prompts_per_step=12, val_batch_size=5),
        lambda c: c["trainer"].update(val_check_interval=1),
        steps=1,
    )
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    found = metrics(place)
    rows = table(place)
    tasks = {row["question"]: row["task"] for row in TASKS}
    assert len(rows) == 24
    for row in rows:
        own, other = ("words", "sums") if tasks[row["question"]] == "word" else ("sums", "words")
        assert row["correctness"] == row["reward"] == row[f"reward/{own}"]
        assert math.isnan(row[f"reward/{other}"])
    assert found["rewards/words/mean"] == [1.0]
    assert found["rewards/sums/mean"] == [0.5]
    assert "rewards/never/mean" not in found
    assert found["rewards/unscored_fraction"] == found["rewards/failed_fraction"] == [0.0]
    assert (summary(place)["failed_rewards"], summary(place)["unscored_completions"]) == (0, 0)
    last = {name: values[-1] for name, values in found.items() if name.startswith("val/")}
    assert last["val/prompts"] == last["val/pass@2_prompts"] == 12
    parts = [(last[f"val/rewards/{name}/prompts"], last[f"val/rewards/{name}/mean"]) for name in ("sums", "words")]
    assert sum(prompts for prompts, _ in parts) == 12
    assert [mean for _, mean in parts] == [0.5, 1.0]
    assert sum(prompts * mean for prompts, mean in parts) == pytest.approx(12 * last["val/accuracy"])
    assert last["val/accuracy"] == pytest.approx((parts[0][0] * 0.5 + parts[1][0]) / 12)


@pytest.mark.parametrize("failure", ["drop", "zero"])
def test_what_no_correctness_reward_applies_to_is_left_out_and_counted(
    place: Place, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_pool(place.path / "pool.jsonl", TASKS)
    configured(
        place,
        [function("sums", correctness=True), function("words")],
        lambda c: model(c).update(on_reward_failure=failure),
        lambda c: data(c).update(val_size=12, prompts_per_step=12),
        lambda c: c["trainer"].update(val_check_interval=1),
        steps=1,
    )
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    tasks = {row["question"]: row["task"] for row in TASKS}
    sums = len(table(place))
    assert {tasks[row["question"]] for row in table(place)} == {"sum"}
    found = metrics(place)
    assert found["rewards/unscored_fraction"] == [pytest.approx(1 - sums / 24)]
    words = 6 - (24 - sums) // 2  # among the validation prompts
    assert found["val/unscored_fraction"][-1] == pytest.approx(words / 12)
    assert found["val/prompts"][-1] == 12 - words
    assert found["val/accuracy"][-1] == 0.5
    assert summary(place)["failed_rewards"] == 0
    assert summary(place)["unscored_completions"] == (24 - sums) + 2 * words * len(summary(place)["evaluations"])
    assert sum("no correctness reward applies to" in line for line in warnings_of(caplog)) == 1


@pytest.mark.parametrize("selector", ["Dots"])
def test_groups_that_lose_all_their_completions_end_nothing(place: Place, selector: str) -> None:
    algorithm = {
        "RolloutReplay": {"capacity": 8, "admit": "all"},
        "ReferenceRollouts": {"size": 3, "every": 1},
        "DynamicSampling": {"max_refills": 1},
    }
    configured(
        place,
        [function("seldom")],
        lambda c: c["trainer"]["callbacks"].extend(
            {"class_path": f"callbacks.{name}", "init_args": options} for name, options in algorithm.items()
        ),
        lambda c: c["trainer"].update(val_check_interval=1),
        lambda c: data(c).update(val_size=2, selector={"class_path": f"datamodules.selectors.{selector}"}),
        lambda c: model(c)["sampling"].update(num_generations=4),
        steps=5,
    )
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    assert summary(place)["completed"] is True
    found = metrics(place)
    assert found["rewards/unscored_fraction"][0] >= 0.5
    measured = {name: values for name, values in found.items() if not name.startswith("val/")}
    assert {name for name, values in measured.items() if not all(map(math.isfinite, values))} == set()
    assert 0 < len(summary(place)["evaluations"]) < len(found["val/prompts"])


@pytest.mark.parametrize("odd", few(["even_or_raise", "even_or_nan", "even_or_hang"], 1))
def test_in_validation_a_failed_score_is_wrong_and_not_absent(
    place: Place, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    def validated(name: str) -> dict[str, float]:
        configured(
            place, [function(name)], lambda c: data(c).update(val_size=4), workers(time_limit_s=0.3),
            lambda c: c["trainer"].update(limit_train_batches=0, default_root_dir=name, logger=[
                {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": name}}]),
        )  # fmt: skip
        code, said = place.run("validate", "--config", "run.yaml")
        assert code == 0, said[-2000:]
        lines = next(Path(name).rglob("metrics.csv")).read_text().splitlines()
        return {key: float(value) for key, value in zip(*(line.split(",") for line in lines), strict=True) if value}

    right, found = validated("even"), validated(odd)
    assert 0 < right["val/accuracy"] < 1, "the control run must have both outcomes"
    for name in ("val/accuracy", "val/pass@2", "val/prompts", "val/pass@2_prompts", "val/reward"):
        assert found[name] == right[name], name
    assert found["val/failed_fraction"] == pytest.approx(1 - right["val/accuracy"])
    assert right["val/failed_fraction"] == 0
    lines = [line for line in warnings_of(caplog) if line.startswith("Validation: ")]
    assert len(lines) == 1


REFUSED = {
    "no_column": "requires the argument 'gold', but",
    "no_columns": "requires the argument 'tests', 'timeout', but",
    "verl": "requires the argument 'data_source', 'solution_str', but",
    "looked_up": "reads 'gold'. The data's columns are 'answer', ",
    "imports": "cannot import what it uses (No module named 'no_such_package'). Install it in the environment of dots",
    "scalar": "returned float, expected a list of 2 numbers or None",
    "mapping": "returned dict, expected a list of 2 numbers or None",
    "texts": "returned '1.0', expected a finite number or None",
    "one_score": "returned 1 scores for 2 completions",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_reward_that_cannot_work_is_refused_before_any_rollout(place: Place, name: str) -> None:
    configured(place, [{"class_path": "app.rewards.Numeric"}, function(name)])
    line = place.refused(*FIT)
    assert f"Reward {name!r} {REFUSED[name]}" in line
    if name in ("no_column", "scalar"):
        line = place.refused("validate", "--config", "run.yaml", "--data.val_size", "2")
        assert f"Reward {name!r} {REFUSED[name]}" in line


@pytest.mark.parametrize("name", ["picky_about_the_trial", "key_of_the_text", "hangs_on_the_trial"])
def test_what_may_be_an_honest_answer_to_the_trial_ends_nothing(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    configured(place, [function(name)], workers(time_limit_s=1.0), steps=1)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    (line,) = warnings_of(caplog)
    assert line.startswith(f"Reward {name!r} fails on a trial completion of prompt ")
    assert summary(place)["failed_rewards"] == 0


@pytest.mark.parametrize(
    ("name", "cause"),
    few(
        [
            ("later", "RuntimeError: the judge is gone (dots_odd_rewards.py, line "),
            ("huge_later", "returned 1e+25, but float32 arithmetic needs scores of at most 1e+06 in magnitude"),
            ("exits_later", "its worker process ended"),
            ("hangs_later", "took more than model.reward_workers.time_limit_s=0.5 s"),
        ],
        2,
    ),
)
def test_a_step_in_which_every_score_failed_ends_the_run(place: Place, name: str, cause: str) -> None:
    configured(place, [function(name), {"class_path": "app.rewards.Numeric"}], workers(time_limit_s=0.5), steps=5)
    line = place.refused(*FIT, touches=True)
    assert f"Step 2: every score of reward {name!r} failed, those of 4 completions; first on prompt '" in line
    assert ", completion 0 ('" in line
    assert cause in line
    assert (run_folder(place) / "checkpoints" / "last.ckpt").resolve().name == "step_00000002.ckpt"
    assert summary(place)["completed"] is False
    assert summary(place)["steps"] == 2
    if name == "later":
        configured(place, [{"class_path": "app.rewards.Numeric"}], steps=3)
        code, said = place.run(*FIT, "--ckpt_path", "last")
        assert code == 0, said[-2000:]


@pytest.mark.long
def test_a_validation_in_which_every_score_failed_ends_the_run(place: Place) -> None:
    write_pool(place.path / "val.jsonl", [{"question": f"7{row} + 1 =", "answer": "8"} for row in range(5)])
    configured(
        place,
        [function("validation_only")],
        lambda c: data(c).update(
            val={"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": "val.jsonl"}}, val_batch_size=1
        ),
    )
    line = place.refused(*FIT, touches=True)
    assert "Validation: every score of reward 'validation_only' failed, those of 4 completions; first on prompt" in line
    assert "RuntimeError: no validation, please" in line


def test_scores_of_a_call_that_is_too_slow_are_kept_or_the_option_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    mark = place.path / "mark"
    rows = [{"question": f"{row} + 1 =", "answer": "8", "marks": str(mark)} for row in range(8)]
    write_pool(place.path / "pool.jsonl", rows)
    for name, calls, lines in (("judge", 8 + 4, 1), ("yielding_judge", 8, 0)):
        configured(
            place, [function(name)], workers(time_limit_s=0.7, chunk_size=8, num_workers=1),
            lambda c: data(c).update(prompts_per_step=4), steps=1,
        )  # fmt: skip
        mark.write_text("")
        caplog.clear()
        assert place.run(*FIT)[0] == 0
        assert len(mark.read_text()) in (
            calls + 2,
            calls + 1,
        )  # with the two of the trial; a slow machine gets less far
        told = warnings_of(caplog)
        assert len(told) == lines
        assert all("model.reward_workers.time_limit_s=0.7 s for calls of 8 completions" in line for line in told)


def test_an_attack_costs_at_most_the_scores_of_its_call(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    names = [*KEPT, *LOST]
    rows = [{"question": f"{name}:", "answer": "1", "attack": name} for name in names]
    write_pool(
        place.path / "pool.jsonl", [row | {"self": "s", "name": "n", "weight": "w", "call": "c"} for row in rows]
    )
    configured(
        place,
        [function("attack"), {"class_path": "app.rewards.Numeric", "init_args": {"correctness": False, "weight": 0.0}}],
        workers(time_limit_s=1.0, memory_limit_mb=1024, chunk_size=1),
        lambda c: data(c).update(prompts_per_step=len(names)),
        steps=1,
    )
    started = time.monotonic()
    code, said = place.run(*FIT)
    assert code == 0, said[-3000:]
    assert time.monotonic() - started < 60
    found: dict[str, list[float]] = {}
    for row in table(place):
        found.setdefault(row["question"].rstrip(":"), []).append(row["reward/attack"])
    assert {name: found.get(name) for name in KEPT} == KEPT
    assert not set(found) & set(LOST)
    logged = metrics(place)
    assert all(math.isfinite(value) for values in logged.values() for value in values)
    assert logged["rewards/attack/ok"] == [2.0]
    assert sum("/attack/many" in name for name in logged) == 99  # a hundred names with "ok"
    assert not {name for name in logged if name.startswith("rewards/attack/")} & {"m", "i", "n", "t", "o"}
    assert logged["rewards/failed_fraction"] == [pytest.approx(len(LOST) / len(names))]
    notes = [row for row in table(place) if row["question"] == "logs columns:"]
    assert [row["note"] for row in notes] == ["a", "b"]
    assert [row["odd"] for row in notes] == ["1", "a"]
    assert [row["extra/reward"] for row in notes] == [7, 7]
    assert [row["long"] for row in notes] == [str(2**70)] * 2
    assert "big" not in table(place)[0]
    assert sum(line.startswith("Step 0: ") for line in warnings_of(caplog)) == 1
    own = {"cmdline": ["sleep", "617"], "cwd": os.getcwd()}  # another run's may still be dying
    sleepers = [one for one in psutil.process_iter(["cmdline", "cwd"]) if one.info == own]
    _, alive = psutil.wait_procs(sleepers, timeout=3)
    assert not alive


@pytest.mark.long
def test_a_pattern_that_matches_no_completion_of_ten_steps_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    patterns = ["<think>.*</think>.*", "(<think>)?.*</think>.*", r"Answer: \d+", "[a-z]{9}", ".*"]
    listed = [
        {"class_path": "app.rewards.Format", "init_args": {"pattern": one, "name": f"f{at}"}}
        for at, one in enumerate(patterns)
    ]
    configured(place, [function("even"), *listed], steps=11)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    told = [line for line in warnings_of(caplog) if "the pattern " in line]
    assert [line.partition(" has matched no")[0] for line in told] == [
        f"Step 9: the pattern {one!r} of reward 'f{at}'" for at, one in enumerate(patterns[:4])
    ]


def test_a_users_subclass_of_reward_keeps_working(place: Place) -> None:
    (place.path / "dots_old_rewards.py").write_text(
        "from app.rewards import Reward\n"
        "class Old(Reward):\n"
        "    def __init__(self, scale: float = 2.0, weight: float = 1.0, correctness: bool = False, name=None):\n"
        "        super().__init__(weight, correctness, name)\n"
        "        self.scale = scale\n"
        "    def __call__(self, prompts, completions, completion_ids, **columns):\n"
        "        return [self.scale * (row % 2) for row in range(len(completions))]\n"
        "class Bare(Old):\n"
        "    def __call__(self, prompts, completions, completion_ids, answer, self_=1, **columns):\n"
        "        return [float('self' not in columns)] * len(answer)\n"
    )
    rows = [{"question": f"{row} + 1 =", "answer": "8", "self": "a", "weight": 1, "name": "b"} for row in range(8)]
    write_pool(place.path / "pool.jsonl", rows)
    old = {"class_path": "dots_old_rewards.Old", "init_args": {"scale": 3.0}}
    configured(place, [old, {"class_path": "dots_old_rewards.Bare"}, {"class_path": "app.rewards.Format",
                       "init_args": {"pattern": ".*"}}], steps=1)  # fmt: skip
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    found = metrics(place)
    assert found["rewards/old/mean"] == [1.5]
    assert found["rewards/bare/mean"] == [1.0]
    assert sorted(row["correctness"] for row in table(place)) == [0.0, 0.0, 3.0, 3.0]
