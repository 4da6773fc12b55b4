"""Float matrices cached on disk across runs and memory-mapped when read."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


def hash_texts(texts: Iterable[str]) -> str:
    """Return a hash of texts in order; each is preceded by its length, so their borders count."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded))
        digest.update(encoded)
    return digest.hexdigest()


def cached_embeddings(
    cache_dir: Path, key: str, rows: int, width: Callable[[], int], fill: Callable[[np.ndarray], object]
) -> np.ndarray:
    """Return `cached_matrix` of the file for `key` in `cache_dir`; `~` is expanded."""
    return cached_matrix(cache_dir.expanduser() / "embeddings" / f"{key}.npy", rows, width, fill)


def cached_matrix(path: Path, rows: int, width: Callable[[], int], fill: Callable[[np.ndarray], object]) -> np.ndarray:
    """Load the matrix in the `.npy` file `path`, or compute and store it if it is missing or unreadable.

    Safe for concurrent processes: each writes a temporary file and renames it, so no reader sees a partial file.
    `width` is called only if the matrix is computed; `fill` then writes it into a zeroed array.

    Returns:
        float32 `[rows, width()]`, memory-mapped copy-on-write.
    """
    stored = _load(path, rows)
    if stored is not None:
        return stored
    columns = width()  # first: an encoder that cannot be loaded leaves no folder
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    os.close(handle)
    try:
        matrix = np.lib.format.open_memmap(name, mode="w+", dtype=np.float32, shape=(rows, columns))
        fill(matrix)
        matrix.flush()
        del matrix
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    # Reading it back makes first and later runs compute from the same bytes and alignment.
    stored = _load(path, rows)
    if stored is None:
        raise OSError(f"{path} cannot be read back after writing it. Check the disk or set another cache folder.")
    return stored


def _load(path: Path, rows: int) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        matrix = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        log.warning("Cache file %s is corrupt (%s). Computing it again.", path, error)
        return None
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.dtype != np.float32:
        log.warning(
            "Cache file %s holds %s %s, expected %d rows of float32. Computing it again.",
            path, matrix.dtype, matrix.shape, rows,
        )  # fmt: skip
        return None
    return matrix
