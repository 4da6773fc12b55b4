"""Builds a pool from a table: one pass decides which rows are kept; prompts are built on demand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from datamodules.errors import UserError
from datamodules.pool import PromptPool, ReadReport
from datamodules.prompts.bounded import bounded
from datamodules.prompts.detection import PROBE
from datamodules.prompts.messages import CALLS, question_of
from datamodules.prompts.schemas import Schema, lookup, with_heads
from datamodules.prompts.tables import Row, Table, batches
from datamodules.prompts.templates import Renderer, check_columns
from datamodules.types import REWARD_ARGUMENTS, Prompt


def read_pool(
    table: Table,
    schema: Schema,
    renderer: Renderer,
    source: str,
    max_prompt_length: int | None = None,
    context_limit: int | None = None,
) -> PromptPool:
    """Return the pool of a table's usable rows, in their order, with its `ReadReport`.

    Dropped and counted: rows without a prompt (or without a required answer), rows with the same rendered text and
    answer as an earlier row (where there are no answers: with the same other columns, the id left out), prompts of
    more than `max_prompt_length` or `context_limit` tokens.

    Raises:
        UserError: no row is left, or a row's prompt is neither text nor messages.
    """
    probe = table.rows(range(min(PROBE, len(table))))
    if renderer.template is not None:
        check_columns(renderer.template, schema, table.columns, probe, source)
    schema = schema.without(renderer.columns)
    if schema.tools and not renderer.reads("tools"):
        schema = replace(schema, tools=None, unused=(*schema.unused, schema.tools))
    if any(map(schema.has_calls, probe)) and not renderer.reads(CALLS):
        schema = replace(schema, unused=(*schema.unused, f"{CALLS} in {schema.prompt}"))
    limit = min((one for one in (max_prompt_length, context_limit) if one is not None), default=None)
    by_context = limit is not None and limit != max_prompt_length
    scan = _Scan(schema, renderer, source, limit)
    scanned = table.narrow([*schema.sources, *with_heads(renderer.columns)]) if schema.answer else table
    for positions, rows in batches(scanned, np.arange(len(table))):
        scan.add(positions, rows)
    described, dropped = f"{source} ({schema})", (scan.empty, scan.duplicates, scan.overlong)
    hidden = tuple(sorted(REWARD_ARGUMENTS & set(table.columns)))
    report = ReadReport(described, len(table), len(scan.kept), *dropped, limit, by_context, hidden_columns=hidden)
    report = replace(report, other_columns=schema.others)
    if schema.answer:
        answers = Counter(row.digests[0] for row in scan.kept)
        report = replace(report, conflicts=sum(count > 1 for count in answers.values()))
    if not scan.kept:
        remedy = "lower sampling.max_completion_length" if by_context else "raise max_prompt_length"
        raise UserError(f"No prompt is left: {report}. Give other data{f' or {remedy}' if scan.overlong else ''}.")
    places = np.array([row.position for row in scan.kept], dtype=np.int64)
    ids = _unique_ids(scan.kept, schema.id_is_index)

    def build(index: int) -> Prompt:
        row = table.rows([places[index]])[0]
        prompt, rendered = schema.prompt_of(row), renderer.render(row, schema)
        assert prompt is not None, "the scan keeps no row without a prompt"
        assert rendered is not None, "it has a prompt"
        question = question_of(prompt)
        tokens = tuple(renderer.encode([rendered.text])[0])

        def extended(text: str) -> tuple[int, ...]:
            longer = renderer.render(row, schema, text)
            assert longer is not None, "it has a prompt"
            return tuple(renderer.encode([longer.text])[0])

        asks = renderer.tools is not None and (isinstance(prompt, str) or prompt[-1]["role"] == "user")
        columns = schema.columns_of(row, question)
        return Prompt(
            ids[index], index, question, rendered.prompt, tokens, columns, extended=extended if asks else None
        )

    return PromptPool(build, ids, Questions(table, places, schema), report, [row.key for row in scan.kept])


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row that becomes a prompt."""

    position: int
    name: str | None
    """Id given by the data, if any."""
    digests: tuple[bytes, bytes]
    """Hashes of the raw prompt, and of the raw prompt and answer."""
    key: bytes
    """Hash of the rendered text and answer, equal for duplicates."""


