"""The reference policy of the KL term: the initial policy."""

from __future__ import annotations

import torch
from torch import Tensor

from app.objective.packing import PackedBatch
from app.policy.model import Policy
from app.policy.scoring import completion_logprobs


class ReferencePolicy:
    """The initial weights: a frozen copy, or with LoRA the policy without its adapters, which needs no memory.

    It isn't an `nn.Module`, so that the copy is neither trained nor saved.
    """

    def __init__(self, frozen: torch.nn.Module | None) -> None:
        self._frozen = None if frozen is None else frozen.eval().requires_grad_(False)

    @classmethod
    def of(cls, policy: Policy) -> ReferencePolicy:
        """Load the reference of a policy."""
        return cls(policy.load() if policy.lora is None else None)

    @torch.no_grad()
    def logprobs(self, policy: torch.nn.Module, packed: PackedBatch, temperature: float) -> Tensor:
        """Return log ref of every generated token of a micro-batch, float32 `[T]`, at the sampling temperature.

        `policy` is the trained policy, whose adapters are switched off if there is no frozen copy.
        """
        if self._frozen is not None:
            # The trainer doesn't move it, and it is loaded before the policy's device is known.
            frozen = self._frozen.to(packed.input_ids.device)
            return completion_logprobs(frozen, packed, temperature, with_entropy=False)[0]
        with policy.disable_adapter():  # type: ignore[operator]
            return completion_logprobs(policy, packed, temperature, with_entropy=False)[0]
