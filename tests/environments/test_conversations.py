"""Conversations with real environments: which tokens they hold, where they end, and what they depend on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from app.engines import Sampling, Transformers
from app.engines.base import RolloutEngine
from app.engines.turns import TurnRequest
from app.environments import Plain, Tools
from app.environments.conversations import EnvironmentRollouts, PolicyConversations
from app.environments.protocols import protocol_of
from app.environments.sessions import Event, Sessions
from app.rewards import Environment, RewardScorer, WorkerOptions
from app.rollouts.pipeline import RolloutPipeline, RolloutRequest
from datamodules.ledger import Ledger
from datamodules.seeding import sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup
from tests.support.policies import TINY

ENVIRONMENT = '''
import os, random, time

class Notes:
    def reset(self, prompt, kind="", **row):
        self.notes, self.kind, self.draw = [], kind, random.randint(100, 999)
        return " and more" if kind == "longer" else None

    def note(self, text: str) -> str:
        """Write something down.

        Args:
            text: anything.
        """
        self.notes.append(text)
        if self.kind in ("thinks", "hangs"):
            time.sleep(0.06 if self.kind == "thinks" else 60)
        if self.kind == "dies":
            os._exit(1)
        if self.kind == "raises":
            raise ValueError("no room")
        return f"{len(self.notes)}:{self.draw}" + "!" * (500 if self.kind == "talks" else 0)

    def get_reward(self) -> float:
        return float(len(self.notes))
'''
PLAIN = Plain(start="*", end="=", tool="note", argument="text", reply=" ={content};")
SAMPLING = Sampling(num_generations=4, max_completion_length=80, temperature=1.2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return the tiny policy with its head made flat, so that it writes all kinds of bytes."""
    made = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(0.6)
    return made


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    file = tmp_path_factory.mktemp("environment") / "notes.py"
    file.write_text(ENVIRONMENT)
    made = Sessions(Tools(f"{file}:Notes", protocol=PLAIN, max_turns=4, time_limit_s=1.0, max_sessions=24))
    yield made
    made.close()


def rollouts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions, **options: int
) -> EnvironmentRollouts:
    engine = Transformers(**options)
    engine.setup(model, tokenizer)
    protocol = protocol_of(sessions.options.protocol, tokenizer)
    return EnvironmentRollouts(engine, sessions.options, protocol, tokenizer, sessions, lambda: 512)


def prompts(tokenizer: PreTrainedTokenizerBase, *kinds: str) -> list[Prompt]:
    texts = [f"Question {number}: {'x' * number}\n" for number in range(len(kinds))]
    return [
        Prompt(f"p{number}", number, text, text, tuple(tokenizer(text)["input_ids"]), {"kind": kind},
               extended=lambda more, text=text: tuple(tokenizer(text.strip() + more + "\n")["input_ids"]))
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=True))
    ]  # fmt: skip


def seeds(batch: Sequence[Prompt], step: int = 0) -> np.ndarray:
    return sample_seeds(0, "test", step, [prompt.id for prompt in batch], 4)


def same(left: Completion, right: Completion) -> bool:
    """Whether two conversations have the same tokens in the same turns, and log-probabilities to rounding."""
    return (
        left.token_ids.tolist() == right.token_ids.tolist()
        and [(turn.generated, turn.tokens, turn.messages) for turn in left.turns]
        == [(turn.generated, turn.tokens, turn.messages) for turn in right.turns]
        and np.allclose(left.logprobs, right.logprobs, atol=1e-5, equal_nan=True)
        and left.finish_reason == right.finish_reason
    )


@torch.no_grad()
def logprobs_of(model: PreTrainedModel, context: Sequence[int], token_ids: Sequence[int]) -> np.ndarray:
    ids = torch.tensor([[*context, *token_ids]])
    found = (model(ids).logits[0, :-1] / SAMPLING.temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[len(context) - 1 :].numpy()


def test_a_conversation_is_the_tokens_that_were_generated_and_those_that_were_said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions
) -> None:
    batch = prompts(tokenizer, *[""] * 6)
    groups = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch))
    retokenised, several = 0, 0
    for prompt, group in zip(batch, groups, strict=True):
        draws = set()
        for one in group:
            assert sum(turn.tokens for turn in one.turns) == len(one.token_ids) <= 80
            assert np.isnan(one.logprobs[~one.generated]).all()
            expected = logprobs_of(model, prompt.token_ids, one.token_ids.tolist())
            np.testing.assert_allclose(one.logprobs[one.generated], expected[one.generated], atol=2e-5)
            assert [turn.generated for turn in one.turns] == [place % 2 == 0 for place in range(len(one.turns))]
            several += len(one.turns) > 1
            place = notes = 0
            for turn in one.turns:
                its = one.token_ids[place : place + turn.tokens].tolist()
                place += turn.tokens
                if turn.generated:
                    written = tokenizer.decode(its)
                    retokenised += tokenizer(written, add_special_tokens=False)["input_ids"] != its
                    continue
                said = "".join(f" ={message['content']};" for message in turn.messages)
                assert its == tokenizer(said, add_special_tokens=False)["input_ids"]
                for message in turn.messages:
                    number, _, draw = message["content"].partition(":")
                    assert message["role"] == "tool"
                    if draw.isdigit():  # not an error, for a call that cannot be read
                        notes += 1
                        assert number == str(notes)
                        draws.add(draw)
            assert one.outcome is not None and one.outcome.calls >= notes and not one.outcome.error
            assert one.outcome.reward == one.outcome.calls - one.outcome.failed_calls
        assert len(draws) <= 1  # all completions of a prompt have the same task
    assert several > 12
    assert retokenised > 5


