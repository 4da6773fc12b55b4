"""Recorded success rates, from which a difficulty predictor learns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.errors import UserError
from datamodules.jsonl import read_objects
from datamodules.seeding import derive_seed

_QUESTION, _RATES = "question", "pass_rate_by_epoch"
_COLUMNS = ("question", "birth_step", "correctness")
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


def read_outcomes(path: Path, smallest_visit: int = 64) -> RecordedOutcomes:
    """Read the outcomes of a run folder (`completions/*.parquet`), one parquet file, or a JSONL of traces.

    A line of the JSONL is `{"question": text, "pass_rate_by_epoch": [rate, ...]}` with null for a visit that did not
    measure the question. A group of a run counts once, at the step that generated it, even if it was replayed.

    Args:
        path: file or folder.
        smallest_visit: successive visits are pooled until each has this many measured questions: references and queries
            must come from one policy, and a logged step has few.

    Raises:
        UserError: there are no outcomes or they are malformed.
    """
    path = path.expanduser()
    if path.is_dir():
        inside = path / "completions" if (path / "completions").is_dir() else path
        files = sorted(inside.glob("step_*.parquet"))
        if not files:
            raise UserError(
                f"{str(path)!r} holds no completions/step_*.parquet, expected the folder of a run "
                "(runs/NAME/version_N) with callbacks.CompletionsLog. Name such a folder or a JSONL of traces."
            )
        cells = _from_parquet(files)
    elif path.suffix == ".parquet":
        cells = _from_parquet([path])
    elif path.suffix in (".jsonl", ".ndjson"):
        cells = _from_traces(path)
    else:
        raise UserError(
            f"{str(path)!r} is not recorded outcomes, expected a run folder, a .parquet of completions or a .jsonl of "
            f'{{"question", "{_RATES}"}}. Name one of these.'
        )
    outcomes = _pool_visits(_tabulate(cells), smallest_visit)
    if not len(outcomes.questions):
        raise UserError(f"{str(path)!r} records no outcome, expected questions with success rates. Name another file.")
    return outcomes


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


def _from_traces(path: Path) -> Iterator[_Cell]:
    for where, row in read_objects(path, (_QUESTION, _RATES)):
        question, rates = row[_QUESTION], row[_RATES]
        if (
            not isinstance(question, str)
            or not isinstance(rates, list)
            or not all(rate is None or (isinstance(rate, int | float) and 0 <= rate <= 1) for rate in rates)
        ):
            raise UserError(
                f'{where} holds {str(row)[:60]!r}, expected {{"{_QUESTION}": text, "{_RATES}": [rates in [0, 1] or '
                "null]}. Correct or remove the line."
            )
        for visit, rate in enumerate(rates):
            if rate is not None:
                yield question, visit, float(rate)


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
