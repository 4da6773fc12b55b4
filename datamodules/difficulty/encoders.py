"""Text encoders by name: one model, one of its inner layers, counts of what stands in the text, or several joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.difficulty import text_statistics
from datamodules.difficulty.cache import cached_matrix, content_key, hash_texts
from datamodules.difficulty.embeddings import TextEncoder, embed_questions
from datamodules.errors import UserError

STATISTICS = "statistics"


def embed_with(name: str, questions: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    """Vectors of a pool's questions, each part and their junction from the disk cache where they are known.

    Args:
        name: a model's folder or hub name; `NAME@20` for its states after layer 20; `statistics` for the counts of
            `text_statistics`; several joined by `+`, e.g. `statistics+models/encoder`.
        questions: `Q` raw texts.
        cache_dir: folder of the cache; `~` is expanded.

    Returns:
        float32 `[Q, E]`, memory-mapped, and the key that names their content.
    """
    parts = [_embed_part(part, questions, cache_dir) for part in encoder_parts(name)]
    if len(parts) == 1:
        return parts[0]
    key = content_key("joined", *(part_key for _, part_key in parts))
    matrices = [matrix for matrix, _ in parts]
    joined = cached_matrix(
        cache_dir.expanduser() / "embeddings" / f"{key}.npy",
        rows=len(questions),
        width=lambda: sum(matrix.shape[1] for matrix in matrices),
        fill=lambda out: _join(matrices, out),
    )
    return joined, key


def block_widths(name: str, questions: Sequence[str], cache_dir: Path) -> list[int]:
    """Components of each part of `embed_with(name, questions, cache_dir)`, in their order."""
    return [_embed_part(part, questions, cache_dir)[0].shape[1] for part in encoder_parts(name)]


def encoder_parts(name: str) -> list[str]:
    """Names joined by `+`; a folder whose name has one stands for itself. UserError for an empty part."""
    if Path(name).expanduser().is_dir():
        return [name]
    parts = [part.strip() for part in name.split("+")]
    if not all(parts):
        raise UserError(f"encoder {name!r} has an empty part, expected names joined by '+': take the spare '+' out")
    return parts


def _embed_part(name: str, questions: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    if name == STATISTICS:
        return _embed_statistics(questions, cache_dir)
    model, at, layer = name.rpartition("@")
    if at and layer.isdigit() and not Path(name).expanduser().is_dir():
        return embed_questions(questions, TextEncoder(model, layer=int(layer)), cache_dir)
    return embed_questions(questions, TextEncoder(name), cache_dir)


def _embed_statistics(questions: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    key = content_key(STATISTICS, text_statistics.VERSION, hash_texts(questions))
    matrix = cached_matrix(
        cache_dir.expanduser() / "embeddings" / f"{key}.npy",
        rows=len(questions),
        width=lambda: text_statistics.WIDTH,
        fill=lambda out: text_statistics.fill(out, questions),
    )
    return matrix, key


def _join(matrices: Sequence[np.ndarray], out: np.ndarray) -> None:
    start = 0
    for matrix in matrices:
        out[:, start : start + matrix.shape[1]] = matrix
        start += matrix.shape[1]
