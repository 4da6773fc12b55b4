"""The GRPO gradient of one prompt, in the parameters that a pattern names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from app.module import GRPOModule
from app.policy.model import decoder_layers
from app.subsets.bench import Bench
from datamodules.errors import UserError
from datamodules.types import RolloutGroup, TrainBatch


def chosen_parameters(model: nn.Module, pattern: str, last_layers: int) -> dict[str, nn.Parameter]:
    """The trainable parameters whose name `pattern` is found in.

    Without a pattern: the LoRA parameters where there are any, else those of the last `last_layers` decoder layers.

    Raises UserError when none is left.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if pattern:
        try:
            wanted = re.compile(pattern)
        except re.error as error:
            raise UserError(f"parameters={pattern!r}: no regular expression ({error})") from error
        chosen = {name: one for name, one in trainable.items() if wanted.search(name)}
    else:
        chosen = {name: one for name, one in trainable.items() if "lora_" in name}
        chosen = chosen or _of_last_layers(model, trainable, last_layers)
    if not chosen:
        some = ", ".join(repr(name) for name in list(trainable)[-3:])
        raise UserError(
            f"parameters={pattern!r} names no trainable parameter: expected a pattern for names like {some}"
        )
    return chosen


class PromptGradients:
    """Gradients of the module's own loss for one group at a time.

    The loss is the training step's for a batch of this one group: same advantages, token weights, clipping and KL. Its
    scale depends on the group alone. Parameters that are not asked for are left out of the backward pass.

    Args:
        bench: the policy.
        parameters: by name, in the order of the flat gradient.
    """

    def __init__(self, bench: Bench, parameters: dict[str, nn.Parameter]) -> None:
        self._bench = bench
        self._module: GRPOModule = bench.module
        self.parameters = list(parameters.values())
        self.size = sum(parameter.numel() for parameter in self.parameters)

    def add(self, group: RolloutGroup, flat: Tensor) -> None:
        """Adds the gradient of a group to `flat`, float32 `[P]`."""
        batch = TrainBatch(0, [group.prompt])
        batch.add([group])
        batch.advantages = self._module.advantages_of(batch)
        sequences = [sequence for part in self._module.minibatches_of(batch) for sequence in part.sequences]
        with only_trained(self._module.policy_model, self.parameters):
            for packed in self._module.microbatches_of(sequences) if sequences else []:
                with self._bench.precision():
                    loss = self._module.loss_of(packed).loss
                self._accumulate(torch.autograd.grad(loss, self.parameters, allow_unused=True), flat)

    def _accumulate(self, gradients: tuple[Tensor | None, ...], flat: Tensor) -> None:
        first = 0
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            last = first + parameter.numel()
            if gradient is not None:
                flat[first:last] += gradient.reshape(-1)
            first = last


@contextmanager
def only_trained(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, no other parameter of the model asks for a gradient, so that the layers below keep no activations."""
    wanted = {id(parameter) for parameter in parameters}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _of_last_layers(model: nn.Module, trainable: dict[str, nn.Parameter], last_layers: int) -> dict[str, nn.Parameter]:
    layers = decoder_layers(model)
    wanted = {id(parameter) for layer in list(layers)[-last_layers:] for parameter in layer.parameters()}
    return {name: parameter for name, parameter in trainable.items() if id(parameter) in wanted}
