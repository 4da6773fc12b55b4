"""Environments of the package `verifiers`, and their tasks as prompts."""

import json
import shutil
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pyarrow.parquet as pq
import pytest

pytest.importorskip("verifiers", reason="needs the extra verifiers: pip install -e '.[verifiers]'")

import verifiers.v1 as vf
from verifiers.v1.mcp import launch

from app.environments import ToolCall, Verifiers
from app.environments.base import Reply
from app.environments.sessions import Event, Sessions
from datamodules.errors import UserError
from datamodules.verifiers import VerifiersTasks, read_tasks
from datamodules.verifiers_generator import rows as rows_of
from tests.support.command import logged
from tests.support.reading_helpers import character_tokenizer
from tests.support.refusal import Place, model

USERS = Path(__file__).parent / "users"


@pytest.fixture(autouse=True)
def _in_the_users_folder(monkeypatch):
    monkeypatch.chdir(USERS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(USERS)])


@pytest.fixture(scope="module")
def adding():
    """Rows of the sums, and the environment in a process of its own, which all tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(USERS)
        sessions = Sessions(Verifiers("adding_tools", load_limit_s=120))
        yield read_tasks("adding_tools", {}, None), sessions
        sessions.close()


def one(sessions: Sessions) -> Event:
    (event,) = sessions.events(60.0)
    return event


def add(a, b) -> ToolCall:
    return ToolCall("add", {"a": a, "b": b})


def opened(sessions: Sessions, row: dict, key: int = 0) -> Event:
    sessions.open(key, row, seed=0)
    return one(sessions)


def said(sessions: Sessions, text: str, *calls: ToolCall) -> Event:
    sessions.respond(0, text, list(calls))
    return one(sessions)


def finished(sessions: Sessions) -> Event:
    sessions.finish(0)
    return one(sessions)


def test_its_tools_are_described(adding):
    _, sessions = adding
    schema, *others = sessions.describe()[""]
    assert [other["function"]["name"] for other in others] == ["draw", "increase"]
    assert schema["type"] == "function" and schema["function"]["name"] == "add"
    assert schema["function"]["description"] == "Add two numbers."
    assert schema["function"]["parameters"]["required"] == ["a", "b"]


def test_a_conversation_with_tools_is_scored_by_its_rewards_and_their_weights(adding):
    rows, sessions = adding
    assert opened(sessions, rows[3]).observation is None
    reply = said(sessions, "", add(3, 2), add("x", 2), ToolCall("subtract", {"a": 1})).reply
    assert reply is not None and not reply.done and reply.calls == 3 and reply.failed_calls == 2
    assert [message["role"] for message in reply.messages] == ["tool"] * 3
    assert reply.messages[0] == {"role": "tool", "name": "add", "content": "5"}
    assert "valid integer" in reply.messages[1]["content"]
    assert reply.messages[2]["content"] == "error: unknown tool 'subtract'"
    assert said(sessions, "5").reply == Reply([], done=True)
    outcome = finished(sessions).outcome
    assert outcome is not None and outcome.reward == 1.25
    assert (outcome.calls, outcome.failed_calls) == (3, 2)


def test_the_next_conversation_of_a_process_knows_nothing_of_the_one_before(adding):
    rows, sessions = adding
    opened(sessions, rows[3])
    said(sessions, "", add(3, 2))
    sessions.abandon(0)
    opened(sessions, rows[3])
    assert said(sessions, "5").reply == Reply([], done=True)
    outcome = finished(sessions).outcome
    assert outcome is not None and outcome.reward == 1.0, "the state of the abandoned one had the tool's result"


def test_what_tools_draw_depends_on_the_seed_of_the_conversation(adding):
    rows, sessions = adding
    drawn = []
    for seed in (1, 2, 1):
        sessions.open(0, rows[1], seed)
        assert one(sessions).kind == "opened"
        reply = said(sessions, "", ToolCall("draw", {}), ToolCall("draw", {})).reply
        drawn.append([message["content"] for message in reply.messages])
        sessions.abandon(0)
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_a_conversation_that_is_ended_at_a_limit_is_scored_as_it_is(adding):
    rows, sessions = adding
    opened(sessions, rows[1])
    said(sessions, "", add(1, 2))
    outcome = finished(sessions).outcome
    assert outcome is not None and outcome.error == "" and outcome.reward == 0.25


def test_a_stop_of_the_task_ends_the_conversation(adding):
    rows, sessions = adding
    opened(sessions, rows[1])
    assert said(sessions, "damn", add(1, 2)).reply == Reply([], done=True, calls=1)
    outcome = finished(sessions).outcome
    assert outcome is not None and outcome.reward == 0.25, "the tool was called, the answer was not given"


def test_a_reward_that_raises_fails_the_conversation(adding):
    rows, sessions = adding
    opened(sessions, rows[1])
    event = said(sessions, "crash")
    assert event.kind == "failed" and "the score crashed" in event.error


def test_a_tool_that_hangs_fails_its_conversation_and_leaves_no_process(adding, tmp_path, monkeypatch):
    """Tool servers lead sessions of their own, but are killed with their environment's process."""
    rows, _ = adding
    monkeypatch.setenv("HOME", str(tmp_path))  # runtimes have their folders below it
    sessions = Sessions(Verifiers("adding_tools", time_limit_s=4, load_limit_s=120))
    try:
        opened(sessions, rows[1])
        sessions.respond(0, "", [ToolCall("increase", {"number": -1})])
        (event,) = sessions.events(60.0)
        assert event.kind == "failed" and "time_limit_s=4" in event.error
        (noted,) = tmp_path.rglob("server.pid")
        server, deadline = int(noted.read_text()), time.monotonic() + 10
        while psutil.pid_exists(server):
            assert time.monotonic() < deadline, "the tool server lives on"
            time.sleep(0.05)
    finally:
        sessions.close()


