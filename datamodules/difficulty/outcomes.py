"""Recorded success rates, from which a difficulty predictor learns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.difficulty.records import EXPECTED, read_row
from datamodules.errors import UserError
from datamodules.jsonl import read_objects
from datamodules.seeding import derive_seed

_COLUMNS = ("question", "birth_step", "correctness")
_MEASURED = ("predict", "test", "validate")
"""Names of the files that these commands write, in a folder for each named set."""
_Cell = tuple[str, int, float]
"""(question, visit, success rate)."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedOutcomes:
    """Success rates of questions under successive checkpoints of one policy.

    Attributes:
        questions: `Q` distinct raw texts.
        rates: float32 `[Q, V]` mean correctness of a question at a visit (one policy checkpoint or a few neighbouring
            ones), in [0, 1], NaN where it was not measured.
    """

    questions: Sequence[str]
    rates: np.ndarray

    def take(self, rows: np.ndarray) -> RecordedOutcomes:
        return RecordedOutcomes([self.questions[row] for row in rows], self.rates[rows])

    @property
    def means(self) -> np.ndarray:
        """Mean success rate of every question relative to its visits, float64 `[Q]`.

        Rates are centred within each visit, so that a question tried late, by a better policy, does not look easier;
        the mean over all visits is added back.
        """
        measured = np.isfinite(self.rates)
        rates = np.where(measured, self.rates, 0.0).astype(np.float64)
        counts = measured.sum(0)
        level = rates.sum(0) / np.maximum(counts, 1)
        centred = np.where(measured, rates - level, 0.0).sum(1) / np.maximum(measured.sum(1), 1)
        return centred + level[counts > 0].mean()


def read_outcomes(*paths: Path, smallest_visit: int = 64) -> RecordedOutcomes:
    """Read the outcomes of run folders (`completions/*.parquet`), parquet and JSONL files, of one or several models.

    Rows are completions as `callbacks.CompletionsLog` writes them, or one of the layouts of `records.read_row`. A group
    of a run counts once, at the step that generated it, even if it was replayed. The folder of `dots predict`, `test`
    or `validate` is one visit, with the questions of all its sets.

    Args:
        paths: files or folders. Each has its own visits, for references and queries must come from one policy.
        smallest_visit: successive visits of one path are pooled until each has this many measured questions: a logged
            step has few.

    Raises:
        UserError: there are no outcomes or they are malformed.
    """
    return _join([_pool_visits(_tabulate(_read(path.expanduser())), smallest_visit) for path in paths], paths)


def _join(parts: Sequence[RecordedOutcomes], paths: Sequence[Path]) -> RecordedOutcomes:
    """Put the visits of several records side by side, with the questions of all of them."""
    for part, path in zip(parts, paths, strict=True):
        if not len(part.questions):
            raise UserError(
                f"{str(path)!r} records no outcome, expected questions with success rates. Name another file."
            )
    questions: dict[str, str] = {}
    for part in parts:
        for question in part.questions:
            questions.setdefault(question_key(question), question)
    row = {key: number for number, key in enumerate(questions)}
    rates = np.full((len(row), sum(part.rates.shape[1] for part in parts)), np.nan, dtype=np.float32)
    first = 0
    for part in parts:
        visits = part.rates.shape[1]
        rates[[row[question_key(question)] for question in part.questions], first : first + visits] = part.rates
        first += visits
    return RecordedOutcomes(list(questions.values()), rates)


