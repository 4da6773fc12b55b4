"""Small prompts, completions and groups for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.pool import PromptPool
from datamodules.types import Completion, Outcome, Prompt, RolloutGroup, Source, Turn


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


def conversation(
    *turns: tuple[str, Sequence[int]], context: Sequence[int] | None = None, outcome: Outcome | None = None
) -> Completion:
    """Return a conversation with an environment, given role and tokens of each turn; token 7 reads as "7"."""
    ids = [token for _, tokens in turns for token in tokens]
    spoken = [role == "assistant" for role, tokens in turns for _ in tokens]
    texts = [" ".join(map(str, tokens)) for _, tokens in turns]
    return Completion(
        token_ids=np.array(ids, dtype=np.int32),
        logprobs=np.where(spoken, -0.1 * np.arange(1, len(ids) + 1), np.nan).astype(np.float32),
        finish_reason="stop",
        policy_version=0,
        text="\n".join(texts),
        turns=tuple(
            Turn(role == "assistant", len(tokens), [{"role": role, "content": text}])
            for (role, tokens), text in zip(turns, texts, strict=True)
        ),
        context=None if context is None else np.array(context, dtype=np.int32),
        outcome=outcome,
    )


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
