"""Turns of conversations, compared with plain forwards over whole conversations and with the engine's own rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engines import Sampling, Transformers
from app.engines.base import RolloutEngine
from app.engines.transformers import turns as turns_module
from app.engines.turns import TurnRequest
from tests.support.scripted_conversations import ScriptedConversations, gap_of_turns
from tests.unit.test_transformers_engine import LENGTHS, SEEDS, build, engine, prompts

SAMPLING = Sampling(num_generations=1, max_completion_length=8, temperature=0.9)


def conversed(made: Transformers, **options: int) -> ScriptedConversations:
    talks = ScriptedConversations(prompts(LENGTHS), SEEDS, **options)
    made.converse(talks, SAMPLING)
    return talks


@pytest.mark.parametrize("name", ["qwen2", "llama", "gpt2", "sliding", "lora"])
@pytest.mark.parametrize("options", [{}, {"max_rows": 6}, {"max_rows": 3, "prefill_tokens": 20}])
def test_logprobs_are_those_of_a_plain_forward_over_the_conversation(name: str, options: dict[str, int]) -> None:
    model = build(name)
    talks = conversed(engine(model, **options))
    assert {len(talk.turns) for talk in talks.talks} == {1, 2, 3, 4}
    for number, talk in enumerate(talks.talks):
        assert len(talk.turns) == 1 + number % 4 == 1 + len(talk.replies)
        assert all(len(turn.token_ids) <= 8 - number % 3 for turn in talk.turns)
    assert gap_of_turns(model, talks, 0.9) < 2e-5


@pytest.mark.parametrize("name", ["qwen2", "sliding"])
def test_conversations_are_those_of_plain_rounds_whatever_the_batch(name: str) -> None:
    model = build(name)
    rounds = ScriptedConversations(prompts(LENGTHS), SEEDS)
    RolloutEngine.converse(engine(model), rounds, SAMPLING)
    for options in ({}, {"max_rows": 5}):
        talks = conversed(engine(model, **options))
        for ours, theirs in zip(talks.talks, rounds.talks, strict=True):
            assert ours.tokens == theirs.tokens
    reverse = ScriptedConversations(prompts(LENGTHS)[:2], SEEDS[:2])
    engine(model).converse(reverse, SAMPLING)
    for ours, theirs in zip(reverse.talks, rounds.talks, strict=False):
        assert ours.tokens == theirs.tokens


def test_the_model_reads_each_token_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = build("qwen2"), 0
    forward = Transformers.forward

    def counted(self: Transformers, input_ids: torch.Tensor, *others: object, **cached: object) -> torch.Tensor:
        nonlocal read
        read += input_ids.numel()
        return forward(self, input_ids, *others, **cached)

    monkeypatch.setattr(Transformers, "forward", counted)
    talks = conversed(engine(model))
    ours, read = read, 0
    RolloutEngine.converse(engine(model), ScriptedConversations(prompts(LENGTHS), SEEDS), SAMPLING)
    tokens = sum(map(len, {talk.prompt.token_ids for talk in talks.talks}))
    tokens += sum(len(talk.tokens) for talk in talks.talks)
    assert ours < 1.6 * tokens < read  # rows of unlike lengths are padded


def test_what_is_kept_of_a_conversation_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of log-probabilities must fail where a conversation comes back with the states of other tokens."""
    model = build("qwen2")
    keep = turns_module.TurnGeneration.leave

    def mixed(self: turns_module.TurnGeneration, rows: np.ndarray) -> None:
        keep(self, rows)
        for number, (keys, values) in self.states.items():
            self.states[number] = keys.flip(2), values

    monkeypatch.setattr(turns_module.TurnGeneration, "leave", mixed)
    talks = conversed(engine(model))
    assert gap_of_turns(model, talks, 0.9) > 2e-4


def test_stop_strings_end_a_turn() -> None:
    model = build("qwen2")
    talks = ScriptedConversations(prompts(LENGTHS), SEEDS)
    letters = engine(model).tokenizer
    stop = [letters.decode([token]) for token in range(2, 20)]
    engine(model).converse(talks, replace(SAMPLING, stop=stop))
    stopped = [turn for talk in talks.talks for turn in talk.turns if turn.finish_reason == "stop"]
    assert len(stopped) > 10
    assert all(turn.token_ids[-1] in (1, *range(2, 20)) for turn in stopped)
    assert not any(set(turn.token_ids[:-1].tolist()) & set(range(1, 20)) for talk in talks.talks for turn in talk.turns)


class LateConversations(ScriptedConversations):
    """Conversations of which all but the first begin later, with prompts that nobody knew to be so long."""

    begun = 1

    @property
    def longest(self) -> int:
        known = max(len(talk.prompt.token_ids) for talk in self.talks[: self.begun])
        return known + self.turns * (self.limit + self.longest_reply)

    def begin(self) -> list[TurnRequest]:
        self._asked.update(range(1, len(self.talks)))
        return [self._request(0)]

    def next(self, wait: bool = True) -> list[TurnRequest]:
        late = sorted(self._asked - set(range(self.begun)))
        self.begun = len(self.talks)
        self._asked -= set(late)
        return sorted([*super().next(wait), *map(self._request, late)], key=lambda one: one.conversation)


@pytest.mark.parametrize("name", ["qwen2", "sliding"])
def test_conversations_with_longer_prompts_than_were_known_come_after_the_others(name: str) -> None:
    model, batch = build(name), prompts([3, 60, 200, 9])
    talks = LateConversations(batch, SEEDS[:4], turns=2, limit=6, longest_reply=4)
    engine(model).converse(talks, replace(SAMPLING, max_completion_length=6))
    known = ScriptedConversations(batch, SEEDS[:4], turns=2, limit=6, longest_reply=4)
    engine(model).converse(known, replace(SAMPLING, max_completion_length=6))
    assert [talk.tokens for talk in talks.talks] == [talk.tokens for talk in known.talks]
    assert gap_of_turns(model, talks, 0.9) < 2e-5
