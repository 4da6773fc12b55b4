"""Rewards on hand-made answers, in this process."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from app.rewards import Exact, Format, Function, Math, Numeric, ReasoningGym, Reward, RewardScorer, SoftOverlong
from app.rewards.numeric import find_numbers
from app.rewards.workers.main import FunctionLog, within_limit
from app.rewards.workers.results import checked
from app.rewards.workers.task import MAX_REPLY_BYTES, CallResult, Failure, Reply
from app.rewards.workers.trial import check_result
from datamodules.errors import UserError

DATA = Path("../shared/data")


def scores(reward: Reward, completions: list, **columns) -> list:
    count = len(completions)
    reward = pickle.loads(pickle.dumps(reward))  # noqa: S301 (pickled on this line)
    reward.load()
    columns = {name: values if isinstance(values, list) else [values] * count for name, values in columns.items()}
    return reward(["?"] * count, completions, [[0]] * count, **columns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 1,234.50 in all.", [1234.5]),
        ("x=-3", [-3]),
        ("5-3", [5, 3]),
        ("(2)-3", [2, 3]),
        ("from 3 to \N{MINUS SIGN}4", [3, -4]),
        ("3/4 and 1/0", [0.75]),
        ("1.5e3, 2E-2", [1500, 0.02]),
        ("1e999999999", []),
        ("9" * 5000, []),
        ("x2 and abc123", []),
        ("4+7=1,1+2=3", [4, 7, 1, 1, 2, 3]),
        ("1,2345", [1, 2345]),
        ("$18.", [18]),
        (".5", [0.5]),
    ],
)
def test_numbers_in_text(text, expected):
    assert [float(number) for number in find_numbers(text)] == expected


def test_numeric_uses_the_last_number_or_the_first_after_the_marker():
    gold = "<<9*2=18>>18\n#### 1,018"
    assert scores(Numeric(), ["2 then 1018.", "1018 or 2", "none", "+1,018.00", "2036/2"], answer=gold) == [
        1,
        0,
        0,
        1,
        1,
    ]
    assert scores(Numeric(after="####"), ["#### 1018 of 3", "1018"], answer=gold) == [1, 0]
    assert scores(Numeric(pattern=r"<a>(.*?)</a>"), ["<a>1</a><a>1018</a> 5"], answer=gold) == [1]
    assert scores(Numeric(), ["1"], answer="no number") == [None]


def test_numeric_tolerance_is_relative_above_one():
    reward = Numeric(tolerance=0.01)
    assert scores(reward, ["1009", "1011"], answer="1000") == [1, 0]
    assert scores(reward, ["0.009", "0.011"], answer="0") == [1, 0]
    assert scores(Numeric(tolerance=0), ["0.1", "0.10000000000000000001"], answer=0.1) == [1, 0]


def test_gold_columns_of_the_usual_schemas():
    assert scores(Numeric(), ["7"], reward_model=[{"ground_truth": np.array(["6", "7"]), "style": "rule"}]) == [1]
    assert scores(Numeric(), ["7"], reward_spec=[json.dumps({"ground_truth": 7})]) == [1]
    assert scores(Numeric(), ["7"], answer=[np.int64(7)]) == [1]
    assert scores(Numeric(gold="a.b"), ["7"], a=[{"b": "7"}], answer="8") == [1]
    assert scores(Numeric(), ["7", "8"], answer=[None, "8"], solution=["7", "0"]) == [1, 1]
    with pytest.raises(UserError, match="did you mean 'answer'"):
        scores(Numeric(gold="anwser"), ["7"], answer="8")
    with pytest.raises(UserError, match="one of the usual names: answer, solution"):
        scores(Numeric(), ["7"], question="8")


def test_exact_normalises_space_case_and_full_stop():
    assert scores(Exact(), [" Yes,\n sir. ", "yes sir"], answer="yes, sir") == [1, 0]
    assert scores(Exact(ignore_case=False), ["Yes", "yes"], answer="yes") == [0, 1]
    assert scores(Exact(after="="), ["4+7=11,11+2=13", "13"], answer="13") == [1, 0]
    assert scores(Exact(pattern=r"\w+"), ["one two", "two one"], answer="two") == [1, 0]
    with pytest.raises(UserError, match="only one can be"):
        Exact(after="=", pattern="x")
    with pytest.raises(UserError, match="not a valid regular expression"):
        Exact(pattern="(")


def test_format_matches_the_whole_completion_and_conversations():
    reward = Format(r"<think>.*</think>\d+")
    texts = ["<think>a\nb</think>12", "<think></think>12.", " <think></think>1"]
    assert scores(reward, texts) == [1, 0, 0]
    assert scores(reward, [[{"role": "assistant", "content": text}] for text in texts]) == [1, 0, 0]


def test_math_equivalence():
    texts = [
        r"so \boxed{\frac{1}{2}}",
        r"$0.5$",
        r"\boxed{\frac12}",
        r"\boxed{2}",
        "nothing",
        r"1/3 no, \boxed{\frac{2}{4}}",
    ]
    assert scores(Math(), texts, answer=r"\frac{1}{2}") == [1, 1, 1, 0, 0, 1]
    assert scores(Math(), ["it is 18", r"\boxed{9}"], answer="2 * 9 = 18\n#### 18") == [1, 0]
    assert scores(Math(require_boxed=True), ["18", r"\boxed{18} of 20"], answer="18") == [0, 1]
    assert scores(Math(), ["18"], solution=r"Hence $x = \boxed{18}$.") == [1]
    assert scores(Math(), ["18", "18"], answer=[None, "18"], reward_model=[None, None]) == [None, 1]


def test_math_accepts_the_reference_solutions_of_math500():
    if not (DATA / "math500.jsonl").exists():
        pytest.skip("needs ../shared/data/math500.jsonl")
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").read_text().splitlines()[:200]]
    right = [row["answer"] for row in rows]
    assert scores(Math(), [row["solution"] for row in rows], answer=right) == [1.0] * len(rows)
    shifted = scores(Math(), [row["solution"] for row in rows], answer=right[1:] + right[:1])
    chance = sum(one == other for one, other in zip(right, right[1:] + right[:1], strict=True))
    assert chance <= sum(shifted) <= chance + 2


def test_reasoning_gym_gives_the_tasks_own_score():
    import reasoning_gym

    tasks = ("chain_sum", "countdown", "gcd", "spell_backward", "basic_arithmetic", "maze", "letter_counting")
    for task in tasks:
        data = reasoning_gym.create_dataset(task, size=2, seed=3)
        for entry in data:
            answer = str(entry["answer"])
            columns = {name: [value] for name, value in entry.items()}
            assert scores(ReasoningGym(), [answer], **columns) == [1.0], task
            for given in (answer, answer + " or so", "", "wrong"):
                expected = data.score_answer(given, entry)
                assert scores(ReasoningGym(binary=False), [given], **columns) == [expected]
                assert scores(ReasoningGym(), [given], **columns) == [float(expected >= 1)]


def test_a_reasoning_gym_entry_survives_parquet_and_json():
    metadata = {"source_dataset": "chain_sum", "difficulty": {"num_terms": np.array([2, 6])}}
    columns = {"question": ["4 - 1 - 7 ="] * 2, "answer": ["-4"] * 2}
    both = [metadata, json.dumps({"source_dataset": "chain_sum"})]
    assert scores(ReasoningGym(after="="), ["4-1=3,3-7= -4", "-4"], metadata=both, **columns) == [1, 0]
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        scores(ReasoningGym(), ["1"], answer="1", metadata=[{"source_dataset": "chain_sums"}])
    with pytest.raises(UserError, match="needs the column 'metadata'"):
        scores(ReasoningGym(), ["1"], answer="1")


def test_function_gets_the_arguments_it_names(tmp_path, monkeypatch):
    (tmp_path / "dots_mine.py").write_text(
        "def named(completions, level): return [len(c) * x for c, x in zip(completions, level)]\n"
        "async def later(prompts, **rest): return [float('prompts' not in rest and 'level' in rest)] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert scores(Function("dots_mine.named"), ["ab", "c"], level=[2, 5], other="x") == [4, 5]
    assert scores(Function("dots_mine.later"), ["ab"], level=[2]) == [1]
    assert Function("dots_mine.named").name == "named"
    with pytest.raises(UserError, match="did you mean 'named'"):
        Function("dots_mine.name").load()
    with pytest.raises(UserError, match="no module 'dots_absent'"):
        Function("dots_absent.f")
    with pytest.raises(UserError, match=r"not of the form 'module\.function'"):
        Function("named")


def test_returned_values_are_checked():
    values, wrong = checked([1, True, None, np.float32(0.5), float("nan"), float("inf"), "1", [2]], 8)
    assert values == [1, 1, None, 0.5, None, None, None, None]
    assert sorted(wrong) == [4, 5, 6, 7]
    assert wrong[6] == "returned '1', expected a finite number or None"
    complaint = "returned 1 scores for 2 completions"
    assert checked([1.0], 2) == ([None, None], {0: complaint, 1: complaint})
    assert checked(1.0, 1) == ([None], {0: "returned float, expected a list of 1 numbers or None"})
    with pytest.raises(ValueError, match="got 1 values for 2 completions"):
        FunctionLog(2).log_extra("a", [1])


@pytest.mark.parametrize(
    "returned", [{1.0, 0.5}, "10", b"10", None, [(1.0, "right")] * 2, iter, {0: 1.0, 1: 0.0}, [1j, 1j]]
)
def test_a_trial_refuses_what_is_no_list_of_scores(returned):
    with pytest.raises(UserError, match=r"Reward 'format' returned .*, expected"):
        check_result(Format("a"), returned, 2)
    check_result(Format("a"), (True, None), 2)
    check_result(Format("a"), np.array([float("nan"), 1e9]), 2)  # told, but not refused


def test_joined_results_keep_positions():
    crashed, late = Failure("crashed", "a"), Failure("timed_out", "b")
    first = CallResult([1.0, None], {1: crashed}, [("m", 1.0, 2.0)], {"a": ["x", "y"]})
    second = CallResult([0.0], {0: late}, [("m", 2.0, 1.0)], {"b": [7]})
    whole = CallResult.joined([first, second])
    assert whole.scores == [1.0, None, 0.0]
    assert whole.failures == {1: crashed, 2: late}
    assert whole.extras == {"a": ["x", "y", None], "b": [None, None, 7]}


def test_scorer_refuses_wrong_configurations():
    with pytest.raises(UserError, match="at least one reward"):
        RewardScorer([])
    for weight in (float("nan"), float("inf"), -1e7):
        with pytest.raises(UserError, match="expected a number of at most 1e\\+06 in magnitude"):
            RewardScorer([Math(weight=weight)])
    assert RewardScorer([Format("a"), Format("b"), Math()]).names == ["format", "format_2", "math"]


def test_which_rewards_measure_correctness():
    shape, math, numeric = Format("a"), Math(), Numeric()
    assert RewardScorer([shape, math, numeric]).correctness == [1, 2]
    assert RewardScorer([shape, math, Numeric(correctness=True)]).correctness == [2]
    assert RewardScorer([Math(correctness=True), shape, Numeric(correctness=True)]).correctness == [0, 2]
    assert RewardScorer([Math(correctness=False), numeric]).correctness == [1]
    assert RewardScorer([shape, SoftOverlong(4, 2)]).correctness == [0]
    assert RewardScorer([Format("a", correctness=True), math]).correctness == [0]


def test_a_reply_has_a_bound_that_costs_no_score():
    reply = Reply("scores", row=3, scores=[1.0], extras={"a": ["x" * MAX_REPLY_BYTES]}, metrics=[("m", 2.0)])
    note = "logged 16 MiB in one call, more than the 16 MiB allowed: left out"
    assert Reply.decode(within_limit(reply)) == Reply("scores", row=3, scores=[1.0], notes=[note])
    reply = Reply("scores", scores=[1.0, None], invalid={"1": "nan"}, metrics=[("m", 2.0)], extras={"a": [1, "x"]})
    assert Reply.decode(within_limit(reply)) == reply


def test_procedural_is_a_deprecated_name_that_keeps_its_logged_name(caplog):
    import app.rewards

    vars(app.rewards).pop("Procedural", None)
    for _ in range(2):
        from app.rewards import Procedural

        assert Procedural is ReasoningGym
    assert [record.getMessage() for record in caplog.records] == [
        "app.rewards.Procedural is deprecated. Use app.rewards.ReasoningGym."
    ]
    assert ReasoningGym().name == "procedural"
    assert ReasoningGym(name="mine").name == "mine"
