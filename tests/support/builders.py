"""Small prompts, completions and groups for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.pool import PromptPool
from datamodules.types import Completion, Prompt, RolloutGroup, Source


def prompt(index: int, name: str | None = None) -> Prompt:
    return Prompt(
        id=name or f"p{index}",
        index=index,
        question=f"question {index}",
        prompt=f"question {index}\n",
        token_ids=(1, 2, 3 + index),
        columns={"answer": str(index)},
    )


def pool(size: int) -> PromptPool:
    return PromptPool.of([prompt(index) for index in range(size)])


def completion(tokens: Sequence[int] = (4, 5), version: int = 0, text: str = "x", finish: str = "stop") -> Completion:
    ids = np.array(tokens, dtype=np.int32)
    return Completion(ids, -0.1 * np.arange(1, len(ids) + 1, dtype=np.float32), finish, version, text)  # type: ignore[arg-type]


def group(of: Prompt, rewards: Sequence[float], birth: int = 0, source: Source = "fresh") -> RolloutGroup:
    values = np.array(rewards, dtype=np.float32)
    return RolloutGroup(
        prompt=of,
        completions=tuple(completion((4 + i, 5, 6)[: 1 + i % 3], text=f"c{i}") for i in range(len(values))),
        rewards=values,
        correctness=values,
        components={"exact": values},
        source=source,
        birth_step=birth,
    )
