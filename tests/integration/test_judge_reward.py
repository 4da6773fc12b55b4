"""Scores by a judge behind a chat API: a real server in this process, asked by the reward and by the command."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.reporting.curves import read_scalars
from app.rewards import Judge, RewardScorer, ScoreError, WorkerOptions, rewards_of
from app.rewards.replies import ReplyCache
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.refusal import ROOT, Place, files, model
from tests.support.reward_server import Asked, Sent, reward_server

KEY = "sk-a-key-that-nobody-may-see"
RUBRIC = "Q: {question}\nGold: {answer}\nGiven: {completion}\nEnd with {{Score: N}}."


def chat(text: str | None, reason: str = "stop") -> dict[str, Any]:
    """Return a chat completion as OpenAI's API and vLLM send it."""
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}


def given(asked: Asked) -> str:
    """Return the completion that a judge reads by `RUBRIC`."""
    (message,) = asked.body["messages"]
    found = re.search(r"^Given: (.*)$", message["content"], re.MULTILINE)
    assert found is not None
    return found[1]


def length(asked: Asked, number: int) -> object:
    """Judge by length: a point per letter."""
    return chat(f"It has some letters.\n**Score:** {len(given(asked))}/10")


def judge(url: str, **options: Any) -> Judge:
    made = Judge(**{"url": url, "model": "judge-1", "rubric": RUBRIC, "time_limit_s": 3.0, "retries": 1, **options})
    made.load()
    return made


def scores(made: Judge, completions: Sequence[Any], prompt: Any = "1 + 1 =", **columns: Any) -> list[Any]:
    count = len(completions)
    columns = {"answer": ["2"] * count, **columns}
    return list(made([prompt] * count, completions, [[1]] * count, **columns))


def test_a_request_is_a_chat_with_the_rubric() -> None:
    rubric = "{question}|{prompt}|{completion}|{answer}|{level}|{extra.note}|{tags}|{{literal}}"
    with reward_server(lambda *_: chat("Score: 5")) as server:
        made = judge(server.url, rubric=rubric, body={"seed": 7, "max_tokens": None})
        found = scores(
            made,
            ["{answer} {", [{"role": "assistant", "content": "two"}]],
            answer=["2", np.array([3, 4])],
            level=[1, None],
            extra=['{"note": "n"}', {"note": 2}],
            tags=[["a"], np.array([1])],
            question=["sum?", "other?"],
        )
    assert found == [0.5, 0.5]
    assert {asked.path for asked in server.asked} == {"/v1/chat/completions"}
    texts = {body["messages"][0]["content"] for body in server.bodies}
    assert texts == {
        'sum?|1 + 1 =|{answer} {|2|1|n|["a"]|{literal}',
        "other?|1 + 1 =|two|3 or 4||2|[1]|{literal}",
    }
    for body in server.bodies:
        assert body.pop("messages")[0]["role"] == "user"
        assert body == {"model": "judge-1", "temperature": 0.0, "seed": 7}
    with reward_server(lambda *_: chat("Score: 5")) as server:
        scores(judge(server.url + "/openai/?version=2", rubric="{question}/{completion}"), ["two"], "the prompt")
    assert server.asked[0].path == "/openai/chat/completions?version=2"
    assert server.bodies[0]["messages"][0]["content"] == "the prompt/two"
    assert server.bodies[0]["max_tokens"] == 512


def test_conversations_are_read_whole() -> None:
    prompt = [{"role": "user", "content": "1 + 1?"}]
    turns = [{"role": "assistant", "content": "Let me see."}, {"role": "user", "content": "Well?"}]
    with reward_server(lambda *_: chat("Score: 5")) as server:
        scores(judge(server.url, rubric="{prompt}\n--\n{completion}"), [turns], prompt)
    assert server.bodies[0]["messages"][0]["content"] == "1 + 1?\n--\nAssistant: Let me see.\n\nUser: Well?"


