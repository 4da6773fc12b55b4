"""Random projections of gradients from millions of numbers to a few thousand, which preserve inner products on average.

A random matrix `R [P, d]` with independent signs over `sqrt(d)` has `E <xR, yR> = <x, y>` with variance
`(|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / d` (Johnson & Lindenstrauss 1984; Achlioptas, 2003). The sparse form
has the same mean and variance at `s / d` of the work. The matrix is not stored: each block of rows is sampled from its
own seed whenever it is used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from datamodules.errors import UserError, nearest
from datamodules.seeding import generator

KINDS = ("sparse", "rademacher", "none")
NONZEROS = 4
"""`s`, the non-zero entries in each row of the sparse `R`."""

_DENSE_BLOCK = 2**22
"""Signs of one block of the dense matrix: 16 MiB as float32."""
_SPARSE_BLOCK = 2**20
"""Coordinates of one block of the sparse matrix."""


class Projection(ABC):
    """A linear map from `[C, P]` to `[C, d]` that depends on its arguments alone.

    Args:
        size: `P`.
        dimension: `d`.
        seed: seed of the random entries.
    """

    def __init__(self, size: int, dimension: int, seed: int) -> None:
        self.size, self.dimension, self.seed = size, dimension, seed

    @abstractmethod
    def __call__(self, gradients: Tensor) -> Tensor:
        """Project the rows of float32 `[C, P]` to float32 `[C, d]` on the same device."""

    def _signs(self, block: int, count: int) -> np.ndarray:
        """Return independent signs -1 and 1, int8 `[count]`."""
        rng = generator(self.seed, type(self).__name__, self.size, self.dimension, block)
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-count // 8)), dtype=np.uint8), count=count)
        return bits.view(np.int8) * 2 - 1


class Unprojected(Projection):
    """The gradient itself, for models whose gradients of the whole pool fit on the disk."""

    def __init__(self, size: int, dimension: int = 0, seed: int = 0) -> None:
        super().__init__(size, size, seed)

    def __call__(self, gradients: Tensor) -> Tensor:
        return gradients


class Rademacher(Projection):
    """Independent signs over `sqrt(d)` in every entry: `P d` multiplications per gradient."""

    def __call__(self, gradients: Tensor) -> Tensor:
        rows = max(1, _DENSE_BLOCK // self.dimension)
        projected = gradients.new_zeros(len(gradients), self.dimension)
        for block, first in enumerate(range(0, self.size, rows)):
            part = gradients[:, first : first + rows]
            signs = torch.from_numpy(self._signs(block, part.shape[1] * self.dimension)).to(part)
            projected.addmm_(part, signs.view(part.shape[1], self.dimension))
        return projected / math.sqrt(self.dimension)


class Sparse(Projection):
    """`s` signs over `sqrt(s)` in every row, one in each of `s` blocks of `w = d / s` columns (Kane & Nelson, 2014).

    Coordinate `i` goes to column `(i + shift) mod w` of a block, with a new random shift for every `w` coordinates. Two
    coordinates collide with probability at most `1 / w`, as with independent columns, and mean and variance depend on
    nothing else. Sums run along memory, in a fixed order on any device.
    """

    def __call__(self, gradients: Tensor) -> Tensor:
        width = self.dimension // NONZEROS
        together = max(1, _SPARSE_BLOCK // width) * width
        projected = gradients.new_zeros(len(gradients), NONZEROS, width)
        for block, first in enumerate(range(0, self.size, together)):
            part = gradients[:, first : first + together]
            count = part.shape[1]
            turns = -(-count // width)
            signs = torch.from_numpy(self._signs(block, NONZEROS * count)).to(part.device).view(NONZEROS, count)
            random = generator(self.seed, "shifts", self.size, self.dimension, block)
            shifts = random.integers(width, size=(NONZEROS, turns, 1))
            origin = torch.from_numpy((np.arange(width) - shifts) % width).to(part.device)
            padded = part.new_zeros(len(part), turns * width)
            for columns in range(NONZEROS):
                padded[:, :count] = part * signs[columns]
                table = padded.view(len(part), turns, width)
                projected[:, columns] += table.gather(2, origin[columns].expand_as(table)).sum(1)
        return projected.flatten(1) / math.sqrt(NONZEROS)


def check_projection(kind: str, dimension: int) -> None:
    """Raise UserError for an unknown name or a dimension that no projection can have."""
    if kind not in KINDS:
        raise UserError(f"projection is {kind!r}; expected one of {', '.join(KINDS)}: {nearest(kind, KINDS)}")
    if dimension < NONZEROS or dimension % NONZEROS:
        raise UserError(f"dimension is {dimension}; set it to a multiple of {NONZEROS}, such as 4096.")


def projection(kind: str, size: int, dimension: int, seed: int) -> Projection:
    """Return the projection of that name from `size` to `dimension` numbers; check it as `check_projection`."""
    check_projection(kind, dimension)
    kinds: dict[str, type[Projection]] = {"sparse": Sparse, "rademacher": Rademacher, "none": Unprojected}
    return kinds[kind](size, dimension, seed)
