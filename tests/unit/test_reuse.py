"""Further updates on a batch: against a loss written out, their gate, and the run's account of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.module import GRPOModule
from app.objective.surrogate import policy_loss
from app.policy.scoring import completion_logprobs
from app.update.optimization import Optimization
from app.update.reuse import HeadNorms, Reuse
from app.update.steps import Updates
from callbacks import Rollouts, RunCheckpoint, RunLedger, WeightSync
from datamodules.errors import UserError
from tests.support.policies import flat_gradient, module_on, tiny_model
from tests.support.scripted_run import HALF, QUARTER, WRONG, scripted_run
from tests.unit.test_objective_microbatches import VOCABULARY, groups


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def take(module: GRPOModule, reuse: Reuse, norms: list[float] | None = None) -> tuple[Updates, list[Tensor]]:
    """Update on the twelve groups by gradient descent; return the gradients of the further updates."""
    learner, model = module.learner, module.policy_model
    parts = learner.minibatches_of(groups(), learner.advantages_of(groups()), step=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    updates, again = Updates(Optimization(clip_norm=0), reuse), []
    updates.head_norms.norms.extend(norms or [])

    def step_again() -> None:
        again.append(flat_gradient(model).clone())
        optimizer.step()

    updates.take(
        learner, parts, 1, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        backward=backward, step_again=step_again,
    )  # fmt: skip
    return updates, again


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_a_further_update_is_relative_to_the_policy_before_the_first(mini_batches: int) -> None:
    options: dict[str, Any] = {"mini_batches": mini_batches}
    updates, again = take(module_on(tiny_model(VOCABULARY, seed=3), **options), Reuse(2, None))
    assert (updates.reused.updates, updates.reused.groups) == (mini_batches, 8)  # 8 of 12 groups have an advantage

    module = module_on(tiny_model(VOCABULARY, seed=3), **options)
    learner, model = module.learner, module.policy_model
    parts = learner.minibatches_of(groups(), learner.advantages_of(groups()), step=1)
    laid_out = [list(learner.microbatches.of(part.sequences)) for part in parts]
    with torch.no_grad():
        old = [[completion_logprobs(model, one, 1.0, with_entropy=False)[0] for one in part] for part in laid_out]
    for number, (part, before) in enumerate(zip(laid_out * 2, old * 2, strict=True)):
        model.zero_grad()
        for one, log_old in zip(part, before, strict=True):
            log_pi, entropy = completion_logprobs(model, one, 1.0, with_entropy=True)
            # Replayed and other groups alike: mu is what generated them, pi_old the policy before all updates.
            backward(
                policy_loss(
                    log_pi, one.behaviour_logprobs, one.advantages, one.weights, module.options.surrogate,
                    old_logprobs=before_update(one, log_old), sequences=one.sequences, entropy=entropy,
                ).loss
            )  # fmt: skip
        found = flat_gradient(model)
        if number >= mini_batches:
            assert (again[number - mini_batches] - found).norm() <= 1e-5 * found.norm()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad  # type: ignore[operator]


def before_update(packed: Any, logprobs: Tensor) -> Tensor:
    """Return log pi_old: what the policy's own engine has recorded for its fresh completions, else the policy's."""
    return torch.where(packed.replayed, logprobs, packed.old_logprobs)


def test_the_gate() -> None:
    norms = HeadNorms()
    for one in (1, 2, 3, 4, 5, 6, 7):
        norms.add(one)
    norms.add(math.nan)
    assert not norms.known
    norms.add(8)
    # Mean 4.5; the variance of 1 to 8 is 6.
    assert norms.known and norms.z_score(4.5 + math.sqrt(6)) == pytest.approx(1)

    model = module_on(tiny_model(VOCABULARY, seed=3))
    updates, again = take(model, Reuse(4, 0.5), [1e9 + one for one in range(8)])
    assert len(again) == updates.reused.updates == 3 and updates.reused.z_score < 0
    updates, again = take(module_on(tiny_model(VOCABULARY, seed=3)), Reuse(4, 0.5), [1e-9 * one for one in range(63)])
    assert again == [] and updates.reused.updates == 0 and updates.reused.z_score > 0.5
    # Nothing is known of norms yet: the batch is used once.
    updates, again = take(module_on(tiny_model(VOCABULARY, seed=3)), Reuse(4, 0.5))
    assert again == [] and math.isnan(updates.reused.z_score)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"passes": 0}, "model.reuse.passes is 0; set"), ({"threshold": math.nan}, "model.reuse.threshold is nan; set")],
)
def test_impossible_options_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Reuse(**options)


def test_a_run_counts_batches_not_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str, reuse: Reuse) -> Any:
        (tmp_path / folder).mkdir()
        callbacks = [WeightSync(), Rollouts(), RunLedger(), RunCheckpoint(every=1, dirpath=str(tmp_path / folder))]
        patterns = [HALF, QUARTER, WRONG, HALF] * 4
        return scripted_run(tmp_path / folder, monkeypatch, patterns, callbacks, steps=3, reuse=reuse)

    once, thrice = run("once", Reuse()), run("thrice", Reuse(3, None))
    assert once.trainer.global_step == thrice.trainer.global_step == 3
    assert once.steps[0].prompts == thrice.steps[0].prompts
    assert "updates/reused" not in once.steps[0].metrics
    for step in thrice.steps:
        informative = sum(one.informative for one in step.groups)
        assert step.metrics["updates/reused"] == 2 and step.counts["reused_groups"] == 2 * informative
    first = [run.steps[0].metrics["loss"] for run in (once, thrice)]
    assert first[0] == first[1]
    assert not np.array_equal(*(one.module.policy_model.lm_head.weight.detach().numpy() for one in (once, thrice)))
    saved = torch.load(next((tmp_path / "thrice").rglob("step_00000003.ckpt")), weights_only=True)
    assert saved["head_norms"] == list(thrice.module._updates.head_norms.norms) and len(saved["head_norms"]) == 3