def test_data_without_the_tasks_are_refused(adding):
    _, sessions = adding
    assert "no columns 'task'" in opened(sessions, {"prompt": "1 + 2 ="}).error


@pytest.fixture
def game():
    return Verifiers("guessing_game").make("")


def test_an_environment_that_speaks_first_adds_to_the_prompt_and_answers_as_the_user(game):
    row = rows_of("guessing_game", {}, None)[7]
    assert row["id"] == "secret-7"
    assert row["prompt"] == [{"role": "system", "content": "Play."}, {"role": "user", "content": ""}]
    assert game.tools() == []
    for _ in range(2):  # the second conversation begins as the first did
        assert game.reset(row) == "Guess a number below 10."
        assert game.respond("5", []) == Reply([{"role": "user", "content": "higher"}])
        assert game.respond("8", []) == Reply([{"role": "user", "content": "lower"}])
        assert game.respond("7", []) == Reply([], done=True)
        assert game.reward() == 2.0
        assert game.final() == {"guessed": 1.0}
    game.reset(row)
    game.respond("5", [])
    assert game.reward() == 0.0, "ended while it waits for a guess"


def test_the_policy_reads_and_gets_what_it_does_with_the_program_of_verifiers(monkeypatch, tmp_path):
    """The reference is `null`, the chat program that `verifiers` ships, and tool servers as `verifiers` starts them."""
    from verifiers.v1.runtimes import SubprocessRuntime

    from app.environments.verifiers.servers import _start_in_runtime

    async def with_this_python(self, source, env, *, activate=True):  # `uv` would install what is installed here
        (tmp_path / "program.py").write_text(source)
        return [sys.executable, str(tmp_path / "program.py")]

    row = rows_of("adding_tools", {}, None)[2]
    agent = {"agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}
    turns = [("I add.", [add(2, 2), add("x", 1)]), ("", [add(4, 4), ToolCall("subtract", {})]), ("4", [])]
    heard = {}
    for name, env in (("ours", {}), ("theirs", agent)):
        if name == "theirs":
            monkeypatch.setattr(SubprocessRuntime, "prepare_uv_script", with_this_python)
            monkeypatch.setattr(launch, "serve_in_runtime", _start_in_runtime)
            monkeypatch.setenv("PYTHONPATH", str(USERS))
        environment = Verifiers("adding_tools", env=env).make("")
        observation = environment.reset(row)
        replies = [environment.respond(text, calls) for text, calls in turns]
        messages = [reply.messages for reply in replies]
        heard[name] = observation, environment._tools, messages, environment.reward(), environment.final()
    assert heard["ours"] == heard["theirs"]
    assert heard["ours"][3] == 1.25


def test_an_environment_that_begins_a_second_conversation_is_refused():
    client = {"model": "other", "client": {"type": "eval", "base_url": "http://127.0.0.1:9", "api_key_var": "NONE"}}
    environment = Verifiers("two_players", env={"second": client}).make("")
    environment.reset(rows_of("two_players", {}, None)[0])
    with pytest.raises(NotImplementedError, match="begins another one"):
        environment.respond("hello", [])


USER = """What is 1 + 2?
And?
###DONE###"""


class UsersModel(BaseHTTPRequestHandler):
    """Says the lines of `USER`, one after the other."""

    def do_POST(self):
        said = sum(message["role"] == "assistant" for message in self.request_body()["messages"])
        message = {"role": "assistant", "content": USER.split("\n")[said]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "user", "choices": [choice]}
        body = json.dumps(completion).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def request_body(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_):
        pass


def test_a_simulated_user_is_an_agent_with_a_model_of_its_own():
    server = ThreadingHTTPServer(("127.0.0.1", 0), UsersModel)
    Thread(target=server.serve_forever, daemon=True).start()
    client = {"type": "eval", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "api_key_var": "NONE"}
    user = {"model": "user", "client": client, "harness": {"id": "dots"}, "runtime": {"type": "subprocess"}}
    environment = Verifiers("adding_tools", env={"id": "user-sim", "user": user}).make("")
    try:
        with pytest.raises(ValueError, match="Set speaks_first"):
            environment.reset(rows_of("adding_tools", {}, None)[1])
        assert environment.reset(rows_of("adding_tools", {}, None, speaks_first=True)[1]) == "What is 1 + 2?"
        assert environment.respond("", [add(1, 2)]).messages[0]["content"] == "3"
        assert environment.respond("I know", []) == Reply([{"role": "user", "content": "And?"}])
        assert environment.respond("3", []) == Reply([], done=True)
        assert environment.reward() == 1.25
        assert environment.final() == {"right": 1.0, "used_tool": 1.0, "calls": 1.0, "user_turns": 3.0}
    finally:
        server.shutdown()


def test_it_has_to_be_clear_which_agent_is_the_policy():
    with pytest.raises(UserError, match=r"the agents first, second, of which first, second would be the policy"):
        Verifiers("two_players").make("")


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [({"cuont": 3}, {}, "cuont"), ({}, {"agent": {"harness": {"id": "nul"}}}, "nul"), ({}, {"player": {}}, "player")],
)
def test_a_configuration_that_verifiers_rejects_is_told(arguments, env, told):
    with pytest.raises(UserError, match=f"does not accept.*{told}"):
        Verifiers("adding_tools", arguments, env).make("")


