"""Text encoders by name: a model, one of its inner layers, text statistics, hashed words, or several joined."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from datamodules.difficulty.cache import cached_embeddings, hash_texts
from datamodules.difficulty.embeddings import TextEncoder, embed_questions
from datamodules.errors import UserError

STATISTICS, WORDS = "statistics", "words"
WORDS_WIDTH = 2048
_TOKEN = re.compile(r"\\?\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SENTENCE = re.compile(r"[.?!]")
_COUNTED = ("$", "\\", "\\frac", "\n", "=", ",", "^", "(")
_MAX_DIGITS = 12
STATISTICS_WIDTH = 8 + len(_COUNTED)


def embed_with(name: str, questions: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    """Return the vectors of a pool's questions, with every part and the joined matrix cached on disk.

    Args:
        name: a model's folder or hub name; `NAME@20` for its states after layer 20; `statistics` for `statistics`,
            `words` for `hashed_words`; several joined by `+`, e.g. `statistics+words+models/encoder`.
        questions: `Q` raw texts.
        cache_dir: folder of the cache; `~` is expanded.

    Returns:
        The vectors, float32 `[Q, E]`, memory-mapped, and the key of their content.
    """
    parts = [_embed_part(part, questions, cache_dir) for part in encoder_parts(name)]
    if len(parts) == 1:
        return parts[0]
    key = hash_texts(("joined", *(part_key for _, part_key in parts)))
    matrices = [matrix for matrix, _ in parts]
    width = sum(matrix.shape[1] for matrix in matrices)
    joined = cached_embeddings(
        cache_dir, key, len(questions), lambda: width, lambda out: np.concatenate(matrices, axis=1, out=out)
    )
    return joined, key


def block_widths(name: str, questions: Sequence[str], cache_dir: Path) -> list[int]:
    """Return the number of components of each part of `embed_with(name, questions, cache_dir)`, in order."""
    return [_embed_part(part, questions, cache_dir)[0].shape[1] for part in encoder_parts(name)]


def encoder_parts(name: str) -> list[str]:
    """Return the names joined by `+`, except in the name of an existing folder. Raises UserError for an empty part."""
    if Path(name).expanduser().is_dir():
        return [name]
    parts = [part.strip() for part in name.split("+")]
    if not all(parts):
        raise UserError(f"encoder {name!r} has an empty part, expected names joined by '+'. Remove the spare '+'.")
    return parts


def _embed_part(name: str, questions: Sequence[str], cache_dir: Path) -> tuple[np.ndarray, str]:
    if name in _COUNTERS:
        count, width = _COUNTERS[name]
        key = hash_texts((name, "v1", hash_texts(questions)))

        def fill(out: np.ndarray) -> None:
            for row, question in enumerate(questions):
                out[row] = count(question)

        return cached_embeddings(cache_dir, key, len(questions), lambda: width, fill), key
    model, at, layer = name.rpartition("@")
    if at and layer.isdigit() and not Path(name).expanduser().is_dir():
        return embed_questions(questions, TextEncoder(model, layer=int(layer)), cache_dir)
    return embed_questions(questions, TextEncoder(name), cache_dir)


def statistics(question: str) -> list[float]:
    """Return text statistics: log(1 + x) of sizes and counts, and whether the text has a `$` formula.

    A sentence encoder tells what a question is about, these tell how much there is to work through.
    """
    numbers, words = _NUMBER.findall(question), _WORD.findall(question)
    sizes = [
        len(question),
        len(question.split()),
        len(_SENTENCE.findall(question)),
        len(numbers),
        max(map(len, numbers), default=0),
        max((int(number[:_MAX_DIGITS]) for number in numbers), default=0),
        sum(map(len, words)) / max(1, len(words)),
        *(question.count(mark) for mark in _COUNTED),
    ]
    return [*np.log1p(np.array(sizes, dtype=np.float64)), float("$" in question)]


def hashed_words(question: str) -> np.ndarray:
    """Return 1 + log(count) of the words and pairs of words, hashed to `WORDS_WIDTH` signed sums, of length 1.

    Commands of LaTeX and marks are words. Without a vocabulary, the vector of a text does not depend on other texts.
    """
    words = _TOKEN.findall(question.lower())
    vector = np.zeros(WORDS_WIDTH)
    for term, count in Counter(words + [f"{one} {two}" for one, two in pairwise(words)]).items():
        code = zlib.crc32(term.encode("utf-8", "surrogatepass"))
        vector[(code >> 1) % WORDS_WIDTH] += (1 if code & 1 else -1) * (1 + np.log(count))
    return vector / max(float(np.linalg.norm(vector)), 1e-9)


_COUNTERS: dict[str, tuple[Callable[[str], Sequence[float] | np.ndarray], int]] = {
    STATISTICS: (statistics, STATISTICS_WIDTH),
    WORDS: (hashed_words, WORDS_WIDTH),
}
