"""The calculator of `configs/calculator.yaml`: its class, the demonstrations for it, and what the run of it learns."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reasoning_gym
import torch
import yaml
from safetensors import safe_open
from transformers.utils import get_json_schema

from datamodules.demonstrations import ANSWER_MARKER
from datamodules.demonstrations.calls import CALCULATIONS, Calls, converse
from datamodules.demonstrations.supervised import IGNORED, Demonstrations
from datamodules.errors import UserError
from datamodules.procedural import ProceduralTask
from examples.calculator import Calculator
from tests.support.command import ROOT, dots, logged

PARAMS = {
    "chain_sum": {"min_terms": 2, "max_terms": 7, "min_digits": 2, "max_digits": 2},
    "leg_counting": {"min_animals": 1, "max_animals": 4, "max_instances": 40},
    "products": {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2},
}


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "configs" / name).read_text())


def entries(task: str, size: int = 100) -> list[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(task, size=size, seed=5, **PARAMS[task])
    return [dataset[index] for index in range(size)]


def test_one_operation_is_done_exactly() -> None:
    calculator, rng = Calculator(), np.random.default_rng(0)
    calculator.reset(prompt="?", answer="1")
    for left, right in rng.integers(-9999, 9999, (50, 2)).tolist():
        assert calculator.calc(f"{left}+{right}") == str(left + right)
        assert calculator.calc(f" {left} - {right} ") == str(left - right)
        assert calculator.calc(f"{left}*{right}") == str(left * right)


@pytest.mark.parametrize(
    "expression",
    ["", "7", "1+2+3", "(1+2)*3", "2**9", "6/2", "1.5*2", "True+1", "x*2", "abs(1)+2", "1+", "--1+2", "9" * 39 + "*9"],
)
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        Calculator().calc(expression)


def test_the_tool_is_described_as_chat_templates_take_it() -> None:
    described = get_json_schema(Calculator().calc)["function"]
    assert described["name"] == "calc"
    assert described["parameters"]["required"] == ["expression"]


@pytest.mark.parametrize("task", CALCULATIONS)
def test_without_noise_every_conversation_is_right_and_the_calculator_says_what_it_shows(task: str) -> None:
    calls, calculator = Calls(), Calculator()
    score = reasoning_gym.get_score_answer_fn(task)
    for entry in entries(task):
        found = converse(task, entry["metadata"], 0.0, calls, np.random.default_rng(0))
        assert found.slips == 0
        assert score(found.turns[-1].removeprefix(ANSWER_MARKER), entry) == 1.0
        for said, reply in zip(found.turns[:-1:2], found.turns[1::2], strict=True):
            body = said.removeprefix(calls.start).removesuffix(calls.end)
            assert reply == calls.answer(said) == f"={calculator.calc(body)}\n"


@pytest.mark.parametrize("unaided", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", CALCULATIONS)
def test_steps_are_wrong_as_often_and_in_the_ways_that_are_told(task: str, unaided: float) -> None:
    """Each step is judged by the results before it: without a call the result is wrong, with one an operand is."""
    rng, noise, steps, slips, alone = np.random.default_rng(1), 0.3, 0, 0, 0
    for entry in entries(task, 400):
        found = converse(task, entry["metadata"], noise, Calls(unaided=unaided), rng)
        written = re.findall(r"(<calc>)?(-?\d+[-+*]-?\d+)(?:</calc>)?=(-?\d+)\n", "".join(found.turns))
        calculation, wrong = CALCULATIONS[task](entry["metadata"]), 0
        left, sign, right = next(calculation)
        for position, (called, operation, result) in enumerate(written):
            if called:
                wrong += operation != f"{left}{sign}{right}"
            else:
                assert operation == f"{left}{sign}{right}" and Calculator().calc(operation) != result
                alone += 1
                wrong += 1
            if position < len(written) - 1:
                left, sign, right = calculation.send(int(result))
        assert wrong == found.slips and found.answer == written[-1][2]
        steps, slips = steps + len(written), slips + wrong
    assert abs(slips / steps - noise) < 4 * np.sqrt(noise * (1 - noise) / steps)
    assert abs(alone / slips - unaided) <= 4 * np.sqrt(unaided * (1 - unaided) / slips)


def test_a_conversation_worked_by_hand() -> None:
    animals = {"cat": 3, "spider": 2}
    found = converse("leg_counting", {"animals": animals}, 0.0, Calls(), np.random.default_rng(0))
    assert found.turns == (
        "<calc>3*4</calc>", "=12\n", "<calc>2*8</calc>", "=16\n", "<calc>12+16</calc>", "=28\n", "#### 28",
    )  # fmt: skip


def test_only_what_the_policy_says_is_learnt() -> None:
    tasks = [ProceduralTask(name, 10, params) for name, params in PARAMS.items()]
    data = Demonstrations(tasks, dict.fromkeys(PARAMS, 0.3), repeats=2, row_length=320, calls=Calls())
    data.setup("fit")
    conversations = 0
    for batch in data.train_dataloader():
        for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
            for start, stop in pairwise(starts):
                learnt = labels[start:stop] != IGNORED
                if not learnt.any():
                    continue
                conversations += 1
                assert torch.equal(ids[start:stop][learnt], labels[start:stop][learnt])
                said = data.tokenizer.decode(ids[start:stop][learnt])
                whole = data.tokenizer.decode(ids[start:stop])
                answered = re.sub(r"</calc>=-?\d+\n", "</calc>", whole)
                assert answered.count("</calc>") == whole.count("</calc>=")
                assert answered.endswith("\n" + said) and said.endswith("<eos>")
    assert conversations == 60


def test_a_task_without_calls_is_refused() -> None:
    with pytest.raises(UserError, match="spell_backward"):
        Demonstrations([ProceduralTask("spell_backward", 5)], {"spell_backward": 0.0}, calls=Calls())


def test_policy_pool_and_calculator_are_made_for_each_other() -> None:
    run, pretraining = config("calculator.yaml"), config("calculator_policy.yaml")
    made = Demonstrations(
        **pretraining["data"]["init_args"]
        | {
            "tasks": [ProceduralTask(**task) for task in pretraining["data"]["init_args"]["tasks"]],
            "calls": Calls(**pretraining["data"]["init_args"]["calls"]),
        }
    )
    protocol = run["model"]["init_args"]["environment"]["init_args"]["protocol"]
    assert made.calls is not None
    assert (protocol["start"], protocol["end"]) == (made.calls.start, made.calls.end)
    assert protocol["reply"] == made.calls.reply
    assert [len(made.tokenizer(text)["input_ids"]) for text in (protocol["start"], protocol["end"])] == [1, 1]
    assert protocol["tool"] == "calc" and protocol["argument"] == "expression"
    pool = {task["name"] for task in run["data"]["init_args"]["train"]["init_args"]["tasks"]}
    assert pool == {task.name for task in made.tasks}


def test_the_committed_folder_is_small_and_float32() -> None:
    folder = ROOT / "configs" / "calculator_policy"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4 * 1024**2
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118 (no mapping)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_run_learns_to_use_the_calculator(tmp_path: Path) -> None:
    """By at least 0.25 of the validation set's conversations, with the committed settings and seed."""
    done = dots("fit", "--config", "configs/calculator.yaml", f"--trainer.logger.save_dir={tmp_path}", timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    found = logged(tmp_path / "calculator" / "version_0")
    first, *_, last = found["val/accuracy"].values()
    assert last - first >= 0.25