def test_a_taskset_that_is_not_there_is_told():
    with pytest.raises(UserError, match="'addding_tools' cannot be imported"):
        Verifiers("addding_tools").load()
    with pytest.raises(UserError, match="'addding_tools' cannot be read: ModuleNotFoundError"):
        read_tasks("addding_tools", {}, None)


def test_tasks_are_prompts():
    tokenizer = character_tokenizer(chat=True)
    pool = VerifiersTasks("adding_tools", {"count": 6}, limit=5).load(tokenizer, seed=0)
    assert len(pool) == 5
    prompt = pool[3]
    assert prompt.question == "State the final answer to the following arithmetic problem: 3 + 2 ="
    assert tokenizer.decode(prompt.token_ids) == f"<|system|>Add.<|end|><|user|>{prompt.question}<|end|><|assistant|>"
    assert json.loads(prompt.columns["task"])["answer"] == 5


def test_tasks_without_a_prompt_are_prompts_to_which_the_environment_adds():
    tokenizer = character_tokenizer(chat=True)
    pool = VerifiersTasks("guessing_game").load(tokenizer, seed=0)
    assert len(pool) == 10
    assert tokenizer.decode(pool[3].token_ids) == "<|system|>Play.<|end|><|user|><|end|><|assistant|>"


def test_a_taskset_that_never_ends_needs_a_limit():
    with pytest.raises(ValueError, match="never ends"):
        rows_of("adding_tools", {"endless": True}, None)
    assert len(rows_of("adding_tools", {"endless": True}, 2)) == 2


def test_tasks_survive_the_way_through_the_data():
    rows = rows_of("adding_tools", {}, None)
    config = vf.taskset_config_type("adding_tools")(id="adding_tools")
    for task, row in zip(vf.load_taskset(config), rows, strict=True):
        assert type(task.data).model_validate_json(row["task"]) == task.data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taskset", "arguments", "start", "role"),
    [
        ("adding_tools", {"instruction": None}, "+", "tool"),  # what the policy writes between + and = is a call
        ("guessing_game", {}, "x", "user"),  # no number begins with x, so all that it writes is a guess
    ],
)
def test_it_trains_by_config_alone(taskset, arguments, start, role, tmp_path, monkeypatch, capsys):
    place = Place.at(tmp_path, monkeypatch, capsys)
    shutil.copy(USERS / f"{taskset}.py", tmp_path)
    plain = {"start": start, "end": "=", "tool": "increase", "argument": "number", "reply": "{content};"}

    def change(config: dict) -> None:
        options = {"taskset": taskset, "arguments": arguments, "protocol": plain, "max_turns": 3, "load_limit_s": 120}
        model(config).update(
            environment={"class_path": "app.environments.Verifiers", "init_args": options},
            rewards=[{"class_path": "app.rewards.Environment"}],
            sampling={"num_generations": 4, "max_completion_length": 60},
        )
        config["data"]["init_args"]["train"] = {
            "class_path": "datamodules.verifiers.VerifiersTasks",
            "init_args": {"taskset": taskset, "arguments": arguments, "template": "{question}\n"},
        }

    place.config(change)
    run, _ = place.fit("runs", 5)
    assert len(logged(run)["reward"]) == 5
    assert set(logged(run)["environment/failed"].values()) == {0.0}
    rows = [row for file in (run / "completions").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert {message["role"] for row in rows for message in json.loads(row["turns"])} == {"assistant", role}
