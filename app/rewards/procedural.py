"""reasoning-gym's own scoring of its tasks (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from app.rewards.answers import AnswerSpan, plain, text_of
from app.rewards.base import Reward
from datamodules.errors import UserError, nearest
from datamodules.prompts import exact_json
from datamodules.types import Messages


class Procedural(Reward):
    """The score that the task's `score_answer` gives, in [0, 1]. A pool may mix tasks.

    Needs the columns of a procedural pool: `answer`, `metadata` (an object or its JSON) with `source_dataset`, and
    `question` where the task's scorer reads it.

    Args:
        weight: factor of this reward in the sum that is optimised.
        correctness: whether difficulty, filters and accuracy are about this reward.
        name: under which it is logged.
        after: string that comes before the answer, e.g. `=`; by default the whole completion is the answer.
        pattern: regular expression whose last match (its first group, if it has one) is the answer, e.g.
            `<answer>(.*?)</answer>`.
        binary: whether only a full score counts: 1 for it, 0 for any less.
    """

    preload = ("reasoning_gym",)

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool = False,
        name: str | None = None,
        after: str = "",
        pattern: str = "",
        binary: bool = True,
    ) -> None:
        super().__init__(weight, correctness, name)
        self.span = AnswerSpan(after, pattern)
        self.binary = binary
        self._scorers: dict[str, Callable[..., float]] = {}

    def load(self) -> None:
        import reasoning_gym  # noqa: F401

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        completion_ids: Sequence[list[int]],
        **columns: Any,
    ) -> list[float | None]:
        for needed in ("answer", "metadata"):
            if completions and needed not in columns:
                given = ", ".join(map(repr, sorted(columns))) or "none"
                raise UserError(
                    f"the data has no column {needed!r} (it has {given}): Procedural scores reasoning-gym data"
                )
        entries = [_entry(columns, row) for row in range(len(completions))]
        return [self._score(text_of(text), entry) for text, entry in zip(completions, entries, strict=True)]

    def _score(self, text: str, entry: dict[str, Any]) -> float:
        answer = self.span(text)
        scorer = self._scorer(str(entry["metadata"].get("source_dataset")))
        score = float(scorer(answer=None if answer is None else answer.strip(), entry=entry))
        return float(score >= 1.0) if self.binary else min(max(score, 0.0), 1.0)

    def _scorer(self, task: str) -> Callable[..., float]:
        if task not in self._scorers:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS

            if task not in DATASETS:
                raise UserError(f"metadata.source_dataset={task!r} is no reasoning-gym task; {nearest(task, DATASETS)}")
            self._scorers[task] = reasoning_gym.get_score_answer_fn(task)
        return self._scorers[task]


def _entry(columns: dict[str, Any], row: int) -> dict[str, Any]:
    """One item as reasoning-gym generated it; parquet and JSON have turned its lists into arrays or text."""
    metadata = columns["metadata"][row]
    metadata = exact_json.loads(metadata) if isinstance(metadata, str) else plain(metadata)
    if not isinstance(metadata, dict):
        raise UserError(f"metadata={metadata!r}: expected an object with the key 'source_dataset'")
    if "source_dataset" not in metadata and "source_dataset" in columns:
        metadata["source_dataset"] = columns["source_dataset"][row]
    question = columns["question"][row] if "question" in columns else None
    return {"question": question, "answer": plain(columns["answer"][row]), "metadata": metadata}
