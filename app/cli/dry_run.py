"""`dots fit --dry_run`: one small step of everything, in a folder that is removed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from app.module import GRPOModule
from app.runs.folder import checkpoint_of
from callbacks import ReferenceRollouts
from datamodules.errors import UserError
from datamodules.types import TrainBatch

_PROMPTS = 4
_MAX_COMPLETION_LENGTH = 32


class _StopAfterOneStep(Callback):
    """Ends the run after its first step, and keeps what happened in it."""

    def __init__(self) -> None:
        self.batch: TrainBatch | None = None
        self.found: list[str] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        trainer.should_stop = True  # before the checkpoint and the validation of a run's end are due
        self.batch = batch

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.batch is None or not trainer.is_global_zero or not isinstance(pl_module, GRPOModule):
            return
        groups = self.batch.groups
        self.found = [f"{len(groups)} groups of {pl_module.sampling.num_generations} completions were trained on"]
        measured: dict[str, Any] = {**self.batch.metrics, **trainer.callback_metrics}
        self.found += [f"{name} {float(measured[name]):.3f}" for name in ("reward", "val/accuracy") if name in measured]


class DryRun(AbstractContextManager["DryRun"]):
    """Makes the config of a run small, and tells at the end what was found.

    Args:
        config: of `dots fit`; sizes and places are changed, in place.

    Raises:
        UserError: the run is to resume, or is not one of `GRPOModule`.
    """

    def __init__(self, config: Any) -> None:
        if config.get("ckpt_path"):
            raise UserError("--dry_run tries a new run, which keeps nothing. Leave --ckpt_path or --resume out.")
        model, data, trainer = config.model.get("init_args"), config.data.get("init_args"), config.trainer
        if not model or "sampling" not in model or "prompts_per_step" not in data:
            raise UserError(
                f"--dry_run is for runs of app.module.GRPOModule, but the model is {config.model.class_path}."
            )
        self._folder = TemporaryDirectory(prefix="dots_dry_run_")
        self._started = time.monotonic()
        self.stop = _StopAfterOneStep()
        for sampling in (model.sampling, model.val_sampling):
            if sampling is not None:
                sampling.max_completion_length = min(sampling.max_completion_length, _MAX_COMPLETION_LENGTH)
        counted = [str(one) for one in (trainer.devices, trainer.num_nodes)]
        if all(one.isdigit() for one in counted) or counted[0] == "auto":
            processes = 1 if counted[0] == "auto" else int(counted[0]) * int(counted[1])
            data.prompts_per_step = min(data.prompts_per_step, _PROMPTS * max(1, model.mini_batches) * processes)
        data.val_batch_size, data.cache_dir = min(data.val_batch_size, _PROMPTS), self._folder.name
        trainer.logger, trainer.default_root_dir = False, self._folder.name
        trainer.limit_val_batches, trainer.val_check_interval = 1, 1
        listed = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks or {}]
        for one in listed:
            options = one.get("init_args") or {}
            if one.get("class_path", "").rpartition(".")[2] == ReferenceRollouts.__name__:
                options["size"] = min(options["size"], data.prompts_per_step)
            if options.get("dirpath"):
                options["dirpath"] = str(Path(self._folder.name, "checkpoints"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        saved = [checkpoint_of(one) for one in Path(self._folder.name).rglob("version_*") if one.is_dir()]
        found = self.stop.found + [f"a checkpoint of {_size(one) / 2**20:.1f} MiB was written" for one in saved]
        self._folder.cleanup()
        if error is None:
            seconds = time.monotonic() - self._started
            print(f"dry run: ok in {seconds:.0f} s: {', '.join(found)}. Nothing was kept.", flush=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)
