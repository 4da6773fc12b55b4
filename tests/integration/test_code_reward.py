"""The reward that runs generated programs: right, wrong and hostile ones, at every isolation that the system gives."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from app.reporting.curves import read_scalars
from app.rewards import Code, RewardScorer, WorkerOptions
from app.rewards.code import kernel
from app.rewards.code.cases import read_cases, same_output
from app.rewards.code.sandbox import Isolation
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt
from tests.support.refusal import Place, model, source, write_pool

LEVELS = ["namespaces", "filters", *(["bubblewrap"] if shutil.which("bwrap") else [])]
SECRET = "a-key-that-no-program-may-see"
DOUBLE = "def double(x):\n    return 2 * x"
ASSERTS = {"tests": ["print(1)\nassert double(2) == 4", "assert all([double('a') == 'aa'])"]}
ECHO = "print(int(input()) * 2)"
STDIN = {"input_output": json.dumps({"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]})}


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> Isolation:
    if request.param == "namespaces" and sys.prefix.startswith("/tmp/"):
        pytest.skip("the environment lies under /tmp, which is empty for programs in namespaces")
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which those of programs are made."""
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def reward(level: Isolation, folders: Path) -> Iterator[Code]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_KEY", SECRET)
        patch.setenv("TMPDIR", str(folders))
        made = loaded(isolation=level, time_limit_s=2.0, memory_limit_mb=300, score="fraction", num_processes=2)
        yield made
    close(made)


def test_namespaces_refuse_an_environment_that_programs_could_not_see() -> None:
    with pytest.raises(OSError, match=r"/tmp/clone/\.venv lies under /tmp"):
        kernel.enter_namespaces(["/usr", "/tmp/clone/.venv"])


def loaded(**options: Any) -> Code:
    made = Code(**options)
    made.load()
    return made


def close(made: Code) -> None:
    for process in made._sandbox._idle:
        process.close()
    made._loop.close()


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


def scores(made: Code, *rows: tuple[str, dict[str, Any]]) -> list[float | None]:
    """Score pairs of a program and the columns of its row."""
    names = {name for _, row in rows for name in row}
    columns = {name: [row.get(name) for _, row in rows] for name in names}
    texts = [fenced(program) for program, _ in rows]
    return list(made(["?"] * len(rows), texts, [[1]] * len(rows), **columns))


FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "asserts": (ASSERTS, "from __future__ import annotations\n" + DOUBLE, "def double(x): return x"),
    "mbpp": (
        {"test_list": np.array(["assert height(root) == 2"], object),
         "test_setup_code": "root = Node(1)\nroot.left = Node(2)"},
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\n"
        "def height(n): return 0 if n is None else 1 + height(n.left)",
        "class Node:\n    def __init__(self, v): self.v, self.left = v, None\ndef height(n): return 1",
    ),
    "humaneval": (
        {"test": "def check(candidate):\n    assert candidate([1.5]) == (1.5, {1})\n"
         "    assert list(candidate([])) == [0, set()]",
         "entry_point": "f"},
        "def f(x: List[float]) -> Tuple[float, Set[int]]: return (sum(x), {int(i) for i in x})",
        "def f(x): return [sum(x), {int(i) for i in x}]",
    ),
    "apps": (STDIN, ECHO, "print(4)"),
    "apps_function": (
        {"input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [1, 2]]})},
        "class Solution:\n    def add(self, a, b): return (*a, *b) if isinstance(a, list) else a + b",
        "def add(a, b): return 0",
    ),
    "livecodebench": (
        {"public_test_cases": json.dumps([{"input": "[1, 2]\n1", "output": "3", "testtype": "functional"}]),
         "metadata": json.dumps({"func_name": "at"})},
        "class Solution:\n    def at(self, xs: List[int], i: int) -> int: return xs[i] + 1",
        "class Solution:\n    def at(self, xs, i): return xs",
    ),
    "deepcoder": ({"tests": json.dumps([{"input": "1 2", "output": "0.3333333", "type": "stdin_stdout"}])},
                  "a, b = map(int, input().split())\nprint(a / (a + b))", "print(0.3)"),
    "verl": ({"reward_model": {"ground_truth": json.dumps({"inputs": ["ü\n"], "outputs": ["Ü"]})}},
             "import threading\nthreading.Thread(target=lambda: print(input().upper())).start()", "print('ü')"),
    "acecode": ({"test_cases": ["assert add(1, 2) == 3", "assert add(0, -1) == -1"]},
                "add = lambda a, b: a + b", "add = max"),
    "open_r1": ({"verification_info": json.dumps({"language": "python", "test_cases": [
                    {"input": "3\n", "output": "6", "type": "stdin_stdout", "fn_name": None}]})},
                "print(2 * int(input()))", "print(int(input()) + 2)"),
    "codecontests": ({"public_tests": {"input": np.array(["1 2\n"], object), "output": np.array(["3\n"], object)},
                      "private_tests": {"input": [], "output": []}},
                     "print(sum(map(int, input().split())))", "print(input())"),
    "columns": ({"inputs": ["b a", "c"], "outputs": ["a b", "c"]}, "print(*sorted(input().split()))", "print(input())"),
    "function_columns": ({"inputs": [[[1, 2]]], "outputs": [2], "fn_name": "size"}, "size = len", "size = sum"),
    "kodcode": ({"test": "import math\nimport pytest\nfrom solution import root\n\ndef test_right():\n"
                 "    assert root(4) == math.sqrt(4)\n\ndef test_wrong() -> None:\n"
                 "    with pytest.raises(ValueError):\n        root(-1)"},
                "def root(x):\n    if x < 0: raise ValueError\n    return x ** 0.5", "def root(x): return x ** 0.5"),
    "exceptions": ({"tests": "try: f(-1)\nexcept ValueError: pass\nelse: assert False\nassert next(g()) == f(4) == 2"},
                   "def f(x):\n    if x < 0: raise ValueError(x)\n    return int(x ** 0.5)\ndef g(): yield from (2, 3)",
                   "def f(x): return 2\ndef g(): yield 2"),
}  # fmt: skip


