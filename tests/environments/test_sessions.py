"""Conversations with environments in processes of their own: hostile tools, and what others notice of them."""

import importlib
import pickle
import re
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from app.environments import ToolCall, Tools
from app.environments.sessions import Event, Sessions
from datamodules.errors import UserError

ENVIRONMENTS = '''
import asyncio, os, random, signal, socket, subprocess, sys, threading, time
import numpy as np

class Counter:
    """Counts, and does harm on request."""

    def __init__(self):
        self.built = random.random()
        self.kept = 0

    def reset(self, start=0, fail="", **columns) -> str | None:
        if fail == "reset":
            raise KeyError("no such level")
        if fail == "memory":
            bytearray(2**32)
        self.fail, self.count, self.columns = fail, start, columns
        self.drawn = [random.random(), float(np.random.rand())]
        self.kept += 1
        return columns.get("hint")

    def add(self, by: int) -> int:
        """Add to the count.

        Args:
            by: how much.
        """
        self.count += by
        return self.count

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def state(self) -> str:
        """Return what it holds."""
        return repr((self.built, self.drawn, random.random(), float(np.random.rand())))

    def visits(self) -> str:
        """Return the process, and how often the object was reset."""
        return f"{os.getpid()} {self.kept}"

    def act(self, what: str) -> str:
        """Do harm.

        Args:
            what: which.
        """
        return ACTS[what]()

    def get_reward(self) -> float:
        if self.fail == "reward":
            return {}["absent"]
        return {"none": None, "nan": float("nan"), "text": "1"}.get(self.fail, float(self.count))

class Locked(Counter):
    def __init__(self):
        self.lock = threading.Lock()
        super().__init__()

def children():
    for attributes in ({}, {"start_new_session": True}):
        subprocess.Popen(["sleep", "611"], **attributes)
        if os.fork() == 0:  # a child with a child of its own
            os.setsid()
            subprocess.Popen(["sleep", "611"])
            time.sleep(611)
    time.sleep(600)

def write_to_all():
    for descriptor in range(1024):
        try:
            if socket.socket(fileno=os.dup(descriptor)).family == socket.AF_UNIX:
                os.write(descriptor, b"rubbish" * 100)
        except OSError:
            pass
    return "wrote"

def flood():
    """Print 8 MiB, as Python and by a process of its own."""
    print("first words", flush=True)
    for _ in range(64):
        print("x" * 2**16, flush=True)
    subprocess.run([sys.executable, "-c", "print('y' * 2**22)"])
    os.write(2, b"last words")
    return "printed"

ACTS = {
    "raise": lambda: 1 / 0, "hang": lambda: time.sleep(600), "exit": lambda: os._exit(3), "leave": lambda: sys.exit(0),
    "memory": lambda: str(len(bytearray(2**32))), "long": lambda: "x" * 10**7,
    "endless": lambda: "".join(iter(str, None)),
    "print": lambda: print("noise") or "printed", "flood": flood,
    "say": lambda: print("another process", flush=True), "children": children, "write": write_to_all,
    "surrogate": lambda: "\\ud83d!", "fork": lambda: str(os.fork() == 0), "kill": lambda: os.kill(0, signal.SIGKILL),
    "stop": lambda: threading.Timer(0.2, os._exit, [1]).start() or "soon",
}
'''
LIMITS = {"time_limit_s": 1.0, "memory_limit_mb": 256}


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("environments") / "counting_env.py"
    file.write_text(ENVIRONMENTS)
    return file


@contextmanager
def sessions_of(factory, **limits):
    sessions = Sessions(Tools(factory, **{**LIMITS, **limits}))
    try:
        yield sessions
    finally:
        sessions.close()


@pytest.fixture(scope="module")
def shared(module):
    with sessions_of(f"{module}:Counter") as made:
        yield made


@pytest.fixture
def sessions(shared):
    """Sessions without conversations, which have survived the tests before."""
    yield shared
    for key in range(10):
        shared.abandon(key)


def call(tool: str, **arguments) -> list[ToolCall]:
    return [ToolCall(tool, arguments)]


def one(sessions: Sessions, timeout: float = 30.0) -> Event:
    """The next event, which must be the only one."""
    (event,) = sessions.events(timeout)
    return event


def opened(sessions: Sessions, key: int = 0, seed: int = 0, **columns) -> None:
    sessions.open(key, columns, seed)
    event = one(sessions)
    assert (event.key, event.kind, event.error) == (key, "opened", "")


