"""Softmax-weighted averages over the reference prompts: what the trained predictor and the kernel have in common."""

from __future__ import annotations

import numpy as np
import torch

CHUNK = 8192


def softmax_average(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """`softmax_i(scale * q . k_i) @ values` for every query, in chunks: beside the result it takes `CHUNK x K` floats.

    Args:
        queries: `[Q, D]` float16 or float32, may be memory-mapped.
        keys: `[K, D]`.
        values: `[K]`.
        scale: factor on the dot products.

    Returns:
        float64 `[Q]`.
    """
    weights = torch.from_numpy(np.ascontiguousarray(keys, dtype=np.float32) * np.float32(scale)).T.contiguous()
    targets = torch.from_numpy(np.asarray(values, dtype=np.float32))
    out = np.empty(len(queries), dtype=np.float64)
    with torch.inference_mode():
        for start in range(0, len(queries), CHUNK):
            chunk = torch.from_numpy(np.asarray(queries[start : start + CHUNK])).float()
            attention = torch.softmax(chunk @ weights, dim=1)
            out[start : start + len(chunk)] = (attention @ targets).numpy()
    return out


def leave_one_out(similarity: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The average that each reference would get from the others.

    Args:
        similarity: float64 `[K, K]`: row i holds the dot products of reference i's query with every key; `K >= 2`.
        values: float64 `[K]`.
        scale: factor on the similarities.

    Returns:
        float64 `[K]`.
    """
    logits = similarity * scale
    np.fill_diagonal(logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ values / weights.sum(axis=1)
