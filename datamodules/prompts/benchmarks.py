"""Benchmarks of mathematics by name: where they are, and how the policy is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from datamodules.errors import UserError, nearest
from datamodules.prompts.file import PromptFile, PromptSource

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""System prompt of a policy that was not trained with another one."""


@dataclass(frozen=True, slots=True)
class Known:
    """A benchmark on the hub.

    Attributes:
        path: its name there.
        name: its configuration; None if it has one only.
        split: its split.
        answer: the column with the reference answer.
        answer_format: how it is written, as an option of `PromptFile`.
    """

    path: str
    name: str | None = None
    split: str = "test"
    answer: str = "answer"
    answer_format: Literal["auto", "set"] = "auto"


BENCHMARKS: dict[str, Known] = {
    "gsm8k": Known("openai/gsm8k", "main"),
    "math500": Known("HuggingFaceH4/MATH-500"),
    "minerva_math": Known("math-ai/minervamath"),
    "olympiadbench": Known("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "final_answer", "set"),
    "aime24": Known("HuggingFaceH4/aime_2024", split="train"),
    "aime25": Known("math-ai/aime25"),
    "amc23": Known("math-ai/amc23"),
}
"""The known benchmarks: 1,319, 500, 272, 674, 30, 30 and 40 questions. `app.rewards.Math` scores all of them."""


class Benchmark(PromptFile):
    """A benchmark of mathematics by its name.

    Unless one of `system_prompt`, `template` and `chat_template_kwargs` is given, `dots test` asks as the prompts of
    `data.train` were asked, if these are a single source with a prompt of its own.

    Args:
        benchmark: gsm8k, math500, minerva_math, olympiadbench, aime24, aime25 or amc23.
        path: a file or folder with the benchmark's own columns, where the hub is not to be asked.
        split: split of the hub data set or folder; null for the one that is the benchmark.
        system_prompt: goes before every prompt; null asks for reasoning and an answer in a box, or for nothing where
            there is a template.
        template: plain template such as `Question: {question}\\nAnswer:`; by default the tokenizer's chat template, or
            the plain text if it has none.
        chat_template_kwargs: arguments of the chat template, e.g. `{enable_thinking: false}`.
        max_prompt_length: prompts of more tokens are dropped and counted.
        limit: number of questions to read, from the start.
    """

    def __init__(
        self,
        benchmark: str,
        path: str | None = None,
        split: str | None = None,
        system_prompt: str | None = None,
        template: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        known = BENCHMARKS.get(benchmark)
        if known is None:
            raise UserError(f"There is no benchmark {benchmark!r}: {nearest(benchmark, BENCHMARKS)}")
        self._asks_by_default = system_prompt is None and not template and not chat_template_kwargs
        super().__init__(
            known.path if path is None else path,
            known.split if split is None else split,
            known.name if path is None else None,
            answer_column=known.answer,
            answer_format=known.answer_format,
            system_prompt=system_prompt if system_prompt is not None else "" if template else INSTRUCTION,
            template=template,
            chat_template_kwargs=chat_template_kwargs,
            max_prompt_length=max_prompt_length,
            limit=limit,
        )

    def ask_as(self, trained: PromptSource) -> None:
        """Ask as the prompts of a source are asked, unless this one or that one is asked in the default way."""
        asked = trained.system_prompt, trained.template, trained.chat_template_kwargs
        if self._asks_by_default and any(asked):
            self.system_prompt, self.template, self.chat_template_kwargs = asked
