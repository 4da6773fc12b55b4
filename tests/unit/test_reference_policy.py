"""The reference stays the initial policy while the trained one moves, with and without adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.objective.packing import ScoredSequence
from app.policy.adapters import Lora
from app.policy.model import Policy
from app.policy.reference import ReferencePolicy
from app.update.microbatches import MicroBatches
from tests.support.policies import TINY


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["all_weights", "lora"])
def test_logprobs_are_those_of_the_initial_policy(lora: Lora | None) -> None:
    policy = Policy(str(TINY), lora=lora)
    trained, reference = policy.load(), ReferencePolicy.of(policy)
    sequences = [ScoredSequence([5, 6, 7], np.arange(8, 20), np.zeros(12), 1.0, 1.0)]
    packed = MicroBatches(trained, 64, True, 0, torch.device("cpu")).one(sequences)
    with torch.no_grad():
        logits = Policy(str(TINY)).load().eval()(torch.tensor([[5, 6, 7, *range(8, 20)]])).logits[0, 2:-1] / 0.7
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits.log_softmax(-1).gather(1, torch.arange(8, 20)[:, None])[:, 0]
    found = reference.logprobs(trained, packed, 0.7)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
