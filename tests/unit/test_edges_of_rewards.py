"""Borders of scoring that no larger test notices."""

from __future__ import annotations

import json
import socket
import struct

import numpy as np
import psutil
import pytest

from app.rewards import Format, Reward, RewardScorer, WorkerOptions
from app.rewards.base import Column, Scores, Texts, TokenIds
from app.rewards.incidents import Incidents
from app.rewards.workers import frames
from app.rewards.workers.task import MAX_METRIC, MAX_SCORE, CallResult, Reply
from app.rewards.workers.trial import check_arguments
from datamodules.errors import UserError


class Plain(Reward):
    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        return [1.0] * len(completions)


class Silent(Plain):
    def __init__(self) -> None:
        pass


def test_a_reward_counts_once_and_has_its_class_for_a_name() -> None:
    for reward in (Plain(), Silent()):
        assert (reward.weight, reward.correctness, reward.name) == (1.0, None, type(reward).__name__.lower())


def test_frames_are_read_whole_and_within_the_limit() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = frames.FrameReader(ours, limit=4)
        assert reader.read() == []
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
    next(one for one in started if one.ppid() == psutil.Process().pid).suspend()
    scorer.close()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
