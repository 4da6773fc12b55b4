"""The loss of a batch: advantages, mini-batches, micro-batches, and the loss of each micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from app.objective.advantages import BATCH_IN_GROUPS, Baseline, Scale
from app.objective.options import SurrogateOptions
from app.objective.packing import PackedBatch
from app.objective.ratios import Aggregation
from app.objective.sketches import SketchSums, TokenSketch, head_projection
from app.objective.surrogate import PolicyLoss, policy_loss
from app.policy.adapters import causal_lm
from app.policy.modes import evaluating
from app.policy.reference import ReferencePolicy
from app.policy.scoring import completion_logprobs
from app.ranks import Ranks
from app.update.microbatches import MicroBatches
from app.update.minibatch import MiniBatch, advantages_of, minibatches
from datamodules.errors import UserError
from datamodules.seeding import generator, run_seed
from datamodules.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerOptions:
    """The options of `GRPOModule`, where they are described, that decide how groups become a loss."""

    surrogate: SurrogateOptions
    temperature: float
    max_completion_length: int
    advantage_scale: Scale
    advantage_baseline: Baseline
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"]
    mask_truncated_completions: bool
    aggregation: Aggregation
    mini_batches: int
    max_tokens_per_microbatch: int
    share_prompts: bool

    def __post_init__(self) -> None:
        counts = {"mini_batches": self.mini_batches, "max_tokens_per_microbatch": self.max_tokens_per_microbatch}
        for name, given in counts.items():
            if given < 1:
                raise UserError(f"model.{name} is {given}; set it to 1 or more.")
        if self.advantage_baseline == "batch" and (
            self.advantage_scale == "group" or self.multi_objective_aggregation == "normalize_then_sum"
        ):
            instead = "Set advantage_scale to batch or none, and multi_objective_aggregation to sum_then_normalize."
            raise UserError(f"model.{BATCH_IN_GROUPS} {instead}")
        if (self.multi_objective_aggregation, self.advantage_scale) == ("normalize_then_sum", "none"):
            raise UserError(
                "model.advantage_scale is none with multi_objective_aggregation=normalize_then_sum, which would "
                "normalise nothing. Set advantage_scale to batch (GDPO) or group."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """The policy and its loss on scored groups. It computes gradients but takes no optimizer step.

    Attributes:
        policy: the trained model.
        options: how groups become a loss.
        reward_weights: weights by reward name.
        reference: the reference policy of the KL term, if there is one.
        ranks: the processes of the run.
        sharded: the policy is sharded over the ranks, so that every pass is a collective.
        pad_token_id: any valid id.
        device: the device of the policy's inputs.
        generated_by_policy: fresh completions were sampled from the whole distribution of `policy` itself, so that
            their behaviour log-probabilities are those of the policy before the update. Another engine's differ by
            kernels and dtype, those of a truncated distribution by its normalisation.
    """

    policy: torch.nn.Module
    options: LearnerOptions
    reward_weights: Mapping[str, float]
    reference: ReferencePolicy | None
    ranks: Ranks
    sharded: bool
    pad_token_id: int
    device: torch.device
    generated_by_policy: bool

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The trainable parameters."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @property
    def microbatches(self) -> MicroBatches:
        """The layout of sequences for the policy."""
        return MicroBatches(
            self.policy, self.options.max_tokens_per_microbatch, self.options.share_prompts, self.pad_token_id,
            self.device, self.ranks if self.sharded else None,
        )  # fmt: skip

    def advantages_of(self, groups: Sequence[RolloutGroup]) -> list[np.ndarray]:
        """Return the advantages of a batch's completions, float32 `[G]` per group."""
        options, weights = self.options, self.reward_weights
        decoupled = weights if options.multi_objective_aggregation == "normalize_then_sum" else None
        return advantages_of(groups, options.advantage_scale, options.advantage_baseline, decoupled)

    def minibatches_of(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], step: int
    ) -> list[MiniBatch]:
        """Split a batch's groups into the mini-batches of its optimizer steps; see `minibatch.minibatches`."""
        options = self.options
        return minibatches(
            groups,
            advantages,
            parts=options.mini_batches,
            generator=generator(run_seed(), "minibatches", step),
            aggregation=options.aggregation,
            max_completion_length=options.max_completion_length,
            keep_zero_advantage=bool(options.surrogate.beta or options.surrogate.entropy_coef),
            mask_truncated=options.mask_truncated_completions,
            step=step,
        )

    @torch.no_grad()
    def with_old_logprobs(self, part: MiniBatch) -> MiniBatch:
        """Add log pi_old to the sequences whose behaviour policy is another one. Collective if the policy is sharded.

        These are the replayed ones and, unless the policy has generated them itself, all others.
        """
        sequences, micro, temperature = list(part.sequences), self.microbatches, self.options.temperature
        others = [index for index, one in enumerate(sequences) if one.replayed or not self.generated_by_policy]
        plan = micro.plan([sequences[index] for index in others])
        idle = micro.idle(len(plan))
        for rows in plan:
            chosen = [others[row] for row in rows]
            packed = micro.one([sequences[index] for index in chosen])
            with evaluating(self.policy):  # pi_old has no dropout
                logprobs, _ = completion_logprobs(self.policy, packed, temperature, with_entropy=False)
            sizes = [sequences[index].generated_tokens for index in chosen]
            for index, old in zip(chosen, logprobs.cpu().split(sizes), strict=True):
                sequences[index] = dataclasses.replace(sequences[index], old_logprobs=old.numpy())
        for packed in idle:
            completion_logprobs(self.policy, packed, temperature, with_entropy=False)
        return dataclasses.replace(part, sequences=sequences)

    def sketch_sums(self, groups: int) -> SketchSums:
        """Return the sums that the sketches of a batch's groups are added to (see `objective.sketches`)."""
        weight = causal_lm(self.policy).get_output_embeddings().weight
        vocabulary, width = weight.shape
        return SketchSums(head_projection(vocabulary, width, run_seed(), self.device), groups)

    def loss_of(self, packed: PackedBatch, sketch: TokenSketch | None = None, *, updated: bool = False) -> PolicyLoss:
        """Compute the loss of one micro-batch, with gradient; the losses of a mini-batch's micro-batches add up.

        The backward pass adds the gradients of its tokens to `sketch`. `updated`: the policy has been updated on the
        batch, so that it is no longer the one before the update.
        """
        options, temperature = self.options, self.options.temperature
        logprobs, entropy = completion_logprobs(self.policy, packed, temperature, with_entropy=True, sketch=sketch)
        reference = None if self.reference is None else self.reference.logprobs(self.policy, packed, temperature)
        return policy_loss(
            logprobs,
            packed.behaviour_logprobs,
            packed.advantages,
            packed.weights,
            options.surrogate,
            old_logprobs=packed.old_logprobs if options.mini_batches > 1 or updated else None,
            sequences=packed.sequences,
            entropy=entropy,
            reference_logprobs=reference,
        )
