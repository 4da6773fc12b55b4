"""Worked solutions of reasoning-gym tasks with mistakes in them: what the embedded tiny policy was pretrained on.

A policy that learnt only right solutions leaves reinforcement learning little to do; one that learnt them among slips
holds the skill beside bad habits, which is what GRPO can mend.
"""

from __future__ import annotations

from datamodules.demonstrations.base import ANSWER_MARKER, Demonstrator, Solution
from datamodules.demonstrations.chain_sum import ChainSum
from datamodules.demonstrations.complex_arithmetic import ComplexArithmetic
from datamodules.demonstrations.leg_counting import LegCounting
from datamodules.demonstrations.simple_equations import SimpleEquations
from datamodules.demonstrations.spell_backward import SpellBackward

_ALL: tuple[Demonstrator, ...] = (ChainSum(), ComplexArithmetic(), LegCounting(), SimpleEquations(), SpellBackward())
DEMONSTRATORS: dict[str, Demonstrator] = {demonstrator.task: demonstrator for demonstrator in _ALL}

__all__ = ["ANSWER_MARKER", "DEMONSTRATORS", "Demonstrator", "Solution"]
