"""The published settings of `configs/paper`: each prints its table without weights or data, and a twin trains."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.rewards import Math
from datamodules.prompts import PromptFile
from tests.support.command import ROOT
from tests.support.reading_helpers import character_tokenizer, write_jsonl
from tests.support.refusal import Place
from tests.support.tables import few

PAPER = ROOT / "configs" / "paper"
OVERLAYS = {"base", "grpo", "untrained", "authors_code"}
SETTINGS = sorted(
    str(path.relative_to(PAPER).with_suffix("")) for path in PAPER.glob("*/*.yaml") if path.stem not in OVERLAYS
)
UNTRAINED, SMALL = f"--config={PAPER}/dots/untrained.yaml", f"--config={PAPER}/small.yaml"


def configs(setting: str, *overlays: str) -> list[str]:
    folder, _, name = setting.partition("/")
    base = ["base"] if (PAPER / folder / "base.yaml").exists() else []
    return [f"--config={PAPER}/{folder}/{one}.yaml" for one in (*base, name, *overlays)]


@dataclass(frozen=True)
class Size:
    """The shape of a Qwen2 model, and its published count of parameters."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    tied: bool
    parameters: int

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        config = {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "dtype": "bfloat16",
            "hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "intermediate_size": self.inner, "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied, "max_position_embeddings": 131072, "eos_token_id": 151643,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return folder


SMALLEST = Size(1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304)
DISTILLED = Size(1536, 28, 12, 2, 8960, 151936, False, 1_777_088_000)
MIDDLE = Size(2048, 36, 16, 2, 11008, 151936, True, 3_085_938_688)
LARGEST = Size(3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512)


@dataclass(frozen=True)
class Printed:
    """What the papers and scripts say of a setting; docs/published.md has the sources."""

    policy: Size
    prompts: int
    rolled_out: int
    completions: int
    tokens: int
    mini_batches: int
    optimizer_steps: int | None
    """None where the run's length is given in passes over the data."""
    reference: int = 0


DOTS_3072 = {"prompts": 512, "rolled_out": 256, "completions": 8, "tokens": 3072, "mini_batches": 8}
DOTS_4096 = DOTS_3072 | {"tokens": 4096}
MATH = {"prompts": 256, "rolled_out": 256, "completions": 8, "tokens": 8192, "mini_batches": 2}
COUNTDOWN = {"prompts": 256, "rolled_out": 256, "completions": 8, "tokens": 1024, "mini_batches": 4}
GSM8K = {"prompts": 64, "rolled_out": 64, "completions": 8, "tokens": 1024, "mini_batches": 1}
GRESO = {"prompts": 256, "rolled_out": 256, "completions": 8, "tokens": 2560, "mini_batches": 4}
PRINTED = {
    "dots/qwen2.5_math_1.5b_math": Printed(SMALLEST, **DOTS_3072, optimizer_steps=480, reference=2048),
    "dots/qwen2.5_math_1.5b_deepscaler": Printed(SMALLEST, **DOTS_3072, optimizer_steps=480, reference=2048),
    "dots/qwen2.5_math_1.5b_orz": Printed(SMALLEST, **DOTS_3072, optimizer_steps=480, reference=2048),
    "dots/qwen2.5_3b_deepscaler": Printed(MIDDLE, **DOTS_4096, optimizer_steps=480, reference=2048),
    "dots/qwen2.5_3b_deepmath": Printed(MIDDLE, **DOTS_4096, optimizer_steps=480, reference=2048),
    "dots/qwen2.5_math_7b_deepscaler": Printed(LARGEST, **DOTS_3072, optimizer_steps=480, reference=2048),
    "greso/qwen2.5_math_1.5b": Printed(SMALLEST, **GRESO, optimizer_steps=4004),
    "greso/qwen2.5_math_7b": Printed(LARGEST, **GRESO, optimizer_steps=4004),
    "greso/r1_distill_qwen_1.5b": Printed(DISTILLED, 128, 128, 8, 6144, 2, optimizer_steps=2002),
    "mopps/r1_distill_qwen_1.5b_math": Printed(DISTILLED, **MATH, optimizer_steps=None),
    "mopps/r1_distill_qwen_7b_math": Printed(LARGEST, **MATH, optimizer_steps=None),
    "mopps/qwen2.5_3b_countdown": Printed(MIDDLE, **COUNTDOWN, optimizer_steps=480),
    "mopps/qwen2.5_7b_countdown": Printed(LARGEST, **COUNTDOWN, optimizer_steps=480),
    "dps/r1_distill_qwen_1.5b_math": Printed(DISTILLED, **MATH, optimizer_steps=720),
    "dps/r1_distill_qwen_7b_math": Printed(LARGEST, **MATH, optimizer_steps=260),
    "dps/qwen2.5_3b_countdown": Printed(MIDDLE, **COUNTDOWN, optimizer_steps=480),
    "dps/qwen2.5_7b_countdown": Printed(LARGEST, **COUNTDOWN, optimizer_steps=480),
    "learnalign/qwen2.5_1.5b_gsm8k": Printed(SMALLEST, **GSM8K, optimizer_steps=None),
    "learnalign/qwen2.5_3b_gsm8k": Printed(MIDDLE, **GSM8K, optimizer_steps=None),
    "learnalign/qwen2.5_7b_gsm8k": Printed(LARGEST, **GSM8K, optimizer_steps=None),
    "speed_rl/qwen2.5_math_7b_deepscaler": Printed(LARGEST, 16, 16, 24, 3072, 1, optimizer_steps=None),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    monkeypatch.setenv("COLUMNS", "160")
    found = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.chdir(ROOT)
    return found


def described(place: Place, *given: str) -> dict[str, list[str]]:
    """Return the rows of the table that `dots describe` prints: values per process and of the run, by name."""
    code, out, said = place.run_with_output("describe", *given)
    assert code == 0, said[-2000:]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) == 3}


