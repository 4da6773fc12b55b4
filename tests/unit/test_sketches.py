"""Sketches of each group's gradient with respect to the output head, against the gradients themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from app.module import GRPOModule
from app.objective.logprobs import HeadPrecision, token_logprobs
from app.objective.sketches import ERROR, SKETCH_SIZE, SketchSums, head_projection
from app.update.minibatch import shares
from datamodules.types import RolloutGroup
from tests.support.policies import module_on, tiny_model
from tests.support.tables import few
from tests.unit.test_objective_microbatches import VARIANTS, VOCABULARY, groups

CPU = torch.device("cpu")


def sketches(module: GRPOModule, batch: list[RolloutGroup], ranks: int = 1) -> Tensor:
    """Return the groups' sketches as a training step makes them, without the optimizer; summed over ranks."""
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


@pytest.mark.parametrize("name", few(list(VARIANTS), 3))
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


def test_inner_products_are_kept_within_the_bound() -> None:
    """Of two matrices of rank 1 that are parallel, the worst case, of two that are not, and of sums of many."""
    draw = torch.Generator().manual_seed(0)

    def rank(number: int) -> Tensor:
        left, right = torch.randn(90, number, generator=draw), torch.randn(number, 40, generator=draw)
        return (left @ right) / (left @ right).norm()

    one = rank(1)
    pairs = {"parallel": (one, one), "two of rank 1": (one, rank(1)), "two of rank 30": (rank(30), rank(30))}
    errors: dict[str, list[float]] = {name: [] for name in pairs}
    for seed in range(1000, 1300):
        maps = head_projection(90, 40, seed, CPU)
        for name, pair in pairs.items():
            first, second = maps.fold(torch.stack([maps.vocabulary.T.float() @ m @ maps.hidden.float() for m in pair]))
            assert len(first) == SKETCH_SIZE
            errors[name].append(float(first @ second - (pair[0] * pair[1]).sum()))
    for name, found in errors.items():
        deviation = float(np.std(found))
        print(f"{name}: {np.mean(found):.4f} +- {deviation:.3f}, bound {ERROR:.3f}")
        assert abs(np.mean(found)) < 4 * deviation / np.sqrt(300), name
        assert deviation < 1.15 * ERROR, name  # the standard error of a deviation over 300 draws is 4%
    assert np.std(errors["parallel"]) > 0.7 * ERROR
    assert np.std(errors["two of rank 1"]) < 0.85 * ERROR


def test_the_maps_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = head_projection(50, 8, 3, CPU)
    head_projection.cache_clear()
    torch.manual_seed(2)
    again, other = head_projection(50, 8, 3, CPU), head_projection(50, 8, 4, CPU)
    assert torch.equal(one.vocabulary, again.vocabulary) and torch.equal(one.order, again.order)
    assert torch.equal(one.hidden, again.hidden) and torch.equal(one.signs, again.signs)
    assert not torch.equal(one.vocabulary, other.vocabulary)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tiles_and_precisions_of_the_head(precision: HeadPrecision) -> None:
    """Soft cap, scale, temperature and entropy, in tiles with ragged edges; the weight need not ask for a gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 6, generator=draw).requires_grad_() for rows in (23, 31))
    targets, share = torch.randint(0, 31, (23,), generator=draw), torch.rand(23, generator=draw)
    spans = [(1, 5), (0, 7), (2, 4), (0, 7)]
    maps = head_projection(31, 6, 0, CPU)
    expected = torch.zeros(3, 31, 6)
    options = {"temperature": 0.7, "softcap": 2.0, "scale": 0.5, "precision": precision}
    for (group, _), rows in zip(spans, torch.arange(23).split([length for _, length in spans]), strict=True):
        logprobs, entropy = token_logprobs(hidden[rows], weight, targets[rows], **options)
        assert entropy is not None
        (gradient,) = torch.autograd.grad(-((share[rows] * logprobs).sum() + 0.1 * entropy.sum()), weight)
        expected[group] -= gradient
    for bytes_of_tile in (2**20, 128):
        sums = SketchSums(maps, 3)
        logprobs, entropy = token_logprobs(
            hidden, weight.detach(), targets, tile_bytes=bytes_of_tile, sketch=sums.of(spans), **options
        )
        assert entropy is not None
        (-((share * logprobs).sum() + 0.1 * entropy.sum())).backward()
        wanted = maps.fold(maps.vocabulary.T.float() @ expected @ maps.hidden.float())
        assert (sums.folded() - wanted).norm() < (1e-5 if precision == "float32" else 0.02) * wanted.norm()


def test_a_gradient_that_is_not_finite_has_no_sketch() -> None:
    sums = SketchSums(head_projection(31, 6, 0, CPU), 2)
    sums.sums[:] = 1.0
    sums.sums[1, 3, 3] = torch.nan
    assert sums.folded()[0].norm() > 0
    assert (sums.folded()[1] == 0).all()
