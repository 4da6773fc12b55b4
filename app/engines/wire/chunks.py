"""The policy's weights cut into chunks, so that sending them takes the memory of one chunk and not of one model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
"""Bytes at whose multiples tensors start in a chunk, so that each can be viewed in its own dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver must know of a tensor before its bytes arrive.

    Attributes:
        name: in the checkpoint.
        dtype: as torch names it, e.g. "bfloat16".
        shape: of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises ValueError for a name that is no dtype."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"tensor {self.name}: {self.dtype!r} is no dtype of torch")
        return found

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


def to_json(specs: Sequence[TensorSpec]) -> str:
    return json.dumps([[spec.name, spec.dtype, spec.shape] for spec in specs])


def from_json(text: str) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(text)]


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Where each tensor starts in a chunk, and the chunk's size, in bytes."""
    starts, end = [], 0
    for spec in specs:
        starts.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def unpack(flat: torch.Tensor, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of a chunk: views of `flat`, uint8 `[size]`."""
    starts, _ = layout(specs)
    return [
        (spec.name, flat[start : start + spec.nbytes].view(spec.torch_dtype).view(spec.shape))
        for start, spec in zip(starts, specs, strict=True)
    ]


def chunks(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Consecutive tensors of at most `limit` bytes together; a larger tensor is a chunk of its own.

    Args:
        named_tensors: consumed one by one.
        dtype: that floating-point tensors are cast to; None keeps each one's own.
        limit: in bytes.
    """
    chunk: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        cast = tensor.detach().to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        if chunk and size + cast.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, cast))
        size += cast.nbytes
    if chunk:
        yield chunk


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory, uint8 `[nbytes]`, on its device."""
    return tensor.contiguous().view(-1).view(torch.uint8)
