"""Groups of unlike sizes: more completions of a prompt where they are likely to teach."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.algorithm.pilots import Pilots
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.rollout_ahead import RolloutAhead
from callbacks.algorithm.rollouts import Rollouts
from callbacks.algorithm.size_allocation import GAINS, Gain, allocate, marginal_values
from datamodules.errors import UserError, nearest
from datamodules.online import OnlinePromptDataModule
from datamodules.selectors import Selector
from datamodules.types import Outcomes, Prompt, TrainBatch


class GroupSizes(Rollouts):
    """Rolls out more completions of a prompt where its group is more likely informative for them, and worth more.

    A step generates as many completions as without this callback, `model.sampling.num_generations` (G) for each
    prompt on average. Their numbers n maximise the sum over the prompts of `(1 - p^n - (1 - p)^n) gain(p)`, the
    probability that a group is informative times what it is then worth (Knapsack RL, arXiv 2509.25849), averaged over
    what the selector knows of the success rate p: a Beta distribution with its forecast as mean and, if it knows one,
    its standard deviation. Prompts of medium difficulty therefore get few completions, and those that are nearly
    always solved or failed get more. The maximum is exact.

    Works with any selector that forecasts success rates; before its first forecast all groups have G completions. The
    first n completions are those of a larger group. Advantages and token weights let every prompt count alike, whatever
    its number of completions (`objective.advantages`, `objective.ratios.token_weights`). Where rewards are divided by
    the group's standard deviation (`model.advantage_scale: group`), the gradient of a prompt near 0 or 1 still grows
    with its group, as it does with G in any run; "none" and "batch" have no such effect. Reference rollouts and
    validation keep G completions.

    Args:
        smallest: least number of completions of a prompt, at least 2 and at most G.
        largest: largest number; null for four times G.
        gain: worth of an informative group of a prompt: "improvement" is `p (1 - p)^2`, to first order what the update
            adds to p; "variance" is `p (1 - p)`; "equal" maximises the number of informative groups.
    """

    def __init__(self, smallest: int = 2, largest: int | None = None, gain: Gain = "improvement") -> None:
        if smallest < 2:
            raise UserError(f"GroupSizes.smallest is {smallest}, expected at least 2, which can differ. Raise it.")
        if gain not in GAINS:
            raise UserError(f"GroupSizes.gain is {gain!r}; {nearest(str(gain), tuple(GAINS))}")
        self.smallest, self.largest, self.gain = smallest, largest, gain

    def bounds(self, generations: int) -> tuple[int, int]:
        """Return the least and the largest number of completions of a prompt; `generations` are the mean."""
        return self.smallest, 4 * generations if self.largest is None else self.largest

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        generations = module.sampling.num_generations
        smallest, largest = self.bounds(generations)
        if not smallest <= generations <= largest:
            raise UserError(
                f"callbacks.GroupSizes has smallest={smallest} and largest={largest}, but "
                f"model.sampling.num_generations, the mean, is {generations}. Choose bounds around it."
            )
        if not datamodule.selector.forecasts:
            raise UserError(
                f"callbacks.GroupSizes needs the success rates that a selector expects, but "
                f"selectors.{type(datamodule.selector).__name__} forecasts none. Set data.selector to one that does, "
                "such as Posterior, Mopps or Dots, or remove the callback."
            )
        if Pilots.all_of(trainer):
            raise UserError(
                "callbacks.GroupSizes and callbacks.Pilots both decide how many completions a prompt gets. Remove one."
            )
        if any(one.staleness for one in RolloutAhead.all_of(trainer)):
            raise UserError(
                "callbacks.RolloutAhead generates groups of one size during the step before, but callbacks.GroupSizes "
                "sizes them by the forecast of their own step. Remove one of the two, or set staleness=0."
            )
        if any(one.with_training for one in ReferenceRollouts.all_of(trainer)):
            raise UserError(
                "callbacks.ReferenceRollouts has with_training=true, which rolls the training prompts out itself, in "
                "groups of one size. Set with_training=false, or remove callbacks.GroupSizes."
            )

    def roll_out(self, selector: Selector, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]) -> None:
        generations = pl_module.sampling.num_generations
        with batch.ledger.phase("select"):
            sizes = self._sizes(selector, batch, prompts, generations)
        groups = pl_module.pipeline.roll(
            prompts, pl_module.sampling, batch.ledger, purpose="train", step=batch.step, source="fresh", sizes=sizes
        )
        with batch.ledger.phase("select"):
            selector.observe(Outcomes.of(groups, batch.step, "fresh", generations))
        batch.add(groups)

    def _sizes(
        self, selector: Selector, batch: TrainBatch, prompts: Sequence[Prompt], generations: int
    ) -> list[int] | None:
        """Return the size of each prompt's group, or None before the selector's first forecast."""
        forecast, deviations = selector.forecast(), selector.forecast_deviation()
        if forecast is None or not prompts:
            return None
        positions = selector.pool.positions([prompt.id for prompt in prompts])
        mean = forecast[positions]
        deviation = np.zeros(len(mean)) if deviations is None else deviations[positions]
        smallest, largest = self.bounds(generations)
        marginals = marginal_values(mean, deviation, self.gain, smallest, largest)
        sizes = allocate(marginals, smallest, generations * len(prompts))
        if "group_size/max" not in batch.metrics:  # not of refills
            chance = marginal_values(mean, deviation, "equal", 1, largest).cumsum(axis=1)
            batch.metrics |= {
                "group_size/min": float(sizes.min()),
                "group_size/max": float(sizes.max()),
                "group_size/informative_forecast": float(chance[np.arange(len(sizes)), sizes - 2].mean()),
                "group_size/informative_if_equal": float(chance[:, generations - 2].mean()),
            }
        found: list[int] = sizes.tolist()
        return found
