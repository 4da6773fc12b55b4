"""A mini-batch's gradient does not depend on how it is cut, nor on whether completions without advantage take part."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engines import RolloutEngine, Transformers, VllmServer
from app.module import GRPOModule
from app.objective.options import SurrogateOptions
from app.update.minibatch import advantages_of, minibatches
from datamodules.seeding import generator
from datamodules.types import Prompt, RolloutGroup
from tests.support.policies import flat_gradient, gradient, group_of, module_on, tiny_model
from tests.support.tables import few

VOCABULARY = 11
SIZE = 4
TOLERANCE = 1e-6

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "kl_and_entropy": {"surrogate": SurrogateOptions(beta=0.1, entropy_coef=0.02)},
    "gspo": {"surrogate": SurrogateOptions(ratio_level="sequence"), "aggregation": "sequence"},
    "sequence_importance": {"surrogate": SurrogateOptions(importance_level="sequence"), "aggregation": "constant"},
    "cispo": {"surrogate": SurrogateOptions(form="cispo", cispo_cap=1.1)},
    "sapo": {"surrogate": SurrogateOptions(form="sapo"), "aggregation": "sequence"},
    "two_updates": {"mini_batches": 2},
}


def groups() -> list[RolloutGroup]:
    """Twelve groups of four, four of them without advantage, half replayed; completions of 1 to 19 tokens."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(12):
        lengths = draw.integers(1, 20, SIZE)
        rewards = [0.5] * SIZE if index % 3 == 1 else draw.random(SIZE).tolist()
        made.append(
            group_of(
                Prompt(f"p{index}", index, "", "", tuple(draw.integers(3, VOCABULARY, 2 + index % 6).tolist()), {}),
                [tuple(draw.integers(0, VOCABULARY, length).tolist()) for length in lengths],
                [-2.4 + 0.4 * draw.standard_normal(length) for length in lengths],
                rewards,
                "replay" if index % 2 else "fresh",
            )
        )
    return made


def in_microbatches(module: GRPOModule, count: int) -> Tensor:
    """The gradient with the largest token budget that cuts the (first) mini-batch into `count`.

    Groups stay whole where prompts are shared, so that some counts do not occur: then it is the next one."""
    batch_groups = groups()
    sequences = minibatches(
        batch_groups, advantages_of(batch_groups, "group"), parts=module.mini_batches,
        generator=generator(0, "minibatches", 0), aggregation="token", max_completion_length=19,
        keep_zero_advantage=bool(module.options.surrogate.beta),
    )[0].sequences  # fmt: skip
    for budget in range(1300, 10, -1):
        module.options = dataclasses.replace(module.options, max_tokens_per_microbatch=budget)
        if len(module.learner.microbatches.plan(sequences)) >= count:
            return gradient(module, batch_groups)
    raise AssertionError(f"no budget makes {count} micro-batches or more")


@pytest.mark.parametrize("name", few(VARIANTS, 3))
def test_any_number_of_microbatches(name: str) -> None:
    module = module_on(tiny_model(VOCABULARY, seed=3), tiny_model(VOCABULARY, seed=4), **VARIANTS[name])
    whole = in_microbatches(module, 1)
    assert whole.norm() > 1e-3
    for share_prompts in (True, False):
        module.options = dataclasses.replace(module.options, share_prompts=share_prompts)
        for count in (1, 2, 3, 7):
            assert (in_microbatches(module, count) - whole).norm() <= TOLERANCE * whole.norm()


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_completions_without_advantage_left_out_or_kept(aggregation: Any) -> None:
    model = tiny_model(VOCABULARY, seed=3)
    module = module_on(model, aggregation=aggregation)
    left_out = gradient(module, groups())
    model.zero_grad(set_to_none=True)
    (part,) = minibatches(
        groups(), advantages_of(groups(), "group"), parts=1, generator=generator(0, "minibatches", 0),
        aggregation=aggregation, max_completion_length=module.sampling.max_completion_length, keep_zero_advantage=True,
    )  # fmt: skip
    assert len(part.sequences) == 12 * SIZE
    learner = module.learner
    for packed in learner.microbatches.of(part.sequences):
        learner.loss_of(packed).loss.backward()
    kept = flat_gradient(model)
    assert (left_out - kept).norm() <= TOLERANCE * kept.norm()


def test_a_batch_without_any_advantage_has_no_micro_batch() -> None:
    module = module_on(tiny_model(VOCABULARY, seed=3))
    silent = [group for group in groups() if not group.informative]
    assert torch.equal(gradient(module, silent), torch.zeros_like(gradient(module, groups())))


@pytest.mark.parametrize(("engine", "everyone"), [(Transformers(), False), (VllmServer(), True)])
def test_the_policy_before_the_update_is_not_the_engine(engine: RolloutEngine, everyone: bool) -> None:
    """With several updates the log-probabilities of an engine of its own are those of the behaviour policy only."""
    model = tiny_model(VOCABULARY, seed=1)
    module = module_on(model, mini_batches=2, engine=engine)
    learner = module.learner
    for part in learner.minibatches_of(groups(), learner.advantages_of(groups()), step=0):
        for one in learner.with_old_logprobs(part).sequences:
            if not (one.replayed or everyone):
                assert one.old_logprobs is None
                continue
            ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
            with torch.no_grad():
                every = model.eval()(input_ids=ids).logits[0].log_softmax(-1)
            first = len(one.prompt_ids)
            expected = [float(every[first - 1 + at, token]) for at, token in enumerate(one.completion_ids)]
            assert one.old_logprobs == pytest.approx(expected, abs=1e-5)
            assert np.abs(np.array(one.behaviour_logprobs) - expected).max() > 1e-3