@dataclass
class _Scan:
    """The rows kept so far, and counts of those dropped."""

    schema: Schema
    renderer: Renderer
    source: str
    limit: int | None
    kept: list[_Kept] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    empty: int = 0
    duplicates: int = 0
    overlong: int = 0

    def add(self, positions: np.ndarray, rows: Sequence[Row]) -> None:
        found: list[_Kept] = []
        texts: list[str] = []
        with bounded() as start:
            for position, row in zip(positions, rows, strict=True):
                start()
                try:
                    prompt, answer = self.schema.prompt_of(row), self.schema.answer_of(row)
                    lacks_answer = self.schema.answer and self.schema.answer_required and answer is None
                    rendered = None if lacks_answer else self.renderer.render(row, self.schema)
                except ValueError as error:
                    raise UserError(f"{self.source}: row {position + 1}: {error}") from error
                text = "" if rendered is None else rendered.text
                if prompt is None or not text:
                    self.empty += 1
                    continue
                written = json.dumps(answer, default=str)
                self._check_unicode(position, text, json.dumps(answer, ensure_ascii=False, default=str))
                key = _digest(text, written if self.schema.answer else json.dumps(self._others(row), default=str))
                if key in self.seen:
                    self.duplicates += 1
                    continue
                self.seen.add(key)
                raw = prompt if isinstance(prompt, str) else json.dumps(prompt)
                value = None if self.schema.id is None else lookup(row, self.schema.id)
                name = None if value in (None, "") else str(value)
                found.append(_Kept(int(position), name, (_digest(raw), _digest(raw, written)), key))
                texts.append(text)
        if self.limit is not None:
            fits = self.renderer.fit(texts, self.limit)
            self.overlong += fits.count(False)
            found = [row for row, kept in zip(found, fits, strict=True) if kept]
        self.kept += found

    def _others(self, row: Row) -> list[object]:
        """Return the values of all columns but the prompt and the id, which tell apart rows without answers."""
        head, _, leaf = (self.schema.id or "").partition(".")
        inner = row.get(head) if leaf else None
        if isinstance(inner, Mapping):
            row = {**row, head: {name: value for name, value in inner.items() if name != leaf}}
        left_out = {*self.schema.prompt_sources, self.schema.id}
        return [[name, value] for name, value in row.items() if name not in left_out]

    def _check_unicode(self, position: int, *texts: str) -> None:
        r"""Reject half of a surrogate pair (`"\ud800"`): JSON allows it, but no tokenizer, log or reward process."""
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            broken = f"\\u{ord(error.object[error.start]):04x}"
            raise UserError(
                f"{self.source}: row {position + 1} holds {broken}, half of a surrogate pair, which is not valid "
                "Unicode. Correct or remove the row."
            ) from error


class Questions(Sequence[str]):
    """Raw question texts of some rows, read on demand; iteration reads a thousand rows at a time."""

    def __init__(self, table: Table, kept: np.ndarray, schema: Schema) -> None:
        self._whole, self._table = table, table.narrow(schema.prompt_sources)
        self._kept, self._schema = kept, schema

    def take(self, positions: np.ndarray) -> Questions:
        """Return those at `positions`, in that order."""
        return Questions(self._whole, self._kept[positions], self._schema)

    def columns(self, paths: Sequence[str]) -> Iterator[Mapping[str, object]]:
        """Yield for each row those columns for the rewards that the answer and `paths` are read from."""
        names = [name for path in paths for name in (path, path.split(".")[0])]
        for _, rows in batches(self._whole.narrow([*self._schema.sources, *names]), self._kept):
            yield from (self._schema.columns_of(row, "") for row in rows)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # positions only, no slices
        return self._question(self._table.rows([self._kept[index]])[0])

    def __iter__(self) -> Iterator[str]:
        for _, rows in batches(self._table, self._kept):
            yield from map(self._question, rows)

    def _question(self, row: Row) -> str:
        prompt = self._schema.prompt_of(row)
        assert prompt is not None, "the scan keeps no row without a prompt"
        return question_of(prompt)


def reward_columns(pool: PromptPool, paths: Sequence[str]) -> Iterator[Mapping[str, object]]:
    """Yield the columns for the rewards of each prompt, at least those that the answer and `paths` are read from."""
    if isinstance(pool.questions, Questions):
        return pool.questions.columns(paths)
    return (prompt.columns for prompt in pool)


def _unique_ids(rows: Sequence[_Kept], may_repeat: bool) -> list[str]:
    """Return unique ids: the data's own where possible, else hashes of the prompt.

    A column that is merely called `id` is used only if it names every row uniquely. An index that `may_repeat` counts
    within one data source, and sources get mixed: its first row keeps the plain index, so that appending data renames
    nothing, and later rows get a suffix, the hash of their prompt and answer.
    """
    names = [row.name for row in rows]
    if not may_repeat and (None in names or len(set(names)) < len(names)):
        names = [None] * len(names)
    used: set[str] = set()
    ids = []
    for name, row in zip(names, rows, strict=True):
        text, text_and_answer = row.digests
        choices = [name or text[:8].hex()]
        choices += [f"{choices[0]}-{text_and_answer[:size].hex()}" for size in (4, len(text_and_answer))]
        chosen = next(choice for choice in choices if choice not in used)
        used.add(chosen)
        ids.append(chosen)
    return ids


def _digest(*parts: str) -> bytes:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