def test_a_context_that_is_tokenised_again_is_found_out(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison with a plain forward must fail where a turn begins with the text so far, tokenised again."""
    heard = PolicyConversations._heard

    def again(self: PolicyConversations, event: Event) -> TurnRequest | None:
        request = heard(self, event)
        if request is None:
            return None
        text = tokenizer.decode(request.prompt.token_ids)
        tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return replace(request, prompt=replace(request.prompt, token_ids=tokens))

    monkeypatch.setattr(PolicyConversations, "_heard", again)
    monkeypatch.setattr(Transformers, "converse", RolloutEngine.converse)  # which reads what it is given
    batch = prompts(tokenizer, *[""] * 6)
    groups = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch))
    found = [
        np.allclose(one.logprobs[one.generated], expected[one.generated], atol=2e-5)
        for prompt, group in zip(batch, groups, strict=True)
        for one in group
        for expected in [logprobs_of(model, prompt.token_ids, one.token_ids.tolist())]
    ]
    assert found.count(False) > 2


def test_a_conversation_depends_on_its_seed_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions
) -> None:
    batch = prompts(tokenizer, *[""] * 6)
    groups = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch))
    few = rollouts(model, tokenizer, sessions, max_rows=5).generate(batch[::-1], SAMPLING, seeds(batch)[::-1])
    options = sessions.options
    options.max_sessions = 3
    try:
        queued = rollouts(model, tokenizer, sessions).generate(batch[1:3], SAMPLING, seeds(batch)[1:3])
    finally:
        options.max_sessions = 24
    for group, other in zip(groups, few[::-1], strict=True):
        assert all(map(same, group, other))
    for group, other in zip(groups[1:3], queued, strict=True):
        assert all(map(same, group, other))
    later = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch, step=1))
    assert not any(same(one, other) for group, its in zip(groups, later, strict=True)
                   for one, other in zip(group, its, strict=True))  # fmt: skip


def test_limits_end_a_conversation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions.options, "max_turns", 2)
    batch = prompts(tokenizer, *[""] * 8, "talks")
    long = replace(SAMPLING, max_completion_length=400)
    *groups, talking = rollouts(model, tokenizer, sessions).generate(batch, long, seeds(batch))
    short = [one for group in groups for one in group]
    counts = [sum(turn.generated for turn in one.turns) for one in short]
    assert max(counts) == 2
    for one, count in zip(short, counts, strict=True):
        assert count <= 2 and one.turns[-1].generated  # what nobody reads is not part of it
        if one.finish_reason == "length":  # in the middle, or with a call that nobody answers
            assert len(one.token_ids) == 400 or (count == 2 and tokenizer.decode(one.token_ids[-1:]) == "=")
        assert count < 2 or not one.turns[-1].messages[0].get("tool_calls") or one.finish_reason == "length"
    assert {one.finish_reason for one in short} == {"stop", "length"}
    cut = [one for one in talking if one.outcome is not None and one.outcome.calls]
    assert cut  # a reply of 500 characters leaves no room
    assert all(len(one.turns) == 1 and one.finish_reason == "length" for one in cut)


@pytest.mark.parametrize(("kind", "said"), [("hangs", "time_limit_s=1"), ("dies", "its process ended")])
def test_a_tool_that_fails_costs_its_own_conversation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions, kind: str, said: str
) -> None:
    batch = prompts(tokenizer, "", kind, "raises")
    fine, failing, raising = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch))
    alone = rollouts(model, tokenizer, sessions).generate(batch[:1], SAMPLING, seeds(batch)[:1])[0]
    assert all(map(same, fine, alone))
    called = [one.outcome for one in failing if one.outcome is not None and one.outcome.calls]
    assert called
    assert all(said in outcome.error and outcome.reward is None for outcome in called)
    errors = [message["content"] for one in raising for turn in one.turns[1::2] for message in turn.messages]
    assert errors and set(errors) == {"{'error': 'no room'}"}  # which the policy is told
    assert all(one.outcome is not None and not one.outcome.error for one in raising)


def test_what_reset_returns_is_read_as_part_of_the_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions
) -> None:
    batch = prompts(tokenizer, "longer", "")
    longer, plain = rollouts(model, tokenizer, sessions).generate(batch, SAMPLING, seeds(batch))
    expected = tokenizer("Question 0:  and more\n".replace("  ", " "))["input_ids"]
    for one in longer:
        assert one.context is not None
        assert tokenizer.decode(one.context) == tokenizer.decode(expected) == "Question 0: and more\n"
        found = logprobs_of(model, one.context.tolist(), one.token_ids.tolist())
        np.testing.assert_allclose(one.logprobs[one.generated], found[one.generated], atol=2e-5)
    assert all(one.context is None for one in plain)


def outcomes(group: RolloutGroup) -> list[tuple[float | None, str, int, int]]:
    """Return what does not depend on the process of a conversation, which pickles the final object."""
    found = [one.outcome for one in group.completions if one.outcome is not None]
    assert len(found) == len(group.completions)
    return [(one.reward, one.error, one.calls, one.failed_calls) for one in found]


@pytest.fixture(scope="module")
def scorer() -> Iterator[RewardScorer]:
    made = RewardScorer([Environment()], workers=WorkerOptions(num_workers=1), environment=True)
    made.start()
    yield made
    made.close()


def test_a_group_that_is_completed_after_its_pilot_is_the_group_without_pilots(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions, scorer: RewardScorer
) -> None:
    made = rollouts(model, tokenizer, sessions)
    pipeline = RolloutPipeline(made.engine, scorer, 0, nullcontext, environment=made)
    batch, seen, whole, parts = prompts(tokenizer, *[""] * 8), dict[str, RolloutGroup](), Ledger(), Ledger()
    expected = pipeline.roll(batch, SAMPLING, whole, purpose="train", step=3)

    def completed(pilot: RolloutGroup) -> bool:
        seen[pilot.prompt.id] = pilot
        return pilot.prompt.index % 2 == 0

    found = pipeline.roll_with_pilots(batch, SAMPLING, parts, step=3, pilot=2, completed=completed)
    assert [group.prompt.id for group in found] == [prompt.id for prompt in batch] and len(seen) == 8
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        size = 4 if number % 2 == 0 else 2
        for group, count in ((one, size), (seen[one.prompt.id], 2)):
            assert len(group.completions) == count
            assert all(map(same, group.completions, other.completions[:count]))
            assert outcomes(group) == outcomes(other)[:count]
            assert group.rewards.tolist() == other.rewards[:count].tolist()
    assert {len(one.turns) for group in found for one in group.completions} >= {1, 3}
    assert (whole.counts["environment/conversations"], parts.counts["environment/conversations"]) == (32, 24)
    assert parts.counts["tools/calls"] == sum(one.outcome.calls for group in found for one in group.completions)


def test_what_training_rollouts_wait_for_the_environment_is_a_phase(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sessions: Sessions, scorer: RewardScorer
) -> None:
    made = rollouts(model, tokenizer, sessions)
    pipeline = RolloutPipeline(made.engine, scorer, 0, nullcontext, environment=made)
    pipeline.roll(prompts(tokenizer, *[""] * 4), SAMPLING, Ledger(), purpose="train", step=0)  # starts processes

    def roll(kind: str, *purposes: str) -> tuple[float, Ledger, float]:
        """Return the seconds of a roll, their account, and those waited."""
        asked = [RolloutRequest(prompts(tokenizer, kind, kind), one) for one in purposes]
        ledger, before, started = Ledger(), made.waited, time.perf_counter()
        pipeline.roll_together(asked, SAMPLING, ledger, step=0)
        return time.perf_counter() - started, ledger, made.waited - before

    def roll_pilots(kind: str) -> tuple[float, Ledger, float]:
        ledger, before, started, asked = Ledger(), made.waited, time.perf_counter(), prompts(tokenizer, kind, kind)
        pipeline.roll_with_pilots(asked, SAMPLING, ledger, step=0, pilot=2, completed=lambda pilot: True)
        return time.perf_counter() - started, ledger, made.waited - before

    for rolling in (lambda kind: roll(kind, "train"), roll_pilots):
        (quick, _, little), (slow, ledger, much) = rolling(""), rolling("thinks")
        # The same tokens are generated: what the tools take longer is waited for.
        assert slow - quick > 0.15
        assert much - little == pytest.approx(slow - quick, abs=0.1)
        assert ledger.seconds["environment"] == pytest.approx(much)
        assert 0 < ledger.seconds["rollout"] < slow - much
        assert sum(ledger.seconds.values()) == pytest.approx(slow, abs=0.05)
    _, ledger, much = roll("thinks", "train", "reference")
    share = ledger.counts["train/tokens"] / (ledger.counts["train/tokens"] + ledger.counts["reference/tokens"])
    assert 0.2 < share < 0.8
    assert ledger.seconds["environment"] == pytest.approx(share * much)
    assert ledger.seconds["reference"] > (1 - share) * much
    for purpose in ("validate", "reference"):
        slow, ledger, much = roll("thinks", purpose)
        assert ledger.seconds["environment"] == 0 and slow > ledger.seconds[purpose] > much > 0.15