def test_every_form_of_tests(reward: Code) -> None:
    """A right program and a wrong one for each."""
    rows = [(program, row) for row, *programs in FORMS.values() for program in programs]
    found = scores(reward, *rows)
    assert dict(zip(FORMS, found[::2], strict=True)) == dict.fromkeys(FORMS, 1.0)
    assert all(score is not None and score < 1 for score in found[1::2]), found[1::2]


FORGERIES = {
    "exits": "import os\nos._exit(0)",
    "exits_in_a_call": "import os\ndef double(x): os._exit(0)",
    "exits_politely": "import sys\nsys.exit(0)",
    "prints": "print('1' * 9, flush=True)\ndef double(x): print('11')",
    "writes_everywhere": "import os\nfor fd in range(10):\n    try: os.write(fd, b'11')\n    except OSError: pass",
    "equals_all": "class X:\n    def __eq__(self, other): return True\ndef double(x): return X()",
    "equals_all_as_int": "class X(int):\n    def __eq__(self, other): return True\ndef double(x): return X(7)",
    "no_assertions": "import builtins\nclass AssertionError(Exception): pass\nbuiltins.AssertionError = OSError\n"
    "def double(x): raise AssertionError",
    "forges_names": "import json, os\n"
    "for one in ({'double': {'object': 1}, 'all': {'object': 0}}, *[{'value': True}] * 9):\n"
    "    os.write(3, json.dumps(one).encode() + b'\\n')",
    "own_builtins": "def all(x): return True\nlen = print = exec = compile = lambda *a: True\nglobals = lambda: {}",
    "changes_the_interpreter": "import sys, builtins\nbuiltins.exec = sys.exit = lambda *a: None\nsys.settrace(print)",
}
LOOKS_AROUND = """
import gc, sys, os, json
def double(x):
    seen, frame = [], sys._getframe(1)
    while frame:
        seen += [repr(v)[:2000] for v in frame.f_locals.values()] + list(map(repr, frame.f_code.co_consts))
        frame = frame.f_back
    seen += [str(one) for one in gc.get_objects() if isinstance(one, (dict, list, tuple))]
    for fd in range(3, 64):
        try: seen.append(os.pread(fd, 10000, 0).decode())
        except (OSError, ValueError): pass
    for name in ("/proc/self/mem", "/proc/1/mem", f"/proc/{os.getppid()}/mem", f"/proc/{os.getppid()}/environ"):
        try: seen.append(open(name, "rb").read(10).decode("latin"))
        except OSError: pass
    looked_for = str(int("738") * 1000 + 591)  # a constant would be found in this program
    return int(looked_for) if any(looked_for in one for one in seen) else None
"""


def test_a_verdict_cannot_be_forged(reward: Code) -> None:
    rows = [(program, ASSERTS) for program in FORGERIES.values()]
    assert dict(zip(FORGERIES, scores(reward, *rows), strict=True)) == dict.fromkeys(FORGERIES, 0.0)


