"""Worked solutions as packed tensors for supervised pretraining, and their tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import lightning as L
import reasoning_gym
import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from datamodules.demonstrations.calls import CALCULATIONS, Calls, converse
from datamodules.demonstrations.solutions import DEMONSTRATORS, demonstrate
from datamodules.errors import UserError, nearest
from datamodules.procedural import ProceduralTask
from datamodules.seeding import derive_seed, generator

PAD, END = "<pad>", "<eos>"
IGNORED = -100
"""Label of tokens without a loss (prompt, a calculator's replies and padding)."""

Entry: TypeAlias = dict[str, Any]
"""A reasoning-gym entry: `question`, `answer`, `metadata`."""


def char_tokenizer(phrases: Sequence[str] = (), max_length: int = 512) -> PreTrainedTokenizerBase:
    """Make a tokenizer with one token per byte, that is per character of ASCII text.

    It is a Qwen2 tokenizer without merges, since `AutoTokenizer` loads that class for every Qwen2 checkpoint.

    Args:
        phrases: texts that become one ordinary token each, so that a task's fixed wording takes little of the context.
        max_length: value of `model_max_length`.
    """
    vocabulary = [PAD, END, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={token: position for position, token in enumerate(vocabulary)},
        merges=[],
        unk_token=PAD,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class DemonstrationBatch:
    """Rows of packed whole demonstrations.

    Attributes:
        input_ids: int64 `[N, L]`.
        labels: int64 `[N, L]`: the token itself where the policy is to write it, else `IGNORED`.
        position_ids: int64 `[N, L]`: restart at 0 with each demonstration, which keeps them from attending to one
            another.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


class Demonstrations(L.LightningDataModule):
    """Demonstrations of reasoning-gym tasks: `{question}\\n{work}#### {answer}<eos>`. With `calls`, the work is done by
    a calculator, whose replies have no loss.

    Training batches are `DemonstrationBatch`es; validation batches are lists of reasoning-gym entries to solve and
    score. Both use seeds derived from `seed` and their purpose, which no `datamodules.procedural` pool can draw.

    Args:
        tasks: name, size and params of each task, as in the pool that the policy is for.
        noise: probability that a step of a demonstration is wrong, by task name.
        clean_fraction: fraction of the demonstrations, at the start, without slips. The policy learns the skill from
            these, and habits from the slips that follow.
        repeats: demonstrations per prompt of the pool (each of a different entry).
        seed: determines entries, slips and the order of batches.
        row_length: tokens of a packed row, `L`; the longest demonstration must fit.
        rows_per_batch: rows of a training batch.
        val_size: number of validation entries, divided among the tasks like the demonstrations.
        phrases: texts that are one token each, besides the start and the end of a call.
        calls: how steps are written as calls of a calculator; null for steps that the policy works out itself.
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
        calls: Calls | None = None,
    ) -> None:
        super().__init__()
        known = CALCULATIONS if calls else DEMONSTRATORS
        for task in tasks:
            if task.name not in known:
                raise UserError(f"data.tasks: {task.name!r} has no demonstrations: {nearest(task.name, known)}")
            if not 0.0 <= noise.get(task.name, -1.0) <= 1.0:
                raise UserError(
                    f"data.noise of {task.name!r} is {noise.get(task.name)}, which is not a probability. "
                    "Set a number in [0, 1]."
                )
        self.tasks, self.noise, self.clean_fraction = tasks, noise, clean_fraction
        self.repeats, self.seed, self.calls = repeats, seed, calls
        self.row_length, self.rows_per_batch, self.val_size = row_length, rows_per_batch, val_size
        self.tokenizer: PreTrainedTokenizerBase = char_tokenizer(
            [*(phrases or []), *((calls.start, calls.end) if calls else ())]
        )
        self._batches: list[DemonstrationBatch] = []

    def setup(self, stage: str) -> None:
        if stage == "fit" and not self._batches:
            self._batches = self._make_batches()

    def train_dataloader(self) -> DataLoader[DemonstrationBatch]:
        return DataLoader(self._batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style dataset

    def val_dataloader(self) -> DataLoader[list[Entry]]:
        total = sum(task.size for task in self.tasks)
        sizes = [max(1, round(self.val_size * task.size / total)) for task in self.tasks]
        return DataLoader(self.entries("validation", sizes), batch_size=None)  # type: ignore[arg-type]

    def transfer_batch_to_device(
        self, batch: DemonstrationBatch | list[Entry], device: torch.device, dataloader_idx: int
    ) -> DemonstrationBatch | list[Entry]:
        if isinstance(batch, DemonstrationBatch):
            parts = (batch.input_ids, batch.labels, batch.position_ids)
            return DemonstrationBatch(*(part.to(device) for part in parts))
        return batch

    def entries(self, purpose: str, sizes: list[int]) -> list[list[Entry]]:
        """Generate `sizes[i]` entries of task i, with seeds above a pool's (below 2**31, plus the entry's number)."""
        made = []
        for position, (task, size) in enumerate(zip(self.tasks, sizes, strict=True)):
            seed = 2**32 + derive_seed(self.seed, "demonstrations", purpose, position, task.name) % 2**40
            dataset = reasoning_gym.create_dataset(task.name, size=size, seed=seed, **task.params)
            made.append([dataset[index] for index in range(size)])
        return made

    def _make_batches(self) -> list[DemonstrationBatch]:
        """Make demonstrations of all tasks, shuffled together so that each batch is a fair sample of the mixture."""
        entries = self.entries("fit", [task.size * self.repeats for task in self.tasks])
        drawn = [(task.name, entry) for task, group in zip(self.tasks, entries, strict=True) for entry in group]
        rng = generator(self.seed, "demonstrations", "slips")
        clean = round(self.clean_fraction * len(drawn))
        conversations: list[tuple[str, ...]] = []
        for position, index in enumerate(rng.permutation(len(drawn))):
            name, entry = drawn[index]
            noise = self.noise[name] if position >= clean else 0.0
            if self.calls:
                turns = converse(name, entry["metadata"], noise, self.calls, rng).turns
            else:
                turns = (demonstrate(name, entry["metadata"], noise, rng).text,)
            conversations.append((entry["question"] + "\n", *turns[:-1], turns[-1] + END))
        encoded = iter(self.tokenizer([text for parts in conversations for text in parts])["input_ids"])
        members = []
        for parts in conversations:
            ids, labels = list[int](), list[int]()
            for part in range(len(parts)):
                tokens = next(encoded)
                ids += tokens
                labels += tokens if part % 2 else [IGNORED] * len(tokens)  # the policy's turns come second, fourth ...
            members.append((ids, labels))
        rows = torch.tensor([_row(packed, self.row_length) for packed in _pack(members, self.row_length)])
        return [DemonstrationBatch(*chunk.unbind(dim=1)) for chunk in rows.split(self.rows_per_batch)]


Member: TypeAlias = tuple[list[int], list[int]]
"""Token ids of a demonstration, prompt included, and their labels."""


def _pack(members: Sequence[Member], row_length: int) -> list[list[Member]]:
    """Divide demonstrations into rows, in order: the first one that does not fit starts the next row."""
    rows: list[list[Member]] = []
    left = 0
    for member in members:
        length = len(member[0])
        if length > row_length:
            raise UserError(f"A demonstration has {length} tokens, more than data.row_length={row_length}. Raise it.")
        if not rows or length > left:
            rows.append([])
            left = row_length
        rows[-1].append(member)
        left -= length
    return rows


def _row(members: Sequence[Member], length: int) -> tuple[list[int], list[int], list[int]]:
    """Return token ids, labels and position ids of one row; its padding counts as one more demonstration."""
    ids, labels, positions = list[int](), list[int](), list[int]()
    for tokens, learnt in members:
        ids += tokens
        labels += learnt
        positions += range(len(tokens))
    padding = length - len(ids)
    return ids + [0] * padding, labels + [IGNORED] * padding, positions + list(range(padding))
