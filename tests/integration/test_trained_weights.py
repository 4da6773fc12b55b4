"""Trained weights move as they would in float32, stay finite, and leave the run as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.cli import DotsTrainer
from app.module import GRPOModule
from app.policy.model import Policy
from app.policy.weights import checkpoint_weights
from app.rewards import Numeric
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from tests.support.refusal import TINY, Place, data, model, source, write_pool

FIT = ("fit", "--config", "run.yaml")
SUM = "State the final answer to the following arithmetic problem: {} + {} ="


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def stored_as(place: Place, dtype: torch.dtype) -> Path:
    """Return a copy of the tiny policy in the given dtype."""
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).save_pretrained(folder)
    return folder


def sums(place: Place, **options: Any) -> None:
    """Write a run on sums of which the policy knows some, 4 prompts x 4 completions a step."""
    rows = [{"question": SUM.format(a, b), "answer": str(a + b)} for a in range(3, 13) for b in range(4, 10)]
    write_pool(place.path / "pool.jsonl", rows)

    def change(config: dict[str, Any]) -> None:
        config["trainer"] |= {"callbacks": [], "max_steps": 10}
        data(config).update(prompts_per_step=4)
        source(config).update(template="{question}\n")
        model(config).update(
            sampling={"num_generations": 4, "max_completion_length": 24},
            rewards=[{"class_path": "app.rewards.Numeric", "init_args": {"after": "#### "}}],
            optimization={"learning_rate": 1e-6, "weight_decay": 0.0},
        )
        model(config).update(options)

    place.config(change)


def last(place: Place) -> dict[str, torch.Tensor]:
    return checkpoint_weights(place.path / "runs/small/version_0/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("dtype", "precision", "rounding"),
    [(torch.bfloat16, "32-true", 2**-8), (torch.float16, "32-true", 2**-11), (torch.bfloat16, "bf16-mixed", 2**-8)],
    ids=["bfloat16", "float16", "mixed"],
)
def test_small_updates_are_not_lost_to_the_dtype_of_the_file(
    place: Place, dtype: torch.dtype, precision: str, rounding: float
) -> None:
    folder = stored_as(place, dtype)
    before = {name: one.float() for name, one in load_file(folder / "model.safetensors").items()}
    sums(place, policy={"path": str(folder)})
    code, said = place.run(*FIT, f"--trainer.precision={precision}")
    assert code == 0, said[-2000:]
    trained = {name: one for name, one in last(place).items() if name in before}
    assert {one.dtype for one in trained.values()} == {torch.float32}
    changes = torch.cat([(trained[name] - one).flatten() for name, one in before.items()])
    # A step of AdamW moves a weight by about its rate, so that ten move 888,192 weights by 1e-6 to 1e-5 each; from a
    # float32 file it is 99.8% of them, and 3.8e-3 in all.
    assert (changes != 0).float().mean() > 0.99
    assert changes.norm() == pytest.approx(3.8e-3, rel=0.15)
    for out, arguments, expected, error in (
        ("same", (), dtype, rounding),
        ("unrounded", ("--dtype=float32",), torch.float32, 0.0),
    ):
        code, said = place.run("export", "--config=run.yaml", "--ckpt_path=last", f"--out={out}", *arguments)
        assert code == 0, said[-2000:]
        written = load_file(place.path / out / "model.safetensors")
        assert {one.dtype for one in written.values()} == {expected}
        config = json.loads((place.path / out / "config.json").read_text())
        assert config["dtype"] == str(expected).removeprefix("torch.")
        assert all(torch.allclose(one.float(), trained[name], rtol=error, atol=1e-7) for name, one in written.items())


HALF = {
    "dtype": ("--model.policy.dtype=bfloat16",),
    "float16": ("--model.policy.dtype=float16",),
    "bf16-true": ("--trainer.precision=bf16-true",),
    "16-true": ("--trainer.precision=16-true",),
    "true with adapters": ("--trainer.precision=bf16-true", "--model.policy.lora.rank=2"),
}


@pytest.mark.parametrize("name", HALF)
def test_trained_weights_of_16_bits_are_refused(place: Place, name: str) -> None:
    line = place.refused(*FIT, *HALF[name])
    assert "bf16-mixed" in line
    assert line.startswith(("policy.dtype is ", "trainer.precision is "))


def test_scaled_gradients_are_refused(tmp_path: Path) -> None:
    # The command takes bf16-mixed for 16-mixed on a CPU.
    trainer = DotsTrainer(plugins=[MixedPrecision("16-mixed", "cpu")], accelerator="cpu", max_steps=1, logger=False)
    module = GRPOModule(Policy(str(TINY)), [Numeric()])
    prompts = OnlinePromptDataModule(PromptFile(str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match="16-mixed, expected one of 32-true, bf16-mixed"):
        trainer.fit(module, datamodule=prompts)


def test_adapters_are_float32_over_weights_in_the_dtype_of_the_file(place: Place) -> None:
    folder = stored_as(place, torch.bfloat16)
    before = load_file(folder / "model.safetensors")
    sums(place, policy={"path": str(folder), "lora": {"rank": 2}}, optimization={"learning_rate": 1e-3})
    code, said = place.run(*FIT, "--trainer.max_steps=2")
    assert code == 0, said[-2000:]
    found = last(place)
    adapters = {name: one for name, one in found.items() if "lora_" in name}
    assert {one.dtype for one in adapters.values()} == {torch.float32}
    frozen = {name.removeprefix("base_model.model.").replace(".base_layer", ""): one for name, one in found.items()}
    # Bitwise: rollouts and pushes leave no rounding error in the frozen weights.
    assert all(torch.equal(frozen[name], one) for name, one in before.items())
    assert all(one.abs().max() > 0 for name, one in adapters.items() if "lora_B" in name)
