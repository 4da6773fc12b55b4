"""Trained weights move as they would in float32, stay finite, and leave the run as they are."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.cli import DotsTrainer
from app.module import GRPOModule
from app.policy.adapters import Lora
from app.policy.model import Policy
from app.policy.weights import checkpoint_weights, plain_weights
from app.rewards import Numeric
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from tests.support.command import logged
from tests.support.refusal import TINY, Place, data, files, model, source, write_pool
from tests.support.tables import few

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
    few(
        [(torch.bfloat16, "32-true", 2**-8), (torch.float16, "32-true", 2**-11), (torch.bfloat16, "bf16-mixed", 2**-8)],
        1,
    ),
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


@pytest.mark.parametrize("name", few(HALF, 1))
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


@pytest.mark.long
def test_adapters_alone_are_the_policy_over_its_own_weights(place: Place) -> None:
    """In peft, adapters that were exported alone give the logits of the policy that was exported whole."""
    sums(place, policy={"path": str(TINY), "lora": {"rank": 2}}, optimization={"learning_rate": 1e-2})
    code, said = place.run(*FIT, "--trainer.max_steps=2")
    assert code == 0, said[-2000:]
    run = str(next(place.path.rglob("config.yaml")).parent)
    for given in (["--out", "adapters", "--adapter"], ["--out", "whole"]):
        code, said = place.run("export", run, *given)
        assert code == 0, said
    assert (place.path / "adapters" / "adapter_model.safetensors").stat().st_size < 200_000
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        before = base(tokens).logits.clone()
        found = PeftModel.from_pretrained(base, place.path / "adapters").eval()(tokens).logits
        expected = AutoModelForCausalLM.from_pretrained(place.path / "whole", dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-2


TIED = {
    "embedding": "[q_proj, embed_tokens]",
    "head": "[lm_head]",
    "both": "[embed_tokens, lm_head, v_proj]",
    "head by path": "[model.layers.0.self_attn.q_proj, lm_head]",
}


@pytest.mark.parametrize("name", few(TIED, 1))
@pytest.mark.parametrize("command", ["fit", "describe"])
def test_an_adapter_of_a_shared_tensor_is_refused(place: Place, name: str, command: str) -> None:
    line = place.refused(command, "--config=run.yaml", f"--model.policy.lora.target_modules={TIED[name]}")
    assert "are one tensor" in line
    assert "model.embed_tokens.weight" in line
    assert "lm_head.weight" in line


@pytest.mark.long
def test_adapters_of_an_embedding_and_a_head_of_their_own_are_exported(place: Place) -> None:
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    lm = AutoModelForCausalLM.from_pretrained(TINY)
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    lm.config.tie_word_embeddings = False
    lm.save_pretrained(folder)
    lora = {"rank": 2, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    sums(
        place, policy={"path": str(folder), "lora": lora}, optimization={"learning_rate": 2e-3},
        surrogate={"beta": 0.1},
    )  # fmt: skip
    code, said = place.run(*FIT, "--trainer.max_steps=2")
    assert code == 0, said[-2000:]
    # The reference is the policy without its adapters, that of the head too.
    assert 1e-5 < logged(place.path / "runs/small/version_0")["kl"][1] < 1
    policy = Policy(str(folder), lora=Lora(**lora)).load().eval()  # type: ignore[arg-type]
    policy.load_state_dict(last(place))
    assert place.run("export", "--config=run.yaml", "--ckpt_path=last", "--out=out")[0] == 0
    exported = AutoModelForCausalLM.from_pretrained(place.path / "out")
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(exported(ids).logits, policy(input_ids=ids).logits, atol=1e-5)
    pushed = dict(plain_weights(policy))
    assert all(torch.allclose(one, pushed[name], atol=1e-6) for name, one in exported.state_dict().items())


# --- Weights that are not finite -------------------------------------------------------------------------------------

OPTIONS = {
    "learning rate inf": "--model.optimization.learning_rate=.inf",
    "learning rate 1e38": "--model.optimization.learning_rate=1.0e+38",
    "learning rate nan": "--model.optimization.learning_rate=.nan",
    "betas": "--model.optimization.betas=[1, 1]",
    "negative decay": "--model.optimization.weight_decay=-0.1",
    "decay 1e38": "--model.optimization.weight_decay=1.0e+38",
    "decay nan": "--model.optimization.weight_decay=.nan",
    "clip nan": "--model.optimization.clip_norm=.nan",
    "beta of the KL": "--model.surrogate.beta=.nan",
    "beta inf": "--model.surrogate.beta=.inf",
    "entropy": "--model.surrogate.entropy_coef=.nan",
    "clip range": "--model.surrogate.epsilon_high=.nan",
    "dual clip": "--model.surrogate.dual_clip=.inf",
    "cap": "--model.surrogate.importance_cap=.nan",
    "temperature 1e-30": "--model.sampling.temperature=1.0e-30",
    "temperature": "--model.sampling.temperature=.inf",
    "dropout": "--model.policy.lora.dropout=1",
    "dropout nan": "--model.policy.lora.dropout=.nan",
    "alpha": "--model.policy.lora.alpha=.inf",
    "rank": "--model.policy.lora.rank=0",
}


@pytest.mark.parametrize("name", few(OPTIONS, 2))
def test_numbers_that_cannot_train_are_refused(place: Place, name: str) -> None:
    option, _, given = OPTIONS[name].removeprefix("--model.").partition("=")
    shown = given.removeprefix(".").replace("[1, 1]", "(1.0, 1.0)").replace("1.0e", "1e")
    line = place.refused(*FIT, OPTIONS[name])
    assert option.rpartition(".")[0] in line
    assert option.rpartition(".")[2] in line
    assert shown in line


def test_weights_that_are_not_finite_are_never_saved(place: Place) -> None:
    # The warm-up's first rate is 0, so that the first step is saved; the second one makes weights infinite.
    optimization = {"learning_rate": 1e30, "weight_decay": 0.0, "schedule": "constant_with_warmup", "warmup_steps": 1}
    sums(place, policy={"path": str(TINY)}, optimization=optimization)
    line = place.refused(*FIT, "--trainer.max_steps=4", "--checkpoint.every=1", touches=True)
    assert "the update made the norm of the weights NaN or infinite" in line
    assert all(one.isfinite().all() for one in last(place).values())
    # As the line advises: the new rate, not the checkpoint's, is that of the resumed run.
    rate = "--model.optimization.learning_rate=1e-6"
    code, said = place.run(*FIT, "--trainer.max_steps=2", "--ckpt_path=last", rate)
    assert code == 0, said[-2000:]
    assert logged(place.path / "runs/small/version_0")["learning_rate"][1] == pytest.approx(1e-6)


# --- Exports ---------------------------------------------------------------------------------------------------------

GENERATION = (
    {"temperature": 0.6},
    {"top_p": 0.9, "top_k": 20},
    {"early_stopping": True, "length_penalty": 2.0},
    {"typical_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 3e-4, "repetition_penalty": 1.1, "eos_token_id": [0, 1]},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "bos_token_id": 1},
)


@pytest.mark.long
def test_an_export_keeps_the_policys_own_generation_settings_and_is_whole_or_absent(place: Place) -> None:
    folder = place.path / "policy"
    shutil.copytree(TINY, folder)
    place.config(lambda config: model(config)["policy"].update(path=str(folder)))
    assert place.run(*FIT)[0] == 0
    export = ("export", "--config=run.yaml", "--ckpt_path=last")
    for number, settings in enumerate(GENERATION):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        code, said = place.run(*export, f"--out=deep/{number}")
        assert code == 0, said[-2000:]
        written = json.loads((place.path / f"deep/{number}/generation_config.json").read_text())
        assert settings.items() <= written.items()
        AutoModelForCausalLM.from_pretrained(place.path / f"deep/{number}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the weights take 3.5 MB
    try:
        line = place.refused(*export, "--out=new/place/export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "new/place/export cannot be written (" in line
    assert place.run(*export, "--out=new/place/export")[0] == 0
    before = files(place.path)
    assert "is not an empty folder" in place.refused(*export, "--out=new/place/export")
    assert files(place.path) == before
