"""What every engine checks before it generates anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.engines.base import Sampling
from datamodules.errors import UserError
from datamodules.types import Prompt


def check_request(
    prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limit: int | None, limit_name: str
) -> None:
    """Refuses a batch of which some prompt cannot be completed, before any of it runs.

    Args:
        prompts: `B` prompts.
        sampling: `G` and the completion limit.
        seeds: int64 `[B, G]`.
        limit: tokens that a prompt and its completion may have together; None for no limit.
        limit_name: what to call it, e.g. "the model's 512 positions".

    Raises:
        UserError: a prompt has no tokens, or no room for a completion.
        ValueError: seeds of another shape.
    """
    if seeds.shape != (len(prompts), sampling.num_generations):
        raise ValueError(f"seeds of shape {seeds.shape}, expected {(len(prompts), sampling.num_generations)}")
    for prompt in prompts:
        length = len(prompt.token_ids)
        if length == 0:
            raise UserError(f"prompt {prompt.id!r} has no tokens: expected at least one, drop it from the data")
        if limit is not None and length + sampling.max_completion_length > limit:
            raise UserError(
                f"prompt {prompt.id!r}: {length} tokens + max_completion_length={sampling.max_completion_length} "
                f"exceed {limit_name}: shorten the completions or drop longer prompts"
            )