REPLIES: dict[str, tuple[dict[str, Any], str | None, float | str]] = {
    "plain": ({}, "Score: 7", 0.7),
    "last": ({}, "Score: 1 would be mean.\nSCORE = 9.5", 0.95),
    "decorated": ({}, "**Score:** 4/10", 0.4),
    "after_thinking": ({}, "<think>Score: 1</think>Score: 2", 0.2),
    "thinking_only": ({}, "<think>Score: 1</think>", "no score"),
    "cut": ({}, "I think that", r"no score \(expected one by .*\): 'I think that'"),
    "nothing": ({}, None, "no score"),
    "outside": ({}, "Score: 11", "the score 11, which is not within 0 to 10"),
    "negative": ({"scale": (-1, 1)}, "Score: -1", 0.0),
    "own_pattern": ({"pattern": r"\[\[(\w+)\]\]", "scale": (1, 5)}, "[[4]]", 0.75),
    "own_pattern_no_number": ({"pattern": r"\[\[(\w+)\]\]"}, "[[A]]", "no score"),
    "json": ({"json_key": "grade"}, 'So:\n```json\n{"why": {"a": 1}, "grade": 3}\n```', 0.3),
    "json_text": ({"json_key": "grade"}, '{"grade": "3"}', 0.3),
    "json_true": ({"json_key": "right", "scale": (0, 1)}, '{"right": true}', 1.0),
    "json_other": ({"json_key": "grade"}, '{"score": 3}', "no score .expected a number under 'grade'"),
    "json_broken": ({"json_key": "grade"}, '{"grade": 3', "no score"),
    "json_nan": ({"json_key": "grade"}, '{"grade": NaN}', "no score"),
}


@pytest.mark.parametrize("case", REPLIES)
def test_the_score_of_a_reply(case: str) -> None:
    options, reply, expected = REPLIES[case]
    with reward_server(lambda *_: chat(reply)) as server:
        (found,) = scores(judge(server.url, **options), ["two"])
    if isinstance(expected, float):
        assert found == pytest.approx(expected)
    else:
        assert isinstance(found, ScoreError)
        assert re.search(expected, str(found))
        assert not found.refused  # another reply may have one


def test_replies_are_asked_for_together_and_once() -> None:
    """Eight different completions in flight at once; those that are equal, and those that are known, are not asked."""
    all_here = threading.Barrier(8)

    def answer(asked: Asked, number: int) -> object:
        if number < 8:
            all_here.wait(5)
        return length(asked, number)

    logged: list[tuple[str, float]] = []
    columns: dict[str, list[Any]] = {}
    texts = ["x" * size for size in range(8)]
    log: dict[str, Any] = {
        "log_metric": lambda name, value: logged.append((name, value)),
        "log_extra": lambda name, values: columns.update({name: values}),
    }
    with reward_server(answer) as server:
        made = judge(server.url, concurrency=16)
        made.sharing_workers = 2
        assert scores(made, [*texts, *texts[::-1]], **log) == [size / 10 for size in [*range(8), *range(8)[::-1]]]
        assert (server.most, len(server.asked)) == (8, 8)
        assert logged == [("cached", 0.0)] * 16
        logged.clear()
        assert scores(made, ["xxx", "x" * 9], **log) == [0.3, 0.9]
        assert len(server.asked) == 9
        assert logged == [("cached", 1.0), ("cached", 0.0)]
        assert columns["judge_reply"] == [f"It has some letters.\n**Score:** {size}/10" for size in (3, 9)]


def test_what_has_no_score_is_asked_again() -> None:
    with reward_server(lambda asked, number: chat("hm") if number == 0 else length(asked, number)) as server:
        made = judge(server.url)
        (first,) = scores(made, ["two"])
        assert isinstance(first, ScoreError)
        assert scores(made, ["two"]) == [0.3]
    assert len(server.asked) == 2


def test_a_cache_belongs_to_model_rubric_and_text(tmp_path: Path) -> None:
    """Only what changes the request asks again; what only reads the reply does not."""
    cache = str(tmp_path / "a" / "replies.jsonl")
    with reward_server(length) as server:
        for options, times in [
            ({}, 1),
            ({}, 1),
            ({"scale": (0, 5), "concurrency": 2, "pattern": r"(\d+)/"}, 1),
            ({"model": "judge-2"}, 2),
            ({"rubric": RUBRIC + " "}, 3),
            ({"max_tokens": 100}, 4),
            ({"body": {"seed": 1}}, 5),
        ]:
            made = judge(server.url, cache=cache, **options)
            assert scores(made, ["two"]) == [0.6 if "scale" in options else 0.3]
            assert len(server.asked) == times
    assert len(Path(cache).read_text().splitlines()) == 5


