"""The pool of prompts that selection draws from, and the report of how it was read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from datamodules.types import Prompt


@dataclass(frozen=True, slots=True)
class ReadReport:
    """Counts of what was read, kept and dropped. `str(report)` is one line of text.

    Attributes:
        source: name of the data and its schema.
        read: number of rows.
        kept: number of prompts in the pool.
        empty: rows without a prompt, or without the reference answer that their schema requires.
        duplicates: rows with the same rendered prompt and answer as an earlier row; where the data has no answers, with
            the same other columns.
        overlong: prompts of more than `max_prompt_length` tokens.
        max_prompt_length: None for no limit.
        by_context: whether that is what the policy's context leaves beside a completion, not the user's own limit.
        held_out: prompts moved to the validation pool.
        hidden_columns: columns not passed to rewards, because one of their arguments has the same name.
        conflicts: prompts that stand in the data with several different answers; all are kept.
        other_columns: all other columns, where none is known to hold answers and none was named.
    """

    source: str
    read: int
    kept: int
    empty: int = 0
    duplicates: int = 0
    overlong: int = 0
    max_prompt_length: int | None = None
    by_context: bool = False
    held_out: int = 0
    hidden_columns: tuple[str, ...] = ()
    conflicts: int = 0
    other_columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        too_long = f"longer than {self.max_prompt_length} tokens"
        too_long += " (what the policy's context leaves beside a completion)" if self.by_context else ""
        dropped = ((self.empty, "empty"), (self.duplicates, "duplicate"), (self.overlong, too_long))
        parts = [f"{count} {why}" for count, why in dropped if count]
        line = f"{self.source}: {self.read} rows read, {self.kept} prompts kept"
        line += f", {self.held_out} held out for validation" if self.held_out else ""
        line += f", dropped {', '.join(parts)}" if parts else ""
        line += f", {self.conflicts} with several different answers (all kept)" if self.conflicts else ""
        line += f"; not passed to rewards: {', '.join(self.hidden_columns)}" if self.hidden_columns else ""
        if self.other_columns:
            line += f"; if one of {', '.join(self.other_columns)} holds the answers, set answer_column to it"
        return line


class PromptPool(Sequence[Prompt]):
    """An ordered pool of prompts with unique ids.

    Args:
        build: returns the `Prompt` at a position on demand, since a pool may have a million of them.
        ids: `Q` unique ids.
        questions: `Q` raw question texts (may be a lazy sequence).
        report: what was read and dropped to make the pool; None for a pool that was not read.
        digests: `Q` hashes of each prompt's rendered text and answer; None for a pool that was not read.
    """

    def __init__(
        self,
        build: Callable[[int], Prompt],
        ids: Sequence[str],
        questions: Sequence[str],
        report: ReadReport | None = None,
        digests: Sequence[bytes] | None = None,
    ) -> None:
        self._build = build
        self.ids, self.questions = ids, questions
        self.report, self.digests = report, digests

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> PromptPool:
        """Make a pool of prompts that are already in memory."""
        return cls(prompts.__getitem__, [prompt.id for prompt in prompts], [prompt.question for prompt in prompts])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]  # positions only, no slices
        return self._build(range(len(self))[index])

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def _position_by_id(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.ids)}

    def positions(self, ids: Iterable[str]) -> np.ndarray:
        """Return the int64 positions of the given ids. Raises KeyError for an id that is not in the pool."""
        return np.fromiter((self._position_by_id[name] for name in ids), dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ids and questions in order. Pools with equal fingerprints give equal selections."""
        digest = hashlib.blake2b(digest_size=16)
        for name, question in zip(self.ids, self.questions, strict=True):
            digest.update(f"{len(name)}:{name}{len(question)}:{question}".encode())
        return digest.hexdigest()

    def content(self, *, in_order: bool) -> str:
        """Return a hash of what the prompts say, answers included; independent of their order unless `in_order`."""
        digests = self.digests or [hashlib.blake2b(question.encode()).digest() for question in self.questions]
        joined = b"".join(digests if in_order else sorted(digests))
        return hashlib.blake2b(joined, digest_size=16).hexdigest()
