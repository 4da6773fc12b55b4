"""Where a policy with Liger's kernels is refused; what they compute is tested in `tests/gpu/test_device_liger.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app.policy.liger import add_liger, refuse_liger
from app.policy.model import Policy
from datamodules.errors import UserError
from tests.support.policies import TINY
from tests.support.refusal import Place, model

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def refused(family: str, **options: object) -> str:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **options))
    with pytest.raises(UserError) as error:
        add_liger(lm)
    return str(error.value)


def test_a_family_that_was_not_compared_is_refused() -> None:
    said = refused("gpt_neox")
    assert said.startswith(
        "policy.kernels is liger, but the policy's family is gpt_neox, expected one of gemma, gemma2"
    )
    assert said.endswith("Leave policy.kernels out")


def test_an_activation_that_liger_would_replace_is_refused() -> None:
    assert "activation is GELUActivation, expected silu, which Liger computes for llama" in refused(
        "llama", hidden_act="gelu"
    )
    said = refused("gemma2", hidden_activation="gelu")
    assert "activation is GELUActivation, expected gelu_pytorch_tanh" in said


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    policy = Policy(str(TINY), kernels="liger")
    for load in (policy.load, policy.on_meta):
        with pytest.raises(UserError, match=r"cannot be imported .* Run: pip install liger-kernel$"):
            load()


def test_float64_is_refused() -> None:
    with pytest.raises(UserError, match=r"policy.dtype is float64. Leave one of them out"):
        Policy(str(TINY), dtype="float64", kernels="liger")
    with pytest.raises(UserError, match=r"trainer.precision is 64-true"):
        refuse_liger("cuda", "64-true", compiles=False)


def test_a_compiled_policy_is_refused() -> None:
    refuse_liger("cuda", "bf16-mixed", compiles=False)
    with pytest.raises(UserError, match=r"model.compile is true"):
        refuse_liger("cuda", "bf16-mixed", compiles=True)


def test_a_run_on_the_cpu_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    place = Place.at(tmp_path, monkeypatch, capsys)
    place.config(lambda config: model(config)["policy"].update(kernels="liger"))
    said = place.refused("fit", "--config=run.yaml")
    assert said.startswith("model.policy.kernels is liger, but the run is on the CPU, and its kernels need a GPU.")
