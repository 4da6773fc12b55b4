"""The private names of Lightning that Dots needs, each with the reason. No other file uses one."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_configure_model


def configure_model_early(trainer: Trainer) -> None:
    """Call the module's `configure_model` in the contexts of the trainer's strategy and precision.

    Lightning calls it after the logger has created the run's folder. Calling it in `prepare_data` means that a policy
    that can't be loaded leaves no folder behind; no public function enters the same contexts.
    """
    _call_configure_model(trainer)


def train_without_wrapper(strategy: DDPStrategy) -> None:
    """Have DDP broadcast the weights of rank 0 at the start and do nothing else.

    Gradients are summed by `app.update.gradient_sum`. The wrapper would hold buckets of their size for a reduction that
    never runs. Where it does not train, Lightning itself calls this function instead of wrapping.
    """

    def broadcast_weights() -> None:
        assert strategy.model is not None
        _sync_module_states(strategy.model)

    setattr(strategy, "configure_ddp", broadcast_weights)  # noqa: B010  # a method to mypy


def mark_stop_received(trainer: Trainer) -> None:
    """Make the trainer stop as on SIGTERM, at the end of the step in progress.

    `trainer.received_sigterm` is read-only. Lightning's own handler sets the flag only in the process that received
    the signal, and broadcasts it from inside the handler, in the middle of any collective.
    """
    trainer._signal_connector.received_sigterm = True


def after_signal_handlers(trainer: Trainer, then: Callable[[], None]) -> None:
    """Call `then` as soon as Lightning has installed its signal handlers, before any other hook of the run.

    The first hook that follows is `on_train_start`, in which engines start, which may take minutes.
    """
    connector = trainer._signal_connector
    install = connector.register_signal_handlers

    def install_both() -> None:
        install()
        then()

    setattr(connector, "register_signal_handlers", install_both)  # noqa: B010  # a method to mypy


def is_subprocess_launcher(launcher: object) -> TypeGuard[_SubprocessScriptLauncher]:
    """Return whether the launcher started the run's other processes, and can therefore kill them.

    `Strategy.launcher` is typed as the private base class, and only this subclass has `kill`.
    """
    return isinstance(launcher, _SubprocessScriptLauncher)


def logger_folder(logger: Logger) -> tuple[str | None, str | None, str | None]:
    """Return where a logger was told to write: `save_dir`, `name` and the folder of its version.

    Each is None where the logger has none. `version` of TensorBoardLogger and CSVLogger is read without their property,
    which decides on a number where none was given. Other loggers' versions are ids, not folders. The name of an
    MLFlowLogger is that of the experiment as it was given: its property makes the experiment, and is None on ranks > 0.
    """
    save_dir, version = logger.save_dir, None
    name = logger._experiment_name if isinstance(logger, MLFlowLogger) else logger.name
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        given = logger._version
        version = given if given is None or isinstance(given, str) else f"version_{given}"
    return None if save_dir is None else str(save_dir), None if name is None else str(name), version


def write_to(logger: Logger, folder: Path, run_id: str) -> None:
    """Point a logger that writes files at the run's folder; it has not written anything yet.

    A Weights & Biases run has the id of the run, unless another was given, so that a resume continues it.

    TensorBoardLogger and CSVLogger take their folder, `save_dir/name/version`, only when they are built. CSVLogger
    deletes its file of an earlier start with its first access: the file is renamed until `take_csv_back`.
    """
    if isinstance(logger, WandbLogger) and logger.version is None:
        logger._wandb_init["id"] = logger._id = run_id
    if not isinstance(logger, TensorBoardLogger | CSVLogger) or logger._experiment is not None:
        return
    logger._root_dir, logger._name, logger._version = str(folder.parent.parent), folder.parent.name, folder.name
    if isinstance(logger, CSVLogger):
        logger._save_dir = logger._root_dir
        file, kept = _csv_files(logger)
        if file.exists() and not kept.exists():  # else a process was killed before it took the rows back
            os.replace(file, kept)


def forget_files(logger: Logger) -> None:
    """Let a logger open its files again when it writes: those that it has opened were removed with their folder."""
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        logger._experiment = None


def take_csv_back(logger: CSVLogger, steps: int) -> None:
    """Write the rows of the first `steps` steps, from the file that was set aside, into the logger's new file."""
    _, kept = _csv_files(logger)
    if not kept.exists():
        return
    with kept.open(newline="", encoding="utf-8") as content:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(content)]
    writer = logger.experiment
    writer.metrics.extend(row for row in rows if int(row["step"]) < steps)
    writer.save()
    kept.unlink()


def _csv_files(logger: CSVLogger) -> tuple[Path, Path]:
    file = Path(logger.log_dir) / "metrics.csv"
    return file, file.with_name(".metrics.csv.kept")


def raise_stop_iteration(trainer: Trainer) -> None:
    """Have a StopIteration from a hook or a step end the run with an error.

    Lightning's loops catch it as the end of the data, also when a callback or a module has raised it: the rest of the
    step would be skipped without a word.
    """
    epoch = trainer.fit_loop.epoch_loop

    def begun() -> bool:  # not the end of the data, which comes before the batch is counted
        return epoch.batch_progress.current.ready != epoch.batch_progress.current.completed

    _guard(epoch, "advance", begun)
    _guard(epoch, "on_advance_end", lambda: True)
    for loop in (epoch.val_loop, trainer.validate_loop, trainer.test_loop):
        _guard(loop, "_evaluation_step", lambda: True)
    _guard(trainer.predict_loop, "_predict_step", lambda: True)


def _guard(loop: object, name: str, is_error: Callable[[], bool]) -> None:
    method: Callable[..., object] = getattr(loop, name)

    def guarded(*args: object, **kwargs: object) -> object:
        try:
            return method(*args, **kwargs)
        except StopIteration as error:
            if not is_error():
                raise
            raise RuntimeError(f"a hook or a step raised StopIteration({error})") from error

    setattr(loop, name, guarded)
