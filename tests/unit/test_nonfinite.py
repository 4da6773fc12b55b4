"""Updates that are not finite: which completions are named, and when the run ends."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from app.objective.packing import ScoredSequence
from app.update.minibatch import CompletionId, MiniBatch
from app.update.nonfinite import NonFiniteGuard, offenders
from datamodules.errors import UserError

NAN = torch.tensor(float("nan"))
ONE = torch.tensor(1.0)


def sequence(advantage: float) -> ScoredSequence:
    return ScoredSequence([1], [2], np.zeros(1), advantage, 1.0)


def test_a_gradient_that_is_not_finite_is_found_behind_a_finite_loss() -> None:
    weight = torch.nn.Parameter(torch.tensor(4.0))

    def loss_of(one: ScoredSequence) -> Tensor:
        # sqrt(w - 4 a): at a = 0 value 2, slope 1/4; at a = 1 value 0, slope infinite; at a = 2 NaN.
        return torch.sqrt(weight - 4 * one.advantage)

    ids = [CompletionId(f"p{index}", index) for index in range(3)]
    part = MiniBatch([sequence(0), sequence(1), sequence(2)], ids, 3, 0)
    assert offenders(part, loss_of, [weight]) == ids[1:]
    assert weight.grad is None


def test_three_in_a_row_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard()
    for step in range(2):
        guard.skipped(step, NAN, ONE, [CompletionId("a", 1)])
        guard.check(step)
    guard.passed()
    with caplog.at_level(logging.WARNING):
        for step in range(3, 6):
            assert not guard.exhausted
            guard.skipped(step, ONE, NAN, [CompletionId("q/1", index) for index in range(10)])
    assert "step 5: update skipped, not finite: loss 1, gradient norm nan, from q/1[0], q/1[1]," in caplog.text
    assert "q/1[7] and 2 more" in caplog.text and "q/1[8]" not in caplog.text
    with pytest.raises(UserError, match="Stopped at step 5: 3 updates in a row were not finite") as error:
        guard.check(5)
    assert "\n" not in str(error.value)


def test_a_sum_that_overflows_by_itself_is_said_so(caplog: pytest.LogCaptureFixture) -> None:
    NonFiniteGuard().skipped(0, NAN, NAN, [])
    assert "each completion alone is finite" in caplog.text
