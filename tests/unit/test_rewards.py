"""Rewards on hand-made answers, in this process."""
# ruff: noqa: RUF001 (answers hold look-alikes)

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from app.rewards import Exact, Format, Function, Math, Numeric, ReasoningGym, Reward, RewardScorer, SoftOverlong
from app.rewards.answers import check_answers
from app.rewards.numbers import find_numbers
from app.rewards.workers.function_log import FunctionLog
from app.rewards.workers.results import checked
from app.rewards.workers.serving import within_limit
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
        ("12 km^2, 3 m², 4 m^{2}, 5 m s^{-1}", [12, 3, 4, 5]),
        ("1 1/2 and 2\\frac{1}{4} and 1½", [1.5, 2.25, 1.5]),
        (r"\frac{3}{8} or \dfrac12 or -\frac{1}{2}", [0.375, 0.5, -0.5]),
        ("1 000 000, 10\u202f000 and 5 12", [1000000, 10000, 5, 12]),
        (r"1.6\times10^{-19}, 2×10⁸, 3*10^2", [1.6e-19, 2e8, 300]),
        ("10^6 and 2**3", [1000000, 8]),
        ("52_8, 4210_{5} and x_1", []),
        ("$1,234.50, 5%, -\\$7", [1234.5, 5, 7]),
        ("5 - 3 and - 4", [5, 3, 4]),
        (r"10,\!080 and 1{,}234", [10080, 1234]),
        # Spaces between thousands, and between numbers.
        ("100 200", [100, 200]),
        ("100 200 300", [100, 200, 300]),
        ("10 20 30", [10, 20, 30]),
        ("10 200 30", [10, 200, 30]),
        ("1 000 20", [1, 0, 20]),
        ("2020 100", [2020, 100]),
        ("0 123", [0, 123]),
        ("250 000, 12 345 and -1 234.5", [250000, 12345, -1234.5]),
        ("100 200 000", [100200000]),
        ("3 1/2, 1 000 1/2 and 1 000/8", [3.5, 1000.5, 125]),
        (r"1\ 000 and 100\ 200", [1000, 100, 200]),
        (r"100\,200 and 1\,00", [100200, 1, 0]),
        ("100\u2009200, 100\u202f200 and 1\u00a0000\u00a0000", [100200, 100200, 1000000]),
    ],
)
def test_numbers_in_text(text, expected):
    assert [float(number.value) for number in find_numbers(text)] == expected


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


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("12 km^2", ["12", "12 m^2", "12 km²", "so 12.0 km^{2}."], ["2", "144"]),
        ("1 1/2", ["1.5", "3/2", "1 1/2 cups", "1½"], ["1/2", "1"]),
        ("$1,234.50", ["1234.5", "$1,234.50", r"\$1{,}234.5 or $1,234.50"], ["1234", "50"]),
        ("5%", ["5", "5%", "5 percent"], ["0.05"]),
        ("1 000 000", ["1000000", "1,000,000"], ["0", "1"]),
        (r"\frac{3}{7}", ["3/7", r"\frac37"], ["7", "3"]),
        (r"$\boxed{\$7}$", ["7", "$7"], ["-7"]),
        (r"-\$5", ["-5"], ["5"]),
        ("The total is 18 dollars.", ["18"], ["17"]),
        ("70000000", ["70,000,000"], ["70000001"]),
        ("1.6e-19", [r"1.6\times10^{-19}"], ["3.2e-19", "0"]),
        (0.00005, ["0.00005", "5e-5"], ["5"]),
        (2.5e22, ["2.5e22"], ["24999999999999997902848"]),
        ("0.333333", ["1/3", "0.3333333"], ["0.33", "0.34"]),
        (7, ["7", "7.0"], ["8"]),
    ],
)
def test_numeric_forms(gold, right, wrong):
    assert scores(Numeric(), [*right, *wrong], answer=gold) == [1] * len(right) + [0] * len(wrong)


@pytest.mark.parametrize(
    "gold",
    [
        "no number",
        "3,5",
        "#### 1, 2, 3",
        "2004_5",
        r"\sqrt{2}",
        "8n^2 + 4n + 1",
        "(3, 4)",
        r"\boxed{2}, \boxed{3}",
        "3R^2",
    ],
)
def test_numeric_does_not_take_a_part_for_the_whole(gold):
    assert scores(Numeric(), ["1"], answer=gold) == [None]
    assert not Numeric().can_read(gold)


def test_numeric_tolerance_is_relative():
    reward = Numeric(tolerance=0.01)
    assert scores(reward, ["1009", "1011"], answer="1000") == [1, 0]
    assert scores(reward, ["0.504", "0.506"], answer="0.5") == [1, 0]
    assert scores(reward, ["1.61e-19", "1.62e-19"], answer="1.6e-19") == [1, 0]
    assert scores(reward, ["0", "0.009"], answer="0") == [1, 0]
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
    assert scores(Exact(), ["yes", r"\boxed{yes}", r"so \boxed{yes}"], answer=r"so \boxed{yes}") == [1, 1, 0]
    assert scores(Exact(), ["7", "7.0", "07"], answer=7.0) == [1, 1, 0]
    assert scores(Exact(), ["true", "1"], answer=True) == [1, 0]
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


