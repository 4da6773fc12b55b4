"""Random seeds derived from their purpose, so that a resume or another batch layout never changes a draw."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np


def derive_seed(*context: str | int) -> int:
    """Return a seed in [0, 2**63) for names and numbers. BLAKE2b makes it the same on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in context)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def run_seed() -> int:
    """Return the seed given to `seed_everything`, or 0 if there was none. Lightning keeps it in the environment."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def generator(*context: str | int) -> np.random.Generator:
    """Return a new generator for one purpose, e.g. `generator(run_seed, "replay", step)`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*context)))


def sample_seeds(run_seed: int, purpose: str, step: int, prompt_ids: Sequence[str], samples: int) -> np.ndarray:
    """Return non-negative int64 seeds `[B, G]`, one for every completion of every prompt.

    `purpose` separates training, reference and validation draws. Validation passes a constant `step`, so that
    successive evaluations share their random numbers.
    """
    seeds = [
        [derive_seed(run_seed, purpose, step, prompt, sample) for sample in range(samples)] for prompt in prompt_ids
    ]
    return np.array(seeds, dtype=np.int64).reshape(len(prompt_ids), samples)
