"""From prompts to scored groups: generate, score, account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from app.engines import RolloutEngine, Sampling
from app.rewards import RewardScorer, TrainerState
from datamodules.ledger import Ledger
from datamodules.seeding import sample_seeds
from datamodules.types import Prompt, RolloutGroup, Source


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
        seeds = sample_seeds(self.seed, purpose, step, [prompt.id for prompt in prompts], sampling.num_generations)
        phase = {"reference": "reference", "validate": "validate"}.get(purpose, "rollout")
        with ledger.phase(phase), self.precision():
            completions = self.engine.generate(prompts, sampling, seeds)
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
