"""The private names of Lightning that Dots needs, each with the reason. No other file uses one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_configure_model


def configure_model_early(trainer: Trainer) -> None:
    """Call the module's `configure_model` in the contexts of the trainer's strategy and precision.

    Lightning calls it after the logger has created the run's folder. Calling it in `prepare_data` means that a policy
    that can't be loaded leaves no folder behind; no public function enters the same contexts.
    """
    _call_configure_model(trainer)


def mark_stop_received(trainer: Trainer) -> None:
    """Make the trainer stop as on SIGTERM, at the end of the step in progress.

    `trainer.received_sigterm` is read-only. Lightning's own handler sets the flag only in the process that received
    the signal, and broadcasts it from inside the handler, in the middle of any collective.
    """
    trainer._signal_connector.received_sigterm = True


def is_subprocess_launcher(launcher: object) -> TypeGuard[_SubprocessScriptLauncher]:
    """Return whether the launcher started the run's other processes, and can therefore kill them.

    `Strategy.launcher` is typed as the private base class, and only this subclass has `kill`.
    """
    return isinstance(launcher, _SubprocessScriptLauncher)


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
