"""Prompt selection methods, one per file."""

from datamodules.selectors.aligned import Aligned
from datamodules.selectors.base import Ranker, SelectionContext, Selector
from datamodules.selectors.composed import Composed, Filter
from datamodules.selectors.dots import Dots
from datamodules.selectors.dps import Dps
from datamodules.selectors.greso import Greso, ZeroVarianceSkip
from datamodules.selectors.mopps import Mopps
from datamodules.selectors.pools import Pools
from datamodules.selectors.posterior import Posterior
from datamodules.selectors.uniform import Uniform

__all__ = [
    "Aligned",
    "Composed",
    "Dots",
    "Dps",
    "Filter",
    "Greso",
    "Mopps",
    "Pools",
    "Posterior",
    "Ranker",
    "SelectionContext",
    "Selector",
    "Uniform",
    "ZeroVarianceSkip",
]
