"""Randomness derived from what it is for, so that a resume or another batch layout never changes a draw."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np


def derive_seed(*context: str | int) -> int:
    """A seed in [0, 2**63) from names and numbers (BLAKE2b: the same on every machine and in every Python run)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in context)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def run_seed() -> int:
    """The seed that `seed_everything` was given, 0 when there was none (Lightning keeps it in the environment)."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def generator(*context: str | int) -> np.random.Generator:
    """A fresh generator for one purpose, e.g. `generator(run_seed, "replay", step)`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*context)))


def sample_seeds(run_seed: int, purpose: str, step: int, prompt_ids: Sequence[str], samples: int) -> np.ndarray:
    """Seeds `[B, G]` (int64, non-negative): one for every completion of every prompt.

    `purpose` keeps training, reference and validation draws apart; validation passes a constant `step`, so that
    successive evaluations share their random numbers.
    """
    seeds = [
        [derive_seed(run_seed, purpose, step, prompt, sample) for sample in range(samples)] for prompt in prompt_ids
    ]
    return np.array(seeds, dtype=np.int64).reshape(len(prompt_ids), samples)
