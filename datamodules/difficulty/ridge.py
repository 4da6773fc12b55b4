"""Kernel ridge regressions on recorded success rates, in the form of an attention predictor.

Closed form except for the calibration head. Bandwidths, ridge and the strength of the tilt are chosen by leave-one-out
over the training questions, which ridge regression gives without refitting (Allen 1974: the held-out residual of
question i is `[A^-1 y]_i / [A^-1]_ii` with `A = K + lambda I`). Regressions on single encoders and on several together
are added with the non-negative weights that forecast the training questions best, each by the regressions' forecasts
from the others (stacking: Breiman 1996).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import nnls

from datamodules.difficulty.attention import AttentionPredictor, KernelRidgeAdapter, PredictorConfig
from datamodules.difficulty.calibration import CalibrationName
from datamodules.difficulty.outcomes import RecordedOutcomes
from datamodules.difficulty.training import average_measured, soft_loss, visit_forecasts
from datamodules.seeding import derive_seed, generator

BANDWIDTHS = (0.5, 0.7, 1.0, 1.5, 2.5)
TOGETHER = (0.7, 1.0, 1.4, 2.0)
"""Candidate factors on the bandwidths of single blocks where a kernel multiplies several."""
RIDGES = np.geomspace(0.03, 30.0, 16)
GAINS = np.geomspace(0.1, 10.0, 25)
"""Candidate strengths of the tilt, in units of 1 / variance of the forecasts."""
MAX_CENTRES = 4000
COMPANIONS = 63
"""Principal components of the text that follow the forecast."""
MAX_SEARCHED = 1000
"""Questions among which bandwidths are chosen: each candidate costs a decomposition of their kernel matrix."""
HEAD_STEPS, HEAD_LEARNING_RATE = 200, 0.03


@dataclass(frozen=True, slots=True, eq=False)
class RidgeFit:
    """A ridge regression in its dual form, or a weighted sum of `M`.

    Attributes:
        coefficients: float64 `[N]` weights of the training rows' kernels; of a sum `[M, N]`.
        offset: mean of the targets.
        held_out: float64 `[N]` forecast of each training row from the others.
        own: float64 `[N]` contribution of its own target to each training row's forecast.
        ridge: lambda; of a sum 0.
        error: mean squared error of `held_out`.
    """

    coefficients: np.ndarray
    offset: float
    held_out: np.ndarray
    own: np.ndarray
    ridge: float
    error: float


def fit_ridge(kernel: np.ndarray, targets: np.ndarray) -> RidgeFit:
    """Fit a ridge regression of `targets` `[N]` on a positive semi-definite `kernel` `[N, N]`, both float64.

    Its lambda is the one of `RIDGES` of least leave-one-out error.
    """
    offset = float(targets.mean())
    values, vectors = np.linalg.eigh(kernel)
    projected, squares = vectors.T @ (targets - offset), vectors**2
    best: RidgeFit | None = None
    for ridge in RIDGES:
        inverse = 1.0 / (np.maximum(values, 0.0) + ridge)
        coefficients = vectors @ (inverse * projected)
        residual = coefficients / (squares @ inverse)
        error = float(np.mean(residual**2))
        if best is None or error < best.error:
            own = residual - ridge * coefficients
            best = RidgeFit(coefficients, offset, targets - residual, own, float(ridge), error)
    assert best is not None, "RIDGES is not empty"
    return best


def fit_kernel_ridge(
    embeddings: np.ndarray,
    outcomes: RecordedOutcomes,
    blocks: Sequence[int],
    encoder: str | None = None,
    calibration: CalibrationName = "group_logit_temperature",
    seed: int = 0,
) -> AttentionPredictor:
    """Fit a predictor whose adapters are kernel ridge regressions of the questions' mean success rates.

    The kernels are `exp(-sum_b |u_b - v_b|^2 / (2 h_b^2 E_b))` over one block, all but one, or all blocks of
    standardised components, one block for each encoder that was joined into the embeddings. At most `MAX_CENTRES`
    questions, drawn by `seed`, are used.

    Args:
        embeddings: float32 `[N, E]`.
        outcomes: recorded outcomes of the same `N >= 3` questions.
        blocks: components of each block; they sum to `E`.
        encoder: name of the encoder, stored with the predictor.
        calibration: head to fit on the leave-one-out forecasts.
        seed: seed of the draw of centres and of the head's initial weights.
    """
    if len(embeddings) > MAX_CENTRES:
        rows = np.sort(generator(seed, "centres").choice(len(embeddings), MAX_CENTRES, replace=False))
        embeddings, outcomes = embeddings[rows], outcomes.take(rows)
    x = np.asarray(embeddings, dtype=np.float64)
    shift, spread = x.mean(0), x.std(0)
    for first, last in pairwise(np.cumsum([0, *blocks])):
        if (x[:, first:last] == 0).mean() > 0.5:  # hashed words: standardised, the rarest would count most
            spread[first:last] = np.where(spread[first:last] > 1e-9, np.sqrt(np.mean(spread[first:last] ** 2)), 0.0)
    scale = np.where(spread > 1e-9, 1.0 / np.maximum(spread, 1e-9), 0.0)
    scale /= np.repeat(np.sqrt(blocks), blocks)
    precision, fitted = _fit_members((x - shift) * scale, outcomes.means, blocks)
    centred, rates = fitted.held_out - fitted.offset, torch.from_numpy(outcomes.rates)
    gains = GAINS / max(float(centred.var()), 1e-6)
    gain = float(gains[int(np.argmin([float(soft_loss(_tilted(centred, rates, each), rates)) for each in gains]))])

    with torch.random.fork_rng(devices=[]):  # the head's initial weights are drawn from torch's own generator
        torch.manual_seed(derive_seed(seed, "head"))
        predictor = _assemble((x - shift) * scale, fitted, precision, blocks, gain, encoder, calibration)
    predictor.inputs.shift.copy_(torch.from_numpy(shift))
    predictor.inputs.scale.copy_(torch.from_numpy(scale))
    _fit_head(predictor, _tilted(centred, rates, gain), rates)
    return predictor.eval().requires_grad_(False)


def _assemble(
    centres: np.ndarray,
    fitted: RidgeFit,
    precision: np.ndarray,
    blocks: Sequence[int],
    gain: float,
    encoder: str | None,
    calibration: CalibrationName,
) -> AttentionPredictor:
    """Build both adapters from the regressions on scaled `centres` `[N, E]` with `1 / h^2` `[M, B]`."""
    rank = min(COMPANIONS, *centres.shape)
    features, width, count = centres.shape[1], 1 + rank, len(centres)
    config = PredictorConfig(
        features, width, 0, 0.0, centres=count, blocks=tuple(blocks), members=len(precision), calibration=calibration,
        encoder=encoder,
    )  # fmt: skip
    predictor = AttentionPredictor(config)
    query, reference = predictor.query, predictor.reference
    assert isinstance(query, KernelRidgeAdapter)
    assert isinstance(reference, KernelRidgeAdapter)
    for adapter in (query, reference):
        adapter.centres.copy_(torch.from_numpy(centres))
        adapter.coefficients.copy_(torch.from_numpy(fitted.coefficients))
        adapter.precision.copy_(torch.from_numpy(precision))
        # Attention divides by sqrt(width).
        adapter.gain.fill_((gain * config.width**0.5) ** 0.5)
    reference.own.copy_(torch.from_numpy(fitted.own))
    basis = np.linalg.svd(centres, full_matrices=False)[2][:rank].T
    # On average the text's components together are as long as the forecast.
    length = np.sqrt(np.mean(np.sum((centres @ basis) ** 2, axis=1)))
    centred = fitted.held_out - fitted.offset
    query.basis.copy_(torch.from_numpy(basis * float(query.gain) * centred.std() / max(length, 1e-9)))
    return predictor


def _fit_members(x: np.ndarray, targets: np.ndarray, blocks: Sequence[int]) -> tuple[np.ndarray, RidgeFit]:
    """Fit a regression for every set of blocks, each with bandwidths of least leave-one-out error, and add them up.

    Returns `1 / h^2` `[M, B]` of the members whose weight is not 0 (0 where a kernel lacks a block), and their sum.
    """
    few = np.unique(np.linspace(0, len(x) - 1, min(MAX_SEARCHED, len(x))).astype(np.int64))
    distances = _block_distances(x[few], blocks)
    whole = distances if len(few) == len(x) else _block_distances(x, blocks)
    count = len(blocks)
    # Each row of `kept` is the set of blocks that a kernel multiplies: one, all but one, or all.
    kept = np.unique(np.concatenate([np.eye(count), 1 - np.eye(count), np.ones((1, count))]), axis=0)
    kept = kept[kept.sum(1) > 0]
    alone = [_best(distances, [row / h**2 for h in BANDWIDTHS], targets[few]) for row in np.eye(count)]
    precisions, fits = [], []
    for row in kept:
        shared = [row * np.sum(alone, axis=0) / factor**2 for factor in (TOGETHER if row.sum() > 1 else (1.0,))]
        precisions.append(_best(distances, shared, targets[few]))
        fits.append(fit_ridge(_kernel(whole, precisions[-1]), targets))
    offset = float(targets.mean())
    weights, _ = nnls(np.stack([fit.held_out - offset for fit in fits], axis=1), targets - offset)
    if not weights.any():  # nothing forecasts anything
        weights[int(np.argmin([fit.error for fit in fits]))] = 1.0
    used = np.flatnonzero(weights)
    held_out = offset + np.sum([weights[one] * (fits[one].held_out - offset) for one in used], axis=0)
    return np.stack([precisions[one] for one in used]), RidgeFit(
        coefficients=np.stack([weights[one] * fits[one].coefficients for one in used]),
        offset=offset,
        held_out=held_out,
        own=np.sum([weights[one] * fits[one].own for one in used], axis=0),
        ridge=0.0,
        error=float(np.mean((targets - held_out) ** 2)),
    )


def _best(distances: Sequence[np.ndarray], precisions: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Return the one of several `1 / h^2` `[B]` of least leave-one-out error."""
    if len(precisions) == 1:
        return precisions[0]
    return min(precisions, key=lambda precision: fit_ridge(_kernel(distances, precision), targets).error)


