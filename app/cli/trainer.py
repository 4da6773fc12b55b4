"""The trainer: Lightning's, with the standard callbacks and the subcommands of `dots` that Lightning does not have."""

from __future__ import annotations

import errno
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from app.cli.data_page import describe_data
from app.cli.doctor import Place, before_training
from app.cli.export import export_policy
from app.cli.serve import serve
from app.module import GRPOModule
from app.runs.checkpoint_io import StreamedCheckpoints
from app.runs.folder import Runs, RunTrainer, checkpoint_of, find_last
from app.runs.gpus import check_accelerator, default_precision
from app.runs.lightning_internals import raise_stop_iteration, train_without_wrapper
from app.subsets.command import Request, select
from app.subsets.learnalign import LearnAlignOptions
from app.subsets.ufo import UfoOptions
from callbacks.stages import StepCallback
from callbacks.standard import with_standard
from callbacks.upkeep.checkpoint import RunCheckpoint
from callbacks.watching.run_table import print_run_table
from callbacks.watching.validation import validation_interval
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DotsTrainer(RunTrainer):
    """Lightning's Trainer for a `GRPOModule` and its prompts; its arguments are Lightning's.

    It supplies the standard callbacks (`callbacks.standard`): only what makes the algorithm, and what is not to run
    with its default options, has to be listed. A listed callback replaces the standard one of its class. All are
    sorted by their stage in a step. `enable_checkpointing=False` and `enable_progress_bar=False` leave out the
    callbacks for these.

    Its defaults differ from Lightning's where steps take the place of epochs, since the training prompts never end:
    a fraction as `val_check_interval` is one of the run's steps, by default a tenth, and `max_epochs` counts passes: as
    many steps as it takes to choose as many prompts as there are. It is 1 where nothing else ends the run. On GPUs
    `precision` is by default bf16-mixed: float32 weights, computed with in bfloat16.
    """

    def __init__(
        self,
        *,
        callbacks: list[Callback] | Callback | None = None,
        max_epochs: int | None = None,
        max_steps: int = -1,
        max_time: str | timedelta | dict[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = None,
        num_sanity_val_steps: int | None = 0,
        log_every_n_steps: int | None = 1,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = False,
        use_distributed_sampler: bool = False,
        inference_mode: bool = False,  # tensors that a validation makes must serve the training after it
        **kwargs: Any,
    ) -> None:
        # The limits stand here for their types: typing's cache may turn around the order of Lightning's
        # `Optional[Union[int, float]]`, and then 1 (batch) is read as 1.0 (all of them).
        listed = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        accelerator = kwargs.get("accelerator", "auto")
        if warning := check_accelerator(accelerator):
            rank_zero_only(print)(f"dots: warning: {warning}", file=sys.stderr, flush=True)
        if kwargs.get("precision") is None and not kwargs.get("plugins"):
            kwargs["precision"] = default_precision(accelerator)
        in_steps = isinstance(val_check_interval, int | float) or val_check_interval is None
        super().__init__(
            max_epochs=-1,
            max_steps=max_steps,
            max_time=max_time,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            val_check_interval=None if in_steps else val_check_interval,
            callbacks=with_standard(
                listed, checkpoints=enable_checkpointing is not False, progress_bar=enable_progress_bar is not False
            ),
            check_val_every_n_epoch=check_val_every_n_epoch,
            num_sanity_val_steps=num_sanity_val_steps,
            log_every_n_steps=log_every_n_steps,
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            use_distributed_sampler=use_distributed_sampler,
            inference_mode=inference_mode,
            **kwargs,
        )
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            self.strategy.checkpoint_io = StreamedCheckpoints()
        if isinstance(self.strategy, DDPStrategy):
            train_without_wrapper(self.strategy)
        if max_epochs is not None:
            self.passes = None if max_epochs < 0 else max_epochs
        elif max_steps == -1 and not any(isinstance(one, Timer) for one in self._callbacks):
            self.passes = 1
        self._interval = val_check_interval if isinstance(val_check_interval, int | float) else None
        if not in_steps:
            self.val_check_interval = 1.0  # not set by Lightning, nor read
        self._validates_by_time = not in_steps
        raise_stop_iteration(self)
        self._options: dict[str, Any] = {
            **kwargs, "max_time": max_time, "limit_train_batches": limit_train_batches,
            "enable_checkpointing": enable_checkpointing, "enable_progress_bar": enable_progress_bar,
        }  # fmt: skip

    def fit(  # the checks come before anything is loaded or written, which no hook of a callback does
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train the policy.

        Args:
            model: the module of the run.
            train_dataloaders: not used, or the data module.
            val_dataloaders: not used.
            datamodule: the data of the run.
            ckpt_path: resume from a checkpoint file, the newest of a run folder, or "last": the newest of the last run,
                which continues in its folder.
            weights_only: not used: a checkpoint is never unpickled.
        """
        if isinstance(train_dataloaders, LightningDataModule):
            train_dataloaders, datamodule = None, train_dataloaders
        module, data = _of_a_run(model, datamodule)
        self._set_interval(module)
        if ckpt_path == "last":
            found = find_last(Runs.of(self))
            rank_zero_info(f"ckpt_path last: {found.said}{found.then}")
            self.continued, ckpt_path = found.folder, found.checkpoint
        elif ckpt_path is not None and "://" not in str(ckpt_path):
            ckpt_path = checkpoint_of(Path(ckpt_path))
        for callback in self._callbacks:
            if isinstance(callback, StepCallback):
                callback.check(self, module, data)
        if self.is_global_zero and (warning := before_training(self, module, data)):
            print(warning, file=sys.stderr, flush=True)
        with ExitStack() as owned:
            run = owned.enter_context(self.own_folder("fit"))
            if run is not None:
                resumed = None if ckpt_path is None else Path(ckpt_path)
                for one in RunCheckpoint.all_of(self):
                    owned.enter_context(one.own_folder(self, run, resumed))
            try:
                super().fit(module, train_dataloaders, val_dataloaders, data, ckpt_path, weights_only)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise UserError(
                    f"{error.filename or self.run} cannot be written ({error.strerror}). Checkpoints that were saved "
                    "are intact: free disk space, then repeat the command with --ckpt_path last."
                ) from error

    def describe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        world_size: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print the table of a run without loading weights or data.

        Args:
            model: the module of the run.
            datamodule: the data of the run.
            world_size: processes to describe; those of trainer.devices and trainer.num_nodes by default.
            ckpt_path: not used; the config.yaml of a run names it.
            weights_only: not used; the config.yaml of a run names it.
        """
        module, data = _of_a_run(model, datamodule)
        self._set_interval(module)
        print_run_table(
            self,
            module,
            data,
            policy=module.policy.on_meta(),
            world_size=world_size or self.world_size,
            with_memory=True,
        )

    def doctor(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        world_size: int | None = None,
        local_processes: int | None = None,
        accelerator: Literal["cpu", "gpu"] | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Check what a run would meet on this machine, a line for each check; exit code 1 if one is not ok.

        Args:
            model: the module of the run, whose weights are not loaded.
            datamodule: the data of the run, which are read.
            world_size: processes of the run; those of trainer.devices and trainer.num_nodes by default.
            local_processes: processes of this machine; those of trainer.devices by default.
            accelerator: what is trained on; that of trainer.accelerator by default.
            ckpt_path: not used; the config.yaml of a run names it.
            weights_only: not used; the config.yaml of a run names it.
        """
        module, data = _of_a_run(model, datamodule)
        local = local_processes or 1
        device = "cuda" if accelerator == "gpu" else "cpu"
        place = Place(
            self, module, data, module.policy.on_meta(), device, tuple(range(local)) if device == "cuda" else (),
            world_size or local, local,
        )  # fmt: skip
        findings = []
        for finding in place.all_checks():
            print(finding, flush=True)
            findings.append(finding)
        if amiss := sum(bool(one.todo) for one in findings):
            print(f"{amiss} of {len(findings)} checks need a look", flush=True)
            sys.exit(1)

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        out: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        adapter: bool = False,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the policy of a checkpoint as a Hugging Face folder that `from_pretrained` loads.

        Args:
            model: the module of the run.
            ckpt_path: a checkpoint file, a run folder, or "last".
            out: the folder to write; it must not exist or be empty.
            dtype: of the weights in the folder; "auto" is that of the policy's own files, to which trained weights are
                rounded.
            adapter: write the adapters of `model.policy.lora` alone, unmerged, for peft and vLLM.
            datamodule: not used; the config.yaml of a run names one.
            weights_only: not used: a checkpoint is never unpickled.
        """
        module = _grpo(model, "export")
        print(export_policy(module, checkpoint_of(Path(ckpt_path)), Path(out), dtype, adapter_only=adapter))

    def show_data(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show what a config reads: rows, lengths, rendered prompts and the answers that the rewards see.

        Args:
            model: the module of the run, whose weights are not loaded.
            datamodule: the data of the run.
            ckpt_path: not used; the config.yaml of a run names it.
            weights_only: not used; the config.yaml of a run names it.
        """
        module, data = _of_a_run(model, datamodule)
        self.strategy.connect(module)
        data.trainer = self
        data.setup("validate")
        print(describe_data(data, module.scorer))

    def select(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        method: Literal["learnalign", "ufo"],
        keep: int,
        out: str,
        learnalign: LearnAlignOptions = LearnAlignOptions(),  # noqa: B008  # jsonargparse shows the defaults only so
        ufo: UfoOptions = UfoOptions(),  # noqa: B008
        prompts_per_batch: int = 32,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Choose a subset of the training pool before training, and write it as a prompt file.

        Also written are OUT.yaml (a config that makes `dots fit` train on it), OUT.scores.parquet, OUT.png, and the
        folder OUT.select with all measurements: the same command continues from them if it was stopped, and another
        --keep needs no new measurement.

        Args:
            model: the module of the run.
            datamodule: the data of the run; the subset is chosen from its training pool.
            method: "learnalign" keeps prompts whose gradients agree with those of the others (arXiv 2506.11480), "ufo"
                those on which the policy's confidence is intermediate (arXiv 2505.12457).
            keep: number of prompts to keep.
            out: the file to write; its name ends in .jsonl.
            learnalign: settings of LearnAlign.
            ufo: settings of UFO-RL.
            prompts_per_batch: prompts rolled out together; a stopped selection repeats at most these.
            ckpt_path: a checkpoint file, a run folder, or "last": the policy that measures the prompts. By default
                the initial policy, for learnalign after its warm-up.
            weights_only: not used: a checkpoint is never unpickled.
        """
        module, data = _of_a_run(model, datamodule)
        checkpoint = None if ckpt_path is None else checkpoint_of(Path(ckpt_path))
        request = Request(method, keep, Path(out), learnalign, ufo, prompts_per_batch, checkpoint)
        select(self, module, data, request, self._for_warmup)

    def serve(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        host: str | None = None,
        port: int | None = None,
        start_timeout_s: float = 300.0,
        open_to_network: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run a vLLM server of the config's policy until Ctrl-C; runs use it by `--model.engine.url`.

        The plain command that it runs is printed. The server asks for the key in VLLM_API_KEY if that is set, which it
        must be where other machines can reach the server.

        Args:
            model: the module of the run: its policy and, where its engine is VllmServer, how a server is started.
            datamodule: not used; the config.yaml of a run names one.
            host: address to listen on; the engine's by default, which only this machine reaches.
            port: port to listen on; the engine's by default, and a free one where that is 0.
            start_timeout_s: seconds until the server must be healthy.
            open_to_network: allow a server that other machines can reach to have no key.
            ckpt_path: not used: a run pushes its weights to the server before it generates.
            weights_only: not used: a checkpoint is never unpickled.
        """
        serve(_grpo(model, "serve"), host, port, start_timeout_s, open_to_network)

    def limit_steps(self, most: int) -> None:
        super().limit_steps(most)
        self._set_interval(self.lightning_module)

    def _set_interval(self, module: LightningModule) -> None:
        if self.max_steps < 1 and self.passes is not None:
            return  # the length is known once the prompts are read
        assert isinstance(module, GRPOModule)
        if not self._validates_by_time and not self.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            self.val_check_interval = validation_interval(self._interval, self.max_steps, module.mini_batches)

    @property
    def _callbacks(self) -> list[Callback]:
        return self.callbacks  # type: ignore[attr-defined]  # set by a connector

    def _for_warmup(self, *, logger: Logger, max_steps: int) -> DotsTrainer:
        """Return the trainer of a warm-up, see `app.subsets.warmup.WarmupTrainer`."""
        kept: list[Callback] = [one for one in self._callbacks if isinstance(one, SaveConfigCallback)]
        for one in self._callbacks:
            if isinstance(one, RunCheckpoint):  # not in the folder of this run's checkpoints
                kept.append(RunCheckpoint(one.every, one.keep, on_write_error=one.on_write_error))
        return DotsTrainer(
            **{**self._options, "callbacks": kept, "logger": logger, "max_steps": max_steps, "limit_val_batches": 0}
        )


def _grpo(model: LightningModule, command: str) -> GRPOModule:
    if not isinstance(model, GRPOModule):
        raise UserError(f"--model is {type(model).__name__}, but dots {command} needs app.module.GRPOModule.")
    return model


def _of_a_run(model: LightningModule, datamodule: Any) -> tuple[GRPOModule, OnlinePromptDataModule]:
    """Return module and data with their types.

    Raises:
        UserError: they are not those of a GRPO run.
    """
    if not isinstance(model, GRPOModule) or not isinstance(datamodule, OnlinePromptDataModule):
        raise UserError(
            f"DotsTrainer was given {type(model).__name__} and {type(datamodule).__name__}, but it needs "
            "app.module.GRPOModule and datamodules.online.OnlinePromptDataModule. Use Lightning's Trainer for others."
        )
    return model, datamodule
