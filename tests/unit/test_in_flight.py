"""Completions in segments: what is asked for next, how segments join, and what stop strings on a border do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from app.engines import Sampling, Transformers
from app.rewards import Exact, RewardScorer
from app.rollouts.in_flight import InFlight, joined
from app.rollouts.pipeline import RolloutPipeline
from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.ledger import Ledger
from datamodules.pool import PromptPool
from datamodules.seeding import derive_seed, sample_seeds
from datamodules.types import Completion, Prompt
from tests.support.builders import prompt
from tests.support.policies import TINY
from tests.support.selector_builders import saved_and_loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(TINY).eval()
    return found


def segment(ids: Sequence[int], first: float, finish: str = "length", version: int = 0, text: str = "") -> Completion:
    logprobs = first - np.arange(len(ids), dtype=np.float32)
    return Completion(np.array(ids, dtype=np.int32), logprobs, finish, version, text)  # type: ignore[arg-type]


def test_what_is_asked_for_next() -> None:
    sampling = Sampling(num_generations=3, max_completion_length=5)
    begun = InFlight.begin(prompt(0), 3, step=4, forecast=0.25, explored=True)
    (first,) = begun.requests(sampling, 2)
    assert (first.prompt.token_ids, first.samples, first.limit) == ((1, 2, 3), (0, 1, 2), 2)
    whole = sample_seeds(7, "train", 5, ["p0"], 3)[0]  # those of a step that chooses the prompt for itself
    assert list(begun.seeds(7, (0, 1, 2))) == list(whole)
    (uncut,) = begun.requests(sampling, 9)
    assert uncut.limit == 5
    grown = begun.grown({0: segment([4, 5], 0), 1: segment([1], 0, "stop"), 2: segment([6, 7], 0)}, sampling, None)  # type: ignore[arg-type]
    assert grown.segments == 1 and grown.unfinished(sampling) == [0, 2]
    assert [(one.prompt.token_ids, one.samples, one.limit) for one in grown.requests(sampling, 2)] == [
        ((1, 2, 3, 4, 5), (0,), 2), ((1, 2, 3, 6, 7), (2,), 2),
    ]  # fmt: skip
    assert [one.limit for one in grown.requests(sampling, 9)] == [3, 3]  # of the five that a completion may have
    assert list(grown.seeds(7, (0, 2))) == [derive_seed("segment", int(whole[sample]), 1) for sample in (0, 2)]
    # As a checkpoint keeps it, nothing changes.
    (restored,) = unpack_groups(saved_and_loaded(pack_groups([grown.group])), PromptPool.of([prompt(0)]))
    again = InFlight(restored, 1, False, 0.25, True)
    assert again.requests(sampling, 2)[1].prompt.token_ids == (1, 2, 3, 6, 7) and restored.birth_step == 4
    assert list(again.seeds(7, (0, 2))) == list(grown.seeds(7, (0, 2)))
    assert [list(one.logprobs) for one in restored.completions] == [[0, -1], [0], [0, -1]]


def test_a_longer_completion_has_the_log_probabilities_and_the_text_of_all_segments(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = tokenizer("é = 12", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7  # é has two bytes, and so two tokens
    end = tokenizer.eos_token_id
    first = segment(ids[:1], -1.0, version=3, text="?")
    second = joined(first, segment(ids[1:4], -5.0, version=4), (), tokenizer)
    third = joined(second, segment([*ids[4:], end], -20.0, "stop", version=5), (), tokenizer)
    assert third.token_ids.tolist() == [*ids, end] and third.token_ids.dtype == np.int32
    assert third.logprobs.tolist() == [-1, -5, -6, -7, -20, -21, -22, -23] and third.logprobs.dtype == np.float32
    assert third.text == "é = 12" and second.text == "é ="
    assert (second.finish_reason, third.finish_reason) == ("length", "stop")
    assert (second.policy_version, third.policy_version) == (3, 3)


@pytest.mark.parametrize(
    ("before", "after", "stop", "kept", "reason"),
    [
        ("ab", "cd ef", ["bc"], 1, "stop"),  # begins before the border
        ("ab", "cd ef", ["d e"], 5, "length"),  # within the segment: the engine's to find
        ("ab", "cdef", ["xy", "abcd"], 2, "stop"),
        ("ab", "cdef", ["bcx"], 4, "length"),
        ("ab", "cdef", ["", "b"], 4, "length"),  # it would have ended before
        ("aé", "éb", ["éé"], 2, "stop"),  # all bytes of a character
        ("a b", "c", ["bc"], 1, "stop"),
        ("ab", "cd", [], 2, "length"),
    ],
)
def test_a_stop_string_across_a_border_ends_the_completion(
    tokenizer: PreTrainedTokenizerBase, before: str, after: str, stop: list[str], kept: int, reason: str
) -> None:
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    if stop == ["", "b"]:
        first = tokenizer("a", add_special_tokens=False)["input_ids"]
        second, stop = tokenizer("xdef", add_special_tokens=False)["input_ids"], ["", "z"]
    found = joined(segment(first, 0.0), segment(second, -9.0), stop, tokenizer)
    assert found.token_ids.tolist() == [*first, *second[:kept]]
    assert len(found.logprobs) == len(found.token_ids) and found.finish_reason == reason


def of_text(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[Prompt]:
    return [
        Prompt(f"p{number}", number, text, text, tuple(tokenizer(text)["input_ids"]), {"answer": "1"})
        for number, text in enumerate(questions)
    ]


def in_segments(
    pipeline: RolloutPipeline, prompts: Sequence[Prompt], sampling: Sampling, size: int
) -> list[tuple[Completion, ...]]:
    """Return completions generated in segments of `size` tokens, all by the same weights."""
    flights = [InFlight.begin(one, sampling.num_generations, 0, float("nan"), False) for one in prompts]
    while open_ := [one for one in flights if one.unfinished(sampling)]:
        started = pipeline.start(open_, sampling, [size] * len(open_), step=0)
        grown = {one.group.prompt.id: one for one in pipeline.collect(started, sampling, Ledger(), step=0)}
        flights = [grown.get(one.group.prompt.id, one) for one in flights]
    return [one.group.completions for one in flights]


def test_segments_join_to_what_is_generated_at_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Transformers()
    engine.setup(model, tokenizer)
    pipeline = RolloutPipeline(engine, RewardScorer([Exact()]), 0, nullcontext)
    prompts = of_text(tokenizer, ["Spell this word backward (example: sun -> nus): house\n", "3 + 4 + 9 =\n"])

    def generate(sampling: Sampling) -> list[tuple[Completion, ...]]:
        return engine.generate(prompts, sampling, sample_seeds(0, "train", 1, ["p0", "p1"], 2))

    greedy = Sampling(num_generations=2, max_completion_length=30, temperature=0)
    whole = generate(greedy)
    assert {one.finish_reason for group in whole for one in group} >= {"stop"}
    longest = max(len(one.token_ids) for group in whole for one in group)
    assert longest > 6
    for size in (1, 2, 5, 30):
        for found, expected in zip(in_segments(pipeline, prompts, greedy, size), whole, strict=True):
            for one, other in zip(found, expected, strict=True):
                assert one.token_ids.tolist() == other.token_ids.tolist(), size
                assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
                assert not one.logprobs.any()  # a greedy draw is certain
    limits = np.array([[1, 30], [2, 3]])
    limited = engine.generate(prompts, greedy, sample_seeds(0, "train", 1, ["p0", "p1"], 2), limits)
    for found, expected, its in zip(limited, whole, limits, strict=True):
        for one, other, limit in zip(found, expected, its, strict=True):
            assert one.token_ids.tolist() == other.token_ids[:limit].tolist()
            assert one.finish_reason == ("length" if len(other.token_ids) > limit else other.finish_reason)
    # A stop string of four characters, across borders of every place in it.
    stopping = Sampling(num_generations=2, max_completion_length=30, temperature=0, stop=[whole[0][0].text[1:5]])
    stopped = generate(stopping)
    assert len(stopped[0][0].token_ids) < len(whole[0][0].token_ids)
    for size in (1, 2, 3, 4):
        found = in_segments(pipeline, prompts, stopping, size)
        assert [[one.token_ids.tolist() for one in group] for group in found] == [
            [one.token_ids.tolist() for one in group] for group in stopped
        ]
        assert [[one.finish_reason for one in group] for group in found] == [
            [one.finish_reason for one in group] for group in stopped
        ]
    drawn = Sampling(num_generations=2, max_completion_length=12, temperature=1.5)
    found = in_segments(pipeline, prompts, drawn, 4)
    for group, of in zip(found, prompts, strict=True):
        for one in group:
            assert len(one.token_ids) <= 12
            assert one.finish_reason == "stop" or len(one.token_ids) == 12
            ids = torch.tensor([[*of.token_ids, *one.token_ids.tolist()]])
            with torch.no_grad():
                scores = (model(ids).logits[0, len(of.token_ids) - 1 : -1] / 1.5).log_softmax(-1)
            right = scores.gather(1, ids[0, len(of.token_ids) :, None]).squeeze(1)
            np.testing.assert_allclose(one.logprobs, right.numpy(), atol=1e-4)
    first = [[one.token_ids[:4].tolist() for one in group] for group in generate(drawn)]
    assert [[one.token_ids[:4].tolist() for one in group] for group in found] == first
