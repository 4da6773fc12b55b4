"""From prompts to scored groups: generate, score, account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from app.engines import RolloutEngine, Sampling
from app.engines.ahead import Ahead
from app.rewards import RewardScorer, TrainerState
from datamodules.ledger import Ledger
from datamodules.seeding import sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup, Source


class RolloutPipeline:
    """Rolls prompts out with an engine and scores them.

    Args:
        engine: generates completions; already set up with the policy.
        scorer: turns completions into rewards.
        seed: the run's seed, from which every sample's own seed is derived.
        precision: context that generation runs in (autocast under mixed precision), as the update does.
        trainer_state: what reward functions may know about the run.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        scorer: RewardScorer,
        seed: int,
        precision: Callable[[], AbstractContextManager[None]],
        trainer_state: Callable[[], TrainerState] = TrainerState,
    ) -> None:
        self.engine = engine
        self.scorer = scorer
        self.seed = seed
        self.precision = precision
        self.trainer_state = trainer_state

    def roll(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        ledger: Ledger,
        *,
        purpose: str,
        step: int,
        source: Source = "fresh",
    ) -> list[RolloutGroup]:
        """Groups of the prompts, in order.

        Args:
            prompts: `B` prompts.
            sampling: `G` and the sampling distribution.
            ledger: takes the seconds of the phases and the counts (`<purpose>/prompts`, `/completions`, `/tokens`,
                and the scorer's failures).
            purpose: keeps the random numbers of training, reference and validation rollouts apart.
            step: the training step; part of every sample's seed.
            source: written on the groups.
        """
        with ledger.phase(_phase(purpose)), self.precision():
            completions = self.engine.generate(prompts, sampling, self._seeds(prompts, sampling, purpose, step))
        return self._scored(prompts, completions, ledger, purpose, step, source)

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int) -> Ahead:
        """Begins to roll out a later step's prompts, with the policy of now; `finish` takes what becomes of it."""
        return self.engine.start(prompts, sampling, self._seeds(prompts, sampling, "train", step))

    def finish(self, ahead: Ahead, prompts: Sequence[Prompt], ledger: Ledger, *, birth_step: int) -> list[RolloutGroup]:
        """Groups of the prompts that `start` was given, in order.

        Args:
            ahead: what `start` returned.
            prompts: as there.
            ledger: of the step that they are for.
            birth_step: step whose policy generated them.
        """
        with ledger.phase("rollout"):
            completions = ahead.result()
        return self._scored(prompts, completions, ledger, "train", birth_step, "fresh")

    def _seeds(self, prompts: Sequence[Prompt], sampling: Sampling, purpose: str, step: int) -> np.ndarray:
        return sample_seeds(self.seed, purpose, step, [prompt.id for prompt in prompts], sampling.num_generations)

    def _scored(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[tuple[Completion, ...]],
        ledger: Ledger,
        purpose: str,
        step: int,
        source: Source,
    ) -> list[RolloutGroup]:
        phase = _phase(purpose)
        with ledger.phase("reward" if phase == "rollout" else phase):
            result = self.scorer.score(prompts, completions, source=source, step=step, state=self.trainer_state())
        ledger.count(f"{purpose}/prompts", len(prompts))
        ledger.count(f"{purpose}/completions", sum(len(group) for group in completions))
        ledger.count(f"{purpose}/tokens", sum(len(one.token_ids) for group in completions for one in group))
        for name in ("timed_out", "crashed", "unscored", "dropped"):
            ledger.count(f"rewards/{name}", getattr(result, name))
        for name, value in result.metrics.items():
            ledger.counts[f"reward_metric/{name}"] = value
        return result.groups


def _phase(purpose: str) -> str:
    return {"reference": "reference", "validate": "validate"}.get(purpose, "rollout")
