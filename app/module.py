"""The LightningModule: one GRPO step over the groups of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedTokenizerBase

from app.engines import RolloutEngine, Sampling, Transformers
from app.environments.conversations import EnvironmentRollouts
from app.environments.options import EnvironmentOptions
from app.environments.protocols import protocol_of
from app.environments.sessions import Sessions
from app.objective.advantages import Baseline, Scale
from app.objective.options import SurrogateOptions
from app.objective.ratios import Aggregation
from app.policy.adapters import causal_lm
from app.policy.compilation import compile_layers
from app.policy.model import Policy
from app.policy.modes import switch_off_dropout
from app.policy.reference import ReferencePolicy
from app.policy.sharding import Sharding
from app.policy.weights import plain_weights
from app.ranks import Ranks
from app.reporting.validation import ValidationMetrics, mean_over_sets
from app.rewards import Named, RewardScorer, TrainerState, WorkerOptions, rewards_of
from app.rollouts.checks import check_rewards, check_tokens, metrics_of_sets
from app.rollouts.pipeline import RolloutPipeline
from app.runs.folder import RunTrainer, run_folder
from app.runs.identity import RunIdentity
from app.runs.lightning_internals import configure_model_early
from app.runs.python_options import options_of
from app.update.group_measures import GroupMeasures
from app.update.learner import Learner, LearnerOptions
from app.update.metrics import batch_metrics, update_metrics
from app.update.optimization import Optimization
from app.update.reuse import Reuse
from app.update.steps import Updates
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts.templates import Tools
from datamodules.seeding import run_seed
from datamodules.types import TrainBatch
from datamodules.validation import ValidationSet


class GRPOModule(LightningModule):
    """Group relative policy optimization (Shao et al., arXiv 2402.03300) on fresh and replayed groups.

    Callbacks decide when to roll out and put the groups into the batch. A step computes advantages, splits the groups
    into mini-batches and takes one optimizer step for each, accumulating gradients over micro-batches.

    Args:
        policy: the model to train.
        rewards: score the completions: one or a list. A name (`math`, `numeric`), a function (`my_rewards.is_right`,
            `my_rewards.py:is_right`), or a class with options; see `Reward` for which measure correctness.
        engine: generates completions; None is `engines.Transformers`, on the policy itself.
        environment: what the policy talks to in several turns, such as `app.environments.Tools`; None for completions
            of one turn. `sampling.max_completion_length` then limits a whole conversation, its replies included.
        sampling: sampling of training completions. With `top_p` or `top_k` the importance weight of a token is that of
            the whole distribution to the truncated one; tokens that are left out are never tried.
        val_sampling: sampling of validation completions; None is `sampling`.
        pass_at_k: the k of `val/pass@k` and `val/maj@k`, one or several, at most `val_sampling.num_generations`; None
            is 4, or that number if it is less.
        optimization: optimizer and learning-rate schedule.
        surrogate: the loss: form, clipping, importance correction, KL and entropy terms.
        advantage_scale: standard deviation that divides centred rewards: that of the "group", of the "batch", of the
            batch after centring ("batch_centred", REINFORCE++-baseline), or "none".
        advantage_baseline: subtracted from each reward: the group's "mean", "leave_one_out", that of the others,
            "optimal", its mean weighted by length (OPO), or "batch", the mean of all (REINFORCE++).
        multi_objective_aggregation: "sum_then_normalize" adds the weighted rewards first; "normalize_then_sum" (GDPO)
            normalises each within its group first, and with `advantage_scale: batch` the sums over the batch.
        mask_truncated_completions: leave completions that were cut at the length limit out of the loss.
        aggregation: average over the completion tokens of a mini-batch ("token"), over tokens and then sequences
            ("sequence"), divide by the completion limit times sequences ("constant"), add up tokens and average over
            sequences ("sequence_sum"), or add up all ("token_sum").
        mini_batches: optimizer steps per batch, each on as many groups that teach as any other. `trainer.max_steps`
            counts optimizer steps, and the last batch is trained to its end.
        reuse: further updates on the informative groups of a batch.
        max_tokens_per_microbatch: tokens, padding included, of one forward and backward pass.
        share_prompts: read a prompt once for all its completions in a micro-batch, without padding, if the model
            allows it (full attention by torch's SDPA); else bucket sequences by length.
        compile: torch.compile the decoder layers for updates, not for generation. The first update takes longer.
        reward_workers: the processes that score completions, and their time and memory limits.
        on_reward_failure: in training, "drop" a completion whose score timed out or crashed from its group, or score
            it "zero". In validation such a completion is wrong.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: list[Named] | Named,
        engine: RolloutEngine | None = None,
        environment: EnvironmentOptions | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  # jsonargparse shows the defaults of a dataclass only so
        val_sampling: Sampling | None = None,
        pass_at_k: int | list[int] | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008
        surrogate: SurrogateOptions = SurrogateOptions(),  # noqa: B008
        advantage_scale: Scale = "group",
        advantage_baseline: Baseline = "mean",
        multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
        mask_truncated_completions: bool = False,
        aggregation: Aggregation = "token",
        mini_batches: int = 1,
        reuse: Reuse = Reuse(),  # noqa: B008
        max_tokens_per_microbatch: int = 16384,
        share_prompts: bool = True,
        compile: bool = False,
        reward_workers: WorkerOptions = WorkerOptions(),  # noqa: B008
        on_reward_failure: Literal["drop", "zero"] = "drop",
    ) -> None:
        super().__init__()
        policy, sampling = options_of(Policy, "policy", policy), options_of(Sampling, "sampling", sampling)
        engine = None if engine is None else options_of(RolloutEngine, "engine", engine)  # type: ignore[type-abstract]
        if environment is not None:
            environment = options_of(EnvironmentOptions, "environment", environment)  # type: ignore[type-abstract]
        val_sampling = None if val_sampling is None else options_of(Sampling, "val_sampling", val_sampling)
        optimization = options_of(Optimization, "optimization", optimization)
        reuse = options_of(Reuse, "reuse", reuse)
        surrogate = options_of(SurrogateOptions, "surrogate", surrogate)
        reward_workers = options_of(WorkerOptions, "reward_workers", reward_workers)
        self.automatic_optimization = False
        if (group_size := sampling.num_generations) < 2:
            told = f"model.sampling.num_generations is {group_size}, but an advantage compares completions of a prompt"
            raise UserError(f"{told}. Set it to 2 or more.")
        if sampling.temperature == 0:
            raise UserError(
                "model.sampling.temperature is 0, which makes the completions of a group the same, but an advantage "
                "compares them. Set it above 0; val_sampling may be greedy."
            )
        self.options = LearnerOptions(
            surrogate=surrogate, temperature=sampling.temperature, max_completion_length=sampling.max_completion_length,
            advantage_scale=advantage_scale, advantage_baseline=advantage_baseline,
            multi_objective_aggregation=multi_objective_aggregation,
            mask_truncated_completions=mask_truncated_completions, aggregation=aggregation,
            mini_batches=mini_batches, max_tokens_per_microbatch=max_tokens_per_microbatch, share_prompts=share_prompts,
        )  # fmt: skip
        self.mini_batches, self.max_tokens_per_microbatch = mini_batches, max_tokens_per_microbatch
        self.policy, self.optimization, self.compiles = policy, optimization, compile
        self.engine, self.sampling, self.val_sampling = engine or Transformers(), sampling, val_sampling or sampling
        self.scorer = RewardScorer(rewards_of(rewards), on_reward_failure, reward_workers, environment is not None)
        self.environment = environment
        self.sessions = None if environment is None else Sessions(environment)
        self.reference: ReferencePolicy | None = None
        for k in pass_at_k if isinstance(pass_at_k, list) else [pass_at_k]:
            if k is not None and k < 1:
                raise UserError(f"model.pass_at_k is {k}; set it to 1 or more.")
        self.pass_at_k = pass_at_k
        self.measured: dict[str, ValidationMetrics] = {}
        """Metrics of each validation or test set, by the prefix of their names (`OnlinePromptDataModule.sets`)."""
        self.last_measured: dict[str, float] = {}
        """What the last validation or test has measured, by name."""
        self._updates = Updates(optimization, reuse)
        self.resumed: Mapping[str, Any] | None = None  # `RunIdentity` of the checkpoint that training resumes from
        self.sharding: Sharding | None = None
        self._checked_pools: Mapping[str, PromptPool] | None = None

    @property
    def policy_path(self) -> str:
        """Folder or hub name of the initial weights."""
        return self.policy.path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.load_tokenizer()

    @property
    def tools(self) -> Tools | None:
        """The tools of the environment, by its name in the data; None without an environment.

        Raises:
            UserError: its code cannot be imported, or is not an environment.
        """
        return None if self.sessions is None else self.sessions.describe()

    def sampling_of(self, measured: ValidationSet) -> Sampling:
        """Return the sampling of a validation or test set."""
        return replace(self.val_sampling, **measured.sampling.given())  # type: ignore[arg-type]  # fields of Sampling

    def fit_completions(self, most: int, for_prompts: int) -> int:
        """Limit the completions of validation to `most` tokens, or to what the context leaves beside a prompt.

        A prompt has `for_prompts` tokens, or a quarter of a shorter context. Returns the limit.
        """
        context = self.engine.context_length(self.policy.positions())
        limit = most if context is None else min(most, context - min(for_prompts, context // 4))
        self.val_sampling = replace(self.val_sampling, max_completion_length=limit)
        return limit

    def prompt_limit(self, measured: ValidationSet | None, where: str) -> int | None:
        """Return the most tokens of a prompt that leave room for a completion, or None.

        Args:
            measured: the set of the prompt; None for a training prompt.
            where: the option that names the set, for messages.

        Raises:
            UserError: there is no room.
        """
        context = self.engine.context_length(self.policy.positions())
        if context is None:
            return None
        longest = (self.sampling if measured is None else self.sampling_of(measured)).max_completion_length
        if longest >= context:
            name = "model.sampling" if measured is None or self.val_sampling is self.sampling else "model.val_sampling"
            if measured is not None and measured.sampling.max_completion_length is not None:
                name = f"{where}.sampling"
            raise UserError(
                f"{name}.max_completion_length is {longest}, which leaves no room for a prompt within the "
                f"{context} tokens of the policy's context. Lower it."
            )
        return context - longest

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks.of_run()

    @cached_property
    def pipeline(self) -> RolloutPipeline:
        """The pipeline that rolls prompts out with the current policy and scores them."""
        lm, folder = causal_lm(self.policy_model), run_folder(self.trainer)
        self.engine.setup(
            lm, self.tokenizer, weights=lambda: plain_weights(self.policy_model), folder=folder, ranks=self.ranks,
            dtype=self.policy.stored_dtype(),
        )  # fmt: skip
        return RolloutPipeline(
            self.engine, self.scorer, run_seed(), self.trainer.precision_plugin.forward_context,
            lambda: TrainerState(global_step=self.trainer.global_step, max_steps=self.trainer.max_steps),
            self.ranks, None if self.sharding is None else partial(self.sharding.whole, self.policy_model),
            self._environment_rollouts(),
        )  # fmt: skip

    def _environment_rollouts(self) -> EnvironmentRollouts | None:
        if self.environment is None or self.sessions is None:
            return None
        sources = OnlinePromptDataModule.of(self.trainer).train_sources.values()
        schemas = [tool for tools in self.sessions.describe().values() for tool in tools]
        arguments = next((one.chat_template_kwargs for one in sources if one.chat_template_kwargs), None)
        return EnvironmentRollouts(
            self.engine, self.environment, protocol_of(self.environment.protocol, self.tokenizer, arguments, schemas),
            self.tokenizer, self.sessions, lambda: self.engine.context_length(self.policy.positions()),
        )  # fmt: skip

    @property
    def learner(self) -> Learner:
        """The policy and its loss, built for each batch: strategy and callbacks may wrap or move the policy."""
        weights = dict(zip(self.scorer.names, self.scorer.weights.tolist(), strict=True))
        device = self.device if self.sharding is None else self.sharding.device  # shards may be kept on the host
        return Learner(
            self.policy_model, self.options, weights, self.reference, self.ranks, self.sharding is not None,
            self.tokenizer.pad_token_id, device, self.engine.uses_policy and not self.sampling.truncates,
        )  # fmt: skip

    @property
    def optimizer_steps(self) -> int | None:
        """Optimizer steps of the run: `trainer.max_steps`, rounded up to whole batches; None without a limit."""
        steps = self.trainer.max_steps
        return None if steps < 1 else -(-steps // self.mini_batches) * self.mini_batches

    @property
    def diverged(self) -> bool:
        """Whether this step is the last because updates are no longer finite."""
        return self._updates.guard.exhausted

    def prepare_data(self) -> None:
        """Load the policy before the logger creates the run's folder: a run that can't start leaves no files."""
        # A policy that several processes load, or that a callback shards, is built after `setup`.
        if self.trainer.world_size == 1 and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            configure_model_early(self.trainer)
            self.setup(self.trainer.state.fn or "")

    def setup(self, stage: str) -> None:
        data = OnlinePromptDataModule.of(self.trainer)
        if self._checked_pools is not data.pools:  # once: `prepare_data` may have set up before
            self._checked_pools = data.pools
            self.measured = metrics_of_sets(data, self.scorer.names, self.sampling_of, self.pass_at_k)
            check_rewards(data, self.scorer, self.sessions)
        check_tokens(data, self.policy, self.tokenizer)
        if stage != "fit":
            return
        if isinstance(self.trainer, RunTrainer) and self.trainer.passes is not None:
            per_pass = -(-len(data.pools["train"]) // data.prompts_per_step)
            limit = self.trainer.limit_train_batches
            per_pass = min(per_pass, limit) if isinstance(limit, int) else int(per_pass * limit)
            self.trainer.limit_steps(self.trainer.passes * per_pass * self.mini_batches)
        callbacks, steps = self.trainer.callbacks, self.trainer.max_steps  # type: ignore[attr-defined]  # of a connector
        if steps < 1 and not any(isinstance(one, Timer) for one in callbacks):
            raise UserError(
                f"trainer.max_steps is {steps}, and prompts never run out. Set it, trainer.max_epochs (passes over "
                "the prompts) or trainer.max_time."
            )
        self.optimization.check_length(self.optimizer_steps)
        if self.sampling.truncates:
            rank_zero_warn(
                f"model.sampling has top_p={self.sampling.top_p} and top_k={self.sampling.top_k}: tokens that are left "
                "out are never tried, and the importance weights of the others start below 1."
            )
        if self.resumed is not None:
            self._identity.check(self.resumed)

    @cached_property
    def _identity(self) -> RunIdentity:
        train = OnlinePromptDataModule.of(self.trainer).pools["train"]
        return RunIdentity.of(self.tokenizer, train, self.sampling.num_generations, run_seed())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_identity"] = self._identity.as_dict()
        if self._updates.reuse.passes > 1:
            checkpoint["head_norms"] = list(self._updates.head_norms.norms)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != "fit":
            checkpoint["callbacks"] = {}  # the state of training, which refers to the prompts of its pool
        self._updates.head_norms.norms.clear()
        self._updates.head_norms.norms.extend(checkpoint.get("head_norms", []))

    def configure_model(self) -> None:
        if "policy_model" in self._modules:  # Lightning calls this again for each stage
            return
        if self.sharding is not None:
            self.policy_model = self.sharding.load(self.policy, compiles=self.compiles)
        else:
            self.policy_model = self.policy.load()
            if self.compiles:
                compile_layers(self.policy_model)
        self.reference = ReferencePolicy.of(self.policy) if self.options.surrogate.beta else None
        self.scorer.start()
        if self.sessions is not None:
            self.sessions.start()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimization.optimizer(self.policy_model)
        scheduler = self.optimization.scheduler(optimizer, self.optimizer_steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self) -> None:
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(scheduler, LambdaLR)
        self.optimization.apply(optimizer, scheduler)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> None:
        """Take the optimizer steps of a batch and record their metrics in it."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(scheduler, LRScheduler)
        with batch.ledger.phase("sync"):
            self.pipeline.engine.release()
        with batch.ledger.phase("update"):
            switch_off_dropout(self.policy_model)
            learner = self.learner
            batch.advantages = learner.advantages_of(batch.groups)
            parts = learner.minibatches_of(batch.groups, batch.advantages, batch.step)
            selector = OnlinePromptDataModule.of(self.trainer).selector
            measures = GroupMeasures(learner, batch.groups, sketched=batch.wants_sketches or selector.uses_sketches)
            updates = self._updates.take(
                learner, parts, batch.step,
                optimizer=optimizer, scheduler=scheduler, backward=self.manual_backward, measures=measures,
                step_again=None if self._updates.reuse.passes == 1 else self._step_again,
            )  # fmt: skip
            batch.sketches, batch.drift = measures.sketches(self.ranks), measures.drift(self.ranks)
        if selector.uses_sketches:
            with batch.ledger.phase("select"):
                # A group without advantages has a gradient of the KL term at most.
                selector.observe_gradients([one for one in batch.sketches if batch.advantages[one.group].any()])
        batch.metrics |= batch_metrics(batch.groups) | update_metrics(updates, parts)
        if self._updates.reuse.passes > 1:
            reused = self._updates.reused
            batch.ledger.count("reused_groups", reused.groups)
            batch.metrics |= {"updates/reused": float(reused.updates), "updates/reuse_z_score": reused.z_score}
        if self.policy.lora is not None and self.policy.lora.dropout:
            batch.metrics["updates/dropout"] = self.policy.lora.dropout

    def _step_again(self) -> None:
        """Step the optimizer without counting it as a step of the run, as `LightningOptimizer.step` would."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        self.trainer.strategy.optimizer_step(optimizer, lambda: None)

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        """End the run if updates are no longer finite. The callbacks' hooks have saved the checkpoint before."""
        self._updates.guard.check(batch.step)

    def on_validation_epoch_start(self) -> None:
        for metrics in self.measured.values():
            metrics.reset()

    def validation_step(self, batch: TrainBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.measured[self.measured_set(dataloader_idx)].update(batch.groups, batch.ledger.counts)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each set that has been measured and, if all of several have, their means."""
        stage: Literal["val", "test"] = "test" if self.trainer.testing else "val"
        sets = {prefix: metrics.named(prefix) for prefix, metrics in self.measured_sets(stage).items()}
        found = {name: value for one in sets.values() for name, value in one.items()}
        every = len(sets) == len(OnlinePromptDataModule.of(self.trainer).measured(stage))
        if sets and every and stage not in sets:
            found |= mean_over_sets(stage, sets)
        self.last_measured = found
        # Every rank knows all groups: the mean over ranks is the value itself.
        self.log_dict(found, sync_dist=self.ranks.size > 1)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: TrainBatch, batch_idx: int, dataloader_idx: int = 0) -> TrainBatch:
        return batch

    def measured_sets(self, stage: Literal["val", "test"]) -> dict[str, ValidationMetrics]:
        """Return the metrics of the sets that have been measured, by the prefix that their names are logged under.

        Validation prompts have the names of test prompts where they are tested for want of these.
        """
        names = OnlinePromptDataModule.of(self.trainer).measured(stage)
        prefixes = {stage + name.removeprefix("val").removeprefix("test"): self.measured[name] for name in names}
        return {prefix: metrics for prefix, metrics in prefixes.items() if metrics.measured}

    def measured_set(self, dataloader_idx: int) -> str:
        """Return the name of the set (`OnlinePromptDataModule.sets`) that the loader of a number yields."""
        stage: Literal["val", "test"] = "val" if self.trainer.validating else "test"
        return OnlinePromptDataModule.of(self.trainer).measured(stage)[dataloader_idx]

    def teardown(self, stage: str) -> None:
        self.scorer.close()
        if self.sessions is not None:
            self.sessions.close()
        self.engine.close()
