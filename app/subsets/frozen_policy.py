"""The policy that a selection measures: it rolls prompts out and is differentiated, but never updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.policy.adapters import causal_lm
from app.policy.weights import plain_weights
from app.rollouts.pipeline import RolloutPipeline
from datamodules.ledger import Ledger
from datamodules.seeding import run_seed, sample_seeds
from datamodules.types import Completion, Prompt, RolloutGroup

_PURPOSE = "select"
"""Separates the random numbers of these rollouts from those of training."""


class FrozenPolicy:
    """A module with fixed weights, in evaluation mode (no dropout), on the trainer's device.

    Args:
        module: with its weights loaded (`configure_model`).
        trainer: provides device and precision.
    """

    def __init__(self, module: GRPOModule, trainer: Trainer) -> None:
        self.module = module
        trainer.precision_plugin.convert_module(module)
        module.to(trainer.strategy.root_device)
        module.policy_model.eval()
        self.precision = trainer.precision_plugin.forward_context
        """Context of forward passes, as in training."""
        self.seed = run_seed()
        self.ledger = Ledger()
        dtype = module.policy.stored_dtype()
        module.engine.setup(causal_lm(module.policy_model), module.tokenizer, dtype=dtype)
        module.engine.push(plain_weights(module.policy_model), 0)
        self._pipeline = RolloutPipeline(module.engine, module.scorer, self.seed, self.precision)

    def roll(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Return scored groups of `G` completions, sampled as in training."""
        return self._pipeline.roll(prompts, self.module.sampling, self.ledger, purpose=_PURPOSE, step=0)

    def complete(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Return one completion of each prompt, sampled as in training, without a score."""
        sampling = replace(self.module.sampling, num_generations=1)
        seeds = sample_seeds(self.seed, _PURPOSE, 0, [prompt.id for prompt in prompts], 1)
        with self.precision():
            return [one for (one,) in self.module.engine.generate(prompts, sampling, np.asarray(seeds))]
