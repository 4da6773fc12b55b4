"""Forecast success rates by trained predictors and by baselines, and score the forecasts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jsonargparse import Namespace

from app.reporting.forecast_quality import brier, pearson, reliability, spearman
from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace, PredictorConfig
from datamodules.difficulty.encoders import block_widths, embed_with
from datamodules.difficulty.forecaster import predict
from datamodules.difficulty.kernel import KernelSpace
from datamodules.difficulty.outcomes import QuestionSplit, RecordedOutcomes
from datamodules.difficulty.ridge import fit_kernel_ridge, fit_ridge
from datamodules.difficulty.training import TrainingOptions, train_attention
from datamodules.seeding import generator

Forecaster = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps rows `[K]` and success rates `[K]` of references to success rates `[Q]` of all questions."""

METHODS = ("kernel_ridge", "attention")
FEWEST = 8  # tested questions that a visit must have measured for a correlation over them


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """The data that every method learns from.

    Attributes:
        outcomes: recorded success rates of `Q` questions.
        embeddings: float32 `[Q, E]`.
        key: identifies the embeddings' content.
        blocks: components of each of the joined encoders.
        scratch: folder for what methods cache about the pool.
    """

    outcomes: RecordedOutcomes
    embeddings: np.ndarray
    key: str
    blocks: Sequence[int]
    scratch: Path

    @classmethod
    @contextmanager
    def of(cls, outcomes: RecordedOutcomes, encoder: str, cache_dir: Path) -> Iterator[Material]:
        """Yield the material; embeddings are cached, what each method makes of them is not."""
        embeddings, key = embed_with(encoder, outcomes.questions, cache_dir)
        blocks = block_widths(encoder, outcomes.questions, cache_dir)
        with tempfile.TemporaryDirectory(prefix="dots-difficulty-") as scratch:
            yield cls(outcomes, embeddings, key, blocks, Path(scratch))


def fit_predictor(method: str, material: Material, split: QuestionSplit, options: Namespace) -> AttentionPredictor:
    """Fit a predictor by "attention", or by "kernel_ridge" on training and validation (it needs no early stopping)."""
    embeddings, outcomes, blocks = material.embeddings, material.outcomes, material.blocks
    shape = ("width", "depth", "dropout", "input_dropout", "calibration", "encoder")
    config = PredictorConfig(in_features=embeddings.shape[1], **{name: options[name] for name in shape})
    fit = ("epochs", "learning_rate", "references", "batch", "patience", "seed")
    training = TrainingOptions(**{name: options[name] for name in fit})
    if method == "attention":
        return train_attention(config, embeddings, outcomes, blocks, split.train, split.validation, training).predictor
    rows, encoder, calibration = np.concatenate([split.train, split.validation]), config.encoder, config.calibration
    return fit_kernel_ridge(embeddings[rows], outcomes.take(rows), blocks, encoder, calibration, training.seed)


def trained(predictor: AttentionPredictor, material: Material) -> Forecaster:
    """Return a fitted predictor as a forecaster, as selectors use it."""
    space = AttentionSpace(predictor, material.embeddings, material.key, material.scratch)
    method = predictor.config.calibration
    return lambda rows, rates: predict(space, rows, rates, predictor.head, method, refit=False).success_rate


def kernel(material: Material) -> Forecaster:
    """Return the untrained similarity kernel with its calibration fitted on the references."""
    space = KernelSpace(material.embeddings, material.key, material.scratch)
    return lambda rows, rates: predict(space, rows, rates, None, "group_logit_temperature", refit=False).success_rate


def mean(material: Material) -> Forecaster:
    """Return a forecaster that gives every question the references' mean."""
    return lambda rows, rates: np.full(len(material.embeddings), rates.mean())


def length(material: Material) -> Forecaster:
    """Return the least-squares line of success rate on log length that the references give."""
    x = np.log1p([len(question) for question in material.outcomes.questions])

    def forecast(rows: np.ndarray, rates: np.ndarray) -> np.ndarray:
        centred = x[rows] - x[rows].mean()
        slope = centred @ rates / max(float(centred @ centred), 1e-9)
        return np.clip(rates.mean() + slope * (x - x[rows].mean()), 0.0, 1.0)

    return forecast


def linear_ridge(material: Material, rows: np.ndarray) -> Forecaster:
    """Return a ridge regression of mean success rates on standardised embeddings, shifted to the references' mean.

    The ridge is chosen by leave-one-out over the training questions `rows`.
    """
    x = np.asarray(material.embeddings, dtype=np.float64)
    deviation = x[rows].std(0)
    x = (x - x[rows].mean(0)) / np.where(deviation > 1e-9, deviation, np.inf) / np.sqrt(x.shape[1])
    score = x @ (x[rows].T @ fit_ridge(x[rows] @ x[rows].T, material.outcomes.take(rows).means).coefficients)
    return lambda drawn, rates: np.clip(rates.mean() + score - score[drawn].mean(), 0.0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Forecasts of one method for a set of tested questions, over all visits.

    Attributes:
        forecast: float64 `[N]`, one for each tested question and visit that measured it.
        measured: float64 `[N]`.
        pearson: mean over visits of the correlation within a visit, weighted by its number of tested questions: that
            the policy improves from visit to visit earns nothing.
        spearman: the same mean of rank correlations.
    """

    forecast: np.ndarray
    measured: np.ndarray
    pearson: float
    spearman: float

    @property
    def figures(self) -> dict[str, float]:
        """Pearson, Spearman, Brier and expected calibration error by their names in the report."""
        return {
            "pearson": self.pearson,
            "spearman": self.spearman,
            "brier": brier(self.forecast, self.measured),
            "ece": reliability(self.forecast, self.measured).error,
        }


def score(
    forecaster: Forecaster,
    outcomes: RecordedOutcomes,
    tested: np.ndarray,
    candidates: np.ndarray,
    references: int,
    seed: int,
) -> Scored:
    """Score forecasts of the tested questions at every visit from references that the same visit measured.

    Args:
        forecaster: the method.
        outcomes: success rates of all questions.
        tested: int64 rows that are scored, unless drawn as references.
        candidates: int64 rows that references are drawn from at every visit, by `seed` and visit alone.
        references: their number; at most half of the tested ones where they are drawn from these.
        seed: seed of the draw.
    """
    parts = []
    own = len(np.intersect1d(tested, candidates)) > 0
    for visit in range(outcomes.rates.shape[1]):
        rates = outcomes.rates[:, visit].astype(np.float64)
        known = candidates[np.isfinite(rates[candidates])]
        count = min(references, len(known) // 2 if own else len(known))
        drawn = generator(seed, "difficulty references", visit).permutation(known)[:count]
        rest = np.setdiff1d(tested[np.isfinite(rates[tested])], drawn)
        if len(drawn) >= 2 and len(rest) >= FEWEST:
            parts.append((forecaster(drawn, rates[drawn])[rest], rates[rest]))
    if not parts:
        return Scored(np.empty(0), np.empty(0), float("nan"), float("nan"))
    forecasts, measured = zip(*parts, strict=True)

    def mean_over_visits(correlation: Callable[[np.ndarray, np.ndarray], float]) -> float:
        values = np.array([correlation(*part) for part in parts])
        found = np.isfinite(values)  # a constant forecast correlates with nothing
        weights = np.array([len(part) for part in measured])[found]
        return float(np.average(values[found], weights=weights)) if found.any() else float("nan")

    return Scored(
        np.concatenate(forecasts), np.concatenate(measured), mean_over_visits(pearson), mean_over_visits(spearman)
    )