def said(sessions: Sessions, tool: str, key: int = 0, **arguments) -> str:
    sessions.respond(key, "", call(tool, **arguments))
    event = one(sessions)
    assert (event.key, event.kind) == (key, "replied"), event.error
    (message,) = event.reply.messages
    assert message["role"] == "tool"
    return message["content"]


def sleepers() -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", "611"]:
            found.add(process.pid)
    return found


def test_a_conversation(sessions):
    sessions.open(7, {"prompt": "?", "start": 3, "hint": "Count."}, 0)
    event = one(sessions)
    assert (event.key, event.kind, event.observation) == (7, "opened", "Count.")
    assert said(sessions, "add", key=7, by=4) == "7"
    sessions.respond(
        7, "text", [*call("add", by=1), *call("act", what="raise"), *call("subtract"), *call("wait", seconds=0)]
    )
    reply = one(sessions).reply
    assert [message["content"] for message in reply.messages] == [
        "8", "{'error': 'division by zero'}", "{'error': 'Tool subtract not found.'}", "waited"
    ]  # fmt: skip
    assert (reply.done, reply.calls, reply.failed_calls) == (False, 4, 2)
    sessions.respond(7, "", call("add", by=1), ["not JSON"])
    messages = one(sessions).reply.messages
    assert [(one["name"], one["content"]) for one in messages] == [("unknown", "{'error': 'not JSON'}"), ("add", "9")]
    sessions.respond(7, "", [], ["not JSON"])
    reply = one(sessions).reply
    assert (reply.done, reply.calls, reply.failed_calls, len(reply.messages)) == (False, 1, 1, 1)
    sessions.respond(7, "9", [])
    reply = one(sessions).reply
    assert reply.done
    assert reply.messages == []
    sessions.finish(7)
    event = one(sessions)
    assert event.kind == "finished"
    assert (event.outcome.reward, event.outcome.calls, event.outcome.failed_calls, event.error) == (9.0, 8, 4, "")
    assert pickle.loads(event.outcome.environment).count == 9  # noqa: S301 (our own)
    assert sessions.events(None) == []


FAILURES = {
    "hang": "it took more than time_limit_s=1",
    "endless": "time_limit_s=1|memory_limit_mb=256",
    "memory": "it took more than memory_limit_mb=256",
    "exit": "its process ended",
    "kill": "its process ended",
    "leave": r"SystemExit: 0 \(counting_env.py, line \d+\)",
    "write": "something else wrote to its process's socket",
}


@pytest.mark.parametrize("act", FAILURES)
def test_a_harmful_tool_costs_its_own_conversation_only(sessions, act):
    opened(sessions, 0)
    opened(sessions, 1)
    sessions.respond(0, "", call("act", what=act))
    slowest = 0.0
    failed: list[Event] = []
    start = time.monotonic()
    while not failed and time.monotonic() < start + 10:
        sessions.respond(1, "", call("add", by=1))
        begun = time.monotonic()
        found: list[Event] = []
        while not [event for event in found if event.key == 1]:
            found += sessions.events(5.0)
        slowest = max(slowest, time.monotonic() - begun)
        assert {event.kind for event in found if event.key == 1} == {"replied"}
        failed = [event for event in found if event.key == 0]
        time.sleep(0.02)
    (event,) = failed
    assert event.kind == "failed"
    assert event.error == event.outcome.error
    assert re.search(FAILURES[act], event.error), event.error
    assert "\n" not in event.error
    assert (event.outcome.calls, event.outcome.failed_calls, event.outcome.reward) == (1, 1, None)
    assert time.monotonic() - start < 3.0
    assert slowest < 0.5
    opened(sessions, 0)  # the key may be used again, in another process
    assert said(sessions, "add", by=2) == "2"


def test_what_a_process_has_started_is_killed_with_it(sessions):
    before = sleepers()
    opened(sessions)
    sessions.respond(0, "", call("act", what="children"))
    deadline = time.monotonic() + 5
    while len(sleepers() - before) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
        assert sessions.events(0) == []
    assert len(sleepers() - before) == 4
    assert one(sessions).kind == "failed"
    deadline = time.monotonic() + 5
    while sleepers() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sleepers() <= before


def test_long_replies_are_cut_and_odd_ones_pass(sessions):
    opened(sessions)
    content = said(sessions, "act", what="long")
    assert content == "x" * 4096 + " [cut: 4096 of 10000000 characters]"
    assert said(sessions, "act", what="print") == "printed"
    assert said(sessions, "act", what="surrogate") == "?!"
    assert said(sessions, "act", what="fork") == "False"
    assert [said(sessions, "add", by=1) for _ in range(6)] == list("123456")


