"""One pass over a table that decides which rows become prompts; the prompts themselves are made when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.schemas import REWARD_ARGUMENTS, Row, Schema, lookup, question_of
from datamodules.prompts.tables import Table, batches
from datamodules.prompts.templates import Renderer
from datamodules.report import ReadReport
from datamodules.types import Messages, Prompt


def read_pool(
    table: Table, schema: Schema, renderer: Renderer, source: str, max_prompt_length: int | None = None
) -> PromptPool:
    """The pool of a table's usable rows, in their order, with its `ReadReport`.

    Dropped and counted: rows without prompt (or without the answer that they should have), rows whose rendered text
    and answer an earlier row has, prompts of more than `max_prompt_length` tokens.

    Raises UserError when nothing remains, or when a row's prompt is neither text nor messages.
    """
    scan = _Scan(schema, renderer, source, max_prompt_length)
    names = table.rows([0])[0].keys() if len(table) else ()
    for positions, rows in batches(table.narrow(schema.sources), np.arange(len(table))):
        scan.take(positions, rows)
    report = ReadReport(
        source=f"{source} ({schema})",
        read=len(table),
        kept=len(scan.kept),
        empty=scan.empty,
        duplicates=scan.duplicates,
        overlong=scan.overlong,
        max_prompt_length=max_prompt_length,
        hidden_columns=tuple(sorted(REWARD_ARGUMENTS & set(names))),
    )
    if not scan.kept:
        raise UserError(f"no prompt is left: {report}; give other data or raise max_prompt_length")
    kept = np.array(scan.kept, dtype=np.int64)
    ids = _unique_ids(scan.names, scan.digests, schema.id_is_index)
    prompts = _PoolRows(table, kept, ids, schema, renderer)
    return PromptPool(prompts, ids, Questions(table, kept, schema), report, scan.keys)


@dataclass
class _Scan:
    """What is known of the rows seen so far."""

    schema: Schema
    renderer: Renderer
    source: str
    max_prompt_length: int | None
    kept: list[int] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    digests: list[tuple[bytes, bytes]] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    empty: int = 0
    duplicates: int = 0
    overlong: int = 0

    def take(self, positions: np.ndarray, rows: Sequence[Row]) -> None:
        """Takes in a batch."""
        found = []
        for position, row in zip(positions, rows, strict=True):
            prompt, answer = self._prompt(position, row), self.schema.answer_of(row)
            if prompt is None or (self.schema.answer and self.schema.answer_required and not answer):
                self.empty += 1
                continue
            text = self.renderer(prompt).text
            self._check_unicode(position, text, answer)
            written = json.dumps(answer)
            key = _digest(text, written)
            if key in self.seen:
                self.duplicates += 1
                continue
            self.seen.add(key)
            raw = prompt if isinstance(prompt, str) else json.dumps(prompt)
            found.append((int(position), text, self._name(row), (_digest(raw), _digest(raw, written)), key))
        fits = self._fits([text for _, text, *_ in found])
        self.overlong += len(found) - sum(fits)
        for (position, _, name, digests, key), fit in zip(found, fits, strict=True):
            if fit:
                self.kept.append(position)
                self.names.append(name)
                self.digests.append(digests)
                self.keys.append(key)

    def _prompt(self, position: int, row: Row) -> str | Messages | None:
        try:
            return self.schema.prompt_of(row)
        except ValueError as error:
            raise UserError(f"{self.source}: row {position + 1}: {error}") from error

    def _check_unicode(self, position: int, text: str, answer: str | list[str] | None) -> None:
        r"""JSON may hold half of a surrogate pair (`"\ud800"`), which no tokenizer, log or reward process can take."""
        try:
            "".join([text, *([answer] if isinstance(answer, str) else answer or [])]).encode()
        except UnicodeEncodeError as error:
            broken = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{self.source}: row {position + 1} holds {broken}, half of a surrogate pair: "
                "expected Unicode text, repair the row or leave it out"
            ) from error

    def _name(self, row: Row) -> str | None:
        value = None if self.schema.id is None else lookup(row, self.schema.id)
        return None if value in (None, "") else str(value)

    def _fits(self, texts: list[str]) -> list[bool]:
        if self.max_prompt_length is None:
            return [True] * len(texts)
        return [len(ids) <= self.max_prompt_length for ids in self.renderer.encode(texts)]


class _PoolRows:
    """Makes the prompt of a position."""

    def __init__(self, table: Table, kept: np.ndarray, ids: Sequence[str], schema: Schema, renderer: Renderer) -> None:
        self._table = table
        self._kept = kept
        self._ids = ids
        self._schema = schema
        self._renderer = renderer

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]
        row = self._table.rows(self._kept[index : index + 1])[0]
        prompt = self._schema.prompt_of(row)
        assert prompt is not None, "the scan keeps no row without a prompt"
        rendered, question = self._renderer(prompt), question_of(prompt)
        return Prompt(
            id=self._ids[index],
            index=index,
            question=question,
            prompt=rendered.prompt,
            token_ids=tuple(self._renderer.encode([rendered.text])[0]),
            columns=self._schema.columns_of(row, question),
        )


class Questions(Sequence[str]):
    """Raw question texts of some rows, read when asked for; going through them reads a thousand at a time."""

    def __init__(self, table: Table, kept: np.ndarray, schema: Schema) -> None:
        self._table = table.narrow([schema.prompt, schema.prompt.split(".")[0]])
        self._kept = kept
        self._schema = schema

    def take(self, positions: np.ndarray) -> Questions:
        """Those at `positions`, in that order."""
        return Questions(self._table, self._kept[positions], self._schema)

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._question(row) for row in self._table.rows(self._kept[index])]
        place = range(len(self))[index]
        return self._question(self._table.rows(self._kept[place : place + 1])[0])

    def __iter__(self) -> Iterator[str]:
        for _, rows in batches(self._table, self._kept):
            yield from map(self._question, rows)

    def _question(self, row: Row) -> str:
        prompt = self._schema.prompt_of(row)
        assert prompt is not None, "the scan keeps no row without a prompt"
        return question_of(prompt)


def _unique_ids(names: Sequence[str | None], digests: Sequence[tuple[bytes, bytes]], repeats: bool) -> list[str]:
    """The data's own names where they serve, else hashes of the prompt.

    A column that merely is called `id` serves when it names every row once. An index (`repeats`) counts within one
    data source, and sources get mixed: the first row that bears it keeps it plain, so that appended data renames
    nothing; a later one gets the hash of its prompt and answer behind it.
    """
    if not repeats and (None in names or len(set(names)) < len(names)):
        names = [None] * len(names)
    used: set[str] = set()
    ids = []
    for name, (text, text_and_answer) in zip(names, digests, strict=True):
        choices = [name or text[:8].hex()]
        choices += [f"{choices[0]}-{text_and_answer[:size].hex()}" for size in (4, len(text_and_answer))]
        chosen = next(choice for choice in choices if choice not in used)
        used.add(chosen)
        ids.append(chosen)
    return ids


def _digest(*parts: str) -> bytes:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
