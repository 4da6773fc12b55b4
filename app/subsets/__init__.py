"""Selection before training: a subset of the pool, chosen once with the policy as it is (`dots select`).

A selection passes through the files in this order:

1. `command`: what the user asked for, and the order of things.
2. `warmup`: plain GRPO on a few hundred random prompts (LearnAlign only).
3. `bench`: the policy, ready to roll prompts out and to be differentiated.
4. `learnalign` or `ufo`: what is measured of every prompt, and the score that it makes. LearnAlign stands on
   `gradients` (one prompt's GRPO gradient) and `projection` (from millions of numbers to a few thousand).
5. `measurements`: where that is kept, on disk, so that a stopped selection goes on.
6. `subset` and `report`: the prompt file that `dots fit` reads, the table of scores, and the picture.

Letters beyond the project's: `P` numbers in a gradient, `d` numbers in its projection.
"""