def test_what_a_process_prints_is_passed_on_up_to_a_limit(module, capfd):
    with sessions_of(f"{module}:Counter", time_limit_s=5.0) as sessions:  # whose output is this test's
        for key in range(2):
            opened(sessions, key)
        assert said(sessions, "act", what="flood") == "printed"  # it does not wait for its output
        assert said(sessions, "act", key=1, what="say") == "None"
        printed, deadline = "", time.monotonic() + 5
        while not ("left out]" in printed and "another process" in printed) and time.monotonic() < deadline:
            time.sleep(0.02)
            printed += "".join(capfd.readouterr())
    begins, says_so, last = printed[:14] == "first words\nxx", printed.count("left out]"), "last words" in printed
    assert (begins, says_so, last) == (True, 1, False)
    assert 2**20 <= len(printed) < 2**20 + 200
    assert "another process" in printed[-200:]


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        ("reset", r"KeyError: 'no such level' \(counting_env.py, line \d+\)"),
        ("memory", "it took more than memory_limit_mb=256"),
        ("reward", r"KeyError: 'absent' \(counting_env.py, line \d+\)"),
        ("nan", "its reward function returned nan, expected a finite number or None"),
        ("text", "its reward function returned '1', expected a finite number or None"),
    ],
)
def test_a_failing_reset_or_reward_fails_its_conversation(sessions, fail, error):
    sessions.open(0, {"fail": fail}, 0)
    event = one(sessions)
    if event.kind == "opened":
        sessions.finish(0)
        event = one(sessions)
    assert event.kind == "failed"
    assert re.search(error, event.error), event.error
    opened(sessions, fail="none")
    sessions.finish(0)
    assert one(sessions).outcome.reward is None


def test_a_process_that_ends_between_turns_fails_the_next_request(sessions):
    opened(sessions)
    assert said(sessions, "act", what="stop") == "soon"
    time.sleep(0.5)
    assert sessions.events(0.1) == []
    sessions.finish(0)
    assert one(sessions).error == "its process ended"
    opened(sessions)


def test_an_object_that_does_not_pickle_still_has_its_reward(module):
    with sessions_of(f"{module}:Locked") as sessions:
        opened(sessions, start=2)
        sessions.finish(0)
        outcome = one(sessions).outcome
    assert (outcome.reward, outcome.environment, outcome.error) == (2.0, None, "")


