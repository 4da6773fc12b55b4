"""Runs by a server that answers wrongly end in one line and train nothing; none is open to others by accident."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.engines import Sampling, VllmServer
from app.engines.requests import EngineError
from app.engines.server import client, fleet
from app.engines.server.endpoints import EndpointChoice
from app.engines.server.options import ServerOptions
from app.engines.server.process import is_local
from app.engines.turns import TurnRequest
from app.engines.wire import shared_file
from app.engines.worker.guard import KeyGuard, Message
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.command import logged
from tests.support.policies import TINY, tiny_model
from tests.support.refusal import Place, model, write_pool
from tests.support.scripted_conversations import ScriptedConversations
from tests.support.stand_in_server import (
    COMPLETION,
    COMPLETIONS,
    TOKENS,
    Asked,
    Spoiled,
    StandIn,
    Written,
    fives,
    stand_in,
)
from tests.support.tables import few

FIT = ("fit", "--config", "run.yaml")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(client, "_BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(client, "_MAX_BODY_BYTES", 2**20)
    monkeypatch.setattr(fleet, "_SETTLE_S", 0.0)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with stand_in() as started:
        yield started


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: StandIn
) -> Place:
    made = Place.at(tmp_path, monkeypatch, capsys)
    engine = {"class_path": "app.engines.VllmServer", "init_args": {"url": server.url, "max_restarts": 1}}
    made.config(lambda config: model(config).update(engine=engine))
    return made


def test_a_right_server_is_trained_with(place: Place, server: StandIn) -> None:
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    assert server.weights > 0 and server.seen.count(TOKENS) == server.completions == 4
    assert (place.path / "runs/small/version_0/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("mini_batches", few([2, 1], 1))
def test_the_gap_between_server_and_trainer_is_logged(place: Place, server: StandIn, mini_batches: int) -> None:
    """With several mini-batches too, where log pi_old would be the server's own were it not computed."""
    (place.path / "turns.py").write_text(
        "def turns(completions, **_):\n    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    place.config(
        lambda config: model(config).update(
            engine={"class_path": "app.engines.VllmServer", "init_args": {"url": server.url}},
            rewards=[{"class_path": "app.rewards.Function", "init_args": {"path": "turns.py:turns"}}],
            mini_batches=mini_batches,
        )
    )
    code, said = place.run(*FIT, "--completions.every=1", f"--trainer.max_steps={mini_batches}")
    assert code == 0, said[-2000:]
    run = place.path / "runs/small/version_0"
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    gaps = []
    for row in pq.read_table(run / "completions/step_00000000.parquet").to_pylist():
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            every = policy(torch.tensor([[*prompt, 5, 5, 5]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        gaps += (every[:, 5] + 0.5).abs().tolist()  # the server gives -0.5 to each of its tokens
    assert len(gaps) == 2 * 2 * 3
    found = logged(run)
    assert found["sampling/sampling_logp_difference/max"][0] == pytest.approx(max(gaps), rel=1e-4)
    assert found["sampling/sampling_logp_difference/mean"][0] == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


def test_prompts_beyond_the_servers_limit_are_found_when_the_data_are_read(place: Place, server: StandIn) -> None:
    rows = [{"question": "1 + 1 = " * (20 if i == 3 else 1) + f"{i}", "answer": "2"} for i in range(8)]
    write_pool(place.path / "pool.jsonl", rows)
    server.spoiled["/v1/models"] = lambda handler, body: {"data": [{"max_model_len": 40}]}
    code, out, said = place.run_with_output(*FIT, "--data.prompts_per_step=7")  # every prompt that is left
    assert code == 0, said[-2000:]
    assert "7 prompts kept, dropped 1 longer than 37 tokens" in re.sub(r"[^\w,.:]+", " ", out)
    server.spoiled["/v1/models"] = lambda handler, body: {"data": [{"max_model_len": 3}]}
    assert "leaves no room for a prompt within the 3 tokens" in place.refused(*FIT)


@pytest.mark.parametrize(("now", "fresh", "made_ahead"), few([(3, 3, 2), (1, 1, 1)], 1))
def test_a_resume_with_another_number_of_prompts_changes_the_batch_made_ahead(
    place: Place, server: StandIn, now: int, fresh: int, made_ahead: int
) -> None:
    engine = {"class_path": "app.engines.VllmServer", "init_args": {"url": server.url, "max_restarts": 1}}

    def ahead(config: dict[str, Any]) -> None:
        model(config).update(engine=engine)
        config["trainer"]["max_steps"] = 3
        config["trainer"]["callbacks"] = [{"class_path": "callbacks.RolloutAhead"}]
        config["checkpoint"] = {"every": 1, "keep": 9}
        config["completions"] = {"every": 1}

    place.config(ahead)
    code, said = place.run(*FIT)
    assert code == 0, said[-2000:]
    saved = "runs/small/version_0/checkpoints/step_00000001.ckpt"
    code, said = place.run(*FIT, "--ckpt_path", saved, f"--data.prompts_per_step={now}")
    assert code == 0, said[-2000:]
    assert f"prompts_per_step: 2 -> {now}" in said
    for step in (1, 2):
        rows = pq.read_table(place.path / f"runs/small/version_1/completions/step_{step:08d}.parquet").to_pylist()
        trained = {row["prompt_id"]: row["birth_step"] for row in rows if row["advantage"] is not None}
        assert len(trained) == fresh
        if step == 1:
            assert sorted(trained.values()) == [0] * made_ahead + [1] * (fresh - made_ahead)


def choice(**changes: Any) -> Spoiled:
    """A completion of 3 tokens, changed."""
    return lambda handler, body: {"choices": [Written([5] * 3, [-0.5] * 3, "length").sent(handler.path) | changes]}


def logprobs(*values: object) -> Spoiled:
    return lambda handler, body: {"choices": [Written([5] * 3, values, "length").sent(handler.path)]}


def status(code: int, **headers: str) -> Spoiled:
    def send(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", "4")
        handler.end_headers()
        handler.wfile.write(b"oops")

    return send


def _cut(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """Announce more bytes than are sent, and close."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def _endless(delay: float) -> Spoiled:
    def send(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b" " * (1 if delay else 2**16))
                time.sleep(delay)

    return send


HTML = b"<html><body>It works!</body></html>"
NOT_VLLM = "the answer is not that of a vLLM server"
WRONG: dict[str, tuple[str, Spoiled, str]] = {
    "HTML": (COMPLETION, lambda handler, body: HTML, NOT_VLLM),
    "HTML for the models": ("/v1/models", lambda handler, body: HTML, NOT_VLLM),
    "models of another form": ("/v1/models", lambda handler, body: {"data": []}, NOT_VLLM),
    "HTML for a push": ("/collective_rpc", lambda handler, body: HTML, NOT_VLLM),
    "results of another form": ("/collective_rpc", lambda handler, body: {"results": 5}, NOT_VLLM),
    "HTML for the paths": ("/openapi.json", lambda handler, body: HTML, NOT_VLLM),
    "paths of another form": ("/openapi.json", lambda handler, body: {"paths": 5}, NOT_VLLM),
    "no success": ("/reset_prefix_cache", lambda handler, body: [], NOT_VLLM),
    "no choices": (COMPLETION, lambda handler, body: {"choices": []}, NOT_VLLM),
    "two choices": (COMPLETION, lambda handler, body: {"choices": [{}, {}]}, NOT_VLLM),
    "choices of another type": (COMPLETION, lambda handler, body: {"choices": "abc"}, NOT_VLLM),
    "a list": (COMPLETION, lambda handler, body: [], NOT_VLLM),
    "nothing": (COMPLETION, lambda handler, body: b"", NOT_VLLM),
    "cut JSON": (COMPLETION, lambda handler, body: b'{"choices": [', NOT_VLLM),
    "deep JSON": (COMPLETION, lambda handler, body: b"[" * 100_000, NOT_VLLM),
    "token beyond the vocabulary": (COMPLETION, choice(token_ids=[5, 5, 10**9]), "tokens from 5 to 1000000000"),
    "token just beyond": (COMPLETION, choice(token_ids=[5, 5, 4096]), "but the policy has the tokens 0 to "),
    "token of 30 digits": (COMPLETION, choice(token_ids=[5, 5, 10**30]), "returned tokens from 5 to 1000000"),
    "negative token": (COMPLETION, choice(token_ids=[-1, 5, 5]), "returned tokens from -1 to 5"),
    "tokens that are text": (COMPLETION, choice(token_ids=["a", "b", "c"]), NOT_VLLM),
    "tokens with a fraction": (COMPLETION, choice(token_ids=[1.5, 2.0, 3]), NOT_VLLM),
    "no tokens": (COMPLETION, choice(token_ids=None), NOT_VLLM),
    "fewer tokens": (COMPLETION, choice(token_ids=[5]), "1 tokens and 3 log-probabilities"),
    "log-probability of +50": (COMPLETION, logprobs(-1, 50, -1), "a log-probability of 50, but none is above 0"),
    "infinite log-probability": (COMPLETION, logprobs(-1, 1e999, -1), "a log-probability of inf"),
    "log-probability that is none": (COMPLETION, logprobs(-1, None, -1), "NaN or infinite"),
    "log-probability that stands for none": (COMPLETION, logprobs(-1, -9999.0, -1), "NaN or infinite"),
    "log-probability of text": (COMPLETION, logprobs(-1, "x", -1), NOT_VLLM),
    "no log-probabilities": (COMPLETION, choice(logprobs=None), NOT_VLLM),
    "another end": (COMPLETION, choice(finish_reason={"a": 1}), "finished a completion with reason"),
    "internal errors": (COMPLETION, status(500), "were lost 2 times in a row"),
    "internal errors in a push": ("/collective_rpc", status(500), "failed in vLLM's worker"),
    "redirect": (COMPLETION, status(302, Location="http://127.0.0.1:1/"), "redirects elsewhere (302)"),
    "refusal": (COMPLETION, status(422), "rejected the request (422): oops"),
    "answer cut by the connection": (COMPLETION, _cut, "were lost 2 times in a row"),
    "answer of any size": (COMPLETION, _endless(0), "the answer has more than 1048576 bytes"),
    "answer without an end": (COMPLETION, _endless(0.05), "were lost 2 times in a row"),
}  # fmt: skip


THROUGH_THE_COMMAND = (
    "HTML", "HTML for the models", "HTML for a push", "results of another form", "no success", "no choices",
    "token beyond the vocabulary", "log-probability of +50", "log-probability that is none", "internal errors",
    "internal errors in a push", "redirect", "answer of any size", "answer without an end",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", few(THROUGH_THE_COMMAND, 2))
def test_a_wrong_answer_is_one_line(place: Place, server: StandIn, name: str) -> None:
    path, spoiled, expected = WRONG[name]
    server.spoiled[path] = spoiled
    line = place.refused(*FIT)
    assert expected in line
    assert len(line) < 1200


@pytest.mark.parametrize("offers_tokens", [True, False])
@pytest.mark.parametrize("name", [name for name in WRONG if name not in THROUGH_THE_COMMAND])
def test_a_wrong_answer_is_refused(server: StandIn, name: str, offers_tokens: bool) -> None:
    path, spoiled, expected = WRONG[name]
    server.spoiled[path] = spoiled
    server.offers_tokens = offers_tokens
    engine = VllmServer(url=server.url, max_restarts=1)
    engine.setup(tiny_model(600, seed=0), AutoTokenizer.from_pretrained(TINY))
    prompt = Prompt("a", 0, "1 + 1 =", "1 + 1 =", (3, 4), {})
    try:
        with pytest.raises((EngineError, FloatingPointError), match=re.escape(expected)):
            engine.generate([prompt], Sampling(1, 3), np.zeros((1, 1), dtype=np.int64))
    finally:
        engine.close()


# --- Where completions are requested -----------------------------------------------------------------------------


PROMPTS = [Prompt(name, number, "", "", (3, 4, 5 + number), {}) for number, name in enumerate("ab")]
SEEDS = np.array([[2**62, 7], [7, 8]])


def by_seed(asked: Asked) -> Written:
    draw = np.random.default_rng([asked.settings["seed"], *asked.token_ids])
    length = int(draw.integers(1, asked.settings["max_tokens"] + 1))
    return Written(draw.integers(5, 200, length).tolist(), (-draw.random(length)).tolist(), "length")


def generated(server: StandIn, endpoint: EndpointChoice, *stop: str) -> list[list[Any]]:
    """Return tokens and log-probabilities of two prompts' completions."""
    server.write = by_seed
    engine = VllmServer(url=server.url, endpoint=endpoint, max_restarts=1)
    engine.setup(tiny_model(600, seed=0), AutoTokenizer.from_pretrained(TINY))
    try:
        groups = engine.generate(PROMPTS, Sampling(2, 9, temperature=0.7, stop=list(stop)), SEEDS, np.full((2, 2), 6))
        return [[one.token_ids.tolist(), one.logprobs.tolist()] for group in groups for one in group]
    finally:
        engine.close()


def test_both_endpoints_get_the_same_requests_and_give_the_same_completions(server: StandIn) -> None:
    ended = ["\n\n"]
    cases = [("auto", ()), ("completions", ()), ("tokens", ended), ("auto", ended), ("tokens", ())]
    found = [generated(server, endpoint, *stop) for endpoint, stop in cases]
    assert all(one == found[0] for one in found) and len({str(one) for one in found[0]}) == 4
    paths = [one for one in server.seen if one in (TOKENS, COMPLETIONS)]
    assert paths[::4] == [TOKENS, COMPLETIONS, TOKENS, COMPLETIONS, TOKENS]
    assert paths == [path for path in paths[::4] for _ in range(4)]
    requests = [server.asked[start : start + 4] for start in (0, 4, 8)]
    for tokens, completions, stopped in zip(*(sorted(one, key=by_prompt_and_seed) for one in requests), strict=True):
        assert tokens.token_ids == completions.token_ids == stopped.token_ids
        # Text is only made where it is searched for a stop string.
        expected = {key: one for key, one in completions.settings.items() if key not in ("prompt", "return_token_ids")}
        assert tokens.settings == expected | {"detokenize": False}
        assert stopped.settings == expected | {"detokenize": True, "stop": ended}
        assert (expected["max_tokens"], expected["logprobs"], expected["repetition_penalty"]) == (6, 0, 1.0)


def by_prompt_and_seed(asked: Asked) -> tuple[list[int], int]:
    return asked.token_ids, asked.settings["seed"]


@pytest.mark.parametrize("described", [True, False])
def test_a_server_without_the_endpoint_for_token_ids_is_asked_for_completions(
    server: StandIn, capsys: pytest.CaptureFixture[str], described: bool
) -> None:
    server.offers_tokens = False
    if not described:
        server.spoiled["/openapi.json"] = status(404)
    generated(server, "auto")
    assert server.seen.count(COMPLETIONS) == server.completions == 4
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"dots: {server.url} does not list {TOKENS} in its /openapi.json (--enable-scale-out): completions come from "
        f"{COMPLETIONS}, which costs more time per token"
    )
    generated(server, "completions")
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match=r"endpoint is tokens, but http.* does not list .* Start it with --enable-scale"
    ):
        generated(server, "tokens")
    assert server.seen.count("/openapi.json") == 2


def test_a_server_that_is_replaced_by_one_without_the_endpoint_is_asked_again(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = generated(server, "completions")
    answered = server.completions

    def replaced(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> object:
        server.offers_tokens = server.completions < answered + 2
        return (
            status(403)(handler, body)
            if not server.offers_tokens and handler.path == TOKENS
            else server.answer(handler.path, body)
        )

    server.spoiled[COMPLETION] = replaced
    assert generated(server, "auto") == expected
    assert server.seen.count(TOKENS) == 4 and server.seen.count(COMPLETIONS) == answered + 3
    lost, lacking = capsys.readouterr().err.splitlines()
    assert f"no longer offers {TOKENS} (403)" in lost and "completions come from /v1/completions" in lacking


# --- Who can reach a server ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0", "192.0.2.1", "::ffff:0.0.0.0"])
def test_a_server_for_others_needs_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    place = Place.at(tmp_path, monkeypatch, capsys)
    line = place.refused("serve", "--config", "run.yaml", f"--host={host}")
    assert "which other machines can reach, and the server would have no key" in line
    assert "Set VLLM_API_KEY to a key, or allow it with --open_to_network true." in line


def test_local_hosts() -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "127.0.0.2")))
    with pytest.raises(UserError, match="which is no address"):
        is_local("no such host")


@pytest.mark.parametrize("argument", ["--host=0.0.0.0", "--host", "--hos=::"])
def test_the_host_is_not_given_behind_the_check(argument: str) -> None:
    with pytest.raises(UserError, match=r"server\.host is for"):
        ServerOptions(arguments=[argument])


@pytest.mark.parametrize(
    ("kind", "path", "key", "passes"),
    [
        ("http", "/collective_rpc", "", False),
        ("http", "/collective_rpc", "wrong", False),
        ("http", "/collective_rpc", "right", True),
        ("http", TOKENS, "", False),
        ("http", TOKENS, "wrong", False),
        ("http", "/health", "", True),
        ("websocket", "/v1/realtime", "", False),
        ("websocket", "/health", "", False),
        ("websocket", "/v1/realtime", "right", True),
        ("lifespan", "", "", True),
    ],
)
def test_the_key_guards_every_path_and_protocol(
    monkeypatch: pytest.MonkeyPatch, kind: str, path: str, key: str, passes: bool
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "right")
    reached: list[str] = []
    sent: list[Message] = []

    async def app(scope: Message, receive: object, send: object) -> None:
        reached.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope: Message = {"type": kind, "path": path, "headers": headers}
    asyncio.run(KeyGuard(app)({"type": kind} if kind == "lifespan" else scope, receive, send))
    assert bool(reached) is passes
    refused = {"http": "http.response.start", "websocket": "websocket.close"}
    assert [one["type"] for one in sent][:1] == ([] if passes else [refused[kind]])


# --- Chunks of killed pushes ---------------------------------------------------------------------------------------


def _hold(ready: Any) -> None:
    with shared_file.shared_chunk([("weight", torch.ones(1000))]) as (path, _):
        ready.send(path)
        time.sleep(60)


@contextlib.contextmanager
def _holder() -> Iterator[tuple[str, Callable[[], None]]]:
    """A process in the middle of a push: the path of its chunk, and what kills it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(theirs,))
    process.start()
    theirs.close()

    def kill() -> None:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    try:
        yield ours.recv(), kill
    finally:
        process.kill()
        process.join()


def test_the_next_start_removes_what_a_killed_push_has_left(place: Place) -> None:
    with _holder() as (abandoned, kill), _holder() as (held, _):
        kill()
        assert os.path.exists(abandoned) and os.path.exists(held)
        code, said = place.run(*FIT)
        assert code == 0, said[-2000:]
        assert not os.path.exists(abandoned)
        assert os.path.exists(held)
    shared_file.remove_abandoned()
    assert held not in glob.glob(f"{shared_file.FOLDER}/dots-*")


class Late(ScriptedConversations):
    """Conversations whose environment takes 0.3 s for an answer."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._due: dict[int, float] = {}

    def ended(self, conversation: int, turn: Completion) -> None:
        super().ended(conversation, turn)
        self._due[conversation] = time.monotonic() + 0.3

    def next(self, wait: bool = True) -> list[TurnRequest]:
        late = {number for number in self._asked if self._due[number] > time.monotonic()}
        self._asked -= late
        found = super().next(wait)
        self._asked = late
        return found


@pytest.mark.parametrize(("longest_turn_s", "waited_s"), [(0.0, 0.3), (0.6, 0.0)])
def test_waiting_for_an_environment_counts_while_nothing_is_generated(
    server: StandIn, longest_turn_s: float, waited_s: float
) -> None:
    """Of two conversations one has a reply. It is waited for, or comes while the other's turn is generated."""

    def write(asked: Asked) -> Written:
        time.sleep(longest_turn_s if asked.token_ids[0] == 7 else 0.0)
        return fives(asked)

    server.write = write
    engine = VllmServer(url=server.url)
    engine.setup(tiny_model(12, seed=0), AutoTokenizer.from_pretrained(TINY))
    talks = Late([Prompt(f"p{n}", n, "", "", (7 + n, 3), {}) for n in range(2)], np.arange(2)[:, None], turns=2)
    try:
        engine.push(engine.weights(), 1)
        engine.converse(talks, Sampling(1, 8))
    finally:
        engine.close()
    assert [len(talk.turns) for talk in talks.talks] == [1, 2]
    assert talks.waited == pytest.approx(waited_s, abs=0.1)
