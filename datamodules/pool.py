"""The set of prompts that selection draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from datamodules.report import ReadReport
from datamodules.types import Prompt


class PromptRows(Protocol):
    """Random access to prompts, made on demand (a million tokenised prompts need not be alive at once)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Prompt: ...


class PromptPool(Sequence[Prompt]):
    """An ordered pool of prompts with unique ids.

    Args:
        rows: makes the `Prompt` of a position.
        ids: `Q` unique ids, in order.
        questions: `Q` raw question texts, in order (may be a lazy sequence).
        report: what was read and dropped to make the pool; None for one that was not read.
        digests: bytes `[Q]`: a hash of each prompt's rendered text and answer; None for a pool that was not read.
    """

    def __init__(
        self,
        rows: PromptRows,
        ids: Sequence[str],
        questions: Sequence[str],
        report: ReadReport | None = None,
        digests: Sequence[bytes] | None = None,
    ) -> None:
        self._rows = rows
        self.ids = ids
        self.questions = questions
        self.report = report
        self.digests = digests

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> PromptPool:
        """A pool of prompts that are already in memory."""
        return cls(prompts, [prompt.id for prompt in prompts], [prompt.question for prompt in prompts])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]  # positions only, no slices
        return self._rows[int(index)]

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.ids)}

    def positions(self, ids: Iterable[str]) -> np.ndarray:
        """int64 positions of the given ids. Raises KeyError for an id that is not in the pool."""
        return np.fromiter((self._position[name] for name in ids), dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids and questions in order: two pools with the same one select alike."""
        digest = hashlib.blake2b(digest_size=16)
        for name, question in zip(self.ids, self.questions, strict=True):
            digest.update(f"{len(name)}:{name}{len(question)}:{question}".encode())
        return digest.hexdigest()

    def content(self, *, in_order: bool) -> str:
        """Hash of what the prompts say, answers included: of another order the same, unless `in_order`."""
        digests = self.digests or [hashlib.blake2b(question.encode()).digest() for question in self.questions]
        joined = b"".join(digests if in_order else sorted(digests))
        return hashlib.blake2b(joined, digest_size=16).hexdigest()
