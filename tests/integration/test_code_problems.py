"""Twenty problems, each with a right, a wrong and a hostile answer, scored together as a step of a run scores them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from app.rewards import Code, RewardScorer, WorkerOptions
from datamodules.types import Completion, Prompt

SECRET = "a-key-that-no-program-may-see"


class Problem(NamedTuple):
    """The columns of a row, a program that is right and one that is wrong."""

    row: dict[str, Any]
    right: str
    wrong: str


def stdin(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Return tests by standard input and output as APPS has them."""
    inputs, outputs = zip(*pairs, strict=True)
    return {"input_output": json.dumps({"inputs": inputs, "outputs": outputs})}


def asserts(*lines: str, **more: Any) -> dict[str, Any]:
    """Return tests by assertions as MBPP has them."""
    return {"test_list": list(lines), **more}


PROBLEMS = {
    "sum": Problem(stdin(("1 2 3", "6"), ("-1", "-1")), "print(sum(map(int, input().split())))", "print(6)"),
    "reverse": Problem(stdin(("abc", "cba")), "print(input()[::-1])", "print(input())"),
    "count_words": Problem(stdin(("a b a", "a 2\nb 1")),
                           "from collections import Counter\n"
                           "for w, n in sorted(Counter(input().split()).items()): print(w, n)",
                           "print('a 2 b 1')"),
    "mean": Problem(stdin(("1 2 4", "2.3333333")), "x = [*map(int, input().split())]\nprint(sum(x) / len(x))",
                    "x = [*map(int, input().split())]\nprint(sum(x) // len(x))"),
    "lines": Problem(stdin(("2\n3\n4", "7")), "import sys\nn, *x = map(int, sys.stdin)\nprint(sum(x))",
                     "print(input())"),
    "primes": Problem(stdin(("10", "2 3 5 7")),
                      "n = int(input())\nprint(*[k for k in range(2, n) if all(k % d for d in range(2, k))])",
                      "print(2, 3, 5, 7, 9)"),
    "fibonacci": Problem(asserts("assert fib(10) == 55", "assert fib(0) == 0"),
                         "def fib(n):\n    a, b = 0, 1\n    for _ in range(n): a, b = b, a + b\n    return a",
                         "def fib(n): return n if n < 2 else fib(n - 1)"),
    "factorial": Problem(asserts("assert fact(5) == 120"), "import math\nfact = math.factorial",
                         "def fact(n): return n * n"),
    "palindrome": Problem(asserts("assert is_palindrome('abba')", "assert not is_palindrome('ab')"),
                          "def is_palindrome(s): return s == s[::-1]", "def is_palindrome(s): return True"),
    "flatten": Problem(asserts("assert flat([1, [2, [3]]]) == [1, 2, 3]"),
                       "def flat(x): return [z for y in x for z in (flat(y) if isinstance(y, list) else [y])]",
                       "def flat(x): return x"),
    "tree": Problem(asserts("assert depth(t) == 2", test_setup_code="t = Node(1, Node(2))"),
                    "class Node:\n    def __init__(self, v, c=None): self.v, self.c = v, c\n"
                    "def depth(n): return 0 if n is None else 1 + depth(n.c)",
                    "class Node:\n    def __init__(self, v, c=None): pass\ndef depth(n): return 1"),
    "gcd": Problem({"test": "def check(candidate):\n    assert candidate(12, 18) == 6\n    assert candidate(7, 3) == 1",
                    "entry_point": "gcd"}, "from math import gcd", "def gcd(a, b): return min(a, b)"),
    "median": Problem({"test": "def check(f):\n    assert abs(f([3, 1, 2]) - 2) < 1e-9", "entry_point": "median"},
                      "def median(x): return sorted(x)[len(x) // 2]", "def median(x): return x[0]"),
    "two_sum": Problem({"input_output": json.dumps({"fn_name": "twoSum", "inputs": [[[2, 7, 11], 9]],
                                                    "outputs": [[0, 1]]})},
                       "class Solution:\n    def twoSum(self, x: List[int], t: int) -> List[int]:\n"
                       "        return next([i, j] for j in range(len(x)) for i in range(j) if x[i] + x[j] == t)",
                       "class Solution:\n    def twoSum(self, x, t): return [1, 2]"),
    "rotate": Problem({"public_test_cases": json.dumps([{"input": "[1, 2, 3]\n1", "output": "[3, 1, 2]",
                                                         "testtype": "functional"}]),
                       "metadata": json.dumps({"func_name": "rotate"})},
                      "class Solution:\n    def rotate(self, x, k): return x[-k:] + x[:-k]",
                      "class Solution:\n    def rotate(self, x, k): return x[k:] + x[:k]"),
    "collatz": Problem({"tests": json.dumps([{"input": "6", "output": "8", "type": "stdin_stdout"}])},
                       "n, k = int(input()), 0\n"
                       "while n > 1: n, k = (n // 2 if n % 2 == 0 else 3 * n + 1), k + 1\nprint(k)",
                       "print(6)"),
    "anagram": Problem({"test_cases": ["assert anagram('ab', 'ba')", "assert not anagram('ab', 'bb')"]},
                       "def anagram(a, b): return sorted(a) == sorted(b)",
                       "def anagram(a, b): return len(a) == len(b)"),
    "roman": Problem({"test": "from solution import roman\n\ndef test_it():\n    assert roman(4) == 'IV'"},
                     "def roman(n): return {1: 'I', 4: 'IV'}[n]", "def roman(n): return 'I' * n"),
    "upper": Problem({"reward_model": {"ground_truth": json.dumps({"inputs": ["ü"], "outputs": ["Ü"]})}},
                     "print(input().upper())", "print('U')"),
    "generator": Problem(asserts("assert list(squares(3)) == [0, 1, 4]", "assert next(squares(1)) == 0"),
                         "def squares(n): yield from (i * i for i in range(n))", "def squares(n): yield from range(n)"),
}  # fmt: skip


