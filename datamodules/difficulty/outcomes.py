"""Recorded success rates: what a difficulty predictor learns from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.errors import UserError
from datamodules.jsonl import read_objects

_QUESTION = "question"
_RATES = "pass_rate_by_epoch"
_COLUMNS = ("question", "birth_step", "correctness")


@dataclass(frozen=True, slots=True, eq=False)
class RecordedOutcomes:
    """Success rates of questions under successive checkpoints of one policy.

    Attributes:
        questions: `Q` raw texts, no two alike.
        rates: float32 `[Q, V]`, in [0, 1]: mean correctness of a question at a visit (one policy checkpoint, or a few
            neighbouring ones), NaN where it was not measured.
    """

    questions: Sequence[str]
    rates: np.ndarray

    def take(self, rows: np.ndarray) -> RecordedOutcomes:
        """Those questions only."""
        return RecordedOutcomes([self.questions[row] for row in rows], self.rates[rows])

    @property
    def means(self) -> np.ndarray:
        """float64 `[Q]`: how much easier a question is than the average one at the visits where it was measured.

        Centred within each visit, so that a question tried late, by a better policy, does not look easier for it; then
        put back on the scale of rates by the mean over all visits.
        """
        measured = np.isfinite(self.rates)
        rates = np.where(measured, self.rates, 0.0).astype(np.float64)
        counts = measured.sum(0)
        level = rates.sum(0) / np.maximum(counts, 1)
        centred = np.where(measured, rates - level, 0.0).sum(1) / np.maximum(measured.sum(1), 1)
        return centred + level[counts > 0].mean()


def read_outcomes(path: Path, smallest_visit: int = 64) -> RecordedOutcomes:
    """Recorded outcomes of a run folder (`completions/*.parquet`), one parquet file, or a JSONL of traces.

    A line of the JSONL is `{"question": text, "pass_rate_by_epoch": [rate, ...]}`; null stands for a visit without a
    measurement. Of a run, a group counts once, at the step it was generated, however often it was replayed since.

    Args:
        path: file or folder.
        smallest_visit: successive visits are pooled until each has so many questions measured: references and queries
            must come from one policy, and a logged step has few.

    Raises:
        UserError: there is nothing to read, or what is there is malformed.
    """
    path = path.expanduser()
    if path.is_dir():
        cells = _from_run(path)
    elif path.suffix == ".parquet":
        cells = _from_parquet([path])
    elif path.suffix in (".jsonl", ".ndjson"):
        cells = _from_traces(path)
    else:
        raise UserError(
            f"{str(path)!r} is not recorded outcomes, expected a run folder, a .parquet of completions or a .jsonl of "
            f'{{"question", "{_RATES}"}}: give one of them'
        )
    outcomes = _pool_visits(_tabulate(cells), smallest_visit)
    if not len(outcomes.questions):
        raise UserError(f"{str(path)!r} records no outcome, expected questions with success rates: give another file")
    return outcomes


def question_key(question: str) -> str:
    """What makes two questions one: their text, however it is spaced."""
    return " ".join(question.split())


_Cell = tuple[str, int, float]
"""(question, visit, success rate)."""


def _tabulate(cells: Iterator[_Cell]) -> RecordedOutcomes:
    """Mean rate of every (question, visit); visits in rising order."""
    questions: dict[str, str] = {}
    positions: dict[str, int] = {}
    rows, visits, rates = [], [], []
    for question, visit, rate in cells:
        key = question_key(question)
        questions.setdefault(key, question)
        rows.append(positions.setdefault(key, len(positions)))
        visits.append(visit)
        rates.append(rate)
    columns, column = np.unique(np.array(visits, dtype=np.int64), return_inverse=True)
    shape = len(questions), len(columns)
    place = np.array(rows, dtype=np.int64) * len(columns) + column
    total = np.bincount(place, weights=rates, minlength=shape[0] * shape[1]).reshape(shape)
    count = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
    with np.errstate(invalid="ignore"):
        return RecordedOutcomes(list(questions.values()), (total / count).astype(np.float32))


def _pool_visits(outcomes: RecordedOutcomes, smallest: int) -> RecordedOutcomes:
    """Neighbouring visits put together (means) until each measured `smallest` questions; a short rest joins them."""
    measured = np.isfinite(outcomes.rates)
    starts, covered = [0], np.zeros(len(outcomes.questions), dtype=bool)
    for visit in range(measured.shape[1]):
        if covered.sum() >= smallest:
            starts.append(visit)
            covered = np.zeros_like(covered)
        covered |= measured[:, visit]
    if len(starts) > 1 and covered.sum() < smallest:
        starts.pop()
    if len(starts) == measured.shape[1] or not measured.size:
        return outcomes
    total = np.add.reduceat(np.nan_to_num(outcomes.rates), starts, axis=1)
    with np.errstate(invalid="ignore"):
        return RecordedOutcomes(outcomes.questions, total / np.add.reduceat(measured, starts, axis=1, dtype=np.float32))


def _from_traces(path: Path) -> Iterator[_Cell]:
    for where, row in read_objects(path, (_QUESTION, _RATES)):
        question, rates = row[_QUESTION], row[_RATES]
        if not isinstance(question, str) or not isinstance(rates, list) or not all(map(_rate_or_null, rates)):
            raise UserError(
                f'{where} holds {str(row)[:60]!r}, expected {{"{_QUESTION}": text, "{_RATES}": [rates in [0, 1] or '
                "null]}: mend or remove the line"
            )
        for visit, rate in enumerate(rates):
            if rate is not None:
                yield question, visit, float(rate)


def _rate_or_null(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _from_run(folder: Path) -> Iterator[_Cell]:
    inside = folder / "completions" if (folder / "completions").is_dir() else folder
    files = sorted(inside.glob("step_*.parquet"))
    if not files:
        raise UserError(
            f"{str(folder)!r} holds no completions/step_*.parquet, expected the folder of a run (runs/NAME/version_N) "
            "with callbacks.CompletionsLog: give one, or a JSONL of traces"
        )
    return _from_parquet(files)


def _from_parquet(files: Sequence[Path]) -> Iterator[_Cell]:
    """One cell per group; the same group replayed in a later file is left out."""
    seen: set[tuple[str, int]] = set()
    for file in files:
        try:
            table = pq.read_table(file, columns=list(_COLUMNS)).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{str(file)!r} cannot be read ({str(error).splitlines()[0]}), expected completions with "
                f"{', '.join(_COLUMNS)}: give a file of callbacks.CompletionsLog"
            ) from None
        groups = table.groupby(["question", "birth_step"], sort=False)["correctness"].mean()
        for (question, birth), rate in groups.items():
            if (question, birth) not in seen and math.isfinite(rate):
                yield question, int(birth), min(max(float(rate), 0.0), 1.0)
        seen.update(groups.index)
