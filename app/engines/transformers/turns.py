"""Generation of the policy's turns of conversations, each of which begins with the keys and values of the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from app.engines.base import Sampling
from app.engines.transformers.generation import Generation
from app.engines.transformers.schedule import PromptRows
from app.engines.transformers.shared_cache import SharedContextCache
from app.engines.turns import Conversations, TurnRequest
from app.policy.modes import attending

if TYPE_CHECKING:  # the engine makes generations
    from app.engines.transformers.engine import Transformers


class TurnGeneration(Generation):
    """The state of one `converse` call: a generation whose rows leave for the environment and come back.

    The keys and values of a row that leaves stay in the cache; when the environment has answered, the model reads only
    what is new. Answers are waited for when an eighth of the conversations have one coming, or when nothing else is
    left to do: moments that depend on the tokens alone, so that the same seeds give the same batches.

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

    @property
    def parked(self) -> dict[int, int]:
        """The conversations whose keys and values are kept while the environment answers."""
        return self.cache.parked if isinstance(self.cache, SharedContextCache) else {}

    @property
    def free_rows(self) -> int:
        return super().free_rows - len(self.parked)  # each of them has a place to come back to

    def leave(self, rows: np.ndarray) -> None:
        numbers = self.rows.sample[rows]
        if isinstance(self.cache, SharedContextCache):
            self.cache.park(rows, numbers)
        turns = self.completions(numbers)
        self.lengths[numbers] = 0
        for number, turn in zip(numbers.tolist(), turns, strict=True):
            self.conversations.ended(number, turn)

    def queue_more(self) -> None:
        waiting = self.conversations.outstanding
        active = len(self.rows) + sum(len(one.samples) for one in (*self.waiting, *self.returning))
        nothing_begins = not self.waiting or len(self.waiting[0].samples) > self.free_rows
        idle = not len(self.rows) and not self.returning and nothing_begins
        if waiting and (idle or 8 * waiting >= active + waiting):
            self._queue(self.conversations.next())
        if isinstance(self.cache, SharedContextCache) and not self.conversations.outstanding:
            self.cache.forget(self.parked.keys() - {int(one.samples[0]) for one in self.returning})

    def _queue(self, requests: Sequence[TurnRequest]) -> None:
        """Queue turns that can begin."""
        for request in requests:
            number = request.conversation
            if len(request.prompt.token_ids) + request.limit > self.longest:
                self.too_long.append(request)
                continue
            self.seeds[number], self.limits[number] = request.seed, request.limit
            queue = self.returning if number in self.parked else self.waiting
            queue.append(PromptRows(request.prompt.token_ids, np.array([number])))
        self.returning = deque(sorted(self.returning, key=self._news, reverse=True))

    def _news(self, one: PromptRows) -> int:
        """Return how many tokens the model has not read of a conversation that comes back."""
        assert isinstance(self.cache, SharedContextCache)
        return len(one.token_ids) - int(self.cache.lengths[self.parked[int(one.samples[0])]])

    def admit(self) -> None:
        while bucket := self._next_to_return():
            self._read_on(bucket)
        super().admit()

    def _next_to_return(self) -> list[PromptRows]:
        """Remove conversations with similarly much to read (at least half the most) from those that come back.

        None of them is shorter than the most that is to be read.
        """
        bucket: list[PromptRows] = []
        most = self._news(self.returning[0]) if self.returning else 0
        room = max(1, self.engine.prefill_tokens // max(1, most))
        while self.returning and len(bucket) < room:
            one = self.returning[0]
            if 2 * self._news(one) < most or len(one.token_ids) < most:
                break
            bucket.append(self.returning.popleft())
        return bucket

    def _read_on(self, bucket: Sequence[PromptRows]) -> None:
        """Read what is new to conversations whose keys and values are kept, and draw the first tokens of their turns.

        All rows read as many tokens as the one with the most news: others read some again, which pads less.
        """
        assert isinstance(self.cache, SharedContextCache)
        bucket = sorted(bucket, key=lambda one: self.parked[int(one.samples[0])])  # adjacent ones are not copied
        numbers = np.concatenate([one.samples for one in bucket])
        lengths = np.array([len(one.token_ids) for one in bucket])
        new = max(map(self._news, bucket))
        tokens = self.to_device(np.array([one.token_ids[-new:] for one in bucket]))
        positions = self.to_device(lengths[:, None] - new + np.arange(new))
        with attending(self.lm, self.cache.attention):
            logits = self.engine.forward(tokens, positions, **self.cache.reading(numbers.tolist(), lengths, new))
        self.cache.resume(numbers.tolist())
        self.begin(numbers, lengths, logits)
