"""A subset file restores the prompts that were written: ids, texts, tokens, columns, and what the rewards receive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from app.rewards import ReasoningGym
from datamodules.errors import UserError
from datamodules.jsonl import dumps, loads
from datamodules.pool import PromptPool
from datamodules.procedural import Procedural, ProceduralTask
from datamodules.prompts.file import PromptFile, PromptSource
from datamodules.prompts.splits import sub_pool
from datamodules.prompts.subset import check_subset, subset_options, write_subset
from tests.support.builders import prompt as made_up

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "configs" / "tiny_policy")


def written_and_read(source: PromptSource, keep: list[int], path: Path, tokenizer) -> tuple[PromptPool, PromptPool]:
    """Return some prompts of a source, and the same prompts read back from a file."""
    whole = sub_pool(source.load(tokenizer, 3), np.array(keep))
    write_subset(list(whole), path)
    options = subset_options(path, source)
    check_subset(options, list(whole), tokenizer)
    again = PromptFile(**options).load(tokenizer, 9)
    for one, other in zip(whole, again, strict=True):
        assert (one.id, one.question, one.prompt) == (other.id, other.question, other.prompt)
        assert one.token_ids == other.token_ids
    return whole, again


def columns_of(pool: PromptPool) -> list[dict]:
    return [{name: value for name, value in prompt.columns.items() if value is not None} for prompt in pool]


def test_json_keeps_tuples_and_keys():
    value = {"a": ((1, 2), [3, (4,)]), "b": {(0, 1): "x", 2: None}, "c": {"plain": [1.5, True]}}
    assert loads(dumps(value)) == value
    assert loads(dumps({"n": np.int64(3), "m": np.array([1, 2])})) == {"n": 3, "m": [1, 2]}
    assert loads('{"usual": [1, {"k": null}]}') == {"usual": [1, {"k": None}]}
    with pytest.raises(TypeError, match="bytes"):
        dumps({"raw": b"x"})


def test_a_procedural_pool_keeps_what_its_scorers_read(tmp_path, tokenizer):
    """arc_agi compares tuples; rush_hour has no reference answer; two entries of one task have different settings."""
    tasks = [
        ProceduralTask("arc_agi", 3),
        ProceduralTask("rush_hour", 2),
        ProceduralTask("chain_sum", 4, {"max_terms": 3}),
        ProceduralTask("chain_sum", 4),
        ProceduralTask("leg_counting", 3),
    ]
    source = Procedural(tasks, template="Q: {question}\nA:", system_prompt="Think.")
    whole, again = written_and_read(source, [8, 0, 4, 2, 12, 3, 15, 6], tmp_path / "subset.jsonl", tokenizer)
    reward = ReasoningGym()
    reward.load()
    for one, other in zip(whole, again, strict=True):
        assert loads(other.columns["metadata"]) == one.columns["metadata"]
        assert other.columns["answer"] == one.columns["answer"]
        answer = one.columns["answer"] or "no"
        scores = [
            reward([each.prompt], [answer], [[1]], **{name: [value] for name, value in each.columns.items()})
            for each in (one, other)
        ]
        assert scores[0] == scores[1] == [float(one.columns["answer"] is not None)]


def test_gsm8k_keeps_its_answers_and_repeated_ids_theirs(tmp_path, tokenizer):
    rows = [
        {
            "question": f"What is {n} + {n}?",
            "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}",
            "extra_info": {"index": n % 3},
        }
        for n in range(9)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptFile(str(data), template="{question}\n")
    whole, again = written_and_read(source, [7, 4, 1, 8], tmp_path / "subset.jsonl", tokenizer)
    assert len({name.split("-")[0] for name in whole.ids}) < 4, "some ids carry a hash"
    assert columns_of(again) == columns_of(whole)
    assert again[0].columns["answer"] == "14"
    assert again[0].columns["rationale"] == rows[7]["answer"]
    # With no option but the template, the file is read the same.
    alone = PromptFile(str(tmp_path / "subset.jsonl"), template="{question}\n").load(tokenizer, 0)
    assert (alone.ids, columns_of(alone)) == (whole.ids, columns_of(whole))


def test_conversations_and_renamed_columns(tmp_path, tokenizer):
    rows = [
        {
            "id": 10 + n,
            "task": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"},
                     {"role": "user", "content": f"{n} * 3"}],
            "final": str(3 * n),
            "day": "2020-01-0" + str(n),
        }
        for n in range(1, 7)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptFile(str(data), prompt_column="task", answer_column="final", system_prompt="Be brief.")
    whole, again = written_and_read(source, [5, 0, 3], tmp_path / "subset.jsonl", tokenizer)
    assert whole.ids == ["16", "11", "14"]
    assert whole[0].prompt[0] == {"role": "system", "content": "Be brief."}
    assert columns_of(again) == columns_of(whole)
    assert again[0].columns["ground_truth"] == "18"


def test_a_source_that_renders_differently_is_rejected(tmp_path, tokenizer):
    """PromptFile would render other text from these questions."""
    prompts = [made_up(index) for index in range(3)]
    path = tmp_path / "subset.jsonl"
    write_subset(prompts, path)
    with pytest.raises(UserError, match="'p0' has another prompt when read back"):
        check_subset(subset_options(path, None), prompts, tokenizer)


def test_a_column_that_json_cannot_hold_is_named(tmp_path):
    odd = made_up(0)
    odd.columns["image"] = b"\x89PNG"  # type: ignore[index]
    with pytest.raises(UserError, match="Column 'image' cannot be written as JSON"):
        write_subset([odd], tmp_path / "subset.jsonl")
