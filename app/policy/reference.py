"""The policy that a KL term holds the trained one to: the initial one."""

from __future__ import annotations

import torch
from torch import Tensor

from app.objective.packing import PackedBatch
from app.policy.model import Policy
from app.policy.scoring import score


class ReferencePolicy:
    """The initial weights: a frozen copy, or with LoRA the policy without its adapters, which needs no memory.

    No `nn.Module`, so that the copy is neither trained nor saved.

    Args:
        frozen: the copy; None where the policy has adapters to switch off.
    """

    def __init__(self, frozen: torch.nn.Module | None) -> None:
        self._frozen = None if frozen is None else frozen.eval().requires_grad_(False)

    @classmethod
    def of(cls, policy: Policy) -> ReferencePolicy:
        """Loads what is needed beside the trained policy."""
        return cls(policy.load() if policy.lora is None else None)

    @torch.no_grad()
    def logprobs(self, policy: torch.nn.Module, packed: PackedBatch, temperature: float) -> Tensor:
        """log ref of every completion token, float32 `[T]`.

        Args:
            policy: the trained one; a peft model where there is no frozen copy.
            packed: a micro-batch laid out for it.
            temperature: that completions are sampled with.
        """
        if self._frozen is not None:
            # It is loaded before the policy's device is settled, and no module that the trainer would move.
            frozen = self._frozen.to(packed.input_ids.device)
            return score(frozen, packed, temperature, with_entropy=False)[0]
        with policy.disable_adapter():  # type: ignore[operator]
            return score(policy, packed, temperature, with_entropy=False)[0]
