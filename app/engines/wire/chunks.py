"""Chunks of the policy's weights, so that a transfer needs the memory of one chunk instead of the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
"""Alignment in bytes of the tensors in a chunk, so that each can be viewed in its own dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The description of a tensor that a receiver needs before the bytes arrive; the name is that in the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises ValueError if torch has no dtype of that name."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"tensor {self.name}: torch has no dtype {self.dtype!r}")
        return found

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


def to_json(specs: Sequence[TensorSpec]) -> str:
    return json.dumps([[spec.name, spec.dtype, spec.shape] for spec in specs])


def from_json(text: str) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in json.loads(text)]


def layout(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Return the offset of each tensor in a chunk and the size of the chunk, in bytes."""
    starts, end = [], 0
    for spec in specs:
        starts.append(end)
        end += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def pack(chunk: Sequence[tuple[str, torch.Tensor]], flat: torch.Tensor) -> None:
    """Copy the tensors of a chunk into `flat` (uint8, as large as its `layout` or larger)."""
    starts, _ = layout([TensorSpec.of(name, tensor) for name, tensor in chunk])
    for start, (_, tensor) in zip(starts, chunk, strict=True):
        data = as_bytes(tensor)
        flat[start : start + len(data)].copy_(data)


def unpack(flat: torch.Tensor, specs: Sequence[TensorSpec]) -> list[tuple[str, torch.Tensor]]:
    """Return the names and tensors of a chunk, as views of `flat` (uint8 `[size]`)."""
    starts, _ = layout(specs)
    return [
        (spec.name, flat[start : start + spec.nbytes].view(spec.torch_dtype).view(spec.shape))
        for start, spec in zip(starts, specs, strict=True)
    ]


def chunks(
    named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield consecutive tensors of at most `limit` bytes in total; a larger tensor becomes its own chunk.

    Args:
        named_tensors: consumed one by one.
        dtype: dtype that floating-point tensors are cast to; None keeps each tensor's own.
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
    """Return the tensor's memory as uint8 `[nbytes]` on the tensor's device."""
    return tensor.contiguous().view(-1).view(torch.uint8)
