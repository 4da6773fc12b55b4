"""From prompts to scored groups: generate, score, account."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from app.engines import RolloutEngine, Sampling
from app.engines.ahead import Ahead
from app.ranks import Ranks, deal
from app.rewards import RewardScorer, TrainerState
from app.rewards.scorer import means
from app.rollouts.exchange import Rolled, exchange
from datamodules.errors import UserError
from datamodules.ledger import Ledger
from datamodules.seeding import sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup, Source


class RolloutPipeline:
    """Rolls prompts out with an engine and scores them.

    With several ranks each rolls out and scores its share of the prompts, a prompt's completions on one rank; every
    rank gets the groups of all.

    Args:
        engine: generates completions; already set up with the policy.
        scorer: turns completions into rewards.
        seed: the run's seed, from which every sample's own seed is derived.
        precision: context that generation runs in (autocast under mixed precision), as the update does.
        trainer_state: what reward functions may know about the run.
        ranks: the processes that share the work.
        whole_policy: context in which the policy can generate, where the engine has no weights of its own. Collective.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        scorer: RewardScorer,
        seed: int,
        precision: Callable[[], AbstractContextManager[None]],
        trainer_state: Callable[[], TrainerState] = TrainerState,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
        whole_policy: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine = engine
        self.scorer = scorer
        self.seed = seed
        self.precision = precision
        self.trainer_state = trainer_state
        self.ranks = ranks
        self.whole_policy = whole_policy if engine.uses_policy else nullcontext

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
        # Of a completion's length only the bound is known: prompts are dealt evenly, the longest ones apart.
        written = sampling.num_generations * sampling.max_completion_length
        shares = deal([len(prompt.token_ids) + written for prompt in prompts], self.ranks.size)
        share = [prompts[position] for position in shares[self.ranks.rank]]
        rolled = self._roll(share, sampling, ledger, purpose, step, source)
        if self.ranks.size > 1:
            with ledger.phase(_phase(purpose)):
                rolled = exchange(self.ranks, prompts, shares, rolled)
        return _accounted(rolled, ledger)

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, *, step: int) -> Ahead:
        """Begins to roll out a later step's prompts, with the policy of now; `finish` takes what becomes of it.

        In one process: with several, nothing is dealt to the others.
        """
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
        return _accounted(self._scored(prompts, completions, ledger, "train", birth_step, "fresh"), ledger)

    def _roll(
        self, prompts: Sequence[Prompt], sampling: Sampling, ledger: Ledger, purpose: str, step: int, source: Source
    ) -> Rolled:
        """The same of this rank's share."""
        seeds = self._seeds(prompts, sampling, purpose, step)
        # Entered by ranks without a share too.
        with ledger.phase(_phase(purpose)), self.whole_policy(), self.precision():
            try:
                completions = self.engine.generate(prompts, sampling, seeds)
            except FloatingPointError as error:
                raise UserError(
                    f"step {step}: {error}; give a policy with finite weights, or resume with a lower "
                    "model.optimization.learning_rate or --trainer.precision 32-true"
                ) from error
        return self._scored(prompts, completions, ledger, purpose, step, source) if prompts else Rolled()

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
    ) -> Rolled:
        phase = _phase(purpose)
        with ledger.phase("reward" if phase == "rollout" else phase):
            result = self.scorer.score(prompts, completions, source=source, step=step, state=self.trainer_state())
        counts = {
            f"{purpose}/prompts": len(prompts),
            f"{purpose}/completions": sum(len(group) for group in completions),
            f"{purpose}/tokens": sum(len(one.token_ids) for group in completions for one in group),
        }
        counts |= {f"rewards/{name}": getattr(result, name) for name in ("timed_out", "crashed", "unscored", "dropped")}
        return Rolled(result.groups, counts, result.logged)


def _accounted(rolled: Rolled, ledger: Ledger) -> list[RolloutGroup]:
    """Its groups; what it counted goes into the ledger."""
    for name, amount in rolled.counts.items():
        ledger.count(name, amount)
    for name, value in means(rolled.logged).items():
        ledger.counts[f"reward_metric/{name}"] = value
    return rolled.groups


def _phase(purpose: str) -> str:
    """Of the ledger."""
    return {"reference": "reference", "validate": "validate"}.get(purpose, "rollout")
