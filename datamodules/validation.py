"""A validation or test set: its prompts, and how and when they are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datamodules.errors import UserError, nearest
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptSource
from datamodules.prompts.reading import reward_columns
from datamodules.prompts.schemas import lookup
from datamodules.prompts.splits import sample_pool

MOST_VALUES = 64
"""Largest number of values of a column by which a set is measured."""
USUAL_TAG = "data_source"
"""Column that names the origin of each row in verl's files. A set is measured by it unless `tags` says otherwise."""


@dataclass(frozen=True)
class SamplingChanges:
    """The settings in which a set's sampling differs from `model.val_sampling`; null keeps its value.

    Args:
        num_generations: completions per prompt.
        max_completion_length: maximum number of tokens, including the end token.
        temperature: divides the logits; 0 means greedy.
        top_p: keep the smallest set of tokens whose probability reaches it.
        top_k: keep the k most probable tokens; 0 keeps all.
        stop: strings that end a completion.
    """

    num_generations: int | None = None
    max_completion_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: list[str] | None = None

    def given(self) -> dict[str, object]:
        """Return the settings that are changed."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ValidationSet:
    """Prompts that are measured apart, with settings of their own.

    Args:
        source: where the prompts come from.
        sampling: how the set's sampling differs from `model.val_sampling`.
        pass_at_k: the k of pass@k and maj@k, one or several; null for `model.pass_at_k`.
        size: number of prompts to measure, the same in every run; null for all of them.
        every: fewest steps between two validations of the set; the first and the last validation of a run always
            measure it.
        tags: columns of the data such as `level`: the accuracy of each of their values is logged too. By default
            `data_source`, if the set has such a column with several values; an empty list for none.
    """

    source: PromptSource
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    pass_at_k: int | list[int] | None = None
    size: int | None = None
    every: int = 1
    tags: list[str] | None = None

    def __post_init__(self) -> None:
        for name, given in (("size", self.size), ("every", self.every)):
            if given is not None and given < 1:
                raise UserError(f"{name} of a validation set is {given}, expected at least 1. Raise it.")

    def chosen(self, pool: PromptPool) -> PromptPool:
        """Return the prompts to measure, in the order of the pool: those with the smallest hashes of their ids."""
        return sample_pool(pool, self.size, "validation size")

    def tags_of(self, pool: PromptPool, where: str) -> tuple[str, ...]:
        """Return the columns by which the pool is measured.

        Args:
            pool: the prompts to measure.
            where: the option that names the set, for messages.

        Raises:
            UserError: the data lacks one of `tags`, or it has more than `MOST_VALUES` values.
        """
        if self.tags == []:
            return ()
        columns = pool[0].columns
        wanted = (USUAL_TAG,) if self.tags is None else tuple(self.tags)
        values: dict[str, set[str]] = {tag: set() for tag in wanted}
        for row in reward_columns(pool, wanted):
            for tag in wanted:
                values[tag].add(tag_value(row, tag))
        if self.tags is None:
            return wanted if USUAL_TAG in columns and 1 < len(values[USUAL_TAG]) <= MOST_VALUES else ()
        for tag in wanted:
            if values[tag] <= {""}:
                raise UserError(f"{where}.tags has {tag!r}, but no prompt has such a column: {nearest(tag, columns)}")
            if len(values[tag]) > MOST_VALUES:
                raise UserError(
                    f"{where}.tags has {tag!r}, which has {len(values[tag])} different values, expected at most "
                    f"{MOST_VALUES}. Name a column that groups the prompts."
                )
        return wanted


def tag_value(columns: Mapping[str, object], tag: str) -> str:
    """Return the value of a column as it stands in the name of a metric; empty for a prompt without one."""
    value = lookup(columns, tag)
    return "" if value is None else "_".join(str(value).replace("/", "_").split())


def as_set(given: PromptSource | ValidationSet) -> ValidationSet:
    """Return a set with default settings for a source alone."""
    return given if isinstance(given, ValidationSet) else ValidationSet(given)
