"""Generation of the next step's completions while the current step trains."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Trainer

from app.engines.ahead import Ahead
from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.group_codec import pack_groups, unpack_groups
from datamodules.ledger import WeightedMean
from datamodules.online import OnlinePromptDataModule
from datamodules.types import Outcomes, TrainBatch


class RolloutAhead(StepCallback):
    """Overlaps a step's update with the rollouts of the next step, one step off policy.

    It needs an engine that runs outside the trainer's process. When a step has all its groups, the selector, which has
    observed their outcomes, chooses the prompts of the next step, and the policy that this step began with generates
    their completions during the update; with several processes each generates its share. The step waits for all of them
    before it pushes the new weights. The groups are one step old when they are trained on (`birth_step`); the objective
    corrects for that by their behaviour log-probabilities, as for replayed groups. Refills of dynamic sampling and
    reference rollouts stay on policy.
    """

    stage = Stage.ROLL_OUT_AHEAD

    def __init__(self) -> None:
        self._ahead: Ahead | None = None

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        if not pl_module.engine.runs_ahead:
            raise UserError(
                f"callbacks.RolloutAhead is used with engines.{type(pl_module.engine).__name__}, which generates in "
                "the trainer's process and so not during an update. Use engines.VllmServer, or remove the callback."
            )
        self._data = OnlinePromptDataModule.of(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        self._ahead = None
        if trainer.global_step + pl_module.mini_batches >= trainer.max_steps > 0:
            return
        coming = self._data.prepare(batch.step + 1)
        if coming.prompts:
            self._ahead = pl_module.pipeline.start(coming.prompts, pl_module.sampling, step=coming.step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        coming = self._data.prepared
        if self._ahead is None or coming is None:
            return
        groups = pl_module.pipeline.finish(
            self._ahead, coming.prompts, pl_module.sampling, coming.ledger, birth_step=batch.step
        )
        coming.add(groups)
        with coming.ledger.phase("select"):
            self._data.selector.observe(Outcomes.of(groups, batch.step, "fresh"))
        batch.metrics["time/rollout_overlapped"] = self._ahead.overlapped
        batch.ledger.count("overlapped_seconds", self._ahead.overlapped)

    def state_dict(self) -> dict[str, Any]:
        coming = self._data.prepared
        if coming is None:
            return {}
        return {
            "step": coming.step,
            "prompts_per_step": self._data.prompts_per_step,
            "prompts": [prompt.id for prompt in coming.prompts],
            "groups": pack_groups(coming.groups),
            "extras": json.dumps([dict(group.extras) for group in coming.groups]),
            "forecast": None if coming.forecast is None else torch.from_numpy(coming.forecast.copy()),
            "pool_forecast": None if coming.pool_forecast is None else torch.from_numpy(coming.pool_forecast.copy()),
            "explored": sorted(coming.explored),
            "seconds": dict(coming.ledger.seconds),
            "counts": dict(coming.ledger.counts),
            "reward_metrics": {name: list(mean) for name, mean in coming.ledger.reward_metrics.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        pool = self._data.pools["train"]
        prompts = [pool[position] for position in pool.positions(state_dict["prompts"])]
        forecast, pool_forecast = (
            None if state_dict[name] is None else state_dict[name].numpy() for name in ("forecast", "pool_forecast")
        )
        coming = TrainBatch(state_dict["step"], prompts, forecast)
        coming.pool_forecast = pool_forecast
        groups = unpack_groups(state_dict["groups"], pool)
        extras = json.loads(state_dict["extras"]) if "extras" in state_dict else [{} for _ in groups]
        coming.add([replace(group, extras=one) for group, one in zip(groups, extras, strict=True)])
        coming.explored = frozenset(state_dict["explored"])
        coming.ledger.seconds.update(state_dict["seconds"])
        coming.ledger.counts.update(state_dict["counts"])
        for name, mean in state_dict.get("reward_metrics", {}).items():
            coming.ledger.average(name, WeightedMean(*mean))
        now = self._data.prompts_per_step
        more = now - state_dict.get("prompts_per_step", now)  # the resumed run may have been given another number
        if more > 0:
            self._data.add_prompts(coming, more)  # rolled out when the step begins
        elif more < 0:
            kept = max(0, len(coming.prompts) + more)
            coming.prompts, coming.forecast = coming.prompts[:kept], None if forecast is None else forecast[:kept]
            coming.move(coming.groups[kept:], "surplus")
        self._data.prepared = coming