def test_final_objects_are_of_the_class_that_the_rewards_can_import(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    monkeypatch.syspath_prepend(module.parent)
    with sessions_of("counting_env.py:Counter") as sessions:
        opened(sessions, start=2)
        sessions.finish(0)
        outcome = one(sessions).outcome
    counting_env = importlib.import_module("counting_env")
    monkeypatch.setitem(sys.modules, "counting_env", sys.modules.pop("counting_env"))  # forget it after the test
    assert isinstance(pickle.loads(outcome.environment), counting_env.Counter)  # noqa: S301 (our own)


def test_processes_are_reused_and_the_others_wait(module):
    with sessions_of(f"{module}:Counter", max_sessions=2) as sessions:
        for key in range(5):
            sessions.open(key, {}, key)
        visits = defaultdict(list)
        pending = 5
        while pending:
            for event in sessions.events(30):
                if event.kind == "opened":
                    sessions.respond(event.key, "", call("visits"))
                elif event.kind == "replied":
                    process, visit = event.reply.messages[0]["content"].split()
                    visits[process].append(int(visit))
                    sessions.finish(event.key)
                else:
                    assert event.kind == "finished"
                    pending -= 1
    assert len(visits) == 2
    assert all(counts == list(range(1, len(counts) + 1)) for counts in visits.values())


def test_waiting_conversations_are_nothing_to_wait_for(module):
    with sessions_of(f"{module}:Counter", max_sessions=1) as sessions:
        opened(sessions, 0)
        sessions.open(1, {}, 0)
        assert sessions.events(None) == []
        sessions.respond(0, "", call("act", what="hang"))
        sessions.abandon(0)
        assert [event.key for event in sessions.events(None)] == [1]
        sessions.open(2, {}, 0)
        sessions.abandon(2)
        sessions.abandon(1)
        opened(sessions, 3)


def test_the_seed_alone_decides_what_is_drawn(module):
    def drawn(seeds: list[int], max_sessions: int) -> dict[int, str]:
        states = {}
        with sessions_of(f"{module}:Counter", max_sessions=max_sessions) as sessions:
            for key, seed in enumerate(seeds):
                sessions.open(key, {}, seed)
            while len(states) < len(seeds):
                for event in sessions.events(30):
                    if event.kind == "opened":
                        sessions.respond(event.key, "", call("state"))
                    elif event.kind == "replied":
                        states[seeds[event.key]] = event.reply.messages[0]["content"]
                        sessions.finish(event.key)
        return states

    one_process = drawn([5, 6, 2**62 + 1], 1)
    assert drawn([2**62 + 1, 6, 5], 3) == one_process
    assert len(set(one_process.values())) == 3


def test_a_dict_of_factories(module):
    with sessions_of({"a": f"{module}:Counter", "b": f"{module}:Locked"}) as sessions:
        assert set(sessions.describe()) == {"a", "b"}
        opened(sessions, 0, environment="a", start=1)
        opened(sessions, 1, environment="b", start=2)
        for key in (0, 1):
            sessions.finish(key)
            outcome = one(sessions).outcome
            assert (outcome.reward, outcome.environment is None) == (key + 1.0, key == 1)
        sessions.open(2, {"environment": "c"}, 0)
        assert one(sessions).error == "the row's column 'environment' is 'c', but the environments are 'a', 'b'"


def test_describe(sessions):
    (schemas,) = sessions.describe().values()
    names = [schema["function"]["name"] for schema in schemas]
    assert names == ["act", "add", "state", "visits", "wait"]
    assert schemas[1]["function"]["parameters"] == {
        "type": "object", "properties": {"by": {"type": "integer", "description": "how much."}}, "required": ["by"]
    }  # fmt: skip
    assert sessions.describe() == {"": schemas}


BROKEN = {
    "raises": ("import absent_module", "importing '.*' fails .*No module named 'absent_module'"),
    "hangs": ("import time; time.sleep(600)", "was not imported and built within load_limit_s=1 s"),
    "ends": ("import os; os._exit(1)", "cannot be imported: its process ended"),
    "leaves": ("import sys; sys.exit(2)", "cannot be imported: SystemExit: 2"),
    "lacks": ("class Else: pass", "has no 'Env'; did you mean|choose one of 'Else'"),
    "no_reset": ("class Env: pass", r"The environment 'Env' has no method reset"),
    "undescribed": ("class Env:\n def reset(self): pass\n def f(self, x): return x", "The tool 'f' of the environment"),
    "factory_raises": ("def Env(): raise OSError('no')", r"cannot be used: OSError: no \(broken.py, line 1\)"),
    "factory_hangs": ("import time\ndef Env(): time.sleep(600)", "was not imported and built within load_limit_s=1 s"),
}  # fmt: skip


def open_three(sessions: Sessions) -> None:
    for key in range(3):
        sessions.open(key, {}, 0)
    while events := sessions.events(None):
        assert {event.error for event in events} == {"its process ended"}


@pytest.mark.parametrize("kind", BROKEN)
def test_code_that_cannot_be_used_is_refused_in_one_line(tmp_path, kind):
    code, told = BROKEN[kind]
    (tmp_path / "broken.py").write_text(code)
    with sessions_of(f"{tmp_path / 'broken.py'}:Env", load_limit_s=1.0 if "hangs" in kind else 30.0) as sessions:
        with pytest.raises(UserError, match=told) as refusal:
            sessions.describe()
        assert "\n" not in str(refusal.value)
        if kind not in ("no_reset", "undescribed", "factory_raises", "factory_hangs"):
            with pytest.raises(UserError, match=told):  # at once, or with the third process that ends
                open_three(sessions)


def test_a_killed_server_costs_the_conversations_of_the_moment(sessions):
    opened(sessions, 0)
    opened(sessions, 1)
    sessions.finish(1)
    assert one(sessions).kind == "finished"
    server = next(p for p in psutil.Process().children() if "app.environments.worker" in p.cmdline())
    forked = server.children()
    server.kill()
    server.wait()
    psutil.wait_procs(forked, timeout=5)
    sessions.respond(0, "", call("add", by=1))
    assert one(sessions).error == "its process ended"
    opened(sessions, 0)


def test_processes_end_with_close(sessions):
    opened(sessions)
    pid = int(said(sessions, "visits").split()[0])
    assert psutil.pid_exists(pid)
    sessions.close()
    deadline = time.monotonic() + 2
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)
    opened(sessions)
