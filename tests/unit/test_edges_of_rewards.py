"""Borders of scoring that no larger test notices."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest

from app.rewards import (
    Exact,
    Format,
    Function,
    Math,
    Numeric,
    ReasoningGym,
    Reward,
    RewardScorer,
    SoftOverlong,
    WorkerOptions,
    rewards_of,
)
from app.rewards.answers import plain
from app.rewards.base import Column, Scores, Texts, TokenIds
from app.rewards.incidents import Incidents
from app.rewards.numbers import find_numbers
from app.rewards.workers import frames
from app.rewards.workers.function_log import FunctionLog
from app.rewards.workers.results import checked
from app.rewards.workers.task import MAX_METRIC, MAX_SCORE, CallResult, Failure, Reply
from app.rewards.workers.trial import check_arguments
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt


class Plain(Reward):
    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        return [1.0] * len(completions)


class Silent(Plain):
    def __init__(self) -> None:
        pass


def test_a_reward_counts_once_and_has_its_class_for_a_name() -> None:
    for reward in (Plain(), Silent(), Math(), Numeric(), Exact()):
        assert (reward.weight, reward.correctness, reward.name) == (1.0, None, type(reward).__name__.lower())
    others: list[Reward] = [Format("a"), SoftOverlong(4, 2), ReasoningGym(), Function("json.dumps")]
    assert [(one.weight, one.correctness) for one in others] == [(1.0, False), (1.0, False), (1.0, None), (1.0, None)]


def test_frames_are_read_whole_and_within_the_limit() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = frames.FrameReader(ours, limit=4)
        frames.send(ours, 1, b"", timeout=2.0)
        assert reader.read() == []  # at once
        frames.send(theirs, 7, b"four")
        frames.send(theirs, 8, b"")
        theirs.sendall(struct.pack("!4sQQ", b"dots", 9, 2) + b"l")
        assert reader.read() == [(7, b"four"), (8, b"")]
        theirs.sendall(b"o")
        assert reader.read() == [(9, b"lo")]
        frames.send(theirs, 7, b"fives")
        with pytest.raises(frames.GarbledError):
            reader.read()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!4sQQ", b"dogs", 7, 0))
        with pytest.raises(frames.GarbledError):
            frames.FrameReader(ours, limit=4).read()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"scores": [2 * MAX_SCORE]}, {"scores": [-MAX_SCORE]}),
        ({"metrics": [("m", 1.1 * MAX_METRIC)]}, {"metrics": [("m", MAX_METRIC), ("n", -MAX_METRIC)]}),
        ({"extras": {"a": [1, 2]}}, {"extras": {"a": [1]}}),
        ({"invalid": {"1": "nan"}}, {"invalid": {"0": "nan"}}),
        ({"invalid": {"-1": "nan"}}, {}),
        ({"pid": "1"}, {"pid": 1}),
        ({"row": None}, {"row": 5}),
        ({"metrics": [("m", float("nan"))]}, {}),
    ],
)
def test_replies_within_bounds_are_read(wrong: dict[str, object], right: dict[str, object]) -> None:
    plain: dict[str, object] = {"kind": "scores", "scores": [1.0]}
    assert vars(Reply.decode(json.dumps(plain | right).encode())) == vars(Reply(**plain | right))  # type: ignore[arg-type]
    with pytest.raises(frames.GarbledError):
        Reply.decode(json.dumps(plain | wrong).encode())


def test_a_trial_asks_for_the_arguments_that_a_reward_requires() -> None:
    class Named(Plain):
        def __call__(self, completions, gold, /, level, *more, mode="a", **rest):  # type: ignore[no-untyped-def, override]
            return [1.0] * len(completions)

    given = {"prompts": [], "completions": [], "completion_ids": [], "answer": [], "level": [], "log_extra": None}
    check_arguments(Plain(), given)
    with pytest.raises(UserError, match=r"'named' requires the argument 'completions', 'gold', but .*are 'answer', 'l"):
        check_arguments(Named(), given)


def test_what_could_not_be_logged_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    incidents = Incidents(["a", "b"], WorkerOptions())
    for _ in range(2):
        results = [CallResult([1.0]), CallResult([1.0], notes=["too many names", "odd name"])]
        incidents.add(results, ["prompt 'p', completion 0"], ["text"], np.zeros(1, bool))
    assert caplog.messages == ["Reward 'b': too many names.", "Reward 'b': odd name."]


def test_a_server_that_does_not_end_is_killed_with_its_workers() -> None:
    before = set(psutil.Process().children(recursive=True))
    scorer = RewardScorer([Format("a")], workers=WorkerOptions(num_workers=1))
    scorer.wait_ready()
    started = set(psutil.Process().children(recursive=True)) - before
    server = next(one for one in started if one.ppid() == psutil.Process().pid)
    assert os.getsid(server.pid) == server.pid  # Ctrl-C in the trainer's terminal does not reach it
    server.suspend()
    scorer.close()
    assert not psutil.pid_exists(server.pid)  # it is not left as a zombie either
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def test_a_report_names_each_reward_its_count_and_its_first_failure(caplog: pytest.LogCaptureFixture) -> None:
    incidents = Incidents(["a", "b"], WorkerOptions(time_limit_s=2.5))
    labels = [f"prompt 'p', completion {row}" for row in range(3)]
    late, crash = Failure("timed_out", "too late"), Failure("crashed", "ValueError: x", "the traceback")
    fine = CallResult([1.0, 0.0, 1.0])
    incidents.add([fine, fine], labels, ["x", "y", "z"], np.zeros(3, bool))
    incidents.report("Step 0")
    assert caplog.messages == []
    for _ in range(2):
        failed = CallResult([1.0, None, None], {2: late, 1: crash}, overran=3)
        incidents.add([fine, failed], labels, ["x", "y", "z"], np.array([False, True, True]))
    assert incidents.first_cause("a") is None
    assert incidents.first_cause("b") == "prompt 'p', completion 1 ('y'): ValueError: x"
    incidents.report("Step 1")
    slow, lost, traceback = caplog.messages
    assert slow == (
        "Step 1: reward 'b' took more than model.reward_workers.time_limit_s=2.5 s for calls of 6 completions, which "
        "were scored again one by one: raise it, lower model.reward_workers.chunk_size, or yield the scores; reward "
        "'b' failed on 4 of 6 completions (2 took too long, 2 crashed), first on prompt 'p', completion 1 ('y'): "
        "ValueError: x."
    )
    assert lost.startswith(
        "Step 1: no correctness reward applies to 4 of 6 completions, the first of which is prompt 'p', completion 1. "
    )
    assert traceback == "First traceback of reward 'b':\nthe traceback"
    caplog.clear()
    incidents.report("Step 2")
    assert caplog.messages == []
    incidents.add([fine, CallResult([1.0, None, None], {1: crash})], labels, ["x", "y", "z"], np.ones(3, bool))
    incidents.report("Step 3")
    assert [line[:40] for line in caplog.messages] == ["Step 3: reward 'b' failed on 1 of 3 comp"]


def test_results_of_calls_are_joined_and_put_in_their_rows() -> None:
    crash = Failure("crashed", "x")
    first = CallResult([1.0, None], {1: crash}, [("m", 1.0, 2.0)], {"a": [5, 6]}, ["odd"], overran=2)
    whole = CallResult.joined([first, CallResult([0.5], {}, [("m", 4.0, 1.0)], {}, ["big"], overran=1)])
    assert (whole.metrics, whole.notes, whole.overran) == ([("m", 1.0, 2.0), ("m", 4.0, 1.0)], ["odd", "big"], 3)
    wide = whole.spread(np.array([1, 3, 4]), 5)
    assert wide.scores == [None, 1.0, None, None, 0.5]
    assert wide.failures == {3: crash}
    assert wide.extras == {"a": [None, 5, None, 6, None]}
    assert (wide.metrics, wide.notes, wide.overran) == (whole.metrics, whole.notes, 3)


def test_what_a_function_logs_has_bounds() -> None:
    log = FunctionLog(2)
    for value in (1, 4.0, np.float32(7)):
        log.log_metric("m", value)  # type: ignore[arg-type]
    log.log_metric("n" * 100, -MAX_METRIC)
    for bad in (math.nan, 1.1 * MAX_METRIC, "x", 10**400):
        log.log_metric("bad", bad)  # type: ignore[arg-type]
    assert log.metrics == [("m", 4.0), ("n" * 100, -MAX_METRIC)]
    assert log.notes == ["log_metric('bad') got a value that is not a finite number of float32: left out"]
    for name in ("n" * 101, "", "a\nb", 3):
        log.log_extra(name, [1, 2])  # type: ignore[arg-type]
    assert log.notes[1:] == ["log_extra got a name that is not text of 1 to 100 printable characters: left out"]
    for place in range(101):
        log.log_extra(f"c{place}", [2**63 - 1, 2**63])
    assert list(log.extras) == [f"c{place}" for place in range(100)]
    assert log.extras["c0"] == [2**63 - 1, str(2**63)]
    log.log_extra("c1", [np.int64(3), [None]])
    assert log.extras["c1"] == [3, "[None]"]
    log.log_extra("c2", [-(2**63) + 1, 10**5000])
    assert log.extras["c2"] == [-(2**63) + 1, "<int>"]
    for place in range(9):
        log.log_metric(f"bad {place}", math.inf)
    assert len(log.notes) == 5


def test_scores_are_at_most_1e6() -> None:
    scores, errors = checked([MAX_SCORE, -MAX_SCORE, 1_000_001, -1e9, True, None], 6)
    assert scores == [1e6, -1e6, None, None, 1.0, None]
    assert list(errors) == [2, 3]
    assert errors[3].startswith("returned -1e+09, but float32 arithmetic needs scores of at most 1e+06 in magnitude")


def test_rewards_have_short_names() -> None:
    kinds = [
        type(one) for one in rewards_of(["math", "NUMERIC", "reasoning_gym", "ReasoningGym", Exact(), "json.dumps"])
    ]
    assert kinds == [Math, Numeric, ReasoningGym, ReasoningGym, Exact, Function]
    assert [type(one) for one in rewards_of("exact")] == [Exact]
    for one in (json.dumps, [json.dumps]):
        (function,) = rewards_of(one)  # type: ignore[arg-type]
        assert isinstance(function, Function)
        assert (function.path, function.name) == ("json.dumps", "dumps")
    for wrong, told in (
        ("nath", "did you mean 'Math'"),
        ("soft_overlong", "SoftOverlong needs max_completion_length and buffer"),
        ([Math], "expected a reward, the name of one, or a function"),
        ([3], "holds 3, but expected"),
    ):
        with pytest.raises(UserError, match=told):
            rewards_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["num_workers", "time_limit_s", "memory_limit_mb", "load_limit_s", "chunk_size"])
def test_limits_of_workers_are_above_zero(name: str) -> None:
    assert getattr(WorkerOptions(**{name: 1}), name) == 1
    for wrong in (0, -1, math.nan):
        with pytest.raises(UserError, match=rf"workers\.{name} is {wrong}, but must be above 0"):
            WorkerOptions(**{name: wrong})  # type: ignore[arg-type]


def test_the_answer_that_is_logged_is_one_text_for_equal_numbers() -> None:
    numeric = Numeric()
    found = [numeric.extract(text) for text in ("2/4 or 0.50", "so 1,000.0", "none", "1e1000", "2e1000", "-2e1000")]
    assert found == ["1/2", "1000", None, "1" + "0" * 1000, None, None]
    assert Exact().extract(" So  BE it. ") == "so be it"
    assert Math().extract(r"\boxed{3} and \boxed{4}") == r"\boxed{3}, \boxed{4}"


def test_groups_stay_together_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dots_sizes.py").write_text(
        "def size(completions, **rest): return [len(completions)] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sizes = [3, 2, 3, 5, 1]
    prompts = [Prompt(str(place), place, "?", "?", (1,), {}) for place in range(len(sizes))]
    one = Completion(np.array([1], np.int32), np.zeros(1, np.float32), "stop", 0, "x")
    scorer = RewardScorer([Function("dots_sizes.size")], workers=WorkerOptions(num_workers=1, chunk_size=4))
    try:
        result = scorer.score(prompts, [(one,) * size for size in sizes], source="fresh", step=0)
    finally:
        scorer.close()
    # 3 and 2 fill a chunk of at least 4, so do 3 and 5, and the last one is alone.
    assert [group.rewards.tolist() for group in result.groups] == [[5] * 3, [5] * 2, [8] * 3, [8] * 5, [1]]
    assert result.asked_by_reward == {"size": (5, 14)}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is east. It is not west.", "east"),
        ("north. So 18", "18"),
        ("The answer is x = east.", "x = east"),
        ("first line\n18", "18"),
        ("the answer is 3 of 4", "3"),
        ("3 of 4", "4"),
        ("answer: $x$ or $y$", "x"),
        ("$x$ or $y$", "y"),
        ("answer: 1\nanswer: 2", "2"),
        ("nothing\nat all", None),
    ],
)
def test_the_answer_in_running_text(text: str, answer: str | None) -> None:
    assert Math().extract(text) == answer


def test_a_file_of_rewards_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def right(completions): return [1.0 for _ in completions]\n")
    assert Function(f"{tmp_path}/mine.py:right").name == "right"
    with pytest.raises(UserError, match=r"there is no file .*mime\.py; did you mean 'mine\.py'"):
        Function(f"{tmp_path}/mime.py:right")
    reward = Function(f"{tmp_path}/mine.py:wrong")
    with pytest.raises(UserError, match="has no 'wrong'"):
        reward.load()


def score(reward: Reward, completions: list[str], **columns: list[object]) -> Scores:
    return reward(["?"] * len(completions), completions, [[0]] * len(completions), **columns)


def test_a_task_is_named_by_its_entry_or_else_by_its_row() -> None:
    reward = ReasoningGym()
    rows = {"answer": ["3"], "question": ["?"]}
    assert score(reward, ["3"], metadata=[{}], source_dataset=["gcd"], **rows) == [1.0]
    assert score(reward, ["3"], metadata=['{"source_dataset": "gcd"}'], source_dataset=["none"], **rows) == [1.0]
    with pytest.raises(UserError, match=r"metadata\.source_dataset='none' is not a reasoning-gym task"):
        score(reward, ["3"], metadata=[{}], source_dataset=["none"], **rows)
    with pytest.raises(UserError, match="is not an object with the key 'source_dataset'"):
        score(reward, ["3"], metadata=["[1]"], **rows)
    logged: dict[str, list[str | None]] = {}
    columns = {"answer": ["3"] * 2, "metadata": [{"source_dataset": "gcd"}] * 2, "log_extra": logged.__setitem__}
    score(reward, [" 3\n", " "], **columns)  # type: ignore[arg-type]
    assert logged == {"extracted_answer": ["3", None]}


def test_values_of_parquet_become_plain_ones() -> None:
    value = {"a": np.array([[1, 2]]), 3: (np.float32(0.5), [np.int64(1), None])}
    assert plain(value) == {"a": [[1, 2]], "3": (0.5, [1, None])}
    assert json.dumps(plain(value)) == '{"a": [[1, 2]], "3": [0.5, [1, null]]}'


def test_a_dotted_column_leads_into_objects_and_json() -> None:
    deep = Numeric(gold="a.b.c")
    found = score(deep, ["7"] * 5, a=[{"b": {"c": 7}}, '{"b": {"c": "8"}}', "no json", {"b": 7}, None])
    assert found == [1.0, 0.0, None, None, None]


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (12, -1.0)])
def test_a_long_completion_is_punished_little_by_little(length: int, penalty: float) -> None:
    reward = SoftOverlong(max_completion_length=10, buffer=4)
    assert reward(["?"], ["x"], [[0] * length]) == [penalty]
    SoftOverlong(4, 4)
    for wrong in (0, 5):
        with pytest.raises(UserError, match=f"buffer={wrong} and max_completion_length=4"):
            SoftOverlong(4, wrong)


def test_options_of_a_function_win_over_columns_and_make_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # loading adds the folder
    (tmp_path / "dots_beside.py").write_text("nothing = 0\n")
    (tmp_path / "options.py").write_text(
        "from dots_beside import nothing\n"
        "def scaled(completions, scale=1.0, shift=0.0): return [scale * len(one) + shift for one in completions]\n"
        "class Judge:\n"
        "    made = 0\n"
        "    def __init__(self, scale): self.scale = scale; Judge.made += 1\n"
        "    def __call__(self, completions, **rest): return [self.scale * Judge.made + len(rest)] * len(completions)\n"
        "class Mute: pass\n"
        "constant = 3 + nothing\n"
    )
    path, columns = str(tmp_path / "options.py"), {"scale": [9, 9], "shift": 0.5, "other": [1, 1]}
    assert score(Function(f"{path}:scaled", kwargs={"scale": 2.0}), ["ab", "c"], **columns) == [4.5, 2.5]  # type: ignore[arg-type]
    judge = Function(f"{path}:Judge", kwargs={"scale": 10})
    for _ in range(2):  # it is made once, and receives prompts, completion_ids and the three columns
        assert score(judge, ["ab", "c"], **columns) == [15, 15]  # type: ignore[arg-type]
    for name, told in (("Mute", "instances cannot be called"), ("constant", "is a int, not a function")):
        with pytest.raises(UserError, match=told):
            Function(f"{path}:{name}").load()
    for wrong, told in (
        ("__main__.f", "in __main__"),
        ("a.b-c", "neither"),
        (":f", "neither"),
        ("absent_one.f", "no mod"),
    ):
        with pytest.raises(UserError, match=told):
            Function(wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9" * 1000, Fraction(10**1000 - 1)),
        ("9" * 1001, None),
        ("1e1000", Fraction(10**1000)),
        ("1e1001", None),
        ("1e-1000", Fraction(1, 10**1000)),
        ("1e00001", Fraction(10)),
        ("1e000001", None),
        ("10^500", Fraction(10**500)),
        ("10^501", None),
        ("2^{-2}", Fraction(1, 4)),
        ("0^2", Fraction(0)),
        ("0^-1", None),
        ("3 1/0", None),
        (r"\frac{1}{0}", None),
        ("1/0", None),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"-1.\overline{09}", Fraction(-12, 11)),
        (r"1\frac{2}{3}", Fraction(5, 3)),
        ("-2 1/4", Fraction(-9, 4)),
        ("1.5/0.5", Fraction(3)),
    ],
)
def test_numbers_are_exact_and_bounded(text: str, value: Fraction | None) -> None:
    assert [number.value for number in find_numbers(text)] == ([] if value is None else [value])


def test_a_reference_nested_too_deeply_is_none() -> None:
    deep = "(" * 9 + "1" + ")" * 9
    assert not Math(strict=False).can_read(deep)
    assert Math(strict=False).can_read(deep[1:-1])
    assert score(Math(strict=False), [r"\boxed{1}"], answer=[deep]) == [None]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1000000.0", "1000000.1", True),  # one unit of the last place
        ("1000000.0", "1000000.2", False),
        ("1.00000000", "1.000001", True),  # 1e-6 relative to the larger
        ("1.00000000", "1.000002", False),
        ("1e6", "1000001", False),  # integers are exact
        ("2.5e1", "25.00001", True),
        ("2.5e1", "25.00004", False),
        ("1/3", "0.33333334", True),
    ],
)
def test_decimals_may_be_rounded(one: str, other: str, equal: bool) -> None:
    (left,), (right,) = find_numbers(one), find_numbers(other)
    assert left.equals(right) is right.equals(left) is equal
