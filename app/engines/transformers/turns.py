"""Generation of the policy's turns of conversations, each of which begins with the keys and values of the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from app.engines.base import Sampling
from app.engines.transformers.generation import Generation
from app.engines.transformers.kv_cache import PrefilledCache
from app.engines.transformers.schedule import PromptRows
from app.engines.transformers.shared_cache import SharedPromptCache
from app.engines.turns import Conversations, TurnRequest

if TYPE_CHECKING:  # the engine makes generations
    from app.engines.transformers.engine import Transformers

States = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, `[layers, key_value_heads, tokens, head_dim]`."""


class TurnGeneration(Generation):
    """The state of one `converse` call: a generation whose rows leave for the environment and come back.

    A row that leaves takes its keys and values along; when the environment has answered, the model reads only what is
    new. Answers are waited for when an eighth of the conversations have one coming, or when nothing else is left to do:
    moments that depend on the tokens alone, so that the same seeds give the same batches.

    Args:
        engine: its options, policy and tokenizer.
        conversations: begun.
        requests: their first turns, at least one.
        sampling: the distribution of a turn; `num_generations` is 1.
    """

    def __init__(
        self, engine: Transformers, conversations: Conversations, requests: Sequence[TurnRequest], sampling: Sampling
    ) -> None:
        count = len(conversations)
        seeds, limits = np.zeros((2, count, 1), dtype=np.int64)
        first = {request.conversation: request for request in requests}
        for number, request in first.items():
            seeds[number], limits[number] = request.seed, request.limit
        self.conversations, self.longest = conversations, conversations.longest
        self.too_long: list[TurnRequest] = []
        """Turns of conversations for which the buffers are too short, which the next generation takes."""
        self.states: dict[int, States] = {}
        """Of the conversations that wait for the environment, by number."""
        self.returning: deque[PromptRows] = deque()
        super().__init__(
            engine, [request.prompt for request in requests], sampling, seeds, limits, longest=self.longest
        )
        # The queue numbers the requests; its rows are conversations.
        numbers = np.array(list(first))
        self.waiting = deque(PromptRows(one.token_ids, numbers[one.samples]) for one in self.waiting)

    @classmethod
    def of(cls, engine: Transformers, conversations: Conversations, sampling: Sampling) -> None:
        """Generate the turns of conversations until all have ended."""
        requests = conversations.begin()
        while not requests and conversations.outstanding:
            requests = conversations.next()
        while requests:
            generation = cls(engine, conversations, requests, sampling)
            generation.run()
            requests = generation.too_long

    @property
    def expects_more(self) -> bool:
        return bool(self.returning) or self.conversations.outstanding > 0

    def leave(self, rows: np.ndarray) -> None:
        numbers = self.rows.sample[rows]
        if isinstance(self.cache, SharedPromptCache):
            self.states |= zip(numbers.tolist(), self.cache.states_of(rows), strict=True)
        turns = self.completions(numbers)
        self.lengths[numbers] = 0
        for number, turn in zip(numbers.tolist(), turns, strict=True):
            self.conversations.ended(number, turn)

    def queue_more(self) -> None:
        waiting = self.conversations.outstanding
        active = len(self.rows) + sum(len(one.samples) for one in (*self.waiting, *self.returning))
        if not waiting or (active and 8 * waiting < active + waiting):
            return
        for request in self.conversations.next():
            number = request.conversation
            if len(request.prompt.token_ids) + request.limit > self.longest:
                self.too_long.append(request)
                continue
            self.seeds[number], self.limits[number] = request.seed, request.limit
            queue = self.returning if number in self.states else self.waiting
            queue.append(PromptRows(request.prompt.token_ids, np.array([number])))
        self.returning = deque(sorted(self.returning, key=self._news, reverse=True))

    def _news(self, one: PromptRows) -> int:
        """Return how many tokens the model has not read of a conversation that comes back."""
        keys, _ = self.states[int(one.samples[0])]
        return len(one.token_ids) - keys.shape[2]

    def admit(self) -> None:
        while self.cache.can_join and (bucket := self._next_to_return()):
            self.begin_rows(bucket, *self._read_on(bucket))
        super().admit()

    def _next_to_return(self) -> list[PromptRows]:
        """Remove conversations with similarly much to read (at least half the most) from those that come back."""
        bucket: list[PromptRows] = []
        most = self._news(self.returning[0]) if self.returning else 0
        room = min(self.max_rows - len(self.rows), max(1, self.engine.prefill_tokens // max(1, most)))
        while self.returning and len(bucket) < room and 2 * self._news(self.returning[0]) >= most:
            bucket.append(self.returning.popleft())
        return bucket

    def _read_on(self, bucket: Sequence[PromptRows]) -> tuple[torch.Tensor, PrefilledCache]:
        """Read what is new to conversations whose states are kept; returns what `prefill` does.

        All rows read as many tokens as the one with the most news: others read some again, which pads less.
        """
        states = [self.states.pop(int(one.samples[0])) for one in bucket]
        lengths = np.array([len(one.token_ids) for one in bucket])
        new = int(max(length - its[0].shape[2] for length, its in zip(lengths, states, strict=True)))
        kept = (lengths - new).clip(min=0)
        longest = int(kept.max())
        past = PrefilledCache(config=self.lm.config)
        padded = []
        for part in (0, 1):
            layers, heads, _, width = states[0][part].shape
            rows = states[0][part].new_zeros(layers, len(bucket), heads, longest, width)
            for row, (its, size) in enumerate(zip(states, kept.tolist(), strict=True)):
                rows[:, row, :, longest - size :] = its[part][:, :, :size]
            padded.append(rows)
        for layer, (keys, values) in enumerate(zip(*padded, strict=True)):
            past.update(keys, values, layer)
        tokens = np.zeros((len(bucket), new), dtype=np.int64)
        for row, one in enumerate(bucket):
            its_new = one.token_ids[-new:]
            tokens[row, new - len(its_new) :] = its_new
        positions = (np.arange(longest, longest + new) - (longest + new - lengths)[:, None]).clip(min=0)
        seen = np.arange(longest + new) >= (longest + new - lengths)[:, None]
        mask = None if seen.all() else self.to_device(seen.astype(np.int64))
        logits = self.engine.forward(
            self.to_device(tokens), self.to_device(positions), attention_mask=mask, past_key_values=past
        )
        return logits, past
