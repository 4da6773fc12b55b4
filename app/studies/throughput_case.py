"""What `dots throughput` has both trainers do: one policy, the same prompts, completions of a fixed length."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.procedural import Procedural, ProceduralTask

CASES = {"all_informative": 1.0, "half_informative": 0.5}
"""Share of the prompts whose completions get different rewards."""

_TASKS: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("spell_backward", 0.4, {}),
    ("chain_sum", 0.4, {"min_terms": 4, "max_terms": 11}),
    ("leg_counting", 0.2, {}),
)


@dataclass(frozen=True, slots=True)
class Work:
    """One step's work, and how often it is done.

    Attributes:
        policy: folder of the policy.
        prompts: of a step, all of them in every step.
        num_generations: completions of each.
        completion_length: tokens of every completion.
        warmup: steps that are not counted.
        pairs: steps of each trainer that are.
        microbatch_tokens: of Dots.
        microbatches: gradient accumulation steps of TRL.
        learning_rate: of both.
    """

    policy: Path
    prompts: int
    num_generations: int
    completion_length: int
    warmup: int
    pairs: int
    microbatch_tokens: int
    microbatches: int
    learning_rate: float = 1e-5

    @property
    def steps(self) -> int:
        return self.warmup + self.pairs


def write_policy(source: str, folder: Path) -> None:
    """A copy of the policy that ends a completion by its padding token, which it never writes.

    So completions have the same length in both trainers, without a rule that one of them would have to apply at every
    token.

    Raises:
        UserError: the policy has no padding token apart from its end token.
    """
    from app.policy.model import Policy

    policy = Policy(source)
    tokenizer: Any = policy.load_tokenizer()
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"--policy {source}: expected a padding token other than its end token; choose another policy")
    model: Any = policy.load()
    tokenizer.eos_token = tokenizer.pad_token
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(work: Work, informative: float, path: Path) -> None:
    """JSONL of `work.prompts` problems with a column that says whether the prompt's rewards differ."""
    from app.policy.model import Policy

    tasks = [ProceduralTask(name, max(1, round(share * work.prompts)) + 2, params) for name, share, params in _TASKS]
    pool = Procedural(tasks, template="{question}\n").load(Policy(str(work.policy)).load_tokenizer(), seed=0)
    chosen = [pool[index * len(pool) // work.prompts] for index in range(work.prompts)]
    teaching = round(informative * work.prompts)
    with path.open("w") as file:
        for index, prompt in enumerate(chosen):
            # Dealt out evenly, so that prompts of all lengths are among both kinds.
            differs = (index + 1) * teaching // work.prompts > index * teaching // work.prompts
            file.write(json.dumps({"id": prompt.id, "prompt": prompt.prompt, "informative": differs}) + "\n")


def scripted(completions: Sequence[str], informative: Sequence[bool], **_: object) -> list[float | None]:
    """The reward of both trainers: a hash of the completion where the prompt is to be informative, else 0.5."""
    return [
        zlib.crc32(text.encode()) % 997 / 997 if differs else 0.5
        for text, differs in zip(completions, informative, strict=True)
    ]