def test_expected_answers_are_not_there_to_be_read(reward: Code) -> None:
    looks = {"tests": ["assert double(1) == 738591"]}
    assert scores(reward, (LOOKS_AROUND, looks), ("def double(x): return 738591", looks)) == [0.0, 1.0]


def reports(what: str) -> str:
    """A program that prints yes if `what` raises nothing."""
    body = "\n    ".join(what.splitlines())
    imports = "import os, signal, socket, subprocess, sys, ctypes"
    return f"{imports}\ntry:\n    {body}\n    print('yes')\nexcept BaseException: print('no')"


YES, NO = ({"tests": [{"input": "", "output": answer}]} for answer in ("yes", "no"))


def test_rights_of_programs(reward: Code, tmp_path: Path) -> None:
    """What they may not do fails, and leaves no trace: network, files, processes, signals, the trainer's variables."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        server.settimeout(0.1)
        local.bind(str(tmp_path / "local"))
        local.listen()
        port, home, me = server.getsockname()[1], tmp_path / "home", os.getpid()
        home.mkdir()
        (home / "key").write_text(SECRET)
        outside = home / "written"
        denied = {
            "connects": f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "local_socket": f"s = socket.socket(socket.AF_UNIX)\ns.connect({str(tmp_path / 'local')!r})",
            "datagram": f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
            "reads": f"open({str(home / 'key')!r}).read()",
            "lists": f"assert os.listdir({str(home)!r})",
            "writes": f"open({str(outside)!r}, 'w').write('x')",
            "writes_python": "open(os.__file__, 'a').write('')",
            "removes": f"os.remove({str(home / 'key')!r})",
            "kills_us": f"os.kill({me}, signal.SIGTERM)",
            "kills_parent": "assert os.getppid()\nos.kill(os.getppid(), signal.SIGKILL)",
            "kills_all": "os.kill(-1, signal.SIGKILL)",
            "forks": "os.fork()",
            "runs": "subprocess.run(['/bin/true'], check=True)",
            "executes": "os.execv('/bin/true', ['true'])",
            "traces": f"assert ctypes.CDLL(None).ptrace(16, {me}, 0, 0) == 0",
            "namespaces": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
            "secret": f"assert {SECRET[:6]!r} + {SECRET[6:]!r} in str(os.environ)",
            "variables": "assert os.environ.keys() & {'SECRET_KEY', 'HOME', 'PYTHONPATH', 'USER'}",
            "big_file": "open('big', 'wb').write(bytes(17 * 2**20))",
            "many_files": "files = [open(f'f{i}', 'w') for i in range(100)]",
            "memory": "bytearray(400 * 2**20)",
        }
        allowed = {
            "own_folder": "open('b', 'w').write('x')\nassert open('b').read() == 'x'\nos.remove('b')",
            "own_limits": "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (2**20, 2**20))",
            "libraries": "import json, sqlite3, zoneinfo, ssl, decimal, numpy\nassert numpy.ones(3).sum() == 3",
            "threads": "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
            "clean": "assert os.listdir('.') == [] and len(os.environ) < 12",
        }
        rows = [(reports(what), NO) for what in denied.values()] + [(reports(what), YES) for what in allowed.values()]
        found = dict(zip([*denied, *allowed], scores(reward, *rows), strict=True))
        found.pop("kills_all")  # in a namespace that is all of nothing
        assert {name for name, score in found.items() if score != 1.0} == set()
        with pytest.raises(TimeoutError):
            server.accept()
    assert (home / "key").read_text() == SECRET
    assert not outside.exists()


HOSTILE = {
    "fork_bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread_bomb": "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork() or time.sleep(600)\n    os._exit(0)",
    "endless_output": "while True: print('x' * 10**6)",
    "endless_loop": "while True: pass",
    "sleeps": "import time\ntime.sleep(600)",
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "kills_itself": "import os\nos.abort()",
    "kills_its_group": "import os\nos.killpg(0, 9)",
    "ignores_signals": "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
    "while True: pass",
    "closes_all": "import os\nos.closerange(0, 1000)\nprint(4)",
    "segfaults": "import ctypes\nctypes.string_at(0)",
    "fills_its_folder": "i = 0\nwhile True:\n    open(str(i := i + 1), 'wb').write(bytes(10**6))",
    "deep_folders": "import os\nfor i in range(600): os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)",
    "no_program": "def (",
    "unicode": "print('\\ud800')",
}


def test_hostile_programs_score_zero_and_leave_nothing(reward: Code, level: Isolation, folders: Path) -> None:
    begin = time.monotonic()
    with nothing_left(reward, level):
        found = scores(reward, *[(program, STDIN) for program in HOSTILE.values()], (ECHO, STDIN))
    assert dict(zip(HOSTILE, found, strict=False)) == dict.fromkeys(HOSTILE, 0.0)
    assert found[-1] == 1.0
    assert time.monotonic() - begin < 2.5 * len(HOSTILE) / 2 + 10
    assert list(folders.iterdir()) == []


@contextmanager
def nothing_left(made: Code, level: Isolation) -> Iterator[None]:
    """Assert that no process is there afterwards, wherever it was born, but those that wait for the next program."""
    before = set(psutil.pids())
    kernel.adopt_orphans()
    yield
    waiting = {process._process.pid for process in made._sandbox._idle}
    if level == "bubblewrap":
        waiting |= {one.pid for pid in waiting for one in psutil.Process(pid).children(recursive=True)[:2]}
    until = time.monotonic() + 5
    while left := {one.pid for one in psutil.Process().children(recursive=True)} - before - waiting:
        assert time.monotonic() < until, [psutil.Process(pid) for pid in left]
        time.sleep(0.05)
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # orphans of other tests are no children of this process


def test_tests_too_are_stopped_at_the_time_limit(reward: Code) -> None:
    """What was passed before counts; a program that hangs in a call, and a test that hangs without one."""
    rows = [
        (
            "def f(x):\n    while x: pass\n    return x",
            {"tests": ["assert f(0) == 0", "assert f(1)", "assert f(0) == 0"]},
        ),
        ("f = 1", {"tests": ["assert f == 1", "while f: assert f"]}),
        ("x = 'x' * 10**8\ndef f(): return x", {"tests": ["assert f()"] * 40}),
        ("def f():\n    x = []\n    x.append(x)\n    return x", {"tests": ["assert f() == 0", "assert f"]}),
    ]
    assert scores(reward, *rows) == [pytest.approx(1 / 3), 0.5, 0.0, 0.5]


@pytest.mark.parametrize(("weak", "said"), [("none", "WITHOUT ISOLATION"), ("seccomp", "WITHOUT PROTECTION OF FILES")])
def test_limits_hold_without_isolation(weak: Isolation, said: str) -> None:
    """What the last resorts keep to: time, memory, files, output, and no process that survives."""
    made = loaded(isolation=weak, time_limit_s=1.0, memory_limit_mb=300)
    assert said in made.start_notice
    names = ("daemon", "endless_output", "endless_loop", "memory", "segfaults", "closes_all", "kills_its_group")
    with nothing_left(made, weak):
        found = scores(
            made, *[(HOSTILE[name], STDIN) for name in names], (ECHO, STDIN), (LOOKS_AROUND, ASSERTS), (DOUBLE, ASSERTS)
        )
    assert found == [0.0] * len(names) + [1.0, 0.0, 1.0]
    network = reports("socket.socket()"), NO if weak == "seccomp" else YES
    assert scores(made, network) == [1.0]
    close(made)


def group(**columns: Any) -> Prompt:
    return Prompt("a", 0, "?", "?", (1,), columns)


def completed(*programs: str) -> tuple[Completion, ...]:
    ids, logprobs = np.array([1], np.int32), np.zeros(1, np.float32)
    return tuple(Completion(ids, logprobs, "stop", 0, fenced(program)) for program in programs)


def test_a_chunk_of_slow_programs_keeps_within_the_time_limit_of_workers() -> None:
    """Nine that sleep and one that is right, two at a time: each gets its score, and none is a failure."""
    made = Code(time_limit_s=1.0, num_processes=2)
    scorer = RewardScorer([made], "drop", WorkerOptions(num_workers=1, time_limit_s=4.0))
    try:
        sleeping = [HOSTILE["sleeps"]] * 9
        result = scorer.score([group(**STDIN)], [completed(*sleeping, ECHO)], source="fresh", step=0)
    finally:
        scorer.close()
    assert result.groups[0].rewards.tolist() == [0.0] * 9 + [1.0]
    assert (result.failed, result.timed_out, result.crashed) == (0, 0, 0)
    logged = {name: mean.total / mean.weight for name, mean in result.logged.items()}
    assert logged == pytest.approx({"code/passed": 0.1, "code/timed_out": 0.9, "code/no_program": 0.0})
    assert result.groups[0].extras["passed_tests"] == [0.0] * 9 + [1.0]


def test_what_is_not_the_programs_fault_is_a_failure() -> None:
    made = loaded(num_processes=1)
    for process in made._sandbox._idle:
        process._process.kill()
        process._process.wait()
    with pytest.raises(OSError, match="has ended or hangs"):
        scores(made, (ECHO, STDIN))
    assert scores(made, (ECHO, STDIN)) == [1.0]
    close(made)


def test_programs_in_completions(reward: Code) -> None:
    """The last block counts, after thinking, indented or not; without one, or unfinished, there is no program."""
    right, wrong = "```python\nprint('yes')\n```", "```python\nprint('no')\n```"
    texts = {
        wrong + right: 0.0,  # no line of its own
        f"{wrong}\n{right}": 1.0,
        f"{right}\nIt prints:\n```text\nyes\n```": 1.0,
        f"{right}</think>": 0.0,
        f"<think>{wrong}</think>\n1. So:\n  ```py\n  print('yes')\n  ```": 1.0,
        "print('yes')": 0.0,
        "```python\nprint('yes')": 0.0,
        "```\nprint('yes')\n```": 1.0,
    }
    found = list(reward(["?"] * len(texts), [*texts], [[1]] * len(texts), tests=[YES["tests"]] * len(texts)))
    assert dict(zip(texts, found, strict=True)) == texts


@pytest.mark.parametrize(
    "tests",
    [
        "42",
        "assert (",
        "f(x)",
        "import unittest\nclass Test(unittest.TestCase):\n    def test(self): self.assertEqual(1, 2)",
        "def check_f():\n    assert f() == 1",
        "import pytest\ndef test_f(tmp_path): assert f() == 1",
        "import no_such_module\nassert f() == 1",
        ["from no_such_module.part import g\nassert f() == g()"],
        {"inputs": ["1"], "outputs": []},
        [{"input": "[1]", "output": "1", "testtype": "functional"}],
        [{"input": "1"}],
        [1, 2],
        {"fn_name": "f(); g", "inputs": [[1]], "outputs": [1]},
    ],
    ids=repr,
)
def test_tests_that_cannot_be_read(tests: Any) -> None:
    """Also those that every program would pass."""
    with pytest.raises(ValueError, match=r"^column 'tests' \("):
        read_cases({"tests": tests}, None)


def test_outputs() -> None:
    assert same_output("1 2\n3\n\n", " 1  2 \n3")
    assert same_output("0.33333333", "0.3333333")
    assert not same_output("1\n2", "1 2")
    assert not same_output("100000000000000001", "100000000000000000")
    assert not same_output("0.34", "0.33")
    assert not same_output("", "1")


def test_unusable_options() -> None:
    with pytest.raises(UserError, match=r"may need 9 s for a score, more than model.reward_workers.time_limit_s=5 s"):
        RewardScorer([Code()], workers=WorkerOptions(time_limit_s=5.0))
    with pytest.raises(UserError, match=r"memory_limit_mb of .* is 0"):
        Code(memory_limit_mb=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match=r"cannot be isolated as asked \(bubblewrap: .*bwrap"):
            loaded(isolation="bubblewrap")


def small(config: dict[str, Any]) -> None:
    model(config).update(rewards=[{"class_path": "app.rewards.Code", "init_args": {"fenced": False, "prelude": "'''"}}])
    source(config).update(answer_column=None)


def test_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.setenv("SECRET_KEY", SECRET)
    rows = [{"question": f"{i} + 1 =", "tests": ["assert double(2) == 4"]} for i in range(8)]
    write_pool(tmp_path / "pool.jsonl", rows)
    place.config(small)
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0, said[-3000:]
    assert caplog.text.count("Generated programs run ") == 1
    (events,) = tmp_path.rglob("events*")
    scalars = read_scalars(events.parent)
    assert [*scalars["rewards/code/passed"][1]] == [0.0]
    code, said, _ = place.run_with_output("data", "--config", "run.yaml")
    assert code == 0
    assert "code sees tests=['assert double(2) == 4']" in said

    write_pool(tmp_path / "pool.jsonl", [*rows[1:], {"question": "?", "tests": ["assert ("]}])
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0
    assert "The tests of 1 of 8 rows of the train prompts cannot be read by code, first that of" in caplog.text
    unread = json.dumps({"inputs": ["1"], "outputs": []})
    write_pool(tmp_path / "pool.jsonl", [{"question": f"{i}?", "tests": unread} for i in range(8)])
    assert "column 'tests' (" in (line := place.refused("fit", "--config", "run.yaml"))
    assert "1 inputs and 0 outputs" in line
    write_pool(tmp_path / "pool.jsonl", [{"question": f"{i} + 1 =", "unit": "x"} for i in range(8)])
    line = place.refused("fit", "--config", "run.yaml")
    assert "no column with tests for app.rewards.Code, only " in line
    assert "'unit'" in line
