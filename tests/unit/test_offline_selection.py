"""LearnAlign against the explicit Q x Q matrix of whole gradients, UFO-RL against a plain forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cli.trainer import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule
from app.policy.adapters import Lora
from app.policy.model import Policy
from app.rewards import ReasoningGym
from app.subsets.base import Column, best
from app.subsets.frozen_policy import FrozenPolicy
from app.subsets.gradients import PromptGradients, chosen_parameters
from app.subsets.learnalign import LearnAlign, LearnAlignOptions, alignment_scores, learnability
from app.subsets.measurements import Measurements, claim_folder
from app.subsets.ufo import Ufo, UfoOptions, mean_logprobs
from datamodules.errors import UserError
from datamodules.procedural import Procedural, ProceduralTask
from datamodules.types import Prompt, RolloutGroup

POLICY = str(Path(__file__).parents[2] / "configs" / "tiny_policy")
LAST_LAYER = r"layers\.3\."


def make_policy(lora: Lora | None = None) -> FrozenPolicy:
    module = GRPOModule(
        Policy(POLICY, lora=lora),
        [ReasoningGym(after="#### ")],
        sampling=Sampling(num_generations=8, max_completion_length=48),
        mini_batches=2,
        max_tokens_per_microbatch=700,
    )
    module.configure_model()
    trainer = DotsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return FrozenPolicy(module, trainer)


@pytest.fixture(scope="module")
def policy() -> Iterator[FrozenPolicy]:
    torch.set_num_threads(1)
    made = make_policy()
    yield made
    made.module.teardown("test")


@pytest.fixture(scope="module")
def prompts(policy: FrozenPolicy) -> list[Prompt]:
    settings = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
    source = Procedural([ProceduralTask("chain_sum", 40, settings)], template="{question}\n")
    return list(source.load(policy.module.tokenizer, 0))[:24]


@pytest.fixture(scope="module")
def groups(policy: FrozenPolicy, prompts: list[Prompt]) -> list[RolloutGroup]:
    return policy.roll(prompts)


def plain_gradient(policy: FrozenPolicy, group: RolloutGroup, pattern: str) -> np.ndarray:
    """Autograd through the model's own logits: GRPO's loss of one group, completion by completion, float64 `[P]`."""
    model = policy.module.policy_model
    chosen = [one for name, one in model.named_parameters() if pattern in name]
    rewards = torch.from_numpy(group.rewards)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    tokens = sum(len(one.token_ids) for one in group.completions)
    loss = torch.zeros(())
    for completion, advantage in zip(group.completions, advantages, strict=True):
        ids = torch.tensor([[*group.prompt.token_ids, *completion.token_ids.tolist()]])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(group.prompt.token_ids) - 1 :]
        loss = loss - (torch.exp(taken - taken.detach()) * advantage).sum() / tokens
    gradients = torch.autograd.grad(loss, chosen)
    return torch.cat([one.reshape(-1) for one in gradients]).double().numpy()


def explicit_scores(groups: list[RolloutGroup], gradients: np.ndarray) -> np.ndarray:
    """Through the Q x Q matrix, one pair at a time."""
    rates = [float(np.mean(group.correctness)) for group in groups]
    scores = np.zeros(len(groups))
    for i, (p, phi) in enumerate(zip(rates, gradients, strict=True)):
        for q, psi in zip(rates, gradients, strict=True):
            if np.any(phi) and np.any(psi):
                cosine = phi @ psi / (np.linalg.norm(phi) * np.linalg.norm(psi))
                scores[i] += p * (1 - p) * q * (1 - q) * cosine / len(groups)
    return scores


@pytest.fixture(scope="module")
def exact(policy: FrozenPolicy, groups: list[RolloutGroup]) -> np.ndarray:
    size = sum(one.numel() for name, one in policy.module.policy_model.named_parameters() if "layers.3." in name)
    gradients = [
        plain_gradient(policy, group, "layers.3.") if group.informative else np.zeros(size) for group in groups
    ]
    return explicit_scores(groups, np.stack(gradients))


def scores_of(
    policy: FrozenPolicy, prompts: list[Prompt], **options: object
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    method = LearnAlign(LearnAlignOptions(parameters=LAST_LAYER, **options))  # type: ignore[arg-type]
    method.prepare(policy)
    measured = method.measure(policy, prompts)
    return method.score(measured), measured


def test_a_prompts_gradient_is_that_of_the_written_out_loss(policy: FrozenPolicy, groups: list[RolloutGroup]) -> None:
    """Micro-batches of a few sequences, two mini-batches and left-out completions change nothing."""
    informative = [group for group in groups if group.informative][:3]
    assert informative
    parameters = chosen_parameters(policy.module.policy_model, LAST_LAYER, 1)
    gradients = PromptGradients(policy, parameters)
    for group in informative:
        flat = torch.zeros(gradients.size)
        gradients.add(group, flat)
        expected = plain_gradient(policy, group, "layers.3.")
        np.testing.assert_allclose(flat.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert all(one.requires_grad and one.grad is None for one in policy.module.policy_model.parameters())


def test_scores_equal_the_matrix_of_whole_gradients(
    policy: FrozenPolicy, prompts: list[Prompt], groups: list[RolloutGroup], exact: np.ndarray
) -> None:
    scores, measured = scores_of(policy, prompts, projection="none")
    np.testing.assert_allclose(measured["success_rate"], [group.success_rate for group in groups])
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-5 * np.abs(exact).max())
    certain = [not group.informative for group in groups]
    assert any(certain), "the pool holds prompts without variance"
    assert set(scores[certain]) == {0.0}


@pytest.mark.parametrize(("kind", "dimension"), [("sparse", 4096), ("rademacher", 1024)])
def test_projected_scores_rank_alike(
    policy: FrozenPolicy, prompts: list[Prompt], exact: np.ndarray, kind: str, dimension: int
) -> None:
    """A cosine errs by `1 / sqrt(d)` and a mean over the pool, whose errors are independent, by less."""
    scores, _ = scores_of(policy, prompts, projection=kind, dimension=dimension)
    teaching = exact != 0
    assert np.corrcoef(scores[teaching], exact[teaching])[0, 1] > 0.97
    assert len(set(best(scores, 6)) & set(best(exact, 6))) >= 5
    largest = learnability(np.array([0.5]))[0] ** 2
    expected_error = largest / dimension**0.5 / len(prompts) ** 0.5
    assert 0 < np.sqrt(np.mean((scores - exact) ** 2)) < expected_error


def test_measurements_do_not_depend_on_the_batch(policy: FrozenPolicy, prompts: list[Prompt]) -> None:
    _, whole = scores_of(policy, prompts[:6])
    parts = [scores_of(policy, prompts[first : first + 2])[1] for first in (0, 2, 4)]
    joined = np.concatenate([part["feature"] for part in parts])
    np.testing.assert_allclose(joined, whole["feature"], rtol=1e-4, atol=1e-5 * np.abs(whole["feature"]).max())


def test_scores_by_hand() -> None:
    """u = (1, 0), (0.6, 0.8), nothing; V = 0.25, 0.1875, 0: mean V u = (0.3625, 0.15) / 3."""
    features = np.array([[2, 0], [3, 4], [0, 0]], dtype=np.float32)
    weight = learnability(np.array([0.5, 0.25, np.nan]))
    expected = [0.25 * 0.3625 / 3, 0.1875 * (0.6 * 0.3625 + 0.8 * 0.15) / 3, 0]
    np.testing.assert_allclose(alignment_scores(weight, features), expected, rtol=1e-12)
    assert best(np.array([0.0, 2.0, 0.0, 3.0]), 3).tolist() == [3, 1, 0]


def test_which_parameters_are_meant(policy: FrozenPolicy) -> None:
    model = policy.module.policy_model
    assert {name.split(".")[2] for name in chosen_parameters(model, "", 2)} == {"2", "3"}
    assert list(chosen_parameters(model, r"^model\.norm", 2)) == ["model.norm.weight"]
    with pytest.raises(UserError, match="matches no trainable parameter"):
        chosen_parameters(model, "layers.99", 2)
    with pytest.raises(UserError, match="not a regular expression"):
        chosen_parameters(model, "(", 2)


def test_adapters_are_meant_where_there_are_any(prompts: list[Prompt]) -> None:
    torch.manual_seed(0)
    adapted = make_policy(Lora(rank=2))
    try:
        chosen = chosen_parameters(adapted.module.policy_model, "", 1)
        trainable = {name for name, one in adapted.module.policy_model.named_parameters() if one.requires_grad}
        assert set(chosen) == trainable
        assert all("lora_" in name for name in chosen)
        (group,) = [one for one in adapted.roll(prompts[:8]) if one.informative][:1]
        gradients = PromptGradients(adapted, chosen)
        flat = torch.zeros(gradients.size)
        gradients.add(group, flat)
        np.testing.assert_allclose(
            flat.numpy(), plain_gradient(adapted, group, "lora_"), rtol=1e-3, atol=1e-4 * float(flat.abs().max())
        )
    finally:
        adapted.module.teardown("test")


def test_confidence_is_the_mean_logprob_of_one_completion(policy: FrozenPolicy, prompts: list[Prompt]) -> None:
    completions = policy.complete(prompts)
    found = mean_logprobs(policy, prompts, completions)
    for value, prompt, completion in zip(found, prompts, completions, strict=True):
        ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
        with torch.no_grad():
            logprobs = policy.module.policy_model(ids).logits[0, :-1].double().log_softmax(-1)
        taken = logprobs.gather(1, ids[0, 1:, None])[-len(completion.token_ids) :]
        assert value == pytest.approx(float(taken.mean()), rel=1e-4)
    measured = Ufo(UfoOptions()).measure(policy, prompts)
    np.testing.assert_allclose(measured["confidence"], found)


def test_the_middle_is_kept() -> None:
    confidence = np.array([-4.0, -1.0, -0.9, np.nan, -0.1, -0.5])
    by_median = Ufo(UfoOptions("median")).score({"confidence": confidence})
    assert best(by_median, 3).tolist() == [2, 1, 5]  # median -0.9
    by_mean = Ufo(UfoOptions("mean")).score({"confidence": confidence})
    assert best(by_mean, 2).tolist() == [1, 2]  # mean -1.3
    assert by_mean[3] == -np.inf


def test_a_folder_belongs_to_one_selection(tmp_path: Path) -> None:
    columns = {"rate": Column("float64"), "feature": Column("float32", 3)}
    claim_folder(tmp_path / "w", {"seed": 1, "betas": (0.9, 0.999)})
    first = Measurements(tmp_path / "w", columns, 5)
    first.append({"rate": np.array([0.5, 1.0]), "feature": np.ones((2, 3))})
    # Written by a process that was killed before it could say so: written again.
    first.arrays["rate"][2] = 77
    claim_folder(tmp_path / "w", {"seed": 1, "betas": (0.9, 0.999)})
    again = Measurements(tmp_path / "w", columns, 5)
    assert again.done == 2
    again.append({"rate": np.array([0.25, 0.0, 0.5]), "feature": np.zeros((3, 3))})
    assert again.arrays["rate"].tolist() == [0.5, 1.0, 0.25, 0.0, 0.5]
    assert np.load(tmp_path / "w" / "feature.npy").tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 3
    with pytest.raises(UserError, match=r"made with another seed\."):
        claim_folder(tmp_path / "w", {"seed": 2, "betas": (0.9, 0.999)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="was not written by `dots select`"):
        claim_folder(tmp_path / "other", {})
