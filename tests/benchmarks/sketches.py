"""Measure what sketches of gradients cost an update, and how far they rank pairs of groups as whole gradients do.

    python -m tests.benchmarks.sketches CONFIG [CONFIG ...] [--prompts 64] [--groups 24] [--pairs 15]

The policy of the configs rolls prompts out, and the groups that teach are updated on with and without sketches, in
turn, with a learning rate of 1e-12. Seconds are those of the processor, which other programs disturb less than the
clock. Cosines of the gradients of two groups are compared by Spearman's correlation over all pairs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from app.studies.worth.command import BuiltRun
from app.studies.worth.measure import Gradients
from app.studies.worth.walk import Walker
from app.subsets.warmup import load_policy
from app.update.group_measures import GroupMeasures
from datamodules.ledger import Ledger
from datamodules.types import RolloutGroup

_CHUNK = 2**22


def seconds(walker: Walker, groups: list[RolloutGroup], *, sketched: bool) -> float:
    """Return the seconds of the processor that an update on the groups takes."""
    learner = walker.module.learner
    parts = learner.minibatches_of(groups, learner.advantages_of(groups), step=0)
    measures = GroupMeasures(learner, groups, sketched=sketched)
    start = time.process_time()
    with walker.precision():
        walker.updates.take(
            learner, parts, 0, optimizer=walker.optimizer, scheduler=walker.scheduler,
            backward=lambda loss: loss.backward(), measures=measures,
        )  # fmt: skip
    measures.sketches(learner.ranks)
    return time.process_time() - start


def cosines(vectors: list[Tensor]) -> np.ndarray:
    """Return the cosines of all pairs of vectors, without holding them in float32."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for start in range(0, len(vectors[0]), _CHUNK):
        rows = torch.stack([one[start : start + _CHUNK] for one in vectors]).float()
        gram += (rows @ rows.T).double()
    scale = gram.diagonal().sqrt()
    above = np.triu_indices(len(vectors), 1)
    return (gram / scale[:, None] / scale).numpy()[above]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+")
    for name, default in (("prompts", 64), ("groups", 24), ("pairs", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    built = BuiltRun(options.configs)
    built.trainer.strategy.connect(built.model)
    built.model.trainer = built.datamodule.trainer = built.trainer
    built.datamodule.setup("fit")
    load_policy(built.model, None)
    walker = Walker(built.model, built.trainer, built.datamodule, None)
    try:
        walker.restart(1e-12, 0)
        rolled = walker.roll(walker.next_prompts(options.prompts), 0, Ledger())
        groups = [one for one in rolled if one.informative][: options.groups]
        tokens = sum(one.completion_tokens for one in groups)
        print(
            f"{len(groups)} informative groups of {len(rolled)}, {tokens:,} tokens, {torch.get_num_threads()} threads"
        )
        for sketched in (True, False):  # the first time is another one
            seconds(walker, groups, sketched=sketched)
        pairs = np.array(
            [[seconds(walker, groups, sketched=one) for one in (False, True)] for _ in range(options.pairs)]
        )
        ratios = pairs[:, 1] / pairs[:, 0] - 1
        error = ratios.std(ddof=1) / len(ratios) ** 0.5
        print(f"an update of {np.median(pairs[:, 0]):.2f} s takes {np.median(ratios):+.1%} with sketches in the median")
        print(f"of {len(ratios)} pairs, {ratios.mean():+.1%} +- {error:.1%} in the mean")
        gradients = Gradients(walker)
        found = [gradients.of(one, 0) for one in groups]
        sketches, whole = cosines([one.sketch for one in found]), cosines([one.flat.bfloat16() for one in found])
        rank = spearmanr(sketches, whole).statistic
        print(f"{len(whole)} pairs: cosines {whole.mean():.3f} +- {whole.std():.3f}, rank correlation {rank:.2f}")
    finally:
        built.model.teardown("sketches")


if __name__ == "__main__":
    main()
