"""Sketches of the gradient of each group's loss with respect to the output head, whose inner products stay the same.

The gradient of a group's objective with respect to the head `W [V, H]` is the sum over its tokens of outer products,

    M = sum_t d_t h_t^T,      d_t = -dL / d(W h_t)  (on policy w_t A_t (onehot(y_t) - p_t)),

and both factors are at hand in the backward pass of `logprobs`. With random signs `P_v [V, a]` and `P_h [H, b]` a group
costs the `a x b` numbers of `P_v^T M P_h`, which are then hashed with random signs to `SKETCH_SIZE`
(Charikar, Chen & Farach-Colton, 2002). All three maps preserve inner products on average, so that `E <S, S'>` is
`<M, M'>`; by the variance of each (Achlioptas, 2003) its standard deviation is at most `ERROR |M| |M'|`, which parallel
matrices of rank 1 reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from datamodules.seeding import generator

SKETCH_SIZE = 1024
"""Numbers of a sketch: 4 kB in float32."""
VOCABULARY_SIDE, HIDDEN_SIDE = 64, 64
"""`a` and `b`."""
ERROR = math.sqrt((1 + 2 / VOCABULARY_SIDE) * (1 + 2 / HIDDEN_SIDE) * (1 + 2 / SKETCH_SIZE) - 1)
"""Standard deviation of an inner product of sketches, in units of the product of the gradients' norms, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadProjection:
    """The random maps of a run.

    Attributes:
        vocabulary: int8 `[V, a]` signs.
        hidden: int8 `[H, b]` signs.
        order: int64 `[a b]`, a permutation; entries whose places are equal modulo `SKETCH_SIZE` share a sum.
        signs: float32 `[a b]`, of the permuted entries, divided by `sqrt(a b)`.
    """

    vocabulary: Tensor
    hidden: Tensor
    order: Tensor
    signs: Tensor

    def fold(self, sums: Tensor) -> Tensor:
        """Return the sketches `[N, SKETCH_SIZE]` of sums `[N, a, b]`."""
        return (sums.flatten(1)[:, self.order] * self.signs).unflatten(1, (-1, SKETCH_SIZE)).sum(1)


@lru_cache(maxsize=1)
def head_projection(vocabulary: int, width: int, seed: int, device: torch.device) -> HeadProjection:
    """Return the maps of a head `[V, H]`; they depend on the sizes and the seed alone."""
    rng = generator(seed, "gradient sketches", vocabulary, width)

    def signs(*shape: int) -> Tensor:
        bits = np.unpackbits(np.frombuffer(rng.bytes(-(-math.prod(shape) // 8)), np.uint8), count=math.prod(shape))
        return torch.from_numpy(bits.view(np.int8) * 2 - 1).view(shape).to(device)

    entries = VOCABULARY_SIDE * HIDDEN_SIDE
    sides = signs(vocabulary, VOCABULARY_SIDE), signs(width, HIDDEN_SIDE)
    order = torch.from_numpy(rng.permutation(entries)).to(device)
    return HeadProjection(*sides, order, signs(entries) / math.sqrt(entries))


class SketchSums:
    """Adds up the sketches of a batch's groups over its micro-batches.

    Args:
        projection: the random maps.
        groups: groups of the batch.
    """

    def __init__(self, projection: HeadProjection, groups: int) -> None:
        self.projection = projection
        device = projection.vocabulary.device
        self.sums = torch.zeros(groups, VOCABULARY_SIDE, HIDDEN_SIDE, device=device)

    def of(self, tokens: Iterable[tuple[int, int]]) -> TokenSketch:
        """Return the sketch of one micro-batch, given group and number of generated tokens of each sequence."""
        spans = [(group, sum(length for _, length in run)) for group, run in groupby(tokens, key=itemgetter(0))]
        return TokenSketch(self, spans)

    def folded(self) -> Tensor:
        """Return the groups' sketches, float32 `[groups, SKETCH_SIZE]`; 0 where a gradient was not finite."""
        sketches = self.projection.fold(self.sums)
        return torch.where(sketches.isfinite().all(1, keepdim=True), sketches, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSketch:
    """Where the tokens of a micro-batch add to the sums of their groups.

    Attributes:
        total: the sums.
        spans: group and number of tokens of its sequences that follow one another, in the order of the tokens.
    """

    total: SketchSums
    spans: Sequence[tuple[int, int]]

    @property
    def projection(self) -> HeadProjection:
        """The random maps."""
        return self.total.projection

    @torch.no_grad()
    def add(self, descent: Tensor, hidden: Tensor) -> None:
        """Add the outer products of `-P_v^T dL / d(W h_t)`, given without the minus, and `P_h^T h_t`.

        Args:
            descent: `[T, a]`.
            hidden: `[T, b]`.
        """
        lengths = [length for _, length in self.spans]
        for (group, _), left, right in zip(self.spans, descent.split(lengths), hidden.split(lengths), strict=True):
            self.total.sums[group].sub_(left.T @ right)
