"""Steps of plain GRPO from one checkpoint, whose groups are kept so that later steps can replay them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from app.module import GRPOModule
from app.policy.adapters import causal_lm
from app.policy.modes import switch_off_dropout
from app.policy.weights import plain_weights
from app.rollouts.pipeline import RolloutPipeline
from app.update.steps import Updates
from datamodules.ledger import Ledger
from datamodules.online import OnlinePromptDataModule
from datamodules.seeding import derive_seed, generator
from datamodules.types import Prompt, RolloutGroup


@dataclass(slots=True, eq=False)
class Walk:
    """What the steps of a walk left.

    Attributes:
        born: the groups that each step trained on when they were fresh.
        spare: groups rolled out beside them, which no update has seen, by step.
        ledger: seconds and counts of all steps.
        fresh: groups rolled out and trained on.
        informative: those among them whose rewards differ, without replayed ones.
        updated: informative groups in the updates, replayed ones included.
    """

    born: list[list[RolloutGroup]] = field(default_factory=list)
    spare: dict[int, list[RolloutGroup]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    fresh: int = 0
    informative: int = 0
    updated: int = 0


class Walker:
    """A policy with AdamW's state that takes steps of plain GRPO, and starts again from its checkpoint.

    Args:
        module: with its weights loaded.
        trainer: provides device and precision.
        data: the prompts.
        moments: AdamW's state dict of the checkpoint; None starts without moments.
    """

    def __init__(
        self, module: GRPOModule, trainer: Trainer, data: OnlinePromptDataModule, moments: dict[str, Any] | None
    ) -> None:
        self.module, self.data, self._moments = module, data, moments
        self.precision = trainer.precision_plugin.forward_context
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        switch_off_dropout(module.policy_model)
        self.parameters = [one for one in module.policy_model.parameters() if one.requires_grad]
        self._start = self.weights()
        module.engine.setup(
            causal_lm(module.policy_model), module.tokenizer, weights=lambda: plain_weights(module.policy_model),
            dtype=module.policy.stored_dtype(),
        )  # fmt: skip
        self._version = 0
        self._options = module.optimization
        self.updates = Updates(self._options)
        self.optimizer = self._options.optimizer(module.policy_model)

    def weights(self) -> list[Tensor]:
        """Return copies of the trained weights."""
        return [one.detach().clone() for one in self.parameters]

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Set the trained weights, and give them to an engine that keeps its own when it generates next."""
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)
        self._version += 1
        self._stale = True

    def restart(self, learning_rate: float, seed: int) -> None:
        """Return to the checkpoint, with a constant learning rate and a seed of prompts and completions."""
        self.load(self._start)
        self._options = dataclasses.replace(
            self.module.optimization, learning_rate=learning_rate, schedule="constant", warmup_steps=0
        )
        self.updates = Updates(self._options)
        self.optimizer = self._options.optimizer(self.module.policy_model)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        if self._moments is not None:
            self.optimizer.load_state_dict(self._moments)
            self._options.apply(self.optimizer, self.scheduler)
        self.seed = seed
        self._left = {order: self._shuffled(order) for order in ("prompts", "spare")}
        self._pipeline = RolloutPipeline(
            self.module.engine, self.module.scorer, derive_seed(seed, "worth"), self.precision
        )

    def next_prompts(self, count: int, order: str = "prompts") -> list[Prompt]:
        """Return training prompts in one of two orders of the seed's own, each once until all were returned."""
        return list(itertools.islice(self._left[order], count))

    def _shuffled(self, order: str) -> Iterator[Prompt]:
        pool, draws = self.data.pools["train"], generator(self.seed, "worth", order)
        while True:
            yield from (pool[int(position)] for position in draws.permutation(len(pool)))

    def roll(self, prompts: Sequence[Prompt], step: int, ledger: Ledger, purpose: str = "train") -> list[RolloutGroup]:
        """Roll prompts out with the current policy and score them."""
        if self._stale:
            self.module.engine.push(plain_weights(self.module.policy_model), self._version)
            self._stale = False
        return self._pipeline.roll(prompts, self.module.sampling, ledger, purpose=purpose, step=step)

    def walk(self, steps: int, replays: int, spare: Sequence[int]) -> Walk:
        """Take steps on fresh groups, each of which the next `replays` steps replay too.

        Args:
            steps: number of steps.
            replays: steps after its own in which an informative group is trained on again.
            spare: steps that roll out as many groups again, on which nothing is trained.
        """
        made = Walk()
        for step in range(steps):
            groups = self.roll(self.next_prompts(self.data.prompts_per_step), step, made.ledger)
            if step in spare:
                others = self.next_prompts(self.data.prompts_per_step, "spare")
                made.spare[step] = self.roll(others, step, Ledger(), "spare")
            again = [one for earlier in made.born[max(0, step - replays) : step] for one in earlier if one.informative]
            made.born.append(groups)
            made.fresh += len(groups)
            made.informative += sum(one.informative for one in groups)
            made.updated += sum(one.informative for one in groups) + len(again)
            self._update([*groups, *(dataclasses.replace(one, source="replay") for one in again)], step, made.ledger)
        return made

    def _update(self, groups: Sequence[RolloutGroup], step: int, ledger: Ledger) -> None:
        learner = self.module.learner

        def backward(loss: Tensor) -> None:
            loss.backward()

        with ledger.phase("update"), self._computing():
            parts = learner.minibatches_of(groups, learner.advantages_of(groups), step)
            self.updates.take(
                learner, parts, step, optimizer=self.optimizer, scheduler=self.scheduler, backward=backward
            )
        self._version += 1
        self._stale = True

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.precision(), torch.enable_grad():
            yield
