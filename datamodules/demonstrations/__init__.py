"""Worked solutions of reasoning-gym tasks, with mistakes: the data that the bundled tiny policy was pretrained on.

A policy trained only on correct solutions leaves reinforcement learning little to do. One trained on solutions with
occasional mistakes has the skill along with bad habits, which GRPO can correct.
"""

from datamodules.demonstrations.solutions import ANSWER_MARKER, DEMONSTRATORS, Solution, demonstrate

__all__ = ["ANSWER_MARKER", "DEMONSTRATORS", "Solution", "demonstrate"]
