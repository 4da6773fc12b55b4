"""Scores from an HTTP endpoint: a real server in this process, asked by the reward and by the command."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from app.reporting.curves import read_scalars
from app.rewards import Remote, RewardScorer, ScoreError, WorkerOptions, rewards_of
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.refusal import Place, files, model
from tests.support.reward_server import Asked, RewardServer, Sent, closed_port, reward_server

KEY = "sk-a-key-that-nobody-may-see"
FAST = {"time_limit_s": 3.0, "retries": 2}


def lengths(asked: Asked, number: int) -> object:
    """Return the length of each completion in tenths, as the prompt's end shows it."""
    return {"rewards": [len(text) / 10 for text in asked.body["completions"]]}


def scores(reward: Remote, completions: Sequence[Any], prompt: Any = "1 + 1 =", **columns: Any) -> list[Any]:
    """Score completions of one prompt in this process."""
    reward.load()
    count = len(completions)
    return list(reward([prompt] * count, completions, [[1]] * count, **columns))


def test_a_request_is_that_of_openrlhf() -> None:
    """Facts: https://github.com/OpenRLHF/OpenRLHF, `_fetch_rewards_via_http`; labels that are missing are ""."""
    with reward_server(lengths) as server:
        made = Remote(f"{server.url}/get_reward", columns=["level"], end="<eos>")
        found = scores(
            made, ["two", "a longer one", ""], answer=["2", None, np.int64(3)], level=[1, {"a": np.ones(1)}, None]
        )
    assert found == [0.3, 1.2, 0.0]
    (asked,) = server.asked
    assert asked.path == "/get_reward"
    assert asked.body == {
        "query": ["1 + 1 =two<eos>", "1 + 1 =a longer one<eos>", "1 + 1 =<eos>"],
        "prompts": ["1 + 1 ="] * 3,
        "completions": ["two", "a longer one", ""],
        "labels": ["2", "", 3],
        "level": [1, {"a": [1.0]}, None],
    }
    assert asked.headers["Content-Type"] == "application/json"
    assert "Authorization" not in asked.headers


def test_conversations_are_text() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    with reward_server(lengths) as server:
        scores(Remote(server.url), [[{"role": "assistant", "content": "2"}], turns], prompt)
    start = "System: Be brief.\n\nUser: 1 + 1?"
    said = f"Assistant: {json.dumps([call])}\n\nTool: 2\n\nAssistant: It is 2."
    (body,) = server.bodies
    assert body["prompts"] == [start] * 2
    assert body["completions"] == ["2", said]
    assert body["query"] == [f"{start}\n\nAssistant: 2", f"{start}\n\n{said}"]


def test_batches_are_in_flight_together_and_scores_in_order() -> None:
    """Ten batches, four at a time, of which earlier ones take longer."""
    all_here = threading.Barrier(4)

    def answer(asked: Asked, number: int) -> object:
        if number < 4:
            all_here.wait(5)  # none is answered before four are there
        time.sleep(0.2 if number == 0 else 0.05)
        return lengths(asked, number)

    texts = ["x" * size for size in range(29)]
    with reward_server(answer) as server:
        made = Remote(server.url, batch_size=3, concurrency=8)
        made.sharing_workers = 2
        assert scores(made, texts) == [size / 10 for size in range(29)]
    assert sorted(len(body["query"]) for body in server.bodies) == [2] + [3] * 9
    assert server.most == 4


def test_servers_take_turns() -> None:
    with reward_server(lengths) as one, reward_server(lengths) as other:
        made = Remote([one.url, other.url], batch_size=1, concurrency=1)
        assert scores(made, ["a", "bb", "ccc", "dddd"]) == [0.1, 0.2, 0.3, 0.4]
    assert [len(one.asked), len(other.asked)] == [2, 2]
    with reward_server(lengths) as alive:
        made = Remote([closed_port(), alive.url], batch_size=1, concurrency=1)
        assert scores(made, ["a", "bb"]) == [0.1, 0.2]


