"""Recorded pass rates: what every prompt of a pool would have shown at every visit of a finished run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError
from datamodules.jsonl import read_objects
from datamodules.pool import PromptPool
from datamodules.seeding import generator
from datamodules.types import Prompt

QUESTION = "question"
RATES = "pass_rate_by_epoch"


@dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """The questions of a recorded run and their pass rates.

    Attributes:
        ids: `Q` names: the question's row in the file, counted from 0.
        questions: `Q` raw texts.
        rates: float64 `[Q, V]` success rate of every question at visit 0, 1, ... `V - 1`.
        first: visit of the run that column 0 is.
    """

    ids: tuple[str, ...]
    questions: tuple[str, ...]
    rates: np.ndarray
    first: int = 0

    def cut(self, first: int, visits: int | None) -> Traces:
        """From visit `first` on, `visits` of them (None: all that are left). UserError when there are too few."""
        recorded = self.rates.shape[1]
        last = recorded if visits is None else first + visits
        if first < 0 or last > recorded or last - first < 2:
            asked = f"from visit {first}" + ("" if visits is None else f", {visits} visits")
            raise UserError(
                f"{asked}: the shortest trace has {recorded} visits, counted from 0, and at least 2 are replayed: "
                "lower --from or --visits, or leave short traces out of the file"
            )
        return replace(self, rates=self.rates[:, first:last], first=self.first + first)

    def shuffled(self) -> Traces:
        """The same questions in a random order, always the same one (so that their embeddings are cached once)."""
        order = generator("forecast", "question order").permutation(len(self.ids))
        return replace(
            self,
            ids=tuple(self.ids[row] for row in order),
            questions=tuple(self.questions[row] for row in order),
            rates=self.rates[order],
        )

    def pool(self) -> PromptPool:
        """The pool that selectors choose from; nothing is generated, so its prompts carry no tokens."""
        rows = enumerate(zip(self.ids, self.questions, strict=True))
        return PromptPool.of([Prompt(name, index, text, text, (), {}) for index, (name, text) in rows])


def read_traces(path: Path) -> Traces:
    """Reads a JSONL file of `{"question": text, "pass_rate_by_epoch": [rate, ...]}`; other keys are ignored.

    Traces may differ in length; all are cut to the shortest one, since beyond its end a choice of it has no outcome.

    Raises UserError naming the line of whatever cannot be used.
    """
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file: --traces expects a JSONL file with {QUESTION!r} and {RATES!r}")
    questions, rates = [], []
    for where, row in read_objects(path, (QUESTION, RATES)):
        questions.append(_question(row, where))
        rates.append(_rates(row, where))
    if not questions:
        raise UserError(f"{str(path)!r} is empty: expected one object with {QUESTION!r} and {RATES!r} per line")
    shortest = min(map(len, rates))
    table = np.array([trace[:shortest] for trace in rates], dtype=np.float64)
    return Traces(tuple(map(str, range(len(questions)))), tuple(questions), table)


def _question(row: dict[str, Any], where: str) -> str:
    question = row[QUESTION]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: {QUESTION} is {question!r}, expected a text")
    return question


def _rates(row: dict[str, Any], where: str) -> list[float]:
    rates = row[RATES]
    if not isinstance(rates, list) or not rates:
        raise UserError(f"{where}: {RATES} is {str(rates)[:40]!r}, expected a list of success rates")
    for visit, rate in enumerate(rates):
        # A comparison, not its opposite: NaN is outside too.
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise UserError(f"{where}: {RATES}[{visit}] is {rate!r}, expected a success rate in [0, 1]")
    return rates
