"""Turns of conversations, compared with plain forwards over whole conversations and with the engine's own rounds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engines import Sampling, Transformers
from app.engines.base import RolloutEngine
from app.engines.transformers import step_graphs
from app.engines.transformers.shared_cache import SharedContextCache
from app.engines.turns import TurnRequest
from tests.support.recorded_step import Recorder
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
    assert gap_of_turns(model, talks, 0.9) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_logprobs_after_ten_updates(dtype: torch.dtype, tolerance: float) -> None:
    """Recorded log-probabilities are float32, which is all that parts them from those of a float64 forward."""
    model = build("qwen2").to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    made = engine(model)
    for _ in range(10):
        talks = conversed(made)
        for talk in talks.talks:  # the policy is taught what it wrote, more or less strongly
            ids = torch.tensor([[*talk.prompt.token_ids, *talk.tokens]])
            (talk.seed % 3 * model(ids, labels=ids).loss / len(talks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = gap_of_turns(model, talks, 0.9)
    assert before > 0.1  # of the weights before the last update
    assert gap_of_turns(model, conversed(made), 0.9) < tolerance


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


@pytest.mark.parametrize("max_rows", [4, 6, 12])
def test_conversations_that_wait_take_no_more_than_the_rows_places(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers have a place for `max_rows` contexts: those that are read, and those that wait for an answer."""
    model, most = build("qwen2"), [0, 0]
    place = SharedContextCache._place_rows

    def noted(self: SharedContextCache) -> None:
        place(self)
        assert len(self.lengths) <= self.max_contexts <= max_rows
        most[:] = max(most[0], len(self.lengths)), max(most[1], len(self.parked))

    monkeypatch.setattr(SharedContextCache, "_place_rows", noted)
    talks = conversed(engine(model, max_rows=max_rows))
    assert gap_of_turns(model, talks, 0.9) < 1e-5
    assert max_rows // 2 < most[0] <= max_rows and most[1] > 1


@pytest.mark.parametrize("mixed", [False, True])
def test_turns_of_recorded_steps_are_the_same(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the layout of CUDA graphs, whose buffers stay where they are, replayed by a recorder."""
    model, recorder = build("qwen2"), Recorder()
    monkeypatch.setattr(step_graphs, "COLUMNS", 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        usual = conversed(engine(model, max_rows=8))
        monkeypatch.setattr("app.engines.transformers.generation.capture_on", lambda *_: recorder)
        replayed = conversed(engine(model, max_rows=8))
    assert recorder.captured > 3 and recorder.replayed > 20
    same = sum(a.tokens == b.tokens for a, b in zip(usual.talks, replayed.talks, strict=True))
    assert same >= (0.8 if mixed else 1) * len(usual.talks)
    if not mixed:
        assert gap_of_turns(model, replayed, 0.9) < 1e-5


def test_what_is_kept_of_a_conversation_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of log-probabilities must fail where a conversation comes back with the states of other tokens."""
    model = build("qwen2")
    park = SharedContextCache.park

    def mixed(self: SharedContextCache, rows: np.ndarray, conversations: np.ndarray) -> None:
        park(self, rows, conversations)
        for conversation in conversations.tolist():
            context = self.parked[conversation]
            for layer in self.contexts:
                its = layer.keys[context, :, : self.lengths[context]]
                its.copy_(its.flip(1))

    monkeypatch.setattr(SharedContextCache, "park", mixed)
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
    assert gap_of_turns(model, talks, 0.9) < 1e-5