def test_two_workers_and_a_later_run_share_a_cache(tmp_path: Path) -> None:
    """What one has asked, the other reads during its run; nothing asks twice."""
    cache = str(tmp_path / "replies.jsonl")
    with reward_server(length) as server:
        one, other = judge(server.url, cache=cache), judge(server.url, cache=cache)
        assert scores(one, ["a", "bb"]) == [0.1, 0.2]
        assert scores(other, ["bb", "ccc"]) == [0.2, 0.3]
        assert scores(one, ["ccc", "a"]) == [0.3, 0.1]
        assert len(server.asked) == 3
        prompts = [Prompt("a", 0, "1 + 1 =", "1 + 1 =", (1,), {"answer": "2"})]
        ids, logprobs = np.array([1], np.int32), np.zeros(1, np.float32)
        completions = [tuple(Completion(ids, logprobs, "stop", 0, text) for text in ("a", "bb", "ccc"))]
        made = Judge(server.url, "judge-1", RUBRIC, cache=cache)
        scorer = RewardScorer([made], workers=WorkerOptions(num_workers=2))
        try:
            result = scorer.score(prompts, completions, source="fresh", step=0)
        finally:
            scorer.close()
        assert len(server.asked) == 3
    assert result.groups[0].rewards.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert [one.total / one.weight for one in result.logged.values()] == [1.0]


WRITER = """
import sys
from app.rewards.replies import ReplyCache
cache = ReplyCache(sys.argv[1], 10)
for row in range(300):
    cache.add(f"{sys.argv[2]}-{row}", sys.argv[2] * (9000 if row % 50 == 0 else 30))
"""


def test_many_processes_write_one_cache(tmp_path: Path) -> None:
    """Lines longer than a pipe's atomic write, too, and one that was cut off by a kill."""
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'{"request": "whole", "reply": "r"}\n{"request": "cut", "rep')
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter], env=environment) for letter in "abcd"
    ]
    assert [one.wait(60) for one in writers] == [0] * 4
    first, cut, *lines = path.read_text().splitlines()
    assert (json.loads(first)["request"], cut) == ("whole", '{"request": "cut", "rep')
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 1200
    assert {entry["request"] for entry in entries} == {f"{letter}-{row}" for letter in "abcd" for row in range(300)}
    cache = ReplyCache(str(path), 10_000)
    assert [cache.get(key) for key in ("whole", "cut", "b-50", "c-51")] == ["r", None, "b" * 9000, "c" * 30]