def _read(path: Path) -> Iterator[_Cell]:
    if path.is_dir():
        inside = path / "completions" if (path / "completions").is_dir() else path
        files = sorted(inside.glob("step_*.parquet"))
        files = files or sorted(one for name in _MEASURED for one in inside.rglob(f"{name}.parquet"))
        if not files:
            raise UserError(
                f"{str(path)!r} holds no completions/step_*.parquet, expected the folder of a run "
                "(runs/NAME/version_N) with callbacks.CompletionsLog, or that of dots predict. Name such a folder or a "
                "JSONL of traces."
            )
        return _from_parquet(files)
    if path.suffix == ".parquet":
        return _from_parquet([path]) if _is_completions(path) else _from_rows(_parquet_rows(path))
    if path.suffix in (".jsonl", ".ndjson"):
        return _from_rows(read_objects(path))
    raise UserError(
        f"{str(path)!r} is not recorded outcomes, expected a run folder, a .parquet of completions, or a .jsonl or "
        f".parquet whose rows have {EXPECTED}. Name one of these."
    )


def question_key(question: str) -> str:
    """Return the text with normalised white space, which identifies a question."""
    return " ".join(question.split())


def _tabulate(cells: Iterator[_Cell]) -> RecordedOutcomes:
    """Average the rates of every (question, visit), with visits in ascending order."""
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
    """Average neighbouring visits until each measured `smallest` questions; a smaller rest joins the last one."""
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


def _from_rows(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[_Cell]:
    visits: dict[str, int] = {}
    for where, row in rows:
        question, rates = read_row(row, where)
        for name, rate in rates.items():
            # A trace's visits are numbered; models are in the order in which they appear.
            yield question, int(name) if name.isdigit() else visits.setdefault(name, len(visits)), rate


def _is_completions(path: Path) -> bool:
    try:
        return set(_COLUMNS) <= set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return True  # and reading it says what is wrong


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
        yield f"{str(path)!r} row {number}", row


def _from_parquet(files: Sequence[Path]) -> Iterator[_Cell]:
    """Yield one cell per group, ignoring groups that a later file replays."""
    seen: set[tuple[str, int]] = set()
    for file in files:
        try:
            table = pq.read_table(file, columns=list(_COLUMNS)).to_pandas()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{str(file)!r} cannot be read ({str(error).splitlines()[0]}), expected completions with the columns "
                f"{', '.join(_COLUMNS)}. Name a file of callbacks.CompletionsLog."
            ) from None
        groups = table.groupby(["question", "birth_step"], sort=False)["correctness"].mean()
        for (question, birth), rate in groups.items():
            if (question, birth) not in seen and math.isfinite(rate):
                yield question, int(birth), min(max(float(rate), 0.0), 1.0)
        seen.update(groups.index)


@dataclass(frozen=True, slots=True, eq=False)
class QuestionSplit:
    """Rows of the questions to train on, to stop early by and to test on; int64, ascending."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_questions(
    questions: Sequence[str], seed: int, validation: float = 0.1, test: float = 0.2, fold: int = 0
) -> QuestionSplit:
    """Split questions in an order given by hashes of seed and text, so that a predictor is tested on unseen texts.

    The split does not depend on the order or number of rows. Fold k is tested on the k-th slice of the order, so the
    test parts of folds `0 .. floor(1 / test) - 1` do not overlap; validation is the next slice, wrapping around.

    Args:
        questions: `Q` texts; texts that differ only in white space go to the same part.
        seed: seed of the order.
        validation: share of the distinct questions to validate on.
        test: share to test on.
        fold: index of the slice to test on.

    Raises:
        UserError: a part would be empty.
    """
    keys = [question_key(question) for question in questions]
    order = sorted(set(keys), key=lambda key: (derive_seed(seed, "question split", key), key))
    count = len(order)
    first, last = round(count * fold * test), round(count * (fold + 1) * test)
    held = round(count * validation)
    if first == last or held == 0 or last > count or last - first + held >= count:
        raise UserError(
            f"{count} questions cannot be split into {validation:.0%} for validation and {test:.0%} for the test of "
            f"fold {fold + 1}, expected at least one question per part. Record more questions or change the shares."
        )
    place = {key: (number - first) % count for number, key in enumerate(order)}
    places = np.array([place[key] for key in keys])
    tested, trained = places < last - first, places >= last - first + held
    return QuestionSplit(*(np.flatnonzero(part) for part in (trained, ~tested & ~trained, tested)))
