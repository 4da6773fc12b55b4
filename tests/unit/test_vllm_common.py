"""The vLLM engines without vLLM: requests, answers, the environment, and rejected options."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from app.engines import Sampling, Vllm
from app.engines.base import check_request
from app.engines.requests import Answer, EngineError, completions_of, engine_environment, environment, request_fields
from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.types import Prompt
from tests.support.policies import TINY, tiny_model

TOKENIZER = AutoTokenizer.from_pretrained(TINY)
VOCABULARY = len(TOKENIZER)
ENDS = np.array([1, 7])


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_a_request_is_one_sample_with_its_own_seed() -> None:
    sampling = Sampling(8, 96, temperature=0.7, top_p=0.9, top_k=20, stop=["\n\n"])
    fields = request_fields(sampling, ENDS, np.int64(2**63 - 1))
    assert (fields["n"], fields["seed"], fields["max_tokens"]) == (1, 2**63 - 1, 96)
    assert (fields["temperature"], fields["top_p"], fields["top_k"]) == (0.7, 0.9, 20)
    assert fields["stop_token_ids"] == [1, 7] and fields["ignore_eos"] and fields["stop"] == ["\n\n"]
    with pytest.raises(UserError, match=r"temperature is 0\.001"):
        request_fields(Sampling(temperature=0.001), ENDS, 0)


def test_answers_become_groups_in_order() -> None:
    answers = [Answer([*ids(f"{i}"), 1], [-0.5, -0.25 * i], "stop") for i in range(1, 4)]
    answers.append(Answer(ids("ab"), [-1.0, -2.0], "length"))
    groups = completions_of(answers, Sampling(2, 5), TOKENIZER, version=9, vocabulary=VOCABULARY)
    assert [[one.text for one in group] for group in groups] == [["1", "2"], ["3", "ab"]]
    assert groups[0][1].token_ids.tolist() == [*ids("2"), 1]
    assert groups[0][1].logprobs.tolist() == [-0.5, -0.5]
    assert [one.finish_reason for group in groups for one in group] == ["stop", "stop", "stop", "length"]
    assert {one.policy_version for group in groups for one in group} == {9}


def test_the_last_token_and_a_rounded_certainty_are_right() -> None:
    answer = Answer([0, VOCABULARY - 1], [0.0, 0.009], "length")
    [[one]] = completions_of([answer], Sampling(1, 2), TOKENIZER, 0, VOCABULARY)
    assert one.token_ids.tolist() == [0, VOCABULARY - 1]


def test_a_greedy_draw_is_certain() -> None:
    [[one]] = completions_of([Answer([5], [-0.7], "length")], Sampling(1, 1, temperature=0), TOKENIZER, 0, VOCABULARY)
    assert one.logprobs.tolist() == [0.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer([5, 6], [-1.0], "stop"), "2 tokens and 1 log-probabilities"),
        (Answer([], [], "stop"), "0 tokens"),
        (Answer([5], [-1.0], "abort"), "'abort'"),
        (Answer([5], [-1.0], None), "None"),
        (Answer([5, 6, 7], [-1.0, -1.0, -1.0], "length"), "3 tokens"),
        (Answer([5, VOCABULARY], [-1.0, -1.0], "length"), f"the policy has the tokens 0 to {VOCABULARY - 1}"),
        (Answer([-1, 5], [-1.0, -1.0], "length"), "tokens from -1 to 5"),
        (Answer([5], [0.02], "stop"), "log-probability of 0.02"),
    ],
)
def test_incomplete_answers_are_refused(answer: Answer, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        completions_of([answer], Sampling(1, 2), TOKENIZER, 0, VOCABULARY)


def test_missing_and_diverged_answers_are_named() -> None:
    with pytest.raises(EngineError, match="1 completions instead of a multiple of 2"):
        completions_of([Answer([5], [-1.0], "stop")], Sampling(2, 2), TOKENIZER, 0, VOCABULARY)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite \(version 3\)"):
        completions_of([Answer([5], [float("nan")], "stop")], Sampling(1, 2), TOKENIZER, 3, VOCABULARY)


def test_the_environment_is_the_users_first_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    before = dict(os.environ)
    with environment(engine_environment(on_cpu=True, cache_gib=0.3)):
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert dict(os.environ) == before
    assert "TORCHDYNAMO_DISABLE" not in engine_environment(on_cpu=False, cache_gib=1)


def test_options_that_cannot_be_are_refused() -> None:
    for options in ({"max_num_seqs": 0}, {"gpu_memory_utilization": 1.5}, {"cpu_cache_gib": 0.0}, {"block_size": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            Vllm(**options)
    with pytest.raises(UserError, match=r"sleep_level is 2 .*only CUDA"):
        Vllm(sleep_level=2).setup(tiny_model(12, seed=0), TOKENIZER)


def policy_on(device: str) -> PreTrainedModel:
    policy = tiny_model(12, seed=0)
    policy.__class__ = type("OnDevice", (type(policy),), {"device": torch.device(device)})
    return policy


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """How vLLM was started: its arguments, and the environment that it saw. It is replaced, for want of GPUs."""
    found = []

    class Llm:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))

        def __init__(self, path: str, **arguments: Any) -> None:
            found.append((arguments, dict(os.environ)))
            torch.set_float32_matmul_precision("highest")  # as its worker does

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Llm))
    monkeypatch.setitem(sys.modules, "vllm.envs", SimpleNamespace(disable_envs_cache=lambda: None))
    return found


@pytest.mark.parametrize(("rank", "device", "local"), [(0, "cuda:3", "3"), (5, "cuda:1", "1"), (1, "cpu", "0")])
def test_every_process_has_an_engine_on_its_own_device(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, rank: int, device: str, local: str
) -> None:
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "77")  # a launcher's, e.g. of the host
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    torch.set_float32_matmul_precision("high")
    before = dict(os.environ)
    try:
        Vllm().setup(policy_on(device), TOKENIZER, ranks=Ranks(rank, 8))
        # That of the trainer, which may compute its head in TF32.
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    [(arguments, seen)] = started
    assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), local)
    assert arguments["distributed_executor_backend"] == "external_launcher"
    assert arguments["enable_sleep_mode"] == device.startswith("cuda")
    assert arguments["dtype"] == ("bfloat16" if device.startswith("cuda") else "float32")
    assert dict(os.environ) == before


def test_a_start_is_said_once(started: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    Vllm().setup(policy_on("cuda:1"), TOKENIZER, ranks=Ranks(1, 2))
    assert capsys.readouterr().err == ""
    Vllm().setup(policy_on("cuda:0"), TOKENIZER, ranks=Ranks(0, 2))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("dots: vLLM starts on cuda:0: compiling") and second == "dots: vLLM started in 0 s"


def test_engines_that_processes_cannot_share_are_refused(started: list[Any]) -> None:
    with pytest.raises(UserError, match=r"tensor_parallel_size is 2, but 3 trainer processes"):
        Vllm(tensor_parallel_size=2).setup(tiny_model(12, seed=0), TOKENIZER, ranks=Ranks(0, 3))
    with pytest.raises(UserError, match=r"tensor_parallel_size is 2, .*the policy is on cuda:3\. Set CUDA_VISIBLE_DEV"):
        Vllm(tensor_parallel_size=2).setup(policy_on("cuda:3"), TOKENIZER)
    assert started == []


@pytest.mark.long
def test_importing_the_engines_does_not_import_vllm() -> None:
    code = "import sys, app.module, callbacks; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_prompt_may_fill_the_limit_but_not_exceed_it() -> None:
    prompt = Prompt("p", 0, "", "", (1, 2, 3), {})
    seeds = np.zeros((1, 2), dtype=np.int64)
    check_request([prompt], Sampling(2, 5), seeds, 8, "the limit")
    check_request([prompt], Sampling(2, 5), seeds, None, "the limit")
    with pytest.raises(
        UserError, match=r"has 3 tokens and sampling\.max_completion_length is 6, which together exceed"
    ):
        check_request([prompt], Sampling(2, 6), seeds, 8, "the limit")
