"""What another model's success rates say about a pool before its first rollout, as one more feature of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np

from datamodules.errors import UserError, nearest
from datamodules.jsonl import read_objects
from datamodules.mixture import Mixture
from datamodules.pool import PromptPool
from datamodules.prompts.reading import reward_columns
from datamodules.prompts.schemas import lookup

RATE = "pass_rate"
"""Key of the rates in a file by question."""
QUESTION = "question"
SLOPE = 1.4
"""Expected weight of the feature: prompts that differ by 2 in the other model's log-odds differ by 1.4 in the policy's,
since models differ and their rates are measured with errors."""
CLIP = 0.02
"""Rates nearer to 0 or 1 than this say no more: they come from a few completions."""
_RIDGE = 4.0
"""Penalty of the regression that fills in missing rates, in prompts whose features have length 1."""
_CHUNK = 65536


def read_prior(prior: str, pool: PromptPool) -> np.ndarray:
    """Return another model's success rate on each prompt, float64 `[Q]`, NaN where there is none.

    Args:
        prior: a JSONL file of `{"question": text, "pass_rate": rate}`, or the column of the pool's data that holds the
            rates; a dot leads into an object. A rate is a number in [0, 1] or a text such as `0.25` or `3/8`.
        pool: the prompts. Those of a file are matched by their whole question; repeated questions are averaged.

    Raises:
        UserError: neither a file nor a column, a value that is not a success rate, or no rate for any prompt.
    """
    path = Path(prior).expanduser()
    if path.suffix == ".jsonl" or path.is_file():
        found, source = _by_question(path, pool.questions), f"the file {prior!r}"
    else:
        found, source = _by_column(prior, pool), f"the column {prior!r}"
    if not np.isfinite(found).any():
        raise UserError(
            f"selectors.Posterior prior: {source} has a success rate for none of the {len(pool)} prompts, expected one "
            "for some of them. Give the rates of these questions, or leave the prior out."
        )
    return found


def _by_question(path: Path, questions: Sequence[str]) -> np.ndarray:
    if not path.is_file():
        raise UserError(
            f"selectors.Posterior prior is {str(path)!r}, but there is no such file. Give a JSONL file of "
            f'{{"{QUESTION}": text, "{RATE}": rate}}, or the name of a column of the training prompts.'
        )
    rates: dict[str, list[float]] = {}
    for where, row in read_objects(path, (QUESTION, RATE)):
        rate = _rate(row[RATE], f"{where}: {RATE}")
        if np.isfinite(rate):
            rates.setdefault(str(row[QUESTION]).strip(), []).append(rate)
    mean = {question: float(np.mean(values)) for question, values in rates.items()}
    return np.fromiter((mean.get(question.strip(), np.nan) for question in questions), np.float64, len(questions))


def _by_column(column: str, pool: PromptPool) -> np.ndarray:
    found, seen = np.full(len(pool), np.nan), dict[str, None]()
    parts = pool.parts.values() if isinstance(pool, Mixture) else [pool]
    for place, row in enumerate(chain.from_iterable(reward_columns(part, [column]) for part in parts)):
        seen |= dict.fromkeys(row)
        found[place] = _rate(lookup(row, column), f"prompt {pool.ids[place]!r}: {column}")
    if column.split(".")[0] not in seen:
        raise UserError(
            f"selectors.Posterior prior is {column!r}, which is neither a JSONL file nor a column of the training "
            f"prompts: {nearest(column, list(seen))}"
        )
    return found


def _rate(value: object, where: str) -> float:
    """Return a success rate, NaN for a missing one. Raises UserError for anything else."""
    if value is None or value == "":
        return float("nan")
    try:
        rate = float(Fraction(value)) if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        rate = float("inf")
    if isinstance(value, bool) or not (0 <= rate <= 1 or np.isnan(rate)):
        raise UserError(
            f"selectors.Posterior prior: {where} is {value!r}, expected a success rate in [0, 1], or null where it is "
            "not known. Give the share of right answers, not a percentage or a count."
        )
    return rate


def with_prior(features: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Return the features with one more: half the log-odds of the rates, float32 `[Q, r + 1]`.

    Rates that are missing are imputed from the other features by ridge regression on those that are known, so a prompt
    without one is expected where the texts put it on the other model's scale.
    """
    known = np.isfinite(rates)
    clipped = np.clip(rates[known], CLIP, 1 - CLIP)
    log_odds = np.log(clipped / (1 - clipped)) / 2
    level = log_odds.mean()
    wide = np.empty((len(features), features.shape[1] + 1), dtype=np.float32)
    wide[:, :-1] = features
    gram = np.diag(np.full(features.shape[1], _RIDGE))
    moment = np.zeros(features.shape[1])
    rows = np.flatnonzero(known)
    for start in range(0, len(rows), _CHUNK):
        some = np.asarray(features[rows[start : start + _CHUNK]], dtype=np.float64)
        gram += some.T @ some
        moment += some.T @ (log_odds[start : start + _CHUNK] - level)
    weights = np.linalg.solve(gram, moment) if len(gram) else moment
    wide[:, -1] = level + np.asarray(features @ weights.astype(np.float32))
    wide[known, -1] = log_odds
    return wide