def rows_of(path: str) -> dict[str, Any]:
    """Return a row in the columns of a hub data set."""
    boxed, plain = "It is \\boxed{3}", {"question": "q", "answer": "3"}
    asked, replied = {"from": "human", "value": "q"}, {"from": "assistant", "ground_truth": {"value": "3"}}
    return {
        "math_level3to5_data_processed_with_qwen_prompt.json": {"input": "x", "question": "q", "gt_answer": "3"},
        "agentica-org/DeepScaleR-Preview-Dataset": {"problem": "q", "answer": "3", "solution": "It is 3"},
        "Open-Reasoner-Zero/orz_math_57k_collection": {"0": asked, "1": replied},
        "zwhe99/DeepMath-103K": {"question": "q", "final_answer": "3", "difficulty": 5.0, "r1_solution_1": "3"},
        "haizhongzheng/DAPO-Math-17K-cleaned": {"prompt": "q", "target": "3"},
        "DigitalLearningGmbH/MATH-lighteval": {"problem": "q", "level": "Level 5", "solution": boxed},
        "Jiayi-Pan/Countdown-Tasks-3to4": {"target": 3, "nums": [1, 2, 6]},
        "openai/gsm8k": {"question": "q", "answer": "It is 3.\n#### 3"},
        "HuggingFaceH4/MATH-500": {"problem": "q", "solution": boxed, "answer": "3", "level": 5},
        "math-ai/olympiadbench": {"id": 1, "question": "q", "solution": ["It is 3"], "final_answer": ["3"]},
        "HuggingFaceH4/aime_2024": {"id": 60, "problem": "q", "solution": "It is 3", "answer": "3", "year": "2024"},
        "AI-MO/aimo-validation-amc": {"id": 0, "problem": "q", "answer": 3.0, "url": "x"},
        "math-ai/minervamath": plain,
        "math-ai/amc23": plain,
        "math-ai/aime25": {"problem": "q", "answer": "3"},
    }[path]


