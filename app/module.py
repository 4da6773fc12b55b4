"""The LightningModule: one GRPO step over the groups of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_configure_model
from transformers import PreTrainedTokenizerBase

from app.engines import RolloutEngine, Sampling, Transformers
from app.objective.advantages import Baseline, Scale
from app.objective.packing import PackedBatch, ScoredSequence
from app.objective.surrogate import PolicyLoss, SurrogateOptions, policy_loss
from app.objective.weights import Aggregation
from app.option_checks import check_options
from app.policy.compilation import compile_layers
from app.policy.model import Policy, causal_lm
from app.policy.reference import ReferencePolicy
from app.policy.scoring import score
from app.policy.sharding import Sharding
from app.policy.weights import plain_weights
from app.ranks import Ranks
from app.reporting.run_table import print_run_table
from app.reporting.validation import ValidationMetrics
from app.rewards import Reward, RewardScorer, TrainerState, WorkerOptions
from app.rollouts.pipeline import RolloutPipeline
from app.runs.folder import run_folder
from app.runs.identity import RunIdentity
from app.update.metrics import batch_metrics, update_metrics
from app.update.microbatches import MicroBatches
from app.update.minibatch import MiniBatch, advantages_of, minibatches, shares, token_imbalance
from app.update.optimization import Optimization
from app.update.steps import Updates
from datamodules.errors import UserError
from datamodules.seeding import generator, run_seed
from datamodules.types import TrainBatch


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
        compile: torch.compile the decoder layers for updates, not for generation. The quickstart on one CPU thread: a
            quarter less time per update, after 48 s of compiling in the first.
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
        compile: bool = False,
        reward_workers: WorkerOptions = WorkerOptions(),  # noqa: B008
        on_reward_failure: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.optimization, self.surrogate = policy, optimization, surrogate
        self.engine = engine or Transformers()
        self.sampling, self.val_sampling = sampling, val_sampling or sampling
        self.advantage_scale, self.advantage_baseline = advantage_scale, advantage_baseline
        self.multi_objective_aggregation = multi_objective_aggregation
        self.mask_truncated_completions, self.aggregation = mask_truncated_completions, aggregation
        self.mini_batches, self.max_tokens_per_microbatch = mini_batches, max_tokens_per_microbatch
        self.share_prompts, self._compiles = share_prompts, compile
        counts = {"mini_batches": mini_batches, "max_tokens_per_microbatch": max_tokens_per_microbatch}
        check_options(sampling, advantage_scale, multi_objective_aggregation, counts | {"pass_at_k": pass_at_k})
        self.scorer = RewardScorer(rewards, on_reward_failure, reward_workers)
        self.reference: ReferencePolicy | None = None
        self.measured = ValidationMetrics(min(pass_at_k, self.val_sampling.num_generations))
        self._updates = Updates(self)
        self.resumed: Mapping[str, Any] | None = None
        """`RunIdentity` of the checkpoint that training will go on from."""
        self.sharding: Sharding | None = None

    @property
    def policy_path(self) -> str:
        """Folder or hub name of the initial weights."""
        return self.policy.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.load_tokenizer()

    @cached_property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return Ranks.of_run()

    @cached_property
    def pipeline(self) -> RolloutPipeline:
        """Rolls prompts out with the current policy and scores them."""
        self.engine.setup(
            causal_lm(self.policy_model),
            self.tokenizer,
            weights=lambda: plain_weights(self.policy_model),
            folder=run_folder(self.trainer),
            ranks=self.ranks,
        )
        return RolloutPipeline(
            self.engine, self.scorer, run_seed(), self.trainer.precision_plugin.forward_context, self._trainer_state,
            self.ranks, self._whole_policy,
        )  # fmt: skip

    def _trainer_state(self) -> TrainerState:
        return TrainerState(global_step=self.trainer.global_step, max_steps=self.trainer.max_steps)

    def prepare_data(self) -> None:
        """Loads and checks before the logger makes the run's folder: what cannot be used leaves nothing behind.

        Lightning calls this in one process; where there are several, each does so when the folder is there. So does a
        single one with a strategy that cuts the policy, which is to be built after its callback has said how.
        """
        trainer: Any = self.trainer
        if self._checks_late:
            return
        _call_configure_model(trainer)  # with the contexts of strategy and precision
        self._check_run()

    def setup(self, stage: str) -> None:
        if self._checks_late:
            self._check_run()

    @property
    def _checks_late(self) -> bool:
        return self.trainer.world_size > 1 or isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _check_run(self) -> None:
        trainer: Any = self.trainer
        if trainer.state.fn != "fit":
            return
        if trainer.max_steps < 1 and not any(isinstance(one, Timer) for one in trainer.callbacks):
            raise UserError(
                f"trainer.max_steps={trainer.max_steps}: prompts never run out; expected optimizer steps (or "
                "trainer.max_time) that end the run"
            )
        if self.resumed is not None:
            self._identity.check(self.resumed)

    @cached_property
    def _identity(self) -> RunIdentity:
        trainer: Any = self.trainer
        return RunIdentity.of(self.tokenizer, trainer.datamodule.pools["train"], self.sampling.num_generations)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_identity"] = self._identity.as_dict()

    def configure_model(self) -> None:
        if not hasattr(self, "policy_model"):
            self.policy_model = self._load_policy()
            self.reference = ReferencePolicy.of(self.policy) if self.surrogate.beta else None
            self.scorer.start()

    def _load_policy(self) -> torch.nn.Module:
        if self.sharding is not None:
            return self.sharding.load(self.policy, compiles=self._compiles)
        model = self.policy.load()
        if self._compiles:
            compile_layers(model)
        return model

    @contextmanager
    def _whole_policy(self) -> Iterator[None]:
        """The policy as an engine generates with it."""
        if self.sharding is None:
            yield
            return
        # Before the collective, so that a rank that is lost is named.
        self.ranks.meet("rollouts")
        with self.sharding.whole(self.policy_model):
            yield

    def on_fit_start(self) -> None:
        trainer: Any = self.trainer
        if trainer.is_global_zero:
            print_run_table(
                self, trainer.datamodule, trainer.callbacks,
                policy=self.policy_model, world_size=trainer.world_size, max_steps=trainer.max_steps,
            )  # fmt: skip

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
            dealt = [shares(part, self.ranks.size) for part in parts]
            mine = [share[self.ranks.rank] for share in dealt]
            if self.mini_batches > 1:
                mine = [self.microbatches.with_old_logprobs(share) for share in mine]
            done = self._updates.take(parts, mine, batch.step)
        if self.ranks.size > 1:
            batch.metrics["ranks/update_token_imbalance"] = token_imbalance(dealt)
        batch.metrics |= batch_metrics(batch.groups) | update_metrics(done, parts)
        batch.metrics["learning_rate"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        # After the callbacks' hooks: the checkpoint of this step is written.
        self._updates.check(batch.step)

    @property
    def diverged(self) -> bool:
        """Whether this step is the last because updates are not finite any more."""
        return self._updates.diverged

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

    @property
    def microbatches(self) -> MicroBatches:
        """How the policy, as it is now, reads sequences."""
        return MicroBatches(
            self.policy_model, self.sampling.temperature, self.max_tokens_per_microbatch, self.share_prompts,
            self.tokenizer.pad_token_id, self.device, None if self.sharding is None else self.ranks,
        )  # fmt: skip

    def microbatches_of(self, sequences: Sequence[ScoredSequence]) -> list[PackedBatch]:
        """Sequences as micro-batches within the token budget, on the module's device."""
        return self.microbatches.of(sequences)

    def loss_of(self, packed: PackedBatch) -> PolicyLoss:
        """The loss of one micro-batch, with gradient: those of a mini-batch's micro-batches add up to its loss."""
        policy, temperature = self.policy_model, self.sampling.temperature
        logprobs, entropy = score(policy, packed, temperature, with_entropy=True)
        reference = None if self.reference is None else self.reference.logprobs(policy, packed, temperature)
        return policy_loss(
            logprobs,
            packed.behaviour_logprobs,
            packed.advantages,
            packed.weights,
            self.surrogate,
            old_logprobs=packed.old_logprobs if self.mini_batches > 1 else None,
            sequences=packed.sequences,
            entropy=entropy,
            reference_logprobs=reference,
        )

    def _measure(self, batch: TrainBatch, stage: str) -> None:
        self.measured.update(batch.groups)
        size = max(1, len(batch.groups))
        self.log_dict(self.measured.named(stage), on_step=False, on_epoch=True, batch_size=size)
