"""Environments behind OpenEnv servers, with real servers in processes of their own."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("openenv.core", reason="needs the extra openenv: pip install -e '.[openenv]'")

from app.environments import OpenEnv, ToolCall, Tools
from app.environments.base import Reply
from app.environments.sessions import Event, Sessions
from datamodules.errors import UserError
from tests.support.command import logged
from tests.support.refusal import Place, model

SERVERS = Path(__file__).parent / "users" / "openenv_servers.py"

WRAPPER = '''
import os
from openenv.core.generic_client import GenericEnvClient

class Player:
    """As TRL's documentation writes environments: a client, and methods that are tools."""

    def __init__(self):
        self.client = GenericEnvClient(base_url=os.environ["OPENENV_URL"]).sync()
        self.client.connect()

    def reset(self, seed, **columns) -> str:
        self.reward = 0.0
        return self.client.reset(seed=seed).observation["text"]

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the number.
        """
        result = self.client.step({"number": number})
        self.reward = result.reward
        return result.observation["text"]

    def get_reward(self) -> float:
        return self.reward
'''


@contextmanager
def server(folder: Path, kind: str, sessions: int):
    port = folder / f"port-{kind}"
    process = subprocess.Popen([sys.executable, SERVERS, port, kind, str(sessions)], stderr=subprocess.DEVNULL)
    try:
        while not (port.exists() and port.read_text()):
            assert process.poll() is None, "the server ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text()}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def guessing(tmp_path_factory):
    """A server that takes two sessions at a time."""
    with server(tmp_path_factory.mktemp("server"), "guessing", 2) as url:
        yield url


@contextmanager
def sessions_of(options):
    sessions = Sessions(options)
    try:
        yield sessions
    finally:
        sessions.close()


@pytest.fixture(scope="module")
def shared(guessing):
    """Processes for conversations with the server, no more than it has sessions."""
    with sessions_of(OpenEnv(guessing, reset_columns=["seed"], reward="sum", max_sessions=2)) as sessions:
        yield sessions


def one(sessions: Sessions) -> Event:
    (event,) = sessions.events(60.0)
    return event


def guess(number, tool: str = "step", **more) -> list[ToolCall]:
    return [ToolCall(tool, {"number": number, **more})]


def tool_says(name: str, *contents: str) -> list[dict[str, str]]:
    return [{"role": "tool", "name": name, "content": content} for content in contents]


def test_an_action_is_a_tool_with_its_fields(guessing):
    (schema,) = OpenEnv(guessing, tool="guess").make("").tools()
    assert schema["function"] == {
        "name": "guess",
        "description": "Guess the number.",
        "parameters": {
            "type": "object",
            "properties": {
                "number": {"title": "Number", "type": "integer"},
                "comment": {"default": "", "title": "Comment", "type": "string"},
            },
            "required": ["number"],
        },
    }


def test_a_conversation_of_several_steps_in_a_process(shared):
    shared.open(0, {"prompt": "Play.", "seed": 7}, seed=0)
    assert one(shared).observation == "Guess a number below 10."
    shared.respond(0, "", guess(3))
    assert one(shared).reply == Reply(tool_says("step", "higher"), calls=1)
    shared.respond(0, "", [*guess("x"), *guess(9, comment="hm"), *guess(1, tool="walk"), *guess(9)])
    reply = one(shared).reply
    assert reply is not None and (reply.calls, reply.failed_calls, reply.done) == (4, 3, False)
    assert [message["content"] for message in reply.messages] == [
        "Server error: Invalid message (code: VALIDATION_ERROR)",
        "Server error: no comments (code: EXECUTION_ERROR)",
        "Tool walk not found.",
        "lower",
    ]
    shared.respond(0, "", [*guess(7), *guess(7)])
    assert one(shared).reply == Reply(tool_says("step", "right", "The episode is over."), True, 2, 1)
    shared.finish(0)
    outcome = one(shared).outcome
    assert outcome is not None and outcome.reward == 0.75, "-0.125 twice, and 1"


@pytest.mark.parametrize(("kind", "reward"), [("last", -0.125), ("sum", -0.25)])
def test_rewards_of_steps_make_that_of_the_conversation(guessing, kind, reward):
    environment = OpenEnv(guessing, reset_columns=["seed"], reward=kind).make("")
    for _ in range(2):  # nothing is left of the first conversation in the second
        environment.reset({"seed": 5})
        assert environment.respond("", guess(1)).messages == tool_says("step", "higher")
        assert environment.respond("I think", guess(2)).messages == tool_says("step", "higher")
        assert environment.respond("I give up", []) == Reply([], done=True)
        assert environment.reward() == reward
    environment.reset({"seed": 5})
    assert environment.reward() == 0.0, "no step"


def test_more_conversations_than_the_server_takes_wait_for_processes(shared):
    """With as many processes as sessions, each begins when another one has freed its session."""
    shared.describe()
    for key in range(8):
        shared.open(key, {"seed": key}, seed=0)
    rewards = {}
    while len(rewards) < 8:
        for event in shared.events(60.0):
            assert event.kind != "failed", event.error
            if event.kind == "opened":
                shared.respond(event.key, "", guess(event.key))
            elif event.kind == "replied":
                shared.finish(event.key)
            else:
                rewards[event.key] = event.outcome.reward
    assert rewards == dict.fromkeys(range(8), 1.0)


def test_a_server_that_is_full_says_what_to_do(guessing, monkeypatch):
    monkeypatch.setattr("app.environments.openenv._PATIENCE_S", 0.2)
    environments = [OpenEnv(guessing).make("") for _ in range(3)]
    for environment in environments[:2]:
        environment.reset({})
    with pytest.raises(UserError, match=r"no further session .*2/2 sessions.*Lower model.environment.max_sessions"):
        environments[2].reset({})
    assert environments[0].reward() == 0.0, "ends the session"
    monkeypatch.setattr("app.environments.openenv._PATIENCE_S", 5.0)
    assert environments[2].reset({}) == "Guess a number below 10."
    for environment in environments[1:]:
        environment.reward()


def test_a_reset_that_fails_fails_the_conversation(shared):
    shared.open(0, {"seed": 99}, seed=0)
    event = one(shared)
    assert event.kind == "failed" and "there is no such game" in event.error
    shared.open(1, {}, seed=0)
    assert "'seed', which is no column" in one(shared).error


def test_tools_of_a_server_are_tools(tmp_path):
    with server(tmp_path, "adding", 1) as url:
        environment = OpenEnv(url).make("")
        assert [one["function"]["name"] for one in environment.tools()] == ["add", "divide"]
        assert environment.tools()[0]["function"]["parameters"]["required"] == ["a", "b"]
        assert environment.reset({}) is None
        calls = [
            ToolCall("add", {"a": 1, "b": 2}),
            ToolCall("divide", {"a": 1, "b": 4}),
            ToolCall("divide", {"a": 1, "b": 0}),
            ToolCall("step", {}),
        ]
        reply = environment.respond("", calls)
        assert [message["content"] for message in reply.messages] == [
            "3",
            "0.25",
            "Error calling tool 'divide': float division by zero",
            "Tool step not found.",
        ]
        assert (reply.calls, reply.failed_calls, reply.done) == (4, 2, False)
        assert environment.reward() is None, "this server gives no rewards"


def test_a_class_with_a_client_as_trl_documents_it_says_the_same(guessing, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENENV_URL", guessing)
    (tmp_path / "player.py").write_text(WRAPPER)
    heard = []
    for options, tool in (
        (Tools(f"{tmp_path / 'player.py'}:Player"), "guess"),
        (OpenEnv(tool="guess", reset_columns=["seed"]), "guess"),
    ):
        with sessions_of(options) as sessions:
            sessions.open(0, {"seed": 6}, seed=0)
            said = [one(sessions).observation]
            for number in (2, 6):
                sessions.respond(0, "", guess(number, tool))
                reply = one(sessions).reply
                assert reply is not None
                said.append(reply.messages)
            sessions.finish(0)
            outcome = one(sessions).outcome
            assert outcome is not None
            heard.append((said, outcome.reward))
    assert heard[0] == heard[1]
    assert heard[1][1] == 1.0


def test_no_server_and_no_address_are_told(monkeypatch):
    monkeypatch.delenv("OPENENV_URL", raising=False)
    with pytest.raises(UserError, match="url is '', but must be an address"):
        OpenEnv()
    with pytest.raises(UserError, match=r"No OpenEnv server answers at http://127.0.0.1:9"):
        OpenEnv("http://127.0.0.1:9").make("")


@pytest.mark.slow
def test_it_trains_by_config_alone(guessing, tmp_path, monkeypatch, capsys):
    place = Place.at(tmp_path, monkeypatch, capsys)
    prompt = "State the final answer to the following arithmetic problem: {a} + 2 ="
    rows = [{"id": str(a), "prompt": prompt.format(a=a), "seed": a} for a in range(8)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # What the policy writes between + and = is a guess.
    plain = {"start": "+", "end": "=", "tool": "step", "argument": "number", "reply": "{content};"}

    def change(config: dict) -> None:
        options = {"url": guessing, "reset_columns": ["seed"], "protocol": plain, "max_turns": 3, "max_sessions": 2}
        model(config).update(
            environment={"class_path": "app.environments.OpenEnv", "init_args": options},
            rewards=[{"class_path": "app.rewards.Environment"}],
            sampling={"num_generations": 4, "max_completion_length": 60},
        )

    place.config(change)
    run, _ = place.fit("runs", 5)
    assert set(logged(run)["environment/failed"].values()) == {0.0}
    rows = [row for file in (run / "completions").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    said = {message["content"] for row in rows for message in json.loads(row["turns"]) if message["role"] == "tool"}
    assert said & {"higher", "lower", "right"}
