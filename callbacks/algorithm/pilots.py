"""Pilots: a few completions of every prompt first, the rest of the group only where that is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.algorithm.dynamic_sampling import DynamicSampling, count_rollouts
from callbacks.algorithm.pilot_worth import PilotWorth
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.rollout_ahead import RolloutAhead
from callbacks.algorithm.rollouts import Rollouts
from datamodules.errors import UserError, nearest
from datamodules.online import OnlinePromptDataModule
from datamodules.selectors import Selector
from datamodules.types import Outcomes, Prompt, RolloutGroup, TrainBatch

Rule = Literal["worth", "informative"]


class Pilots(Rollouts):
    """Rolls out `n_init` completions of every prompt first, and the rest of its group only where that is worth it.

    A pilot whose rewards already differ is always completed. With `rule: informative` it is the only one (SPEED-RL,
    arXiv 2506.09016: screening by N_init completions, then N_cont more; here these are the rest of
    `model.sampling.num_generations`). With `rule: worth` a silent pilot is completed, too, where the probability that
    its group becomes informative, given the selector's forecast and the pilot, pays for the rest: see `PilotWorth`.
    Without a forecast it is that of recent pilots. The first step completes every group.

    A completed group is, token for token, the group without pilots. Others are dropped with `n_init` completions: the
    selector learns from them, the table of completions shows them, and they are counted as discarded. The step trains
    on the groups that are left and on replayed ones. `DynamicSampling` refills the batch up to `max_refills` times,
    with pilots as well. Reference rollouts, which measure the pool, and validation are whole.

    `engines.Transformers` decodes the rest of a group beside the pilots of others; other engines generate it in a
    second call, after all pilots. A completed prompt waits for two completions in turn, so that pilots save tokens
    always, but time only where a step has more completions than the engine decodes at the price of a few. Reward
    functions see pilot and rest in separate calls.

    Args:
        n_init: completions of a pilot, at least 2 and fewer than `model.sampling.num_generations`.
        rule: which pilots are completed: "worth" as above, or "informative", those whose rewards differ.
    """

    def __init__(self, n_init: int = 4, rule: Rule = "worth") -> None:
        if n_init < 2:
            raise UserError(f"Pilots.n_init is {n_init}, expected at least 2, which can differ. Raise it.")
        if rule not in get_args(Rule):
            raise UserError(f"Pilots.rule is {rule!r}; {nearest(str(rule), get_args(Rule))}")
        self.n_init, self.rule = n_init, rule
        self._worth = PilotWorth()

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        if self.n_init >= (generations := module.sampling.num_generations):
            raise UserError(
                f"callbacks.Pilots has n_init={self.n_init}, but model.sampling.num_generations is {generations}, "
                "which leaves nothing to complete. Lower n_init or raise num_generations."
            )
        if any(one.staleness for one in RolloutAhead.all_of(trainer)):
            raise UserError(
                "callbacks.RolloutAhead generates whole groups during the step before, but callbacks.Pilots decides "
                "after a part of each. Remove one of the two, or set staleness=0."
            )
        if any(one.with_training for one in ReferenceRollouts.all_of(trainer)):
            raise UserError(
                "callbacks.ReferenceRollouts has with_training=true, which generates whole groups in one call, but "
                "callbacks.Pilots decides after a part of each. Set with_training=false, or remove callbacks.Pilots."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        self._worth.begin_step()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def roll_out(self, selector: Selector, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]) -> None:
        ledger, rest = batch.ledger, pl_module.sampling.num_generations - self.n_init
        forecast, threshold = batch.forecast_of(prompts), self._worth.threshold(rest)
        expected = {prompt.id: one for prompt, one in zip(prompts, forecast.tolist(), strict=True)}

        def completed(pilot: RolloutGroup) -> bool:
            if self.rule == "informative":
                return pilot.informative
            return self._worth.informative(pilot, expected[pilot.prompt.id], rest) >= threshold

        before = ledger.seconds["rollout"]
        groups = pl_module.pipeline.roll_with_pilots(
            prompts, pl_module.sampling, ledger, step=batch.step, pilot=self.n_init, completed=completed
        )
        seconds = (ledger.seconds["rollout"] - before) / max(1, sum(group.completion_tokens for group in groups))
        with ledger.phase("select"):
            self._worth.learn(groups, forecast, self.n_init)
            selector.observe(Outcomes.of(groups, batch.step, "fresh"))
        # An informative pilot is completed, and only one that lost completions to failed scores is no longer than one.
        dropped = [one for one in groups if not one.informative and len(one.completions) <= self.n_init]
        batch.add(groups)
        batch.move(dropped, "dropped")
        batch.metrics["pilot/threshold"] = 1.0 if self.rule == "informative" else threshold
        for name, amount in {
            "prompts": len(groups),
            "dropped": len(dropped),
            "saved_completions": len(dropped) * rest,
            "dropped_seconds": seconds * sum(group.completion_tokens for group in dropped),
        }.items():
            ledger.count(f"pilot/{name}", amount)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if not DynamicSampling.all_of(trainer):  # which counts all that are dropped
            count_rollouts(batch, "discarded", batch.of("dropped"))
        counts = batch.ledger.counts
        if prompts := counts["pilot/prompts"]:
            batch.metrics |= {
                "pilot/completed_fraction": 1 - counts["pilot/dropped"] / prompts,
                "pilot/saved_completions": counts["pilot/saved_completions"],
                "time/pilots_dropped": counts["pilot/dropped_seconds"],
            }

    def state_dict(self) -> dict[str, Any]:
        return self._worth.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._worth.load_state_dict(state_dict)