@pytest.mark.parametrize("failure", [Sent(503), Sent(429, headers={"Retry-After": "1"}), Sent(500, b"oops")])
def test_a_server_that_is_overloaded_is_asked_again(failure: Sent) -> None:
    with reward_server(lambda asked, number: failure if number < 2 else lengths(asked, number)) as server:
        begin = time.monotonic()
        assert scores(Remote(server.url, **FAST), ["two"]) == [0.3]
        assert time.monotonic() - begin > (2.0 if failure.status == 429 else 0.75)
        assert len(server.asked) == 3


FAILURES: dict[str, tuple[object, str, int]] = {
    "status": (Sent(503, b"busy\nnow"), r"^http://127.0.0.1:\d+/score: HTTP 503: busy now$", 3),
    "rejected": (Sent(404), r"score: HTTP 404$", 1),
    "key": (
        Sent(401, b"wrong key " + KEY.encode()),
        r"HTTP 401: wrong key <THE_KEY> \(the key is that in THE_KEY\)$",
        1,
    ),
    "redirect": (Sent(302, headers={"Location": "http://127.0.0.1:1/"}), "HTTP 302$", 1),
    "no_json": (Sent(200, b"<html>"), "the answer is not JSON: <html>$", 1),
    "schema": (
        {"score": [1.0]},
        r"""the answer is \{'score': \[1.0\]\}, but expected \{"rewards": \[...\]\} with""",
        1,
    ),
    "list": ([1.0], r"the answer is \[1.0\], but expected", 1),
    "number": ({"rewards": [1.0, 2.0]}, "the answer has 2 rewards for 1 completions$", 1),
    "text": ({"rewards": ["1.0"]}, "rewards holds '1.0', but expected numbers$", 1),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_be_used_is_a_failure_of_the_completion(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    answer, told, times = FAILURES[case]
    with reward_server(lambda *_: answer) as server:
        (found,) = scores(Remote(f"{server.url}/score?secret=7", api_key_env="THE_KEY", **FAST), ["two"])
    assert isinstance(found, ScoreError)
    assert re.search(told, str(found))
    assert (found.timed_out, found.refused) == (False, True)
    assert len(server.asked) == times
    assert KEY not in str(found)


def test_a_number_that_is_none_costs_one_score_and_null_does_not_apply() -> None:
    rewards = Sent(200, b'{"rewards": [0.5, NaN, null, "x", 1, true]}')
    with reward_server(lambda *_: rewards) as server:
        workers = [Remote(server.url)]
        result = score_once(workers, ["a", "b", "c", "d", "e", "f"])
    (group,) = result.groups
    assert group.rewards.tolist() == [0.5, 1.0, 1.0]
    assert (result.crashed, result.unscored, result.timed_out) == (2, 1, 0)


def test_no_connection_is_told_within_the_limit() -> None:
    begin = time.monotonic()
    (found,) = scores(Remote(closed_port(), **FAST), ["two"])
    assert re.search(r"no connection \(Cannot connect to host 127.0.0.1:\d+", str(found))
    assert 0.7 < time.monotonic() - begin < 3.0


def test_a_server_that_hangs_costs_its_limit_once() -> None:
    """Forty requests, sixteen at a time: those after the first sixteen are not waited for."""
    hang = threading.Event()
    try:
        with reward_server(lambda *_: hang.wait(30)) as server:
            begin = time.monotonic()
            found = scores(Remote(server.url, batch_size=1, time_limit_s=0.5), ["two"] * 40)
            took = time.monotonic() - begin
            asked = len(server.asked)
            hang.set()
    finally:
        hang.set()
    assert all(isinstance(one, ScoreError) and one.timed_out for one in found[:16])
    assert re.fullmatch(r"no answer from http://127.0.0.1:\d+ within time_limit_s=0.5 s", str(found[0]))
    assert str(found[-1]) == "not asked, because the requests before it got no answer"
    assert 0.5 <= took < 1.8
    assert asked < 16 + 4


def test_a_server_that_drips_is_given_up() -> None:
    """Neither the limit of a connection nor that of a read would end this."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not stop.wait(0.05):
                    connection.sendall(b" ")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        begin = time.monotonic()
        (found,) = scores(Remote(f"http://127.0.0.1:{server.getsockname()[1]}", time_limit_s=0.5), ["two"])
        stop.set()
        thread.join()
    assert isinstance(found, ScoreError) and found.timed_out
    assert time.monotonic() - begin < 1.5


def score_once(rewards: list[Any], texts: Sequence[str], **options: Any) -> Any:
    ids, logprobs = np.array([1], np.int32), np.zeros(1, np.float32)
    completions = tuple(Completion(ids, logprobs, "stop", 0, text) for text in texts)
    scorer = RewardScorer(rewards, "drop", WorkerOptions(**options))
    try:
        return scorer.score([Prompt("a", 0, "?", "?", (1,), {"answer": "2"})], [completions], source="fresh", step=0)
    finally:
        scorer.close()


def test_one_completion_that_breaks_the_server_costs_no_other_its_score() -> None:
    def answer(asked: Asked, number: int) -> object:
        return Sent(500, b"KeyError") if "bad" in asked.body["completions"] else lengths(asked, number)

    with reward_server(answer) as server:
        result = score_once([Remote(server.url, batch_size=4, retries=0)], ["a", "bb", "bad", "d", "ee"])
    (group,) = result.groups
    assert group.rewards.tolist() == pytest.approx([0.1, 0.2, 0.1, 0.2])
    assert (result.crashed, result.failed) == (1, 1)
    assert max(len(body["query"]) for body in server.bodies) == 4


def test_a_hanging_server_is_counted_and_scores_before_it_are_kept() -> None:
    """In the workers: the second batch hangs, and is a failure by time, not of the worker."""
    hang = threading.Event()

    def answer(asked: Asked, number: int) -> object:
        if "slow" in asked.body["completions"]:
            hang.wait(20)
        return lengths(asked, number) | {"extra_logs": {"length": [1, 2, 3][: len(asked.body["query"])], "text": "x"}}

    try:
        with reward_server(answer) as server:
            begin = time.monotonic()
            result = score_once(
                [Remote(server.url, batch_size=3, time_limit_s=1.0)], ["a", "bb", "ccc", "slow", "e"], time_limit_s=5.0
            )
            took = time.monotonic() - begin
            hang.set()
    finally:
        hang.set()
    (group,) = result.groups
    assert group.rewards.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert (result.timed_out, result.crashed, result.failed) == (2, 0, 2)
    assert took < 8
    logged = {name: mean.total / mean.weight for name, mean in result.logged.items()}
    assert logged == {"remote/length": 2.0}


def test_a_proxy_of_the_environment_is_used_except_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with reward_server(lengths) as proxy, reward_server(lengths) as near:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert scores(Remote("http://rewards.invalid/score"), ["two"]) == [0.3]
        assert scores(Remote(near.url), ["two"]) == [0.3]
    assert [one.path for one in proxy.asked] == ["http://rewards.invalid/score"]
    assert len(near.asked) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": []}, "url of app.rewards.Remote is an empty list"),
        ({"url": "localhost:5000"}, "url of app.rewards.Remote is 'localhost:5000', expected e.g. http://"),
        ({"url": f"http://me:{KEY}@localhost"}, "holds a name or password, which would be written"),
        ({"api_key_env": KEY}, "is not the name of an environment variable in capitals"),
        ({"batch_size": 0}, "batch_size of app.rewards.Remote is 0"),
        ({"retries": -1}, "retries of app.rewards.Remote is -1, but must be at least 0"),
        ({"concurrency": 0}, "concurrency of app.rewards.Remote is 0"),
        ({"time_limit_s": float("nan")}, "time_limit_s of app.rewards.Remote is nan"),
        ({"columns": ["labels"]}, "columns of app.rewards.Remote holds 'labels'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        Remote(**{"url": "http://localhost", **options})
    assert told in str(refused.value)
    assert KEY not in str(refused.value)


def test_what_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(UserError, match="environment variable THE_KEY, which is not set"):
        Remote("http://localhost", api_key_env="THE_KEY").load()
    monkeypatch.setenv("THE_KEY", "two\nlines")
    with pytest.raises(UserError, match="THE_KEY, which is no line of plain text"):
        Remote("http://localhost", api_key_env="THE_KEY").load()
    with pytest.raises(UserError, match=r"may need 14 s for a score, more than model.reward_workers.time_limit_s=10 s"):
        RewardScorer([Remote("http://localhost", time_limit_s=12)])
    with pytest.raises(
        UserError, match=r"model.rewards=Remote needs url. Write it as \{class_path: app.rewards.Remote"
    ):
        rewards_of("remote")
    for option in ({"labels": "gold"}, {"columns": ["gold"]}):
        with pytest.raises(UserError, match=r"no column 'gold' for \w+ of app.rewards.Remote, only 'answer': choose"):
            scores(Remote("http://localhost", **option), ["a"], answer=["2"])  # type: ignore[arg-type]


def asks(server: RewardServer, **options: Any) -> Any:
    def change(config: dict[str, Any]) -> None:
        given = {"url": f"{server.url}/get_reward", "api_key_env": "THE_KEY", **options}
        model(config).update(rewards=[{"class_path": "app.rewards.Remote", "init_args": given}])

    return change


def test_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two steps by config alone: the server's scores are the run's, the key is sent and is nowhere in its files."""
    place = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("THE_KEY", KEY)

    def answer(asked: Asked, number: int) -> object:
        values = [float(row % 2) for row in range(len(asked.body["query"]))]
        return {"rewards": values, "scores": values, "extra_logs": {"dummy_scores": values}}

    with reward_server(answer) as server:
        place.config(asks(server))
        run, state = place.fit("runs", 2)
        assert place.run("fit", "--config", "run.yaml", "--print_config")[0] == 0
    assert {asked.headers["Authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    assert {asked.path for asked in server.asked} == {"/get_reward"}
    assert {label for body in server.bodies for label in body["labels"]} <= {str(number) for number in range(1, 9)}
    scalars = read_scalars(run)
    assert [*scalars["rewards/remote/mean"][1]] == [0.5, 0.5]
    assert [*scalars["rewards/remote/dummy_scores"][1]] == [0.5, 0.5]
    assert state["global_step"] == 2
    kept = files(tmp_path)
    assert not [name for name, content in kept.items() if content and KEY.encode() in content]
    assert KEY not in caplog.text
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["rewards"][0]["init_args"]["api_key_env"] == "THE_KEY"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Sent(422, b"no such field"), "cannot work: http://127.0.0.1:... HTTP 422: no such field"),
        ({"rewards": [1.0]}, "cannot work: the answer has 1 rewards for 2 completions."),
        ({"rewards": ["a", "b"]}, "cannot work: rewards holds 'a', but expected numbers."),
        (None, "cannot work: http://127.0.0.1:... no connection (Cannot connect to host 127.0.0.1:"),
    ],
    ids=["status", "number", "text", "connection"],
)
def test_a_trial_refuses_an_endpoint_that_cannot_work(answer: object, told: str) -> None:
    with reward_server(lambda *_: answer) as server:
        url = closed_port() if answer is None else server.url
        scorer = RewardScorer([Remote(url, retries=0)], workers=WorkerOptions(num_workers=1))
        try:
            with pytest.raises(UserError, match=".*".join(map(re.escape, told.split("...")))):
                scorer.try_out([Prompt("a", 0, "?", "?", (1,), {"answer": "2"})])
        finally:
            scorer.close()


def test_a_run_whose_key_is_wrong_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("THE_KEY", KEY)
    with reward_server(lambda *_: Sent(401, KEY.encode())) as server:
        place.config(asks(server))
        line = place.refused("fit", "--config", "run.yaml")
        assert re.fullmatch(r"Reward 'remote' cannot work: http://.*: HTTP 401: <THE_KEY> \(the key is .*\)\.", line)
        monkeypatch.delenv("THE_KEY")
        assert "variable THE_KEY, which is not set" in place.refused("fit", "--config", "run.yaml")
