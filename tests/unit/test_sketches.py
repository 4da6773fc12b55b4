"""Sketches of each group's gradient with respect to the output head, against the gradients themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.module import GRPOModule
from app.objective.logprobs import token_logprobs
from app.objective.options import SurrogateOptions
from app.objective.sketches import ERROR, SKETCH_SIZE, SketchSums, head_projection
from datamodules.types import RolloutGroup
from tests.support.policies import module_on, tiny_model
from tests.support.tables import few
from tests.unit.test_objective_microbatches import VARIANTS, VOCABULARY, groups

CPU = torch.device("cpu")


def sketches(module: GRPOModule, batch: list[RolloutGroup], ranks: int = 1) -> Tensor:
    """Return the groups' sketches as a training step makes them, without the optimizer; summed over ranks."""
    from app.update.minibatch import shares

    learner = module.learner
    sums = learner.sketch_sums(len(batch))
    for part in learner.minibatches_of(batch, learner.advantages_of(batch), step=1):
        for share in shares(part, ranks):
            share = learner.with_old_logprobs(share) if module.mini_batches > 1 else share
            for rows in learner.microbatches.plan(share.sequences):
                chosen = [share.sequences[row] for row in rows]
                sketch = sums.of((one.group, len(one.completion_ids)) for one in chosen)
                learner.loss_of(learner.microbatches.one(chosen), sketch).loss.backward()
    return sums.folded()


def head_gradients(module: GRPOModule, batch: list[RolloutGroup]) -> Tensor:
    """Return the ascent direction of each group's loss in the head, `[groups, V, H]`, one backward pass for each."""
    learner, found = module.learner, torch.zeros(len(batch), *module.policy_model.lm_head.weight.shape)
    for part in learner.minibatches_of(batch, learner.advantages_of(batch), step=1):
        part = learner.with_old_logprobs(part) if module.mini_batches > 1 else part
        for group in {one.group for one in part.sequences}:
            mine = [one for one in part.sequences if one.group == group]
            module.policy_model.zero_grad(set_to_none=True)
            for packed in learner.microbatches.of(mine):
                learner.loss_of(packed).loss.backward()
            found[group] = -module.policy_model.lm_head.weight.grad
    return found


def expected(module: GRPOModule, gradients: Tensor) -> Tensor:
    """Return the maps of the run applied to whole gradients."""
    maps = module.learner.sketch_sums(1).projection
    return maps.fold(maps.vocabulary.T.float() @ gradients @ maps.hidden.float())


@pytest.mark.parametrize("name", few([name for name in VARIANTS], 3))
def test_a_sketch_is_the_map_of_the_gradient_that_the_update_applies(name: str) -> None:
    module, batch = module_on(tiny_model(VOCABULARY, 3), tiny_model(VOCABULARY, 4), **VARIANTS[name]), groups()
    wanted = expected(module, head_gradients(module, batch))
    assert wanted.norm(dim=1).gt(0).sum() >= 8
    for budget, share_prompts in ((10_000, True), (90, True), (90, False)):
        module.options = dataclasses.replace(
            module.options, max_tokens_per_microbatch=budget, share_prompts=share_prompts
        )
        torch.testing.assert_close(sketches(module, batch), wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(sketches(module, batch, ranks=3), wanted, atol=1e-6, rtol=1e-4)
