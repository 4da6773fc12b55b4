"""The GRPO gradient of one prompt, in the parameters that a pattern names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.policy.model import decoder_layers
from app.subsets.frozen_policy import FrozenPolicy
from datamodules.errors import UserError
from datamodules.types import RolloutGroup


def chosen_parameters(model: nn.Module, pattern: str, last_layers: int) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model, on the meta device or not, in whose names the pattern is found.

    Without a pattern, the LoRA parameters if there are any, else those of the last decoder layers.

    Raises:
        UserError: an invalid pattern, or no match.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if pattern:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            found = f"parameters is {pattern!r}, which is not a regular expression ({error})"
            raise UserError(f"{found}. Correct the pattern.") from error
        chosen = {name: one for name, one in trainable.items() if wanted.search(name)}
    else:
        chosen = {name: one for name, one in trainable.items() if "lora_" in name}
        if not chosen:
            layers = list(decoder_layers(model))[-last_layers:]
            last = {id(parameter) for layer in layers for parameter in layer.parameters()}
            chosen = {name: parameter for name, parameter in trainable.items() if id(parameter) in last}
    if not chosen:
        some = ", ".join(repr(name) for name in list(trainable)[-3:])
        raise UserError(f"parameters is {pattern!r}, which matches no trainable parameter. Match names such as {some}.")
    return chosen


class PromptGradients:
    """Gradients of the training loss for one group at a time.

    The loss is that of a training batch with this one group: same advantages, token weights, clipping and KL. Its scale
    depends on the group alone. Other parameters are left out of the backward pass.

    Args:
        policy: the policy.
        parameters: by name, in the order of the flat gradient.
    """

    def __init__(self, policy: FrozenPolicy, parameters: dict[str, nn.Parameter]) -> None:
        self._policy = policy
        self.parameters = list(parameters.values())
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self.size = sum(self._sizes)

    def add(self, group: RolloutGroup, flat: Tensor) -> None:
        """Add the gradient of a group to `flat`, float32 `[P]`."""
        learner = self._policy.module.learner
        parts = learner.minibatches_of([group], learner.advantages_of([group]), step=0)
        sequences = [sequence for part in parts for sequence in part.sequences]
        with only_trained(learner.policy, self.parameters):
            for packed in learner.microbatches.of(sequences) if sequences else []:
                with self._policy.precision():
                    loss = learner.loss_of(packed).loss
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                for gradient, place in zip(gradients, flat.split(self._sizes), strict=True):
                    if gradient is not None:
                        place += gradient.reshape(-1)


@contextmanager
def only_trained(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Require gradients of these parameters alone, so that the layers below them keep no activations."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
