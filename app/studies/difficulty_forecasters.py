"""Trained predictors and what they are measured against, behind one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.difficulty.attention import AttentionPredictor, AttentionSpace, PredictorConfig
from datamodules.difficulty.forecaster import predict
from datamodules.difficulty.kernel import KernelSpace
from datamodules.difficulty.outcomes import QuestionSplit, RecordedOutcomes
from datamodules.difficulty.ridge import fit_kernel_ridge, fit_ridge
from datamodules.difficulty.training import TrainingOptions, train_attention

Forecaster = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From rows `[K]` and success rates `[K]` of references to success rates `[Q]` of all questions."""

METHODS = ("kernel_ridge", "attention")


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What every method starts from.

    Attributes:
        outcomes: recorded success rates of `Q` questions.
        embeddings: float32 `[Q, E]`.
        key: names the embeddings' content.
        blocks: components of each encoder joined in them.
        scratch: folder for what methods keep of the pool.
    """

    outcomes: RecordedOutcomes
    embeddings: np.ndarray
    key: str
    blocks: Sequence[int]
    scratch: Path


def fit_predictor(
    method: str, material: Material, split: QuestionSplit, config: PredictorConfig, options: TrainingOptions
) -> AttentionPredictor:
    """A predictor by "attention" or "kernel_ridge"; the latter, which needs no early stopping, learns from all of
    training and validation."""
    if method == "attention":
        return train_attention(
            config, material.embeddings, material.outcomes, material.blocks, split.train, split.validation, options
        ).predictor
    rows = np.concatenate([split.train, split.validation])
    return fit_kernel_ridge(
        material.embeddings[rows],
        material.outcomes.take(rows),
        material.blocks,
        config.encoder,
        config.calibration,
        options.seed,
    )


def trained(predictor: AttentionPredictor, material: Material) -> Forecaster:
    """A fitted predictor, as selectors use it."""
    space = AttentionSpace(predictor, material.embeddings, material.key, material.scratch)
    method = predictor.config.calibration
    return lambda rows, rates: predict(space, rows, rates, predictor.head, method, refit=False).success_rate


def kernel(material: Material) -> Forecaster:
    """The untrained similarity kernel with its calibration fitted on the references."""
    space = KernelSpace(material.embeddings, material.key, material.scratch)
    return lambda rows, rates: predict(space, rows, rates, None, "group_logit_temperature", refit=False).success_rate


def mean(material: Material) -> Forecaster:
    """The references' mean for everyone."""
    return lambda rows, rates: np.full(len(material.embeddings), rates.mean())


def linear_ridge(material: Material, rows: np.ndarray) -> Forecaster:
    """Ridge regression of mean success rates on standardised embeddings, moved to the references' mean.

    Its ridge is chosen by leave-one-out over the training questions `rows`.
    """
    x = np.asarray(material.embeddings, dtype=np.float64)
    deviation = x[rows].std(0)
    x = (x - x[rows].mean(0)) / np.where(deviation > 1e-9, deviation, np.inf) / np.sqrt(x.shape[1])
    score = x @ (x[rows].T @ fit_ridge(x[rows] @ x[rows].T, material.outcomes.take(rows).means).coefficients)
    return lambda drawn, rates: np.clip(rates.mean() + score - score[drawn].mean(), 0.0, 1.0)
