"""The vLLM engines without vLLM: requests, answers, the environment, and rejected options."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoTokenizer

from app.engines import Sampling, Vllm
from app.engines.base import check_request
from app.engines.requests import Answer, EngineError, completions_of, engine_environment, environment, request_fields
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


def test_a_trainer_of_several_processes_is_sent_to_the_server() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(UserError, match=r"one of 2 trainer processes.*VllmServer"):
            Vllm().setup(tiny_model(12, seed=0), TOKENIZER)
    finally:
        dist.destroy_process_group()


def test_another_gpu_than_the_first_is_refused() -> None:
    policy = tiny_model(12, seed=0)
    policy.__class__ = type("OnGpu", (type(policy),), {"device": torch.device("cuda:3")})
    with pytest.raises(UserError, match=r"the policy is on cuda:3\. Set CUDA_VISIBLE_DEVICES=3"):
        Vllm().setup(policy, TOKENIZER)


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