@pytest.mark.parametrize("strict", [True, False])
def test_only_the_box_counts_where_a_box_is_required(strict):
    reward = Math(require_boxed=True, strict=strict)
    wrong = [
        r"\boxed{} 4",
        r"The \boxed{} is 4",
        r"\boxed{?} 4",
        r"\boxed{4} or \boxed{}",
        r"\boxed{5} 4",
        r"4 \boxed{",
        r"4 \boxed{4",
        r"\boxed{ } $4$",
        r"\boxed{3} and \boxed{4}",
        r"<think>\boxed{4}</think> It is 4",
        "4",
        "",
    ]
    right = [
        r"\boxed{4}",
        r"\boxed{3} no, then \boxed{4} of 5",
        r"\fbox{4}",
        r"\boxed{\boxed{4}}",
        r"\boxed 4.",
        r"$\boxed{x = 4}$",
        r"<think>\boxed{3}</think> \boxed{4}",
        r"\boxed{4} and \boxed{4}",
    ]
    assert scores(reward, wrong, answer="4") == [0] * len(wrong)
    assert scores(reward, right, answer="4") == [1] * len(right)


@pytest.mark.parametrize("boxed", [True, False])
def test_every_box_of_the_reference_is_needed(boxed):
    texts = [r"\boxed{2} and \boxed{3}", r"$x=\boxed{3}$ or $x=\boxed{2}$", r"\boxed{2, 3}", r"\boxed{2}", r"\boxed{3}"]
    texts += [r"\boxed{2}, \boxed{3}, \boxed{4}", r"\boxed{2} and \boxed{4}", r"\boxed{23}", r"\boxed{5}"]
    gold = r"The roots are $\boxed{2}$ and $\boxed{3}$."
    assert scores(Math(require_boxed=boxed), texts, answer=gold) == [1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("18", "so it is $9 + 9 = 18$.", 1),
        ("18", "The answer is 18 dollars.", 1),
        ("18", "The answer is 18, because 3 + 15 = 18, not 20.", 1),
        ("20", "The answer is 18, because 3 + 15 = 18, not 20.", 0),
        ("18", "#### 18", 1),
        ("18", "She has 20 and pays 2\nFinal answer: $18", 1),
        ("12", "It covers 12 m^2", 1),
        ("2", "It covers 12 m^2", 0),
        ("2004_5", "The answer is $2004_5$.", 1),
        ("2004", "The answer is $2004_5$.", 0),
        ("CAB", "The answer is CAB.", 1),
        ("CAB", "The answer is ABC.", 0),
        (r"\text{(C)}", "Answer: (C)", 1),
        (r"\text{(C)}", "Answer: (D)", 0),
        ("12,5", "#### 12,5", 1),
        ("12,5", "#### 5,12", 0),
        ("35", "#### 3,5", 0),
        (r"(3, \frac{\pi}{2})", r"The answer is $(3, \frac{\pi}{2})$.", 1),
        ("east", "east", 1),
        ("1.6e-19", r"about $3.2\times10^{-19}$", 0),
        ("4", "", 0),
        ("4", "(" * 30_000, 0),
        ("4", "4 " * 100_000, 1),
    ],
)
def test_math_answers_without_a_box(gold, text, score):
    assert scores(Math(), [text], answer=gold) == [score]


def test_loose_comparison_is_math_verifys():
    loose = Math(strict=False)
    for gold, text in [
        ("CAB", "ABC"),
        ("12,5", "5,12"),
        (r"1.6\times10^{-19}", r"3.2\times10^{-19}"),
        ("0.5", r"50\%"),
    ]:
        assert scores(loose, [rf"\boxed{{{text}}}"], answer=gold) == [1]
        assert scores(Math(), [rf"\boxed{{{text}}}"], answer=gold) == [0]
    assert scores(loose, ["(" * 30_000, r"\boxed{4}"], answer="4") == [0, 1]


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
    with pytest.raises(UserError, match=r"neither 'module\.function' nor"):
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
    vars(app.rewards).pop("Procedural")
    assert app.rewards.Procedural is ReasoningGym  # not by `from`, which asks twice
    assert ReasoningGym().name == "procedural"
    assert ReasoningGym(name="mine").name == "mine"


def test_a_pattern_that_matches_nothing_is_named_once(caplog):
    scorer = RewardScorer([Math(), Format("<think>.*?</think>.*"), Format("(<think>)?.*?</think>.*")])
    text = "so 1</think>1"
    results = [CallResult([0.0]), CallResult([0.0]), CallResult([1.0])]
    for step in range(13):
        scorer.incidents.add(results, ["prompt 'a', completion 0"], [text], np.zeros(1, bool))
        scorer.incidents.report(f"Step {step}")
        assert len(caplog.messages) == (step >= 9)
    assert caplog.messages[0].startswith("Step 9: the pattern '<think>.*?</think>.*' of reward 'format' has matched no")
    assert [scores(Format(reward.pattern.pattern), [text, f"<think>{text}"]) for reward in scorer.rewards[1:]] == [
        [0, 1],
        [1, 1],
    ]


def test_answers_that_no_reward_reads_are_counted(caplog):
    golds = ["7", r"\sqrt{2}", None, "3,5", 5e-5]
    rows = [{"answer": gold} for gold in golds]
    check_answers([Math(), Numeric()], "abcde", rows, "the data")
    assert not caplog.messages
    check_answers([Numeric(), Format("x")], "abcde", rows, "the data")
    line = r"2 of 4 reference answers of the data cannot be read by numeric, the first is '\\sqrt{2}' of prompt 'b'."
    assert [message.startswith(line) for message in caplog.messages] == [True]
    with pytest.raises(UserError, match="2 of 2 reference answers of the data cannot be read by numeric"):
        check_answers([Numeric(), Format("x")], "bd", [rows[1], rows[3]], "the data")
    check_answers([Numeric(), Function("json.dumps")], "bd", [rows[1], rows[3]], "the data")
