"""Float matrices kept on disk between runs, memory-mapped when read."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


def content_key(*parts: str) -> str:
    """A file name that changes when any part does."""
    return hash_texts(parts)


def hash_texts(texts: Iterable[str]) -> str:
    """Hash of texts in order; every text is preceded by its length, so that borders count too."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded))
        digest.update(encoded)
    return digest.hexdigest()


def cached_matrix(
    path: Path, rows: int, width: Callable[[], int], fill: Callable[[np.ndarray], None], dtype: str = "float32"
) -> np.ndarray:
    """The matrix stored at `path`, computed first where it is missing or unreadable.

    Several processes may ask for the same file at once: each writes its own temporary one and renames it, so a reader
    never sees half a file.

    Args:
        path: where it lies (`.npy`).
        rows: rows it must have.
        width: gives the number of columns; asked only when the matrix is computed.
        fill: writes every element of the zeroed `[rows, width()]` array that it is given.
        dtype: element type.

    Returns:
        `[rows, width]`, memory-mapped; writing into it changes a private copy only.
    """
    stored = _load(path, rows, dtype)
    if stored is not None:
        return stored
    columns = width()  # first: an encoder that cannot be loaded leaves no folder
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    os.close(handle)
    try:
        matrix = np.lib.format.open_memmap(name, mode="w+", dtype=dtype, shape=(rows, columns))
        fill(matrix)
        matrix.flush()
        del matrix
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    # Reading back what was written makes a first run and a later one compute from the same bytes and alignment.
    stored = _load(path, rows, dtype)
    if stored is None:
        raise OSError(f"{path} cannot be read back after writing it")
    return stored


def _load(path: Path, rows: int, dtype: str) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        matrix = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        log.warning("cache file %s is corrupt (%s): computing it again", path, error)
        return None
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.dtype != np.dtype(dtype):
        log.warning(
            "cache file %s holds %s %s, expected %d rows of %s: computing it again",
            path, matrix.dtype, matrix.shape, rows, dtype,
        )  # fmt: skip
        return None
    return matrix