def hostile(port: int, home: Path) -> dict[str, str]:
    """Return an attack for each problem: on the machine, on the tests, or on the score."""
    outside, key = home / "written", home / "key"
    return {
        "sum": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "reverse": "while True: print('x' * 10**6)",
        "count_words": "import os\nprint('a 2\\nb 1' if 'SECRET_KEY' in os.environ else sorted(os.environ))",
        "mean": f"open({str(outside)!r}, 'w').write('x')\nprint(7 / 3)",
        "lines": f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).send(b'x')\nprint(7)",
        "primes": f"print(open({str(key)!r}).read() and '2 3 5 7')",
        "fibonacci": "import os\ndef fib(n): os._exit(0)",
        "factorial": "class All(int):\n    def __eq__(self, other): return True\ndef fact(n): return All(0)",
        "palindrome": "import os\nfor fd in range(10):\n    try: os.write(fd, b'11')\n    except OSError: pass",
        "flatten": "import builtins\nbuiltins.AssertionError = OSError\ndef flat(x): raise AssertionError",
        "tree": "x = []\nwhile True: x.append(bytearray(10**7))",
        "gcd": "import sys\ndef check(candidate): pass\nsys.exit(0)",
        "median": "import time\ndef median(x): time.sleep(60)",
        "two_sum": f"import os\nos.remove({str(key)!r})\nclass Solution:\n    def twoSum(self, x, t): return [0, 1]",
        "rotate": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\ndef rotate(x, k): return [3, 1, 2]",
        "collatz": "import subprocess\nsubprocess.run(['/bin/true'], check=True)\nprint(8)",
        "anagram": "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        "roman": "import sys, types\nsys.modules['solution'] = types.SimpleNamespace(roman=lambda n: 'IV')",
        "upper": "open('big', 'wb').write(bytes(17 * 2**20))\nprint('Ü')",
        "generator": "import ctypes\nctypes.string_at(0)",
    }


def test_right_answers_score_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "key").write_text(SECRET)
    monkeypatch.setenv("SECRET_KEY", SECRET)
    ids, logprobs = np.array([1], np.int32), np.zeros(1, np.float32)
    before = {one.pid for one in psutil.process_iter()}
    scorer = RewardScorer(
        [Code(time_limit_s=1.0, memory_limit_mb=300, num_processes=2)], workers=WorkerOptions(num_workers=1)
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        attacks = hostile(server.getsockname()[1], home)
        assert PROBLEMS.keys() == attacks.keys() and len(PROBLEMS) == 20
        prompts = [Prompt(name, at, "?", "?", (1,), one.row) for at, (name, one) in enumerate(PROBLEMS.items())]
        answers = [
            tuple(
                Completion(ids, logprobs, "stop", 0, f"```python\n{program}\n```")
                for program in (one.right, one.wrong, attacks[name])
            )
            for name, one in PROBLEMS.items()
        ]
        try:
            result = scorer.score(prompts, answers, source="fresh", step=0)
        finally:
            scorer.close()
        with pytest.raises(TimeoutError):
            server.accept()
    found = {name: group.rewards.tolist() for name, group in zip(PROBLEMS, result.groups, strict=True)}
    assert found == {name: [1.0, 0.0, 0.0] for name in PROBLEMS}
    assert (result.failed, result.unscored) == (0, 0)
    assert (home / "key").read_text() == SECRET
    assert os.listdir(home) == ["key"]
    left = [one for one in psutil.process_iter(["ppid"]) if one.pid not in before and one.info["ppid"] == os.getpid()]
    assert left == []
