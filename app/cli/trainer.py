"""The Trainer, with the subcommands of `dots` that Lightning does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from app.cli.serve import serve
from app.policy.weights import checkpoint_weights, export
from app.reporting.run_table import print_run_table
from app.subsets.command import Request, select
from app.subsets.learnalign import LearnAlignOptions
from app.subsets.ufo import UfoOptions
from callbacks import RandomState, Rollouts, RunCheckpoint, RunLedger, RunProgress, WeightSync
from datamodules.errors import UserError


class DotsTrainer(Trainer):
    """Lightning's Trainer plus `describe`, `export`, `select` and `serve`; its arguments are Lightning's."""

    def describe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        world_size: int | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Prints the table of a run without loading weights or data.

        Args:
            model: the module of the run.
            datamodule: the data of the run.
            world_size: processes to describe; those of trainer.devices and trainer.num_nodes by default.
            ckpt_path: not used; the config.yaml of a run names it.
            weights_only: not used, likewise.
        """
        print_run_table(
            model,
            datamodule,
            self.callbacks,  # type: ignore[attr-defined]  # set by the connector
            policy=model.policy.on_meta(),  # type: ignore[union-attr,operator]
            world_size=world_size or self.world_size,
            max_steps=self.max_steps,
        )

    def export(
        self,
        model: LightningModule,
        ckpt_path: str,
        out: str,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Writes the policy of a checkpoint as a Hugging Face folder that `from_pretrained` loads.

        Args:
            model: the module of the run.
            ckpt_path: a checkpoint file, or "last".
            out: the folder to write; it must not exist or be empty.
            datamodule: not used; the config.yaml of a run names one.
            weights_only: not used, likewise: a checkpoint is never unpickled.
        """
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out {out}: exists and is not an empty folder; give a new one")
        module: Any = model
        module.configure_model()
        weights = checkpoint_weights(Path(ckpt_path))
        module.policy_model.load_state_dict(weights)
        export(module.policy_model, module.tokenizer, folder)
        module.teardown("export")
        print(f"wrote {folder}")

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
        """Chooses a subset of the training pool before training, and writes it as a prompt file.

        Beside OUT.jsonl stand OUT.yaml (a config that makes `dots fit` train on it), OUT.scores.parquet, OUT.png, and
        the folder OUT.select with what was measured: the same command goes on from it when it was stopped, and another
        --keep needs no new measurement.

        Args:
            model: the module of the run.
            datamodule: the data of the run; its training pool is chosen from.
            method: "learnalign" keeps prompts whose gradients teach what the others teach (arXiv 2506.11480), "ufo"
                those that the policy is neither sure nor at a loss about (arXiv 2505.12457).
            keep: prompts to keep.
            out: the file to write; its name ends in .jsonl.
            learnalign: settings of LearnAlign.
            ufo: settings of UFO-RL.
            prompts_per_batch: prompts rolled out together; a stopped selection repeats no more than these.
            ckpt_path: a checkpoint file, or "last": the policy that looks at the prompts; the initial one by default,
                for learnalign after its warm-up.
            weights_only: not used; the config.yaml of a run names it: a checkpoint is never unpickled.
        """
        checkpoint = None if ckpt_path is None else Path(ckpt_path)
        request = Request(method, keep, Path(out), learnalign, ufo, prompts_per_batch, checkpoint)
        select(self, model, datamodule, request, self._for_warmup)  # type: ignore[arg-type]  # checked there

    def _for_warmup(self, *, logger: Logger, max_steps: int) -> Trainer:
        """Return this trainer with the callbacks of plain GRPO alone, see `app.subsets.warmup.WarmupTrainer`."""
        plain = (WeightSync, Rollouts, RandomState, RunLedger, RunProgress, RunCheckpoint)
        trainer: Any = self
        trainer.callbacks = [
            one for one in trainer.callbacks if isinstance(one, plain) or type(one).__module__.startswith("lightning.")
        ]
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.dirpath = None
        trainer.logger = logger
        trainer.limit_val_batches = 0
        trainer.fit_loop.epoch_loop.max_steps = max_steps
        return self

    def serve(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        host: str | None = None,
        port: int | None = None,
        start_timeout_s: float = 300.0,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Runs a vLLM server of the config's policy until Ctrl-C; runs use it by `--model.engine.url`.

        It prints the plain command that it runs. The server asks for the key in VLLM_API_KEY when there is one.

        Args:
            model: the module of the run: its policy and, where its engine is VllmServer, how a server is started.
            datamodule: not used; the config.yaml of a run names one.
            host: address to listen on; the engine's by default, which only this machine reaches.
            port: to listen on; the engine's by default, and a free one where that is 0.
            start_timeout_s: seconds that the server may take until it is healthy.
            ckpt_path: not used: a run pushes its weights to the server before it generates.
            weights_only: not used, likewise.
        """
        serve(model, host, port, start_timeout_s)  # type: ignore[arg-type]  # our own class, checked there
