"""Worked solutions with mistakes in them, as tensors for supervised pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import reasoning_gym
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.demonstrations import DEMONSTRATORS
from datamodules.demonstrations.char_tokenizer import char_tokenizer
from datamodules.errors import UserError, nearest
from datamodules.procedural import ProceduralTask
from datamodules.seeding import derive_seed, generator

IGNORED = -100
"""Label of a token that is not learnt (prompt and padding)."""


@dataclass(frozen=True, slots=True, eq=False)
class DemonstrationBatch:
    """Rows into which whole demonstrations are packed.

    Attributes:
        input_ids: int64 `[N, L]`.
        labels: int64 `[N, L]`: the token itself within a completion, else `IGNORED`.
        position_ids: int64 `[N, L]`: start again from 0 with each demonstration, which keeps them from attending to
            one another.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


class Demonstrations(L.LightningDataModule):
    """Demonstrations of reasoning-gym tasks: `{question}\\n{work}#### {answer}<eos>`.

    Training batches are `DemonstrationBatch`es; validation batches are lists of reasoning-gym
    entries, to be solved and scored. Both are drawn with seeds derived from `seed` and their purpose, which are those
    of no `datamodules.procedural` pool.

    Args:
        tasks: name, size and params of each, as in the pool that the policy is meant for.
        noise: by task name, the probability that a step of a demonstration is wrong.
        clean_fraction: share of the demonstrations, at the start, that have no slips. The skill is learnt from these;
            the slips that follow become habits on top of it.
        repeats: demonstrations per prompt of the pool (each of another entry).
        seed: fixes entries, slips and the order of batches.
        row_length: tokens of a packed row `L`; the longest demonstration must fit.
        rows_per_batch: rows of a training batch.
        val_size: entries to validate on, shared out like the demonstrations.
        phrases: texts that the tokenizer holds as one token.
    """

    def __init__(
        self,
        tasks: list[ProceduralTask],
        noise: dict[str, float],
        clean_fraction: float = 0.6,
        repeats: int = 10,
        seed: int = 0,
        row_length: int = 192,
        rows_per_batch: int = 2,
        val_size: int = 240,
        phrases: list[str] | None = None,
    ) -> None:
        super().__init__()
        for task in tasks:
            if task.name not in DEMONSTRATORS:
                raise UserError(f"tasks: {task.name!r} has no demonstrations; {nearest(task.name, DEMONSTRATORS)}")
            if not 0.0 <= noise.get(task.name, -1.0) <= 1.0:
                raise UserError(f"noise of {task.name!r} is {noise.get(task.name)}; give a probability in [0, 1]")
        self.tasks, self.noise, self.repeats, self.seed = tasks, noise, repeats, seed
        self.clean_fraction = clean_fraction
        self.row_length, self.rows_per_batch, self.val_size = row_length, rows_per_batch, val_size
        self.tokenizer: PreTrainedTokenizerBase = char_tokenizer(phrases or [])
        self._batches: list[DemonstrationBatch] = []

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self._batches:
            self._batches = self._make_batches()

    def train_dataloader(self) -> DataLoader[DemonstrationBatch]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style dataset

    def val_dataloader(self) -> DataLoader[list[dict[str, Any]]]:
        total = sum(task.size for task in self.tasks)
        sizes = [max(1, round(self.val_size * task.size / total)) for task in self.tasks]
        return DataLoader(self.entries("validation", sizes), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, DemonstrationBatch):
            parts = (batch.input_ids, batch.labels, batch.position_ids)
            return DemonstrationBatch(*(part.to(device) for part in parts))
        return batch

    def entries(self, purpose: str, sizes: list[int]) -> list[list[dict[str, Any]]]:
        """`sizes[i]` entries of task i, of seeds above those of a pool (below 2**31, plus the entry's number)."""
        made = []
        for position, (task, size) in enumerate(zip(self.tasks, sizes, strict=True)):
            seed = 2**32 + derive_seed(self.seed, "demonstrations", purpose, position, task.name) % 2**40
            dataset = reasoning_gym.create_dataset(task.name, size=size, seed=seed, **task.params)
            made.append([dataset[index] for index in range(size)])
        return made

    def _make_batches(self) -> list[DemonstrationBatch]:
        """Demonstrations of all tasks, shuffled together, so that every batch is a fair sample of the mixture."""
        entries = self.entries("fit", [task.size * self.repeats for task in self.tasks])
        drawn = [(task.name, entry) for task, group in zip(self.tasks, entries, strict=True) for entry in group]
        rng = generator(self.seed, "demonstrations", "slips")
        clean = round(self.clean_fraction * len(drawn))
        prompts, completions = [], []
        for position, index in enumerate(rng.permutation(len(drawn))):
            name, entry = drawn[index]
            noise = self.noise[name] if position >= clean else 0.0
            prompts.append(entry["question"] + "\n")
            completions.append(DEMONSTRATORS[name].solve(entry["metadata"], noise, rng).text + self.tokenizer.eos_token)
        tokens = zip(self.tokenizer(prompts)["input_ids"], self.tokenizer(completions)["input_ids"], strict=True)
        pairs = list(tokens)
        packed = _pack([len(prompt) + len(completion) for prompt, completion in pairs], self.row_length)
        rows = torch.tensor([_row([pairs[i] for i in row], self.row_length) for row in packed])
        return [DemonstrationBatch(*chunk.unbind(dim=1)) for chunk in rows.split(self.rows_per_batch)]


def _pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of members in the given order: a row is closed by the first member that does not fit into it."""
    rows: list[list[int]] = []
    left = 0
    for member, length in enumerate(lengths):
        if length > row_length:
            raise UserError(f"a demonstration of {length} tokens does not fit into row_length={row_length}; raise it")
        if not rows or length > left:
            rows.append([])
            left = row_length
        rows[-1].append(member)
        left -= length
    return rows


def _row(members: list[tuple[list[int], list[int]]], length: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids, labels and position ids of one row; its padding counts as one more member."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for prompt, completion in members:
        ids += prompt + completion
        labels += [IGNORED] * len(prompt) + completion
        positions += range(len(prompt) + len(completion))
    padding = length - len(ids)
    return ids + [0] * padding, labels + [IGNORED] * padding, positions + list(range(padding))
