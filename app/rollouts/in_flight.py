"""Completions that are generated in segments, each by the policy of its time (partial rollouts)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from app.engines import Sampling
from datamodules.seeding import derive_seed, sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup

_NOTHING = Completion(np.empty(0, np.int32), np.empty(0, np.float32), "length", 0, "")


@dataclass(frozen=True, slots=True, eq=False)
class InFlight:
    """A prompt that was chosen ahead of its step and has not been trained on yet.

    Attributes:
        group: its completions so far, each with the log-probabilities and the version of the policies that generated
            it; without rewards until it is scored. `birth_step` is the step in which its first tokens were generated.
        segments: number of segments generated so far.
        scored: whether all completions are complete and scored, so that the group can be trained on.
        forecast: success rate that the selector expected of the prompt when it was chosen, or NaN.
        explored: the selector chose it by uniform exploration.
    """

    group: RolloutGroup
    segments: int = 0
    scored: bool = False
    forecast: float = float("nan")
    explored: bool = False

    @classmethod
    def begin(cls, prompt: Prompt, generations: int, step: int, forecast: float, explored: bool) -> InFlight:
        """Return a prompt whose `generations` completions begin in a step."""
        none = np.zeros(generations, np.float32)
        group = RolloutGroup(prompt, (_NOTHING,) * generations, none, none, {}, "fresh", step)
        return cls(group, forecast=forecast, explored=explored)

    def unfinished(self, sampling: Sampling) -> list[int]:
        """Return the positions of the completions that have neither ended nor reached the length limit."""
        return [
            sample
            for sample, one in enumerate(self.group.completions if not self.scored else ())
            if one.finish_reason == "length" and len(one.token_ids) < sampling.max_completion_length
        ]

    def requests(self, sampling: Sampling, segment: int) -> list[SegmentRequest]:
        """Return what is to be generated for its next segment of up to `segment` tokens per completion.

        The first segments of a prompt are one request for `G` samples. A completion is continued by a request of its
        own, whose prompt ends with its tokens.
        """
        limit, open_ = sampling.max_completion_length, self.unfinished(sampling)
        if not self.segments:
            return [SegmentRequest(self.group.prompt, tuple(open_), min(segment, limit))]
        found = []
        for sample in open_:
            tokens = self.group.completions[sample].token_ids
            prompt = dataclasses.replace(self.group.prompt, token_ids=(*self.group.prompt.token_ids, *map(int, tokens)))
            found.append(SegmentRequest(prompt, (sample,), min(segment, limit - len(tokens))))
        return found

    def seeds(self, run_seed: int, samples: Sequence[int]) -> np.ndarray:
        """Return the seeds of the next segment of some completions, int64 `[len(samples)]`.

        Those of first segments are the seeds of completions that are generated as a whole.
        """
        prompt, step = self.group.prompt.id, self.group.birth_step + 1  # the step that it was chosen for
        seeds = sample_seeds(run_seed, "train", step, [prompt], len(self.group.completions))[0][list(samples)]
        if self.segments:
            seeds = np.array([derive_seed("segment", int(seed), self.segments) for seed in seeds], dtype=np.int64)
        return seeds

    def grown(
        self, segments: Mapping[int, Completion], sampling: Sampling, tokenizer: PreTrainedTokenizerBase
    ) -> InFlight:
        """Return it with the next segment of some completions appended, by their positions."""
        completions = tuple(
            joined(one, segments[sample], sampling.stop, tokenizer) if sample in segments else one
            for sample, one in enumerate(self.group.completions)
        )
        group = dataclasses.replace(self.group, completions=completions)
        return dataclasses.replace(self, group=group, segments=self.segments + 1)


@dataclass(frozen=True, slots=True, eq=False)
class SegmentRequest:
    """What an engine is asked for: up to `limit` tokens after a prompt, for the completions at `samples`."""

    prompt: Prompt
    samples: tuple[int, ...]
    limit: int

    def apart(self) -> list[SegmentRequest]:
        """Return a request for each of its completions."""
        return [SegmentRequest(self.prompt, (sample,), self.limit) for sample in self.samples]


def joined(
    before: Completion, segment: Completion, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """Return a completion with its next segment appended.

    Engines look for stop strings within a segment. One that begins before the segment ends the completion here, at the
    token that completes it, as if it had been generated at once. The version is that of the oldest segment.

    Args:
        before: the completion so far; without tokens before the first segment.
        segment: the tokens after it.
        stop: strings that end a completion.
        tokenizer: decodes the tokens.
    """
    if not len(before.token_ids):
        return segment
    kept, reason = len(segment.token_ids), segment.finish_reason
    longest = max((len(one.encode()) for one in stop), default=0)
    # Some more tokens than the string has bytes keep it clear of a tail that begins within a character.
    tail = before.token_ids[-(longest + 8) :].tolist()
    for count in range(1, min(kept, longest) + 1 if longest else 0):
        text = tokenizer.decode([*tail, *segment.token_ids[:count].tolist()])
        if any(one in text for one in stop if one):
            kept, reason = count, "stop"
            break
    token_ids = np.concatenate([before.token_ids, segment.token_ids[:kept]])
    text = tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(
        token_ids=token_ids,
        logprobs=np.concatenate([before.logprobs, segment.logprobs[:kept]]),
        finish_reason=reason,
        policy_version=before.policy_version,
        text=text,
    )
