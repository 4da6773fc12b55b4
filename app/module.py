"""The LightningModule: one GRPO step over the groups of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from app.engines import RolloutEngine, Sampling, Transformers
from app.metrics import TokensRead, Update, batch_metrics, update_metrics
from app.minibatch import CompletionId, MiniBatch, advantages_of, minibatches
from app.nonfinite import NonFiniteGuard, offenders
from app.objective.advantages import Baseline, Scale
from app.objective.packing import PackedBatch, ScoredSequence, collate, pack, plan_microbatches, plan_packs
from app.objective.statistics import Statistics
from app.objective.surrogate import PolicyLoss, SurrogateOptions, policy_loss
from app.objective.weights import Aggregation
from app.optimization import Optimization
from app.pass_at_k import CORRECT, PassAtK
from app.policy import Policy, causal_lm, plain_weights
from app.rewards import Reward, RewardScorer, TrainerState, WorkerOptions
from app.rollouts import RolloutPipeline
from app.run_folder import run_folder
from app.run_table import print_run_table
from app.scoring import can_share_prompts, score
from datamodules.errors import UserError
from datamodules.seeding import generator, run_seed
from datamodules.types import TrainBatch

_NOTHING_TO_LEARN = (
    "no completion of a batch had an advantage: rewards were equal within every group, so the weights stayed as they "
    "were. Look at reward_std and frac_reward_zero_std, and count such updates by updates/empty (said once)."
)


class GRPOModule(LightningModule):
    """Group relative policy optimization (Shao et al., arXiv 2402.03300) on fresh and replayed groups.

    It holds the policy and what rolls it out (engine, rewards, sampling); callbacks decide when that happens and put
    the groups into the batch. A step computes advantages, splits the groups into mini-batches and takes one optimizer
    step for each, its gradient accumulated over micro-batches of at most `max_tokens_per_microbatch` tokens.

    Args:
        policy: which model is trained.
        rewards: what completions are scored by; one of them marked as the correctness reward.
        engine: what generates completions; None is `engines.Transformers`, on the policy itself.
        sampling: how training completions are drawn.
        val_sampling: how validation completions are drawn; None is as in training.
        pass_at_k: the k of `val/pass@k`; at most `val_sampling.num_generations`.
        optimization: optimizer and schedule.
        surrogate: which loss: its form, clipping, importance correction, KL and entropy terms.
        advantage_scale: "group" divides a group's centred rewards by their standard deviation, "batch" by that of the
            batch, "none" does not divide.
        advantage_baseline: what is subtracted from a reward: "mean" of the group, or "leave_one_out", the mean of the
            group's others.
        multi_objective_aggregation: "sum_then_normalize" adds the weighted rewards first; "normalize_then_sum"
            normalises each reward within its group first (GDPO), and divides the sums by the batch's standard
            deviation when `advantage_scale` is "batch".
        mask_truncated_completions: completions cut at the length limit count nothing in the loss.
        aggregation: "token" averages over all completion tokens of a mini-batch, "sequence" over tokens and then
            sequences, "constant" divides by the completion limit times sequences.
        mini_batches: optimizer steps per batch.
        max_tokens_per_microbatch: tokens, padding included, of one forward and backward pass.
        share_prompts: read a prompt once for all its completions in a micro-batch, and nothing padded, where the model
            allows it (full attention by torch's SDPA, no gradient checkpointing); else bucketed by length.
        reward_workers: the processes that score completions, and their time and memory limits.
        on_reward_failure: a completion whose score timed out or crashed is left out of its group ("drop") or scored
            0 ("zero").
    """

    def __init__(
        self,
        policy: Policy,
        rewards: list[Reward],
        engine: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  # jsonargparse shows the defaults of a dataclass only so
        val_sampling: Sampling | None = None,
        pass_at_k: int = 4,
        optimization: Optimization = Optimization(),  # noqa: B008
        surrogate: SurrogateOptions = SurrogateOptions(),  # noqa: B008
        advantage_scale: Scale = "group",
        advantage_baseline: Baseline = "mean",
        multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
        mask_truncated_completions: bool = False,
        aggregation: Aggregation = "token",
        mini_batches: int = 1,
        max_tokens_per_microbatch: int = 16384,
        share_prompts: bool = True,
        reward_workers: WorkerOptions = WorkerOptions(),  # noqa: B008
        on_reward_failure: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.engine = engine or Transformers()
        self.sampling = sampling
        self.val_sampling = val_sampling or sampling
        self.optimization = optimization
        self.surrogate = surrogate
        self.advantage_scale = advantage_scale
        self.advantage_baseline = advantage_baseline
        self.multi_objective_aggregation = multi_objective_aggregation
        self.mask_truncated_completions = mask_truncated_completions
        self.aggregation = aggregation
        self.mini_batches = mini_batches
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        self.share_prompts = share_prompts
        self._check(pass_at_k)
        self.scorer = RewardScorer(rewards, on_reward_failure, reward_workers)
        self._nonfinite = NonFiniteGuard()
        self.accuracy, self.val_reward, self.val_length = MeanMetric(), MeanMetric(), MeanMetric()
        self.pass_at_k = PassAtK(min(pass_at_k, self.val_sampling.num_generations))

    @property
    def policy_path(self) -> str:
        """Folder or hub name of the initial weights."""
        return self.policy.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.load_tokenizer()

    @cached_property
    def pipeline(self) -> RolloutPipeline:
        """Rolls prompts out with the current policy and scores them."""
        self.engine.setup(
            causal_lm(self.policy_model),
            self.tokenizer,
            weights=lambda: plain_weights(self.policy_model),
            folder=run_folder(self.trainer),
        )
        return RolloutPipeline(
            self.engine, self.scorer, run_seed(), self.trainer.precision_plugin.forward_context, self._trainer_state
        )

    def _trainer_state(self) -> TrainerState:
        return TrainerState(global_step=self.trainer.global_step, max_steps=self.trainer.max_steps)

    def configure_model(self) -> None:
        if not hasattr(self, "policy_model"):
            self.policy_model = self.policy.load()
            # In a tuple, so that a frozen copy is neither trained nor saved.
            self._reference = self._load_reference()
            self.scorer.start()

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print_run_table(
                self,
                self.trainer.datamodule,  # type: ignore[attr-defined]  # Lightning leaves it untyped
                self.trainer.callbacks,  # type: ignore[attr-defined]
                policy=self.policy_model,
                world_size=self.trainer.world_size,
                max_steps=self.trainer.max_steps,
            )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.optimizer(self.policy_model)
        scheduler = self.optimization.scheduler(optimizer, self.trainer.max_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def teardown(self, stage: str) -> None:
        self.scorer.close()
        self.engine.close()

    def training_step(self, batch: TrainBatch, batch_idx: int) -> None:
        with batch.ledger.phase("update"):
            batch.advantages = self.advantages_of(batch)
            parts = self.minibatches_of(batch)
            if self.mini_batches > 1:
                parts = [self._with_old_logprobs(part) for part in parts]
            done = [self._update(part, batch.step) for part in parts]
        if not any(part.sequences for part in parts):
            rank_zero_warn(_NOTHING_TO_LEARN)
        batch.metrics |= batch_metrics(batch.groups) | update_metrics(done, parts)
        batch.metrics["learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        # After the callbacks' hooks: the checkpoint of this step is written.
        self._nonfinite.check(batch.step)

    @property
    def diverged(self) -> bool:
        """Whether this step is the last because updates are not finite any more."""
        return self._nonfinite.exhausted

    def validation_step(self, batch: TrainBatch, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: TrainBatch, batch_idx: int) -> None:
        self._measure(batch, "test")

    def predict_step(self, batch: TrainBatch, batch_idx: int) -> TrainBatch:
        return batch

    def advantages_of(self, batch: TrainBatch) -> list[np.ndarray]:
        """Of every completion of the batch's groups; float32 `[G]` per group."""
        apart = self.multi_objective_aggregation == "normalize_then_sum"
        return advantages_of(
            batch.groups,
            self.advantage_scale,
            self.advantage_baseline,
            dict(zip(self.scorer.names, self.scorer.weights.tolist(), strict=True)) if apart else None,
        )

    def minibatches_of(self, batch: TrainBatch) -> list[MiniBatch]:
        """The mini-batches of a batch whose advantages are known."""
        return minibatches(
            batch.groups,
            batch.advantages,
            parts=self.mini_batches,
            generator=generator(run_seed(), "minibatches", batch.step),
            aggregation=self.aggregation,
            max_completion_length=self.sampling.max_completion_length,
            keep_zero_advantage=bool(self.surrogate.beta or self.surrogate.entropy_coef),
            mask_truncated=self.mask_truncated_completions,
            step=batch.step,
        )

    def _update(self, part: MiniBatch, step: int) -> Update:
        """One optimizer step."""
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        loss = torch.zeros((), device=self.device)
        everything, replayed = Statistics.empty(self.device), Statistics.empty(self.device)
        read = TokensRead()
        for packed in self.microbatches_of(part.sequences):
            read = read.plus(packed)
            found = self.loss_of(packed)
            self.manual_backward(found.loss)
            loss += found.loss.detach()
            everything = everything.merge(found.statistics)
            replayed = replayed.merge(found.terms.statistics(packed.replayed))
        norm = self._clip()
        # One decision for all ranks: a loss belongs to one of them.
        finite = self.trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(loss) & torch.isfinite(norm)))
        if not finite:
            self.zero_grad(set_to_none=True)
            self._nonfinite.skipped(step, loss, norm, self._offenders(part))
        elif part.sequences:
            self._nonfinite.passed()
        # Without gradients (nothing to learn, or not finite) AdamW leaves every weight alone, and the schedule and
        # Lightning's step counter still advance.
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return Update(loss, norm, everything, replayed, read, skipped=not finite)

    def loss_of(self, packed: PackedBatch) -> PolicyLoss:
        """The loss of one micro-batch, with gradient: those of a mini-batch's micro-batches add up to its loss."""
        logprobs, entropy = score(self.policy_model, packed, self.sampling.temperature, with_entropy=True)
        return policy_loss(
            logprobs,
            packed.behaviour_logprobs,
            packed.advantages,
            packed.weights,
            self.surrogate,
            old_logprobs=packed.old_logprobs if self.mini_batches > 1 else None,
            sequences=packed.sequences,
            entropy=entropy,
            reference_logprobs=self._reference_logprobs(packed),
        )

    def _clip(self) -> Tensor:
        """Scales gradients to the clip norm and returns the norm before."""
        limit = self.optimization.clip_norm or float("inf")
        trained = [parameter for parameter in self.policy_model.parameters() if parameter.grad is not None]
        return torch.nn.utils.clip_grad_norm_(trained, limit)

    def _offenders(self, part: MiniBatch) -> list[CompletionId]:
        """The completions that made an update not finite; over several ranks all of this rank's."""
        if self.trainer.world_size > 1:
            # Ranks hold different numbers of completions: passes over single ones would leave some rank waiting.
            return part.ids
        trained = [parameter for parameter in self.policy_model.parameters() if parameter.requires_grad]
        return offenders(part, lambda sequence: self.loss_of(self._collate([sequence])).loss, trained)

    def microbatches_of(self, sequences: Sequence[ScoredSequence]) -> list[PackedBatch]:
        """Sequences as micro-batches within the token budget, on the module's device."""
        return [self._collate([sequences[index] for index in rows]) for rows in self._plan(sequences)]

    def _plan(self, sequences: Sequence[ScoredSequence]) -> list[list[int]]:
        """Which sequences share a micro-batch."""
        if self._shares_prompts:
            return plan_packs(sequences, self.max_tokens_per_microbatch)
        return plan_microbatches([len(sequence) for sequence in sequences], self.max_tokens_per_microbatch)

    def _collate(self, sequences: Sequence[ScoredSequence]) -> PackedBatch:
        if self._shares_prompts:
            return pack(sequences, self.device)
        return collate(sequences, self.tokenizer.pad_token_id, self.device)

    @property
    def _shares_prompts(self) -> bool:
        return self.share_prompts and can_share_prompts(self.policy_model)

    @torch.no_grad()
    def _with_old_logprobs(self, part: MiniBatch) -> MiniBatch:
        """Adds log pi_old to replayed sequences; a fresh one's behaviour policy is the policy before the update."""
        sequences = list(part.sequences)
        replayed = [index for index, sequence in enumerate(sequences) if sequence.replayed]
        for rows in self._plan([sequences[index] for index in replayed]):
            chosen = [replayed[row] for row in rows]
            packed = self._collate([sequences[index] for index in chosen])
            logprobs, _ = score(self.policy_model, packed, self.sampling.temperature, with_entropy=False)
            sizes = [len(sequences[index].completion_ids) for index in chosen]
            for index, old in zip(chosen, logprobs.cpu().split(sizes), strict=True):
                sequences[index] = dataclasses.replace(sequences[index], old_logprobs=old.numpy())
        return dataclasses.replace(part, sequences=sequences)

    def _load_reference(self) -> tuple[torch.nn.Module, ...]:
        if not self.surrogate.beta or self.policy.lora is not None:
            return ()
        return (self.policy.load().eval().requires_grad_(False).to(self.device),)

    @torch.no_grad()
    def _reference_logprobs(self, packed: PackedBatch) -> Tensor | None:
        """log ref `[T]` when the loss has a KL term: under the frozen copy, or the policy without its adapters."""
        if not self.surrogate.beta:
            return None
        if self._reference:
            return score(self._reference[0], packed, self.sampling.temperature, with_entropy=False)[0]
        with self.policy_model.disable_adapter():  # type: ignore[operator]
            return score(self.policy_model, packed, self.sampling.temperature, with_entropy=False)[0]

    def _measure(self, batch: TrainBatch, stage: str) -> None:
        for group in batch.groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.accuracy.update(correct.float(), 1.0)
            self.pass_at_k.update(correct)
            self.val_reward.update(torch.from_numpy(group.rewards))
            self.val_length.update(torch.tensor([float(len(one.token_ids)) for one in group.completions]))
        self.log_dict(
            {
                f"{stage}/accuracy": self.accuracy,
                f"{stage}/pass@{self.pass_at_k.k}": self.pass_at_k,
                f"{stage}/reward": self.val_reward,
                f"{stage}/completions/mean_length": self.val_length,
            },
            on_step=False,
            on_epoch=True,
            batch_size=max(1, len(batch.groups)),
        )

    def _check(self, pass_at_k: int) -> None:
        numbers = [
            ("mini_batches", self.mini_batches),
            ("max_tokens_per_microbatch", self.max_tokens_per_microbatch),
            ("pass_at_k", pass_at_k),
        ]
        for name, given in numbers:
            if given < 1:
                raise UserError(f"model.{name}={given}: expected at least 1")
        if (self.multi_objective_aggregation, self.advantage_scale) == ("normalize_then_sum", "none"):
            raise UserError(
                "model.advantage_scale=none with multi_objective_aggregation=normalize_then_sum: nothing would be "
                "normalised; set advantage_scale to batch (GDPO) or group"
            )
        if self.sampling.num_generations < 2:
            raise UserError(
                f"model.sampling.num_generations={self.sampling.num_generations}: expected at least 2, "
                "because advantages are relative to the other completions of a prompt"
            )
        if self.sampling.truncates:
            raise UserError(
                "model.sampling truncates the distribution (temperature 0, top_p < 1 or top_k > 0): importance ratios "
                "would be wrong; set temperature > 0, top_p 1.0 and top_k 0 for training (val_sampling may truncate)"
            )
