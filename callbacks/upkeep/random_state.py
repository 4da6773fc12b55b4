"""Global random state in the checkpoint, for code that draws without a derived seed (dropout, users' code)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback


class RandomState(StepCallback):
    """Saves the global generators of Python, NumPy and torch in the checkpoint and restores them on resume.

    Lightning restores none of them. Dots itself draws from seeds derived from the run's seed.
    """

    stage = Stage.RANDOM_STATE

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        _, state, position, has_gauss, cached = np.random.get_state(legacy=True)
        keys = torch.from_numpy(np.asarray(state).astype(np.int64))
        return {
            "python": [version, list(words), gauss],
            "numpy": [keys, int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
