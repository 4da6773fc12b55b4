"""Logs of completions: a few in TensorBoard, all of a step in a parquet file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from app.module import GRPOModule
from app.runs.folder import run_folder
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.types import Messages, RolloutGroup, TrainBatch

_SHOWN_CHARACTERS = 2000


class CompletionsLog(StepCallback):
    """Writes `completions/step_*.parquet`, and a few completions with their rewards to TensorBoard.

    A file contains all completions that its step trained on and, without `advantage`, those of groups that a filter
    dropped or the batch had no place for. What reward functions give to `log_extra` are further columns.
    `dots predict` writes all its completions to `completions/predict.parquet`.

    Args:
        every: steps between two files.
        samples: number of completions shown as text each time.
    """

    stage = Stage.WATCH

    def __init__(self, every: int = 10, samples: int = 4) -> None:
        if every < 1 or samples < 0:
            raise UserError(
                f"CompletionsLog has every={every} and samples={samples}, expected at least 1 and 0. Raise them."
            )
        self.every = every
        self.samples = samples
        self._predicted: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if batch.step % self.every == 0:
            untrained = [*batch.of("dropped"), *(group for group in batch.of("surplus") if group.source == "fresh")]
            rows = [*_rows(batch.groups, batch.advantages, batch.step), *_rows(untrained, [], batch.step)]
            _write(trainer, f"step_{batch.step:08d}", rows)
            self._show(trainer, "completions/train", batch.groups, batch.step)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GRPOModule,
        outputs: object,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 0:
            step = trainer.fit_loop.epoch_loop.total_batch_idx + 1 if trainer.state.fn == "fit" else 0
            self._show(trainer, f"completions/{pl_module.measured_set(dataloader_idx)}", batch.groups, step)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: GRPOModule,
        outputs: object,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._predicted.extend(_rows(batch.groups, [], 0))

    def on_predict_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        _write(trainer, "predict", self._predicted)
        self._predicted = []

    def _show(self, trainer: Trainer, tag: str, groups: Sequence[RolloutGroup], step: int) -> None:
        shown = [group for group in groups if group.completions][: self.samples]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and shown:
                logger.experiment.add_text(tag, "\n\n---\n\n".join(map(_markdown, shown)), step)


def _rows(groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], step: int) -> Iterator[dict[str, Any]]:
    for position, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            row = {
                "step": step,
                "prompt_id": group.prompt.id,
                "question": group.prompt.question,
                "prompt": _text(group.prompt.prompt),
                "completion": completion.text,
                "reward": float(group.rewards[sample]),
                "correctness": float(group.correctness[sample]),
                "advantage": float(advantages[position][sample]) if advantages else None,
                "source": group.source,
                "birth_step": group.birth_step,
                "policy_version": completion.policy_version,
                "finish_reason": completion.finish_reason,
                "completion_tokens": len(completion.token_ids),
            }
            row |= {f"reward/{name}": float(values[sample]) for name, values in group.components.items()}
            row |= {
                name if name not in row else f"extra/{name}": values[sample] for name, values in group.extras.items()
            }
            yield row


def _write(trainer: Trainer, name: str, rows: list[dict[str, Any]]) -> None:
    if rows and trainer.is_global_zero:
        folder = run_folder(trainer) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys(column for row in rows for column in row)
        table = pa.table({column: _column([row.get(column) for row in rows]) for column in names})
        pq.write_table(table, folder / f"{name}.parquet")


def _column(values: list[Any]) -> pa.Array:
    """Return values as a column; as text if reward functions logged values of several types, or what no type holds."""
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeError, OverflowError):
        texts = (None if value is None else str(value).encode("utf-8", "replace").decode() for value in values)
        return pa.array(texts, pa.string())


def _text(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _markdown(group: RolloutGroup) -> str:
    """Return the first completion of a group, indented because TensorBoard shows indented text verbatim."""
    completion = group.completions[0]
    head = (
        f"**{group.prompt.id}** · {group.source} · reward {group.rewards[0]:.3g} "
        f"· group success {group.success_rate:.2f} · {completion.finish_reason}"
    )
    body = f"{_text(group.prompt.prompt)}\n>>> {completion.text}"[:_SHOWN_CHARACTERS]
    return head + "\n\n" + "\n".join(f"    {line}" for line in body.splitlines())
