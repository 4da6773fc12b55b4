"""`model.compile` changes the speed of an update and nothing else: on the embedded policy, through the real command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app.cli.dots import main
from app.engines import Sampling, Transformers
from app.module import GRPOModule
from app.objective.packing import ScoredSequence
from app.policy.adapters import Lora
from app.policy.compilation import compile_layers
from app.policy.model import Policy
from app.policy.scoring import completion_logprobs
from app.reporting.curves import read_scalars
from datamodules.errors import UserError
from datamodules.types import Prompt
from tests.support.policies import flat_gradient, module_on

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny_policy"
FEW = [
    "--config=configs/quickstart.yaml",
    "--trainer.max_steps=6",
    "--model.mini_batches=2",
    "--trainer.val_check_interval=6",
    "--data.val_size=8",
    "--data.prompts_per_step=8",
    "--model.sampling.max_completion_length=48",
    "--model.val_sampling.max_completion_length=48",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def fit(folder: Path, *more: str) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Return the scalars of three batches of two updates each, and the checkpoint's weights."""
    main(["fit", *FEW, f"--trainer.logger.save_dir={folder}", *more])
    run = folder / "quickstart" / "version_0"
    found = {
        tag: list(values)
        for tag, (_, values) in read_scalars(run).items()
        if not tag.startswith(("time/", "step_time", "tokens_per_second"))
    }
    return found, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.long
def test_a_run_measures_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["dots"])
    expected, weights = fit(tmp_path / "plain")
    with pytest.raises(RuntimeError, match="recompile"), torch.compiler.set_stance("fail_on_recompile"):
        fit(tmp_path / "refused", "--model.compile=true")
    found, compiled = fit(tmp_path / "compiled", "--model.compile=true")
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-5, abs=1e-5, nan_ok=True), tag
    assert list(compiled) == list(weights)
    initial = load_file(TINY / "model.safetensors")
    moved = torch.cat([(weights[f"policy_model.{name}"] - one).flatten() for name, one in initial.items()])
    apart = torch.cat([(compiled[name] - one).flatten() for name, one in weights.items() if "lm_head" not in name])
    assert apart.norm() <= 1e-3 * moved.norm() > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("held", "share_prompts"),
    [
        ({"lora": Lora(rank=2)}, True),
        ({"gradient_checkpointing": True}, False),
        ({"gradient_checkpointing": True}, True),
    ],
    ids=["shared prompts, LoRA", "padded, gradient checkpointing", "shared prompts, gradient checkpointing"],
)
def test_gradients_are_the_same(held: dict[str, Any], share_prompts: bool) -> None:
    policy = Policy(str(TINY), **held)
    torch.manual_seed(0)
    model = policy.load()
    names = list(model.state_dict())
    rng = np.random.default_rng(0)
    batches = [sequences(rng, prompts) for prompts in (3, 5, 1)]

    def gradients() -> list[torch.Tensor]:
        module = module_on(model, share_prompts=share_prompts)
        return [gradient_of(module, batch) for batch in batches]

    expected = gradients()
    compile_layers(model)
    found = gradients()
    assert list(model.state_dict()) == names
    for one, other in zip(expected, found, strict=True):
        assert one.norm() > 1e-3
        assert 0 < (one - other).norm() <= 1e-5 * one.norm()  # not 0: something else was computed


def sequences(rng: np.random.Generator, prompts: int) -> list[ScoredSequence]:
    """Four completions of 1 to 29 tokens for each prompt."""
    made = []
    for length in rng.integers(3, 20, prompts):
        prompt = rng.integers(3, 200, length)
        for tokens in rng.integers(1, 30, 4):
            ids = rng.integers(3, 200, tokens)
            made.append(ScoredSequence(prompt, ids, np.full(tokens, -5.0), float(rng.normal()), 1 / tokens))
    return made


def gradient_of(module: GRPOModule, batch: list[ScoredSequence]) -> torch.Tensor:
    module.policy_model.zero_grad(set_to_none=True)
    for packed in module.learner.microbatches.of(batch):
        logprobs, entropy = completion_logprobs(module.policy_model, packed, 1.0, with_entropy=True)
        assert entropy is not None
        (logprobs * packed.advantages * packed.weights + 0.01 * entropy).sum().backward()
    return flat_gradient(module.policy_model)


def test_the_engine_keeps_the_plain_layers() -> None:
    policy = Policy(str(TINY))
    plain, compiled = policy.load(), policy.load()
    compile_layers(compiled)
    tokens = tuple(policy.load_tokenizer()("2 + 3 =\n").input_ids)
    prompts = [Prompt("a", 0, "", "", tokens, {}), Prompt("b", 1, "", "", tokens[1:], {})]
    made = []
    with torch.compiler.set_stance("fail_on_recompile"):
        for model in (plain, compiled):
            engine = Transformers()
            engine.setup(model, policy.load_tokenizer())
            seeds = np.arange(8, dtype=np.int64).reshape(2, 4)
            made.append(engine.generate(prompts, Sampling(4, 24), seeds))
        # The same layers where a gradient is asked for: these would be compiled.
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(torch.tensor([tokens]))
    for one, other in zip(*(sum(groups, ()) for groups in made), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()


def test_without_a_compiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"model.compile needs a C\+\+ compiler, but 'no-such-compiler' was not found"):
        compile_layers(Policy(str(TINY)).load())
