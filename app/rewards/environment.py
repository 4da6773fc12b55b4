"""The reward that an environment gives itself."""

from __future__ import annotations

from app.rewards.base import Column, Reward, Scores, Texts, TokenIds
from datamodules.errors import UserError


class Environment(Reward):
    """What the environment's own `get_reward` returned at the end of a conversation. The run needs `model.environment`.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
    """

    def __init__(self, weight: float = 1.0, correctness: bool | None = None, name: str | None = None) -> None:
        super().__init__(weight, correctness, name)

    def __call__(self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column) -> Scores:
        """Return `columns["environment_rewards"]`.

        Raises:
            UserError: an environment gave none. One of `app.environments.Tools` without `get_reward` is refused before.
        """
        rewards: Scores = columns["environment_rewards"]
        if None in rewards:
            raise UserError(
                f"Reward {self.name!r} is the environment's own score (get_reward), but it gave a conversation none. "
                "Let it give every conversation a number, or choose rewards that score the conversation."
            )
        return rewards
