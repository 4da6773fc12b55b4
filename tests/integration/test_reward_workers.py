"""Rewards in their worker processes: hostile functions, hostile completions, and the speed of plain ones."""

import os
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from app.rewards import Format, Function, Math, Numeric, ReasoningGym, RewardScorer, TrainerState, WorkerOptions
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

FUNCTIONS = """
import asyncio, os, random, subprocess, sys, time
import numpy as np

def text(c): return c if isinstance(c, str) else c[0]["content"]
def act(name):
    def f(completions, **rest): return [WORD.get(text(c), lambda: 1.0)() for c in completions]
    return f
WORD = {
    "sleep": lambda: time.sleep(600), "exit": lambda: os._exit(3), "memory": lambda: len(bytearray(8 * 2**30)),
    "raise": lambda: 1 / 0, "leave": lambda: sys.exit(0), "nan": lambda: float("nan"), "text": lambda: "1",
    "wrong": lambda: 0.0, "none": lambda: None,
    "child": lambda: subprocess.Popen(["sleep", "615"]) and time.sleep(600),
    "session": lambda: subprocess.Popen(["sleep", "615"], start_new_session=True) and time.sleep(600),
}
hostile = act("hostile")
scored = 0
def counting(completions, **rest):
    global scored  # the score of each is the number of those before it
    for c in completions:
        if text(c) != "ok": WORD[text(c)]()
        scored += 1
        yield scored - 1
def yielding(completions, log_metric, **rest):
    from app.rewards import ScoreError
    log_metric("size", len(completions))
    told = {"late": ScoreError("the judge is slow", timed_out=True), "told": ScoreError("the judge is silent")}
    for c in completions: yield told.get(text(c)) or WORD.get(text(c), lambda: 1.0)()
def short(completions, **rest): return [1.0]
def torch_loaded(completions, **rest):
    return [float(any(m in sys.modules for m in ("torch", "transformers", "lightning")))] * len(completions)
def chat(prompts, completions, completion_ids, **rest):
    return [float(p[-1]["content"] == "hi" and c == [{"role": "assistant", "content": "yo"}] and i == [5, 6])
            for p, c, i in zip(prompts, completions, completion_ids)]
async def wait_a_bit(completions, **rest):
    async def one(c): await asyncio.sleep(0.2); return float(len(c))
    return list(await asyncio.gather(*map(one, completions)))
def journal(completions, level, trainer_state, log_extra, log_metric):
    log_extra("size", [len(c) for c in completions])
    for c in completions: log_metric("length", len(c))
    return [trainer_state.global_step + trainer_state.max_steps + x for x in level]
def noise(completions, **rest): return [random.random() + np.random.rand() for _ in completions]
def columns(table, nested, **rest): return [float(t.sum() + n["a"]["b"][1]) for t, n in zip(table, nested)]
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "dots_functions.py").write_text(FUNCTIONS)
    (tmp_path / "dots_hangs.py").write_text("import time\ntime.sleep(600)\ndef f(completions, **rest): return []\n")
    (tmp_path / "dots_breaks.py").write_text("import absent_module\ndef f(completions, **rest): return []\n")
    monkeypatch.syspath_prepend(tmp_path)


def completion(text: str, ids=(1, 2)) -> Completion:
    return Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", 0, text)


def data(*groups, prompt="?", **columns):
    """Prompts `p0`, `p1`... with one value of each column, and their completions."""
    prompts = [
        Prompt(f"p{row}", row, "?", prompt, (1,), {name: values[row] for name, values in columns.items()})
        for row in range(len(groups))
    ]
    return prompts, [tuple(completion(text) for text in group) for group in groups]


@contextmanager
def scoring(*rewards, on_failure="drop", **limits):
    limits = {"time_limit_s": 0.5, "load_limit_s": 30.0, **limits}
    scorer = RewardScorer(list(rewards), on_failure, WorkerOptions(**limits))
    try:
        yield scorer
    finally:
        scorer.close()


def score(scorer, batch, step=3, state=None):
    return scorer.score(*batch, source="fresh", step=step, state=state)


def texts(result):
    return [[one.text for one in group.completions] for group in result.groups]


@pytest.mark.parametrize("word", ["sleep", "exit", "memory", "raise", "leave", "nan", "text", "none"])
def test_only_the_guilty_completion_is_left_out(word, caplog):
    batch = data(("ok", word, "wrong"), ("ok", "ok"))
    with scoring(Function("dots_functions.hostile"), memory_limit_mb=2000) as scorer:
        result = score(scorer, batch)
        assert texts(result) == [["ok", "wrong"], ["ok", "ok"]]
        assert [group.correctness.tolist() for group in result.groups] == [[1, 0], [1, 1]]
        counts = (result.timed_out, result.crashed, result.failed, result.unscored, result.dropped)
        kinds = {"sleep": (1, 0, 1, 0, 1), "none": (0, 0, 0, 1, 1)}
        assert counts == kinds.get(word, (0, 1, 1, 0, 1))
        scorer.incidents.report("Step 3")
        again = score(scorer, data(("wrong", "ok")))
        assert again.groups[0].correctness.tolist() == [0, 1]
        scorer.incidents.report("Step 4")
    lines = [record.getMessage() for record in caplog.records if "raceback" not in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("Step 3: ")
    assert "prompt 'p0', completion 1" in lines[0]
    assert ("First traceback" in caplog.text) == (word in ("memory", "raise", "leave"))


@pytest.mark.parametrize("word", ["ok", "raise", "exit", "sleep"])
def test_yielded_failures_are_kept_beside_the_scores(word):
    """Also where the call fails after them."""
    with scoring(Function("dots_functions.yielding")) as scorer:
        result = score(scorer, data(("ok", "late", "nan", "told", "wrong", word, "ok")))
        cause = scorer.incidents.first_cause("yielding")
    assert texts(result) == [["ok", "wrong", *(["ok"] if word == "ok" else []), "ok"]]
    counts = (result.timed_out, result.crashed, result.unscored)
    assert counts == (1 + (word == "sleep"), 2 + (word in ("raise", "exit")), 0)
    assert cause == "prompt 'p0', completion 1 ('late'): the judge is slow"
    if word == "ok":  # they were not scored again
        assert {name: mean.total / mean.weight for name, mean in result.logged.items()} == {"yielding/size": 7.0}


@pytest.mark.parametrize("word", ["raise", "exit", "sleep"])
def test_of_two_completions_the_innocent_one_keeps_its_score(word):
    with scoring(Function("dots_functions.hostile")) as scorer:
        assert texts(score(scorer, data(("ok", word)))) == [["ok"]]
        assert texts(score(scorer, data((word, "wrong")))) == [["wrong"]]


def test_scores_that_were_yielded_before_a_failure_are_not_computed_again():
    with scoring(Function("dots_functions.counting"), num_workers=1) as scorer:
        assert score(scorer, data(("ok",))).groups[0].rewards.tolist() == [0]
        result = score(scorer, data(("ok", "ok", "raise", "ok", "ok")))
    assert texts(result) == [["ok"] * 4]
    assert result.groups[0].rewards.tolist() == [1, 2, 3, 4]  # by the same worker


def test_the_fourth_late_completion_in_a_row_costs_the_rest_of_its_call_and_the_third_does_not():
    with scoring(Function("dots_functions.hostile"), time_limit_s=0.3, num_workers=1) as scorer:
        three = score(scorer, data((*["sleep"] * 3, "ok")))
        four = score(scorer, data((*["sleep"] * 4, "ok", "ok")))
    assert (texts(three), three.timed_out) == ([["ok"]], 3)
    assert (texts(four), four.timed_out) == ([[]], 6)


def test_failed_scores_can_count_as_zero_and_a_group_can_lose_all():
    batch = data(("sleep", "ok"), ("raise",))
    with scoring(Format("ok|raise", weight=0.5), Function("dots_functions.hostile", correctness=True)) as scorer:
        dropped = score(scorer, batch)
        scorer.on_failure = "zero"
        zeroed = score(scorer, batch)
    assert texts(dropped) == [["ok"], []]
    assert np.isnan(dropped.groups[1].success_rate)
    assert [group.rewards.tolist() for group in zeroed.groups] == [[0, 1.5], [0.5]]
    assert [group.correctness.tolist() for group in zeroed.groups] == [[0, 1], [0]]
    assert (zeroed.timed_out, zeroed.crashed, zeroed.dropped) == (1, 1, 0)


def test_weighted_sum_skips_none():
    rewards = [Function("dots_functions.hostile"), Numeric(weight=5.0), Format("ok", weight=-0.25)]
    with scoring(*rewards) as scorer:
        result = score(scorer, data(("wrong", "ok"), answer=["no number"]))
    (group,) = result.groups
    assert group.rewards.tolist() == [0.0, 0.75]
    assert np.isnan(group.components["numeric"]).all()
    assert group.components["format"].tolist() == [0, 1]
    assert (result.dropped, group.birth_step, group.source) == (0, 3, "fresh")


def test_a_wrong_number_of_scores_fails_all_of_them(caplog):
    with scoring(Function("dots_functions.short")) as scorer:
        result = score(scorer, data(("a", "b")))
    assert (texts(result), result.crashed) == ([[]], 2)
    scorer.incidents.report("Step 1")
    assert "prompt 'p0', completion 0 ('a'): returned 1 scores for 2 completions" in caplog.text


@pytest.mark.parametrize("word", ["child", "session"])
def test_processes_started_by_a_killed_worker_die_too(word):
    with scoring(Function("dots_functions.hostile")) as scorer:
        assert score(scorer, data((word, "ok"))).timed_out == 1
        sleepers = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "615"]]
        _, alive = psutil.wait_procs(sleepers, timeout=5)
        assert not alive


def test_workers_are_light_and_end_with_close():
    me = psutil.Process()
    before = set(me.children(recursive=True))
    with scoring(
        Function("dots_functions.torch_loaded"), Math(weight=0.0), ReasoningGym(weight=0.0), num_workers=3
    ) as scorer:
        scorer.wait_ready()
        started = set(me.children(recursive=True)) - before
        assert len(started) == 4  # the fork server and its three workers
        entry = {"answer": ["3"], "metadata": [{"source_dataset": "gcd"}], "question": ["?"]}
        assert score(scorer, data(("3",), **entry)).groups[0].correctness.tolist() == [0]
        scorer.close()
        scorer.close()
        _, alive = psutil.wait_procs(started, timeout=3)
        assert not alive
        assert score(scorer, data(("3",), **entry)).dropped == 0  # starts again


def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    import subprocess
    import sys

    code = (
        "import time\nfrom app.rewards import *\n"
        "s = RewardScorer([Function('dots_functions.hostile')]); s.wait_ready()\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert trainer.stdout.readline() == b"ready\n"
    workers = psutil.Process(trainer.pid).children(recursive=True)
    assert len(workers) == 3
    trainer.kill()
    trainer.communicate()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_worker_or_the_fork_server_killed_from_outside_is_replaced():
    with scoring(Function("dots_functions.hostile")) as scorer:
        scorer.wait_ready()
        for victim in ("worker", "server"):
            server = next(p for p in psutil.Process().children() if "app.rewards.workers.main" in p.cmdline())
            (server.children()[0] if victim == "worker" else server).kill()
            time.sleep(0.1)
            assert score(scorer, data(("ok", "wrong"), ("ok",))).dropped == 0


def test_hostile_answers_for_math_verify():
    hostile = [
        r"\boxed{9**9**9**9}",
        r"$9^{9^{9^{9}}}$",
        r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        r"\boxed{" + r"\frac{1}{" * 400 + "2" + "}" * 400 + "}",
        "$" + r"\frac{1}{2}+" * 85_000 + "1$",
        r"\boxed{" * 50_000,
    ]
    with scoring(Math(), on_failure="zero", time_limit_s=2.0, memory_limit_mb=2000) as scorer:
        started = time.monotonic()
        result = score(scorer, data((*hostile, r"\boxed{18}", "19"), answer=["18"]))
        assert time.monotonic() - started < 2.0 * (len(hostile) + 1) + 8
        assert result.groups[0].correctness.tolist() == [0.0] * len(hostile) + [1.0, 0.0]
        assert result.timed_out + result.crashed <= len(hostile)


def test_unloadable_functions_are_the_users_error():
    cases = [
        ("dots_hangs.f", "did not load within"),
        ("dots_breaks.f", "absent_module"),
        ("dots_functions.hostil", "did you mean"),
    ]
    for path, message in cases:
        with scoring(Function(path), load_limit_s=3.0) as scorer, pytest.raises(UserError, match=message) as error:
            score(scorer, data(("a",)))
        assert "\n" not in str(error.value)
    with scoring(Numeric(gold="anwser")) as scorer, pytest.raises(UserError, match="did you mean 'answer'"):
        score(scorer, data(("a",), answer=["1"]))


def test_conversations_async_and_columns_as_trl_passes_them():
    messages = [{"role": "user", "content": "hi"}]
    prompts, _ = data(("yo", "no"), prompt=messages)
    with scoring(Function("dots_functions.chat")) as scorer:
        result = score(scorer, (prompts, [(completion("yo", (5, 6)), completion("no", (5, 6)))]))
        assert result.groups[0].correctness.tolist() == [1, 0]
    with scoring(Function("dots_functions.wait_a_bit"), time_limit_s=2.0) as scorer:
        result = score(scorer, data(tuple("a" * n for n in range(20))))
        assert result.groups[0].correctness.tolist() == list(range(20))  # 4 s if awaited one by one
    with scoring(Function("dots_functions.columns")) as scorer:
        result = score(scorer, data(("a",), table=[np.arange(4)], nested=[{"a": {"b": np.array([1, 9])}}]))
        assert result.groups[0].correctness.tolist() == [15]


def test_journal_and_trainer_state():
    batch = data(("a", "bbb"), ("cc", "d"), level=[0.25, 0.5], prompts=["clash", "clash"])
    with scoring(Function("dots_functions.journal"), chunk_size=2) as scorer:
        result = score(scorer, batch, step=4, state=TrainerState(global_step=4, max_steps=10))
    assert [group.rewards.tolist() for group in result.groups] == [[14.25, 14.25], [14.5, 14.5]]
    assert {name: mean.value for name, mean in result.logged.items()} == {"journal/length": 7 / 4}
    assert [group.extras for group in result.groups] == [{"size": [1, 3]}, {"size": [2, 1]}]


def test_results_do_not_depend_on_the_number_of_workers():
    batch = data(*[("a", "sleep", "b")] + [("a", "b", "c")] * 12)
    seen = []
    for workers in (1, 3):
        with scoring(
            Function("dots_functions.hostile"), Function("dots_functions.noise"), num_workers=workers, chunk_size=6
        ) as s:
            seen.append([group.components["noise"].tolist() for group in score(s, batch).groups])
    assert seen[0] == seen[1]
    assert len({value for group in seen[0] for value in group}) > 10


def test_nothing_to_score():
    with scoring(Format("a")) as scorer:
        assert score(scorer, ([], [])).groups == []
        result = score(scorer, data((), ("a",)))
        assert [len(group.completions) for group in result.groups] == [0, 1]


@pytest.mark.timing
@pytest.mark.parametrize("reward", [ReasoningGym(), Numeric()])
def test_cheap_rewards_score_256_completions_in_50_ms(reward):
    import reasoning_gym

    entries = list(reasoning_gym.create_dataset("chain_sum", size=32, seed=1))
    columns = {name: [entry[name] for entry in entries] for name in ("question", "answer", "metadata")}
    batch = data(*[(entry["answer"], "wrong") * 4 for entry in entries], **columns)
    with scoring(reward, time_limit_s=10.0) as scorer:
        scorer.wait_ready()
        times = []
        for _ in range(8):
            started = time.perf_counter()
            result = score(scorer, batch)
            times.append(time.perf_counter() - started)
        assert all(group.correctness.tolist() == [1, 0] * 4 for group in result.groups)
        assert min(times) < 0.1  # 12 to 23 ms measured; a busy machine takes longer
