"""A rollout engine that generates what the data say, so that the answers of a real run are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from app.engines import RolloutEngine, Sampling
from app.engines.ahead import Groups
from datamodules.types import Completion, Prompt


class Written(RolloutEngine):
    """Yields the texts of the column `written`, one for each completion of the prompt."""

    uses_policy = True

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        return [tuple(map(self._completion, prompt.columns["written"])) for prompt in prompts]

    def _completion(self, text: str) -> Completion:
        end = np.array([self.tokenizer.eos_token_id], dtype=np.int32)
        return Completion(end, np.full(1, -1.0, np.float32), "stop", self.version, text)