def sources(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the options of every source with a path in `data.train` or `data.val`."""
    if isinstance(value, dict):
        if "path" in value:
            yield value
        for inner in value.values():
            yield from sources(inner)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_columns_of_its_data_are_read_and_scored(tmp_path: Path, setting: str) -> None:
    """On a row in the columns that each hub data set has: nothing is downloaded."""
    files = [Path(one.removeprefix("--config=")) for one in configs(setting)]
    merged: dict[str, Any] = {}
    for file in files:
        merge(merged, yaml.safe_load(file.read_text()))
    data = merged["data"]["init_args"]
    found = [*sources(data["train"]), *sources(data["val"])]
    assert found
    for options in found:
        row = rows_of(options["path"])
        write_jsonl(tmp_path / "rows.jsonl", [row])
        given = {name: one for name, one in options.items() if name not in ("path", "name", "split")}
        (prompt,) = PromptFile(str(tmp_path / "rows.jsonl"), **given).load(character_tokenizer(), 0)
        if "countdown" in setting:
            assert "Using the numbers [1, 2, 6], write an equation that equals 3" in str(prompt.prompt)
            texts = [
                "<answer>6 / (1 * 2)</answer>",
                "<answer>1 + 2</answer>",
                "<answer>6 / 2 - 1 * 0</answer>",
                "6 / 2",
            ]
            columns = {name: [value] * 4 for name, value in prompt.columns.items()}
            countdown = runpy.run_path(str(PAPER / "countdown.py"))
            assert countdown["solved"](texts, **columns) == [1.0, 0.0, 0.0, 0.0]
            assert countdown["answered"](texts, **columns) == [1.0, 1.0, 1.0, 0.0]
        else:
            assert prompt.question == "q"
            assert given["system_prompt"] == "Let's think step by step and output the final answer within \\boxed{}."
            columns = {name: [value] * 2 for name, value in prompt.columns.items()}
            assert Math()(["q"] * 2, ["So \\boxed{3}", "So \\boxed{4}"], [[0]] * 2, **columns) == [1.0, 0.0]


def merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


def test_every_setting_is_named_here() -> None:
    assert sorted(PRINTED) == SETTINGS


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_prints_its_table(place: Place, setting: str) -> None:
    printed = PRINTED[setting]
    policy = printed.policy.write(place.path / "policy")
    rows = described(place, *configs(setting), f"--model.policy.path={policy}")
    rolled_out = printed.rolled_out * printed.completions
    assert rows["policy parameters"][1] == f"{printed.policy.parameters:,}"
    assert rows["prompts per step"][1] == str(printed.prompts)
    assert rows["rolled out"][1] == str(printed.rolled_out)
    assert rows["completions per step"][1] == f"{printed.prompts * printed.completions:,}"
    assert rows["generated"][1] == f"{rolled_out:,}"
    assert rows["completion tokens generated, at most"][1] == f"{rolled_out * printed.tokens:,}"
    assert rows["mini-batches per step"][1] == str(printed.mini_batches)
    if printed.optimizer_steps is not None:
        assert rows["steps"][1] == f"{printed.optimizer_steps // printed.mini_batches:,}"
        assert rows[f"optimizer steps (trainer.max_steps {printed.optimizer_steps:,})"]
    if printed.reference:
        assert rows["reference completions, every 2"][1] == f"{printed.reference:,}"
        assert rows["replayed (buffer full)"][1] == "256"


@pytest.mark.parametrize("overlay", few(["grpo", "authors_code"], 1))
def test_an_overlay_of_dots_prints_its_table(place: Place, overlay: str) -> None:
    policy = SMALLEST.write(place.path / "policy")
    rows = described(place, *configs("dots/qwen2.5_math_1.5b_orz", overlay), f"--model.policy.path={policy}")
    assert rows["rolled out"][1] == {"grpo": "512", "authors_code": "256"}[overlay]
    assert ("reference completions, every 2" in rows) == (overlay == "authors_code")


# Under small.yaml settings of one base differ in their rewards and sources only, which it replaces: one of each trains.
TWINS = [
    (setting, overlays)
    for setting in SETTINGS
    for overlays in ([(), ("grpo",), ("authors_code",)] if setting == "dots/qwen2.5_3b_deepmath" else [()])
]


@pytest.mark.parametrize(("setting", "overlays"), TWINS)
def test_its_small_twin_trains(place: Place, setting: str, overlays: tuple[str, ...]) -> None:
    replays = setting.startswith("dots/") and overlays != ("grpo",)
    more = [UNTRAINED] if replays else []
    code, said = place.run(
        "fit", *configs(setting, *overlays), *more, SMALL, f"--trainer.logger.save_dir={place.path}/runs"
    )
    assert code == 0, said[-2000:]
    (summary,) = place.path.glob("runs/*/version_0/summary.json")
    told = json.loads(summary.read_text())
    assert told["completed"] is True
    assert told["steps"] == 3
    assert (told["reference"]["completions"] > 0) == replays