def test_a_writer_waits_for_its_turn(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    cache = ReplyCache(str(path), 2)
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writing = threading.Thread(target=cache.add, args=("a", "reply"))
        writing.start()
        writing.join(0.2)
        assert writing.is_alive() and path.read_bytes() == b""
        fcntl.flock(other, fcntl.LOCK_UN)
    writing.join(5)
    assert json.loads(path.read_text()) == {"request": "a", "reply": "reply"}


def test_a_cache_holds_the_newest_and_follows_its_file(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    cache, other = ReplyCache(str(path), 2), ReplyCache(str(path), 2)
    for key in "abc":
        other.add(key, key)
        other.get("a")
    assert [other.get(key) for key in "abc"] == ["a", None, "c"]  # the one that was not asked for went
    assert cache.get("a") is None
    cache.refresh()
    assert [cache.get(key) for key in "abc"] == [None, "b", "c"]
    path.write_bytes(b"\n[]\n" + json.dumps({"request": "d", "reply": "d"}).encode() + b"\n")
    cache.refresh()
    assert cache.get("d") == "d"
    with pytest.raises(UserError, match=r"The cache .* cannot be written \(Is a directory\). Name another file"):
        ReplyCache(str(tmp_path), 2)


def test_a_cache_without_room_costs_no_score(caplog: pytest.LogCaptureFixture) -> None:
    with reward_server(length) as server:
        made = judge(server.url, cache="/dev/full")
        assert scores(made, ["two", "four"]) == [0.3, 0.4]
    assert [one for one in caplog.messages if "cache" in one] == [
        "The cache of judgements is not written any more: [Errno 28] No space left on device."
    ]


def test_an_answer_that_is_no_chat_refuses_the_judge() -> None:
    with reward_server(lambda *_: {"error": "no such model"}) as server:
        (found,) = scores(judge(server.url), ["two"])
        assert isinstance(found, ScoreError) and found.refused
        assert str(found) == "the answer is not a chat completion: {'error': 'no such model'}"
        scorer = RewardScorer([Judge(server.url, "j", RUBRIC)], workers=WorkerOptions(num_workers=1))
        try:
            with pytest.raises(UserError, match="Reward 'judge' cannot work: the answer is not a chat completion"):
                scorer.try_out([Prompt("a", 0, "?", "?", (1,), {"answer": "2"})])
        finally:
            scorer.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rubric": "Grade {question}"}, r"has the fields \['question'\], but not \{completion\}"),
        ({"rubric": "{completion} as {"}, r"is not a format string \(.*\). Write literal braces as \{\{"),
        ({"rubric": "{completion} {}"}, "is not a format string"),
        ({"pattern": r"Score: \d+"}, "has 0 groups, but expected one"),
        ({"pattern": "("}, "is not a valid regular expression"),
        ({"scale": (5, 5)}, r"scale of app.rewards.Judge is \[5, 5\]"),
        ({"scale": (0, float("inf"))}, r"scale of app.rewards.Judge is \[0, inf\]"),
        ({"cache_entries": 0}, "cache_entries of app.rewards.Judge is 0"),
        ({"url": "127.0.0.1:8000"}, "url of app.rewards.Judge is '127.0.0.1:8000/"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Judge(**{"url": "http://localhost", "model": "j", "rubric": RUBRIC, **options})


def test_what_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs url and model and rubric. Write it as \{class_path: app.rewards.Judge"):
        rewards_of("judge")
    with pytest.raises(
        UserError, match=r"no column 'levle' for rubric of app.rewards.Judge, only 'answer', 'level': did"
    ):
        scores(judge("http://localhost", rubric="{completion}{levle}"), ["a"], level=[1])


def test_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two steps by config alone, of which one reply has no score; then the same again, which asks nothing."""
    place = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("THE_KEY", KEY)

    def small(config: dict[str, Any]) -> None:
        options = {
            "url": f"{server.url}/v1",
            "model": "judge-1",
            "rubric": "{question} {answer}\nGiven: {completion!r}\n",
            "cache": "replies.jsonl",
            "api_key_env": "THE_KEY",
        }
        model(config).update(rewards=[{"class_path": "app.rewards.Judge", "init_args": options}])

    def answer(asked: Asked, number: int) -> object:
        """Fail on the third, which is after the trial's one request."""
        return chat("I cannot say.") if number == 2 else chat(f"Score: {len(given(asked)) % 11}")

    with reward_server(answer) as server:
        place.config(small)
        run, state = place.fit("runs", 2)
        assert state["global_step"] == 2
        asked = len(server.asked)
        assert {one.headers["Authorization"] for one in server.asked} == {f"Bearer {KEY}"}
        assert "reward 'judge' failed on 1 of 4 completions (0 took too long, 1 crashed), first on" in caplog.text
        assert "the judge's reply has no score" in caplog.text
        first = pq.read_table(min((run / "completions").glob("*.parquet")))
        assert any("Score: " in str(reply) for reply in first["judge_reply"].to_pylist())
        again, _ = place.fit("again", 1)
        assert len(server.asked) <= asked + 1  # the one that had no score
    (cached,) = read_scalars(again)["rewards/judge/cached"][1]
    assert cached >= 0.75
    assert not [name for name, content in files(tmp_path).items() if content and KEY.encode() in content]
    assert KEY not in caplog.text


def test_a_judge_whose_rubric_names_no_column_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place.at(tmp_path, monkeypatch, capsys)
    with reward_server(lambda *_: Sent(404, b'{"error": "The model `j` does not exist."}')) as server:
        for rubric, told in [
            ("{completion} {levle}", "no column 'levle' for rubric of app.rewards.Judge, only 'answer', "),
            ("{completion}", 'HTTP 404: {"error": "The model `j` does not exist."}.'),
        ]:
            options = {"url": server.url, "model": "j", "rubric": rubric}
            reward = {"class_path": "app.rewards.Judge", "init_args": options}
            place.config(lambda config, reward=reward: model(config).update(rewards=[reward]))  # type: ignore[misc]
            assert told in place.refused("fit", "--config", "run.yaml")
