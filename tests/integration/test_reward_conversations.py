"""Rewards of conversations with an environment, in their worker processes."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app.rewards import Environment, Function, Numeric, Reward, RewardScorer, ScoreResult, WorkerOptions, rewards_of
from datamodules.errors import UserError
from datamodules.types import Completion, Outcome, Prompt
from tests.support.builders import conversation

CODE = '''
import os

class Counter:
    """An environment's final object, which knows the process that has restored it."""
    def __init__(self, count): self.count = count
    def __setstate__(self, state): self.__dict__ = {**state, "process": os.getpid()}

class Unwilling:
    def __reduce__(self): return (refuse, ())
def refuse(): raise OSError("the connection is gone")

def said(completions, completion_ids, log_extra, **rest):
    log_extra("said", [str(one) for one in completions])
    return [float(len(ids)) for ids in completion_ids]
def counted(environments, log_extra, **rest):
    log_extra("process", [one.process for one in environments])
    return [float(one.count) for one in environments]
def may_count(completions, environments=None): return [float(environments is not None)] * len(completions)
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "dots_talk.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "dots_talk", raising=False)
    return importlib.import_module("dots_talk")


@contextmanager
def scoring(*rewards: Reward, environment: bool = True, on_failure: Any = "drop") -> Iterator[RewardScorer]:
    scorer = RewardScorer(list(rewards), on_failure, WorkerOptions(num_workers=1), environment)
    try:
        yield scorer
    finally:
        scorer.close()


def prompts(count: int = 1, messages: bool = False) -> list[Prompt]:
    shown: Any = [{"role": "user", "content": "?"}] if messages else "?"
    return [Prompt(f"p{index}", index, "?", shown, (1,), {"answer": "5"}) for index in range(count)]


def talk(outcome: Outcome) -> Completion:
    """Tokens 3 4, a reply of 6 that ends in the number 7, and an answer of token 5."""
    return conversation(("assistant", [3, 4]), ("tool", [6, 7]), ("assistant", [5]), outcome=outcome)


def score(scorer: RewardScorer, *groups: tuple[Completion, ...], messages: bool = False, **given: Any) -> ScoreResult:
    return scorer.score(prompts(len(groups), messages), groups, source="fresh", step=3, **given)


def test_what_rewards_see(code: ModuleType) -> None:
    """TRL's form of a conversational prompt's completion, and of a text's prompt the final answer."""
    final = pickle.dumps(code.Counter(4))
    cut = conversation(("assistant", [5]), ("tool", [6]), outcome=Outcome(0.25, final))
    rewards = (Function("dots_talk.said"), Function("dots_talk.counted"), Environment(), Numeric(correctness=True))
    with scoring(*rewards) as scorer:
        scorer.try_out(prompts())
        (text,) = score(scorer, (talk(Outcome(0.5, final)), cut)).groups
        (chat,) = score(scorer, (talk(Outcome(0.5, final)), cut), messages=True).groups
    assert text.extras["said"] == ["5", "5"]
    assert chat.extras["said"] == [
        str([{"role": role, "content": said} for role, said in turns])
        for turns in ((("assistant", "3 4"), ("tool", "6 7"), ("assistant", "5")), (("assistant", "5"), ("tool", "6")))
    ]
    for group in (text, chat):
        assert group.components["said"].tolist() == [5, 2], "all tokens"
        assert group.components["counted"].tolist() == [4, 4]
        assert group.components["environment"].tolist() == [0.5, 0.25]
        # The policy's answer is right; the number in a tool's reply after it is not its answer.
        assert group.correctness.tolist() == [1, 1]
        assert os.getpid() not in group.extras["process"], "the trainer restores no object of the user's"


@pytest.mark.parametrize(("on_failure", "measured"), [("drop", False), ("zero", False), ("drop", True)])
def test_a_failed_environment_costs_its_conversation_once(
    code: ModuleType, on_failure: str, measured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fine, broken = talk(Outcome(1.0, pickle.dumps(code.Counter(2)))), talk(Outcome(error="it took more than 10 s"))
    rewards = (Environment(correctness=True), Function("dots_talk.counted", correctness=False))
    with scoring(*rewards, on_failure=on_failure) as scorer:
        result = score(scorer, (fine, broken, fine), (broken, broken), measured=measured)
        scorer.incidents.report("Step 3")
        scorer.incidents.report("Step 4")
    assert (result.failed, result.timed_out, result.crashed, result.unscored) == (3, 0, 0, 0)
    assert result.failed_by_reward == {"environment": 0, "counted": 0}
    assert result.asked_by_reward == {"environment": (2, 2), "counted": (2, 2)}
    first, second = result.groups
    if on_failure == "drop" and not measured:
        assert result.dropped == 3
        assert (first.rewards.tolist(), second.completions) == ([3, 3], ())
    else:
        assert result.dropped == 0
        assert (first.rewards.tolist(), second.rewards.tolist()) == ([3, 0, 3], [0, 0])
        assert (first.correctness.tolist(), second.correctness.tolist()) == ([1, 0, 1], [0, 0])
    assert [record.getMessage() for record in caplog.records] == [
        "Step 3: the environment failed in 3 of 5 conversations, first in that of prompt 'p0', completion 1 "
        "('3 4\\n6 7\\n5'): it took more than 10 s."
    ]


def test_what_is_missing_is_refused_in_one_line(code: ModuleType) -> None:
    with pytest.raises(
        UserError, match=r"'environment' is what the run's environment gives, but the run has none\. Set"
    ):
        RewardScorer(rewards_of("environment"))
    with scoring(Environment()) as scorer:
        scorer.try_out(prompts())
        with pytest.raises(UserError, match=r"own score \(get_reward\), but it gave a conversation none"):
            score(scorer, (talk(Outcome()),))
    told = r"requires the argument 'environments', but.*Only a run with an environment"
    with scoring(Function("dots_talk.counted"), environment=False) as scorer, pytest.raises(UserError, match=told):
        scorer.try_out(prompts())
    with scoring(Function("dots_talk.counted")) as scorer:
        scorer.try_out(prompts())
        with pytest.raises(UserError, match="that of prompt 'p0', completion 1 does not pickle"):
            score(scorer, (talk(Outcome(environment=pickle.dumps(code.Counter(1)))), talk(Outcome())))
    told = r"cannot be unpickled \(OSError: the connection is gone"
    with scoring(Function("dots_talk.counted")) as scorer, pytest.raises(UserError, match=told):
        score(scorer, (talk(Outcome(environment=pickle.dumps(code.Unwilling()))),))


def test_a_reward_may_do_without_an_environment(code: ModuleType) -> None:
    one = replace(talk(Outcome()), outcome=None)
    with scoring(Function("dots_talk.may_count"), environment=False) as scorer:
        scorer.try_out(prompts())
        assert score(scorer, (one,)).groups[0].rewards.tolist() == [0]