def _kernel(distances: Sequence[np.ndarray], precision: np.ndarray) -> np.ndarray:
    exponent = sum(weight * squared for squared, weight in zip(distances, precision, strict=True) if weight)
    return np.exp(-0.5 * exponent)


def _block_distances(x: np.ndarray, blocks: Sequence[int]) -> list[np.ndarray]:
    """Return squared distances `[N, N]` for each block."""
    distances = []
    for first, last in pairwise(np.cumsum([0, *blocks])):
        part = x[:, first:last]
        norms = (part**2).sum(1)
        distances.append(np.maximum(norms[:, None] + norms - 2 * part @ part.T, 0.0))
    return distances


def _tilted(centred: np.ndarray, rates: torch.Tensor, gain: float) -> torch.Tensor:
    """Forecast every question at every visit from all others, by centred held-out forecasts `[N]`; float32 `[N, V]`."""
    values = torch.from_numpy(centred).float()
    logits = gain * torch.outer(values, values)
    logits.fill_diagonal_(-torch.inf)
    return average_measured(torch.softmax(logits, dim=1), rates)


def _fit_head(predictor: AttentionPredictor, base: torch.Tensor, rates: torch.Tensor) -> None:
    parameters = list(predictor.head.parameters())
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=HEAD_LEARNING_RATE)
    for step in range(HEAD_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = HEAD_LEARNING_RATE * (1 - step / HEAD_STEPS)
        optimizer.zero_grad()
        soft_loss(visit_forecasts(predictor.head, base, rates), rates).backward()
        optimizer.step()
