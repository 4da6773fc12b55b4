"""Pilots: a few completions of every prompt first, the rest of the group only where that is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.rollouts.pipeline import RolloutRequest
from callbacks.algorithm.dynamic_sampling import DynamicSampling, count_rollouts
from callbacks.algorithm.pilot_worth import PilotWorth
from callbacks.algorithm.prepared_batch import prepared_state, restored_batch
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
    always, but time only where a step has more completions than the engine decodes at the price of a few, or with
    `ahead`. Reward functions see pilot and rest in separate calls.

    Args:
        n_init: completions of a pilot, at least 2 and fewer than `model.sampling.num_generations`.
        rule: which pilots are completed: "worth" as above, or "informative", those whose rewards differ.
        ahead: whether the pilots of a step are generated in the call that completes the groups of the step before
            (SPEED-RL's overlap), by the policy of that time: there is one wait for a longest completion in a step, not
            two. The first `n_init` completions of a group are then a step old, and the objective corrects for it by
            their own log-probabilities. Prompts are chosen a step earlier.
    """

    def __init__(self, n_init: int = 4, rule: Rule = "worth", ahead: bool = False) -> None:
        if n_init < 2:
            raise UserError(f"Pilots.n_init is {n_init}, expected at least 2, which can differ. Raise it.")
        if rule not in get_args(Rule):
            raise UserError(f"Pilots.rule is {rule!r}; {nearest(str(rule), get_args(Rule))}")
        self.n_init, self.rule, self.ahead = n_init, rule, ahead
        self._worth = PilotWorth()

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        if self.n_init >= (generations := module.sampling.num_generations):
            raise UserError(
                f"callbacks.Pilots has n_init={self.n_init}, but model.sampling.num_generations is {generations}, "
                "which leaves nothing to complete. Lower n_init or raise num_generations."
            )
        if self.ahead and RolloutAhead.all_of(trainer):
            raise UserError(
                "callbacks.Pilots has ahead=true and callbacks.RolloutAhead is listed, too: both prepare the batch of "
                "the next step. Remove callbacks.RolloutAhead, or set ahead=false."
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

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._data = OnlinePromptDataModule.of(trainer)
        needed = 2 * self._data.prompts_per_step
        if self.ahead and stage == "fit" and (size := len(self._data.pools["train"])) < needed:
            raise UserError(
                "callbacks.Pilots has ahead=true, which chooses other prompts for the next step while one is in "
                f"progress, but the pool has {size} prompts and two steps have {needed}. Lower "
                "data.prompts_per_step, add prompts, or set ahead=false."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        self._worth.begin_step()
        known = {group.prompt.id for group in batch.of("trained", "dropped")}
        if missing := [prompt for prompt in batch.prompts if prompt.id not in known]:
            self.roll_out(self._data.selector, pl_module, batch, missing)
        if self.ahead:
            last = trainer.global_step + pl_module.mini_batches >= trainer.max_steps > 0
            self._complete_beside_pilots(pl_module, batch, last)

    def roll_out(self, selector: Selector, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]) -> None:
        rest = pl_module.sampling.num_generations - self.n_init
        forecast = batch.forecast_of(prompts)
        expected = {prompt.id: one for prompt, one in zip(prompts, forecast.tolist(), strict=True)}
        before = batch.ledger.seconds["rollout"]
        groups = pl_module.pipeline.roll_with_pilots(
            prompts, pl_module.sampling, batch.ledger, step=batch.step, pilot=self.n_init,
            completed=lambda pilot: self._is_completed(pilot, expected[pilot.prompt.id], rest),
        )  # fmt: skip
        seconds = (batch.ledger.seconds["rollout"] - before) / max(1, sum(group.completion_tokens for group in groups))
        with batch.ledger.phase("select"):
            selector.observe(Outcomes.of(groups, batch.step, "fresh", self.n_init + rest))
        # An informative pilot is completed, and only one that lost completions to failed scores is no longer than one.
        dropped = [one for one in groups if not one.informative and len(one.completions) <= self.n_init]
        batch.add(groups)
        batch.move(dropped, "dropped")
        self._account(batch, groups, dropped, rest, seconds)

    def _is_completed(self, pilot: RolloutGroup, expected: float, rest: int) -> bool:
        """Return whether a group is to be completed, given its pilot and the forecast, which may be NaN."""
        if self.rule == "informative":
            return pilot.informative
        return self._worth.informative(pilot, expected, rest) >= self._worth.threshold(rest)

    def _complete_beside_pilots(self, pl_module: GRPOModule, batch: TrainBatch, last: bool) -> None:
        """Complete the groups whose pilots the step before generated, in one call with the pilots of the next step."""
        data, rest = self._data, pl_module.sampling.num_generations - self.n_init
        # Those of the step before; reference groups and groups of `roll_out` are of this one.
        pilots = {one.prompt.id: one for one in batch.groups if one.source == "fresh" and one.birth_step < batch.step}
        spared = [one for one in batch.of("dropped") if one.birth_step < batch.step]
        # Chosen blindly now: a prompt of this step, whose outcome the selector doesn't know, is left for later ones.
        data.in_flight = frozenset(prompt.id for prompt in batch.prompts)
        room = len(data.pools["train"]) - len(data.in_flight)
        coming = None if last else data.prepare(batch.step + 1, min(data.fresh_prompts, room))
        data.in_flight = frozenset()
        asked = () if coming is None else coming.prompts
        unfinished = [one.prompt for one in pilots.values()]
        requests = [
            RolloutRequest(unfinished, "train", sizes=[rest] * len(pilots), begun=self.n_init),
            RolloutRequest(asked, "train", sizes=[self.n_init] * len(asked), step=batch.step + 1),
        ]  # fmt: skip
        before = batch.ledger.seconds["rollout"]
        added, begun = pl_module.pipeline.roll_together(requests, pl_module.sampling, batch.ledger, step=batch.step)
        seconds = batch.ledger.seconds["rollout"] - before
        tokens = sum(group.completion_tokens for group in (*added, *begun))
        whole = [pilot.joined(one) for pilot, one in zip(pilots.values(), added, strict=True)]
        batch.rollouts = [(group, fate) for group, fate in batch.rollouts if group.prompt.id not in pilots]
        batch.add(whole)
        self._account(batch, [*whole, *spared], spared, rest, seconds / max(1, tokens))
        with batch.ledger.phase("select"):
            data.selector.observe(Outcomes.of(whole, batch.step, "fresh", self.n_init + rest))
        if coming is None:
            return
        forecast = coming.forecast_of(asked).tolist()
        chosen = [self._is_completed(one, expected, rest) for one, expected in zip(begun, forecast, strict=True)]
        coming.add(one for one, its in zip(begun, chosen, strict=True) if its)
        dropped = [one for one, its in zip(begun, chosen, strict=True) if not its]
        coming.add(dropped, "dropped")
        with batch.ledger.phase("select"):  # of the others when they are complete
            data.selector.observe(Outcomes.of(dropped, batch.step, "fresh", self.n_init + rest))

    def _account(
        self,
        batch: TrainBatch,
        groups: Sequence[RolloutGroup],
        dropped: Sequence[RolloutGroup],
        rest: int,
        seconds: float,
    ) -> None:
        """Learn from groups, completed or dropped, and count what was spared; `seconds` are those of a token."""
        threshold = self._worth.threshold(rest)
        with batch.ledger.phase("select"):
            self._worth.learn(groups, batch.forecast_of([group.prompt for group in groups]), self.n_init)
        batch.metrics["pilot/threshold"] = 1.0 if self.rule == "informative" else threshold
        for name, amount in {
            "prompts": len(groups),
            "dropped": len(dropped),
            "saved_completions": len(dropped) * rest,
            "dropped_seconds": seconds * sum(group.completion_tokens for group in dropped),
        }.items():
            batch.ledger.count(f"pilot/{name}", amount)

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
        worth = self._worth.state_dict()
        return worth | {"prepared": prepared} if (prepared := self.ahead and prepared_state(self._data)) else worth

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        prepared = state.pop("prepared", None)
        self._worth.load_state_dict(state)
        if prepared is not None:
            coming = restored_batch(prepared, self._data)
            # Where the options have changed, the prompts are rolled out again when the step begins.
            kept = {prompt.id for prompt in coming.prompts} if self.ahead else set()
            fits = [(one, fate) for one, fate in coming.rollouts if len(one.completions) <= self.n_init]
            coming.rollouts = [(one, fate) for one, fate in fits if one.prompt.id in kept]
            self._data.prepared = coming
