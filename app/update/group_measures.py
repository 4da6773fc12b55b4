"""What the updates on a batch measure of its groups besides the loss: gradients in sketches, and drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from app.objective.packing import PackedBatch, ScoredSequence
from app.objective.sketches import SketchSums
from app.objective.surrogate import PolicyLoss
from app.ranks import Ranks
from app.update.learner import Learner
from datamodules.types import GroupSketch, RolloutGroup


class GroupMeasures:
    """Adds up, over the first updates on a batch, what they show of its groups.

    Args:
        learner: the policy of the updates.
        groups: the groups of the batch.
        sketched: whether to sketch the groups' gradients.

    Attributes:
        sums: sums of the sketches of this rank's part; None without sketches.
    """

    def __init__(self, learner: Learner, groups: Sequence[RolloutGroup], *, sketched: bool) -> None:
        self._groups = groups
        self.sums: SketchSums | None = learner.sketch_sums(len(groups)) if sketched else None
        replays = any(group.source == "replay" for group in groups)
        # Of each group: the sum of its tokens' `|log pi_old - log mu|`, and their number.
        self._drift = torch.zeros(len(groups), 2, device=learner.device) if replays else None

    def add(self, sequences: Sequence[ScoredSequence], packed: PackedBatch, found: PolicyLoss) -> None:
        """Add the drift of a micro-batch's tokens, given its sequences."""
        if self._drift is not None:
            groups = torch.tensor([one.group for one in sequences], device=self._drift.device)[packed.sequences]
            moved = found.terms.logp_difference.float()
            self._drift.index_add_(0, groups, torch.stack([moved, torch.ones_like(moved)], 1))

    def sketches(self, ranks: Ranks) -> list[GroupSketch]:
        """Return the groups' sketches, in order; none if they were not asked for. Collective."""
        return [] if self.sums is None else GroupSketch.of(self._groups, ranks.sum(self.sums.folded()).numpy())

    def drift(self, ranks: Ranks) -> np.ndarray | None:
        """Return each group's drift, as `TrainBatch.drift` has it; None without replayed groups. Collective."""
        if self._drift is None:
            return None
        moved, tokens = ranks.sum(self._drift).cpu().numpy().T
        return np.divide(moved, tokens, out=np.full_like(moved, np.nan), where=tokens > 0)
