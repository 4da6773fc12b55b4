"""The untrained predictor: similar questions are similarly hard.

Nadaraya-Watson regression on the references, `p_hat(q) = softmax_i(cos(e_q, e_i) / temperature) @ p`, which is the
attention predictor of DOTS (arXiv 2506.05316, section 4) with identity adapters. Its only parameter, the temperature,
is fitted to the references by leave-one-out, so it works without training on the first run of a new pool.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from datamodules.difficulty.cache import cached_embeddings, hash_texts
from datamodules.difficulty.calibration import soft_cross_entropy
from datamodules.difficulty.forecaster import leave_one_out

RANK = 64
SAMPLE = 16384
CHUNK = 16384
TEMPERATURES = np.geomspace(10.0, 0.01, 31)


class KernelSpace:
    """Centred unit vectors of a pool's questions, whose dot products are cosines.

    Only the `rank` leading principal components are kept: cosines predict as well as with all of them, at a lower cost
    for large pools.

    Args:
        embeddings: float32 `[Q, E]`.
        key: key of the embeddings' content.
        cache_dir: folder of the cache.
        rank: components to keep; embeddings without more are only centred.

    Attributes:
        queries: float32 `[Q, D]`.
    """

    def __init__(self, embeddings: np.ndarray, key: str, cache_dir: Path, rank: int = RANK) -> None:
        name, width = hash_texts(("kernel", "v1", str(rank), key)), min(rank, embeddings.shape[1])
        self.queries = cached_embeddings(
            cache_dir, name, len(embeddings), lambda: width, lambda out: _project(embeddings, out)
        )

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Return the vectors of the reference prompts, `[K, D]`."""
        return self.queries[positions]

    def scale(self, similarity: np.ndarray, rates: np.ndarray) -> float:
        """Return 1 / temperature, fitted to the references' cosines `[K, K]` and success rates `[K]`."""
        return 1.0 / fit_temperature(similarity, rates)


def fit_temperature(similarity: np.ndarray, rates: np.ndarray) -> float:
    """Return the temperature of least leave-one-out cross-entropy in `TEMPERATURES`, the highest of equal ones."""
    best, best_loss = float(TEMPERATURES[0]), np.inf
    if len(rates) < 2:
        return best
    for temperature in TEMPERATURES:
        loss = soft_cross_entropy(leave_one_out(similarity, rates, 1.0 / temperature), rates)
        if loss < best_loss - 1e-12:
            best, best_loss = float(temperature), loss
    return best


def _project(embeddings: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` `[Q, D]` with the normalised leading components of the centred embeddings."""
    starts = range(0, len(embeddings), CHUNK)
    mean = sum(_rows(embeddings, start).sum(0, dtype=np.float64) for start in starts) / len(embeddings)
    shift, basis = mean.astype(np.float32), None
    if out.shape[1] < embeddings.shape[1]:
        # Principal directions from at most SAMPLE rows, spread evenly over the pool.
        rows = np.unique(np.linspace(0, len(embeddings) - 1, min(SAMPLE, len(embeddings))).astype(np.int64))
        sampled = torch.from_numpy(embeddings[rows] - shift)
        _, vectors = torch.linalg.eigh((sampled.T @ sampled).double())
        basis = vectors[:, -out.shape[1] :].float().contiguous()
    for start in starts:
        centred = torch.from_numpy(_rows(embeddings, start) - shift)
        reduced = centred if basis is None else centred @ basis
        out[start : start + len(reduced)] = torch.nn.functional.normalize(reduced, dim=1).numpy()


def _rows(embeddings: np.ndarray, start: int) -> np.ndarray:
    return np.asarray(embeddings[start : start + CHUNK])
