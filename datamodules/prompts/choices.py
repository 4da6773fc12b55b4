"""Reads multiple-choice questions: the choices as lettered lines, and the letter of the right one.

| written for | choices | answer |
|---|---|---|
| MMLU | `choices: [...]` | `answer: 2`, counted from 0 |
| MMLU-Pro, AQuA | `options: [...]` | `answer: "I"`, `correct: "A"` |
| ARC, CommonsenseQA | `choices: {"text": [...], "label": [...]}` | `answerKey: "B"` or `"2"`, one of the labels |
| ARC's own files | `choices: [{"text": ..., "label": ...}, ...]` | the same |
| MedQA | `options: {"A": ..., "B": ...}` | `answer_idx: "B"`, or the text of a choice as `answer` |
| tables | columns `A`, `B`, `C`, ... | a letter |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Literal

CHOICES = ("choices", "options", "question.choices")
"""Columns that may hold the choices. A dot leads into a column of objects."""

CHOICE_ANSWERS = ("answerKey", "answer", "label", "answer_idx", "answer_index", "correct")
"""Columns that may name the right choice, in order of preference."""

Naming = Literal["label", "text", "index", "number"]
"""How an answer names a choice: by its letter or label, its text, its place from 0, or its place from 1."""

_PREFIX = re.compile(r"\s*\(?([A-Za-z])[).:]\s*")


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of one question: their texts, and the labels that the data gives them."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line per choice: `A. text`."""
        return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, self.texts, strict=False))

    def letter_of(self, answer: object, naming: Naming) -> str | None:
        """Return the letter of the choice that an answer names; None if it names none."""
        place = self._place(answer, naming)
        return None if place is None else ascii_uppercase[place]

    def _place(self, answer: object, naming: Naming) -> int | None:
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            return None
        text = str(answer).strip()
        if naming == "label":
            labels = [label.strip().upper() for label in self.labels]
            text = text.strip("().: ").upper()
            return labels.index(text) if labels.count(text) == 1 else None
        if naming == "text":
            texts = [one.strip() for one in self.texts]
            return texts.index(text) if texts.count(text) == 1 else None
        text = text.removesuffix(".0")  # a column of integers with a gap is stored as floats
        place = int(text) - (naming == "number") if re.fullmatch("[0-9]{1,3}", text) else -1
        return place if 0 <= place < len(self.texts) else None


def choices_of(value: object) -> Choices | None:
    """Return the choices in a column's value (see the table above); None if it holds none."""
    labels: Sequence[object] | None = None
    if isinstance(value, Mapping):
        if isinstance(value.get("text"), list):
            labels, value = value.get("label"), value["text"]
        else:  # Arrow gives every row the labels of all
            value = {label: text for label, text in value.items() if text is not None}
            labels, value = list(value), list(value.values())
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        labels, value = [one.get("label") for one in value], [one.get("text") for one in value]
    if not isinstance(value, list) or not 2 <= len(value) <= len(ascii_uppercase):
        return None
    if not all(isinstance(one, str | int | float) for one in value):
        return None
    texts = [str(one) for one in value]
    letters = ascii_uppercase[: len(texts)]
    if not isinstance(labels, list) or len(labels) != len(texts) or not all(isinstance(one, str) for one in labels):
        labels = list(letters)
        prefixes = [_PREFIX.match(text) for text in texts]
        if "".join(found[1].upper() for found in prefixes if found) == letters:
            texts = [text[found.end() :] for text, found in zip(texts, prefixes, strict=True) if found]
    return Choices(tuple(texts), tuple(map(str, labels)))


def naming_of(rows: Sequence[tuple[Choices, object]]) -> Naming | None:
    """Return how the answers of some rows name their choices; None if there is no way that holds for all of them."""
    given = [(choices, answer) for choices, answer in rows if not is_blank(answer)]
    if not given:
        return None
    as_text = all(isinstance(answer, str) for _, answer in given)
    order: tuple[Naming, ...] = (
        ("label", "text", "index", "number") if as_text else ("label", "index", "number", "text")
    )
    return next((one for one in order if all(choices.letter_of(answer, one) for choices, answer in given)), None)


def is_blank(answer: object) -> bool:
    """Return whether a row has no answer, as those of published test sets, whose labels are -1."""
    return answer is None or str(answer).strip() in ("", "-1")
