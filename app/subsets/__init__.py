"""Selection before training: a subset of the pool, chosen once with the policy as it is (`dots select`).

A selection passes through the files in this order:

1. `command`: the user's request, and the order of the steps.
2. `warmup`: plain GRPO on a few hundred random prompts (LearnAlign only).
3. `frozen_policy`: the policy, ready to roll prompts out and to be differentiated.
4. `learnalign` or `ufo`: the measurements of every prompt, and their score. LearnAlign uses `gradients` (the GRPO
   gradient of one prompt) and `projection` (from millions of numbers to a few thousand).
5. `measurements`: the measurements on disk, so that a stopped selection can be resumed.
6. `datamodules.prompts.subset` and `report`: the prompt file that `dots fit` reads, the table of scores, the picture.

Notation, in addition to the project's: `P` numbers in a gradient, `d` numbers in its projection.
"""
