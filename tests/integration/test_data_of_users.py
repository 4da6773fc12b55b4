"""Files as people have them, through `dots data`: what is read, how it is said, and what refuses the rest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.support.refusal import TINY, Place, write_pool
from tests.support.tables import few

Rows = list[dict[str, Any]]
SMALL = ("--data.cache_dir=cache", "--trainer.accelerator=cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def command(path: str, *options: str, policy: Path = TINY) -> tuple[str, ...]:
    rewards = () if any(one.startswith("--model.rewards") for one in options) else ("--model.rewards=exact",)
    return ("data", f"--model.policy.path={policy}", f"--data.train.path={path}", *rewards, *options, *SMALL)


def shown(place: Place, rows: Rows, *options: str, policy: Path = TINY) -> tuple[str, list[str], list[str]]:
    """Return the report of these rows, the prompts that `dots data` shows and what the reward sees of each."""
    write_pool(place.path / "rows.jsonl", rows)
    code, out, err = place.run_with_output(*command("rows.jsonl", *options, policy=policy))
    assert code == 0, err
    report, *rest = out.split("\n\nprompt ")
    prompts, seen = [], []
    for one in rest:
        lines = one.splitlines()[1:]
        prompts.append("\n".join(line.removeprefix("  | ") for line in lines if line.startswith("  | ")))
        seen += [line.partition(" sees ")[2] for line in lines if " sees " in line]
    return report.splitlines()[-2].removeprefix("train: rows.jsonl "), prompts, seen


def refused(place: Place, rows: Rows, *options: str) -> str:
    write_pool(place.path / "rows.jsonl", rows)
    return place.refused(*command("rows.jsonl", *options))


def turns(
    *texts: str, keys: tuple[str, str] = ("role", "content"), names: tuple[str, str] = ("user", "assistant")
) -> Rows:
    return [{keys[0]: names[number % 2], keys[1]: text} for number, text in enumerate(texts)]


SHAREGPT = {"keys": ("from", "value"), "names": ("human", "gpt")}


@pytest.mark.parametrize(
    ("row", "schema", "prompt", "answer"),
    few([
        (lambda n: {"messages": turns(f"{n}+1?", f"{n + 1}")}, "messages -> its last turn", "{n}+1?", "{n+1}"),
        (
            lambda n: {"conversations": turns(f"{n}+1?", f"so \\boxed{{{n + 1}}}", **SHAREGPT), "id": n},
            "conversations -> its last turn (boxed)",
            "{n}+1?",
            "{n+1}",
        ),
        (lambda n: {"prompt": turns(f"{n}+1?", f"is {n + 1}")}, "prompt -> its last turn", "{n}+1?", "is {n+1}"),
        (
            lambda n: {"conversation": turns("hi", "hello", f"{n}+1?", f"{n + 1}"), "source": "x"},
            "conversation -> its last turn",
            "User: hi\nAssistant: hello\nUser: {n}+1?\nAssistant:",
            "{n+1}",
        ),
        (lambda n: {"Question": f"{n}+1?", "Answer": n + 1}, "Question -> Answer", "{n}+1?", "{n+1}"),
        (
            lambda n: {"Instruction": "Add.", "Input": f"{n}+1?", "Output": f"{n + 1}"},
            "Instruction + Input -> Output",
            "Add.\n\n{n}+1?",
            "{n+1}",
        ),
        (lambda n: {"prompt": f"{n}+1?", "completion": f"{n + 1}"}, "prompt -> completion", "{n}+1?", "{n+1}"),
        (
            lambda n: {"prompt": turns(f"{n}+1?"), "completion": turns("", f"{n + 1}")[1:]},
            "prompt -> completion",
            "{n}+1?",
            "{n+1}",
        ),
        (
            lambda n: {"system": "Be brief.", "question": f"{n}+1?", "answer": f"{n + 1}"},
            "question -> answer; system message: system",
            "Be brief.\n\n{n}+1?",
            "{n+1}",
        ),
    ], 5),
)  # fmt: skip
def test_forms_of_questions_and_answers(
    place: Place, row: Callable[[int], dict[str, Any]], schema: str, prompt: str, answer: str
) -> None:
    report, prompts, seen = shown(place, [row(n) for n in (0, 1, 2)])
    assert report == f"({schema}): 3 rows read, 3 prompts kept"
    for n in (0, 1, 2):
        written = [text.replace("{n+1}", str(n + 1)).replace("{n}", str(n)) for text in (prompt, answer)]
        assert prompts[n] == written[0]
        assert seen[n] in (f"answer={written[1]!r}", f"answer={written[1]}")


INSTRUCTIONS: list[tuple[Rows, list[str], list[str]]] = [
    (  # Alpaca
        [{"instruction": "Add.", "input": "2 and 3", "output": "5"},
         {"instruction": "Hi?", "input": "", "output": "7"}],
        ["Add.\n\n2 and 3", "Hi?"], ["5", "7"],
    ),
    (  # Dolly
        [{"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed"},
         {"instruction": "Why?", "context": None, "response": "so", "category": "open"}],
        ["Who?\n\nAnn came.", "Why?"], ["Ann", "so"],
    ),
    ([{"instruction": "Add.", "input": " ", "output": "5"}], ["Add."], ["5"]),
    ([{"input": "2 and 3", "output": "5", "instruction": "Add."}], ["Add.\n\n2 and 3"], ["5"]),
    ([{"instruction": "In French.", "question": "Who?", "answer": "Anne"}], ["In French.\n\nWho?"], ["Anne"]),
    ([{"context": "Ann came.", "question": "Who?", "answer": "Ann"}], ["Ann came.\n\nWho?"], ["Ann"]),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "expected", "answers"), few(INSTRUCTIONS, 2))
def test_all_parts_of_an_instruction_reach_the_policy(
    place: Place, rows: Rows, expected: list[str], answers: list[str]
) -> None:
    report, prompts, seen = shown(place, rows)
    assert f"{len(rows)} rows read, {len(rows)} prompts kept" in report
    assert (prompts, seen) == (expected, [f"answer={one!r}" for one in answers])


def test_a_begun_reply_is_still_continued(place: Place) -> None:
    """A `prompt` whose last turn is the same in all rows is no answer, and neither is one that has an answer."""
    begun = [{"prompt": turns(f"{n}+1?", "<think>")} for n in range(3)]
    report, prompts, seen = shown(place, begun)
    assert (report, seen[0]) == ("(prompt, no answers): 3 rows read, 3 prompts kept", "no reference answer")
    assert prompts[0].startswith("User: 0+1?\nAssistant: ")
    own = [{"prompt": turns(f"{n}+1?", f"{n}"), "answer": n + 1} for n in range(3)]
    report, prompts, seen = shown(place, own)
    assert (report.split(":")[0], prompts[1], seen[1]) == ("(prompt -> answer)", "User: 1+1?\nAssistant: 1", "answer=2")


def mmlu(n: int) -> dict[str, Any]:
    return {"question": f"{n}+1?", "subject": "sums", "choices": [str(n + place) for place in range(4)]}


def arc(n: int, labels: str = "ABCD") -> dict[str, Any]:
    return {"question": f"{n}+1?", "choices": {"text": mmlu(n)["choices"], "label": list(labels)}}


LINES = "{n}+1?\nA. {n}\nB. {n+1}\nC. {n+2}\nD. {n+3}"


@pytest.mark.parametrize(
    ("row", "said"),
    few([
        (lambda n: {**mmlu(n), "answer": 1}, "question + choices -> letter of answer, which counts from 0"),
        (lambda n: {**mmlu(n), "label": "B"}, "question + choices -> letter of label"),
        (lambda n: {**mmlu(n), "answer": ["(b)"]}, "question + choices -> letter of answer"),
        (lambda n: {**mmlu(n), "answer": str(n + 1)}, "question + choices -> letter of answer"),
        (lambda n: {**arc(n), "answerKey": "B"}, "question + choices -> letter of answerKey"),
        (lambda n: {**arc(n, "1234"), "answerKey": "2"}, "question + choices -> letter of answerKey"),
        (
            lambda n: {"id": n, "question": {"stem": f"{n}+1?", "choices": [
                {"text": text, "label": label} for text, label in zip(mmlu(n)["choices"], "ABCD", strict=True)
            ]}, "answerKey": "B"},
            "question.stem + question.choices -> letter of answerKey",
        ),
        (
            lambda n: {"question": f"{n}+1?", "options": dict(zip("ABCD", mmlu(n)["choices"], strict=True)),
                       "answer": str(n + 1), "answer_idx": "B"},
            "question + options -> letter of answer",
        ),
        (
            lambda n: {"question": f"{n}+1?", "options": [f"{letter}){text}" for letter, text in
                                                         zip("ABCD", mmlu(n)["choices"], strict=True)], "correct": "B"},
            "question + options -> letter of correct",
        ),
        (
            lambda n: {"question": f"{n}+1?", **dict(zip("ABCD", mmlu(n)["choices"], strict=True)), "answer": "B"},
            "question + A to D -> letter of answer",
        ),
    ], 5),
)  # fmt: skip
def test_multiple_choice(place: Place, row: Callable[[int], dict[str, Any]], said: str) -> None:
    report, prompts, seen = shown(place, [row(n) for n in (0, 4, 8)])
    assert report == f"(read as multiple choice: {said}): 3 rows read, 3 prompts kept"
    for place_, n in enumerate((0, 4, 8)):
        lines = LINES
        for add in (1, 2, 3):
            lines = lines.replace(f"{{n+{add}}}", str(n + add))
        assert prompts[place_] == lines.replace("{n}", str(n))
        assert seen[place_] == "answer='B'"


def test_choices_counted_from_one_and_answers_that_name_none(place: Place) -> None:
    counted = [{**mmlu(n), "answer": n + 1} for n in range(4)]
    report, _, seen = shown(place, counted)
    assert "letter of answer, which counts from 1" in report
    assert seen == ["answer='A'", "answer='B'", "answer='D'"]
    late = [{**mmlu(n), "answer": 0} for n in range(64)] + [{**mmlu(64), "answer": 4}]
    assert "row 65: answer is 4, which names none of 4 choices" in refused(place, late)
    free = [{**mmlu(n), "answer": f"the sum is {n + 1}"} for n in range(3)]
    report, prompts, seen = shown(place, free)
    assert report.startswith("(question -> answer; not shown to the policy: choices): ")
    assert (prompts[0], seen[0]) == ("0+1?", "answer='the sum is 1'")
    blank = [*({**mmlu(n), "answer": 1} for n in range(3)), {**mmlu(3), "answer": -1}]
    assert shown(place, blank)[0].endswith("4 rows read, 3 prompts kept, dropped 1 empty")
    both = [{**mmlu(n), "answer": str(n + 1), "answerKey": "B"} for n in range(3)]
    assert shown(place, both)[2][0] == "answer='B'"


def test_a_template_names_any_column_and_the_choices_stand_where_it_says(place: Place) -> None:
    rows = [{**mmlu(n), "answer": 1, "meta": {"year": 2000 + n}} for n in (0, 1, 2)]
    template = "{choices}\n\n{subject} of {meta.year}: {question} Letter:"
    report, prompts, seen = shown(place, rows, "--data.train.template", template)
    assert "read as multiple choice" in report
    assert prompts[1] == "A. 1\nB. 2\nC. 3\nD. 4\n\nsums of 2001: 1+1? Letter:"
    assert seen[1] == "answer='B'"
    line = refused(place, rows, "--data.train.template", "{question} {chioces}")
    assert "field 'chioces' is unknown" in line and "'choices'" in line
    assert "the policy would read the answer" in refused(place, rows, "--data.train.template", "{question} {answer}")
    chat = [{"messages": [{"role": "system", "content": "Own."}, *turns(f"{n}?")], "answer": n} for n in range(3)]
    given = ("--data.train.system_prompt=General.", "--data.train.template", "Q: {question}")
    assert shown(place, chat, *given)[1][0] == "Own.\n\nQ: 0?"


CALLS = "{% for one in message.tool_calls %}({{ one.function.name }} {{ one.function.arguments | tojson }}){% endfor %}"
CHAT = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
)


def policy_with(template: str, folder: Path) -> Path:
    """Return the tiny policy with a chat template."""
    policy = folder / "policy"
    policy.mkdir()
    for file in TINY.iterdir():
        (policy / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    for file in policy.glob("*token*"):
        file.unlink()
    (policy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(policy)
    return policy


def test_function_calls_in_a_conversation_reach_the_chat_template(place: Place, tmp_path: Path) -> None:
    """As OpenAI's API and transformers' templates write them: arguments as JSON text or an object, content missing."""

    def row(number: int, arguments: object, **more: object) -> dict[str, Any]:
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        said = {"role": "assistant", "tool_calls": [call], **more}
        result = {"role": "tool", "tool_call_id": "c1", "content": f"{number}"}
        return {"messages": [{"role": "user", "content": f"{number}?"}, said, result], "answer": str(number)}

    rows = [row(3, '{"a": 1, "b": 2}', content=None), row(4, {"a": 1, "b": 3}), row(5, '{"a": 5}', content="Well.")]
    policy = policy_with(CHAT.replace("{{ message.content }}", "{{ message.content }}" + CALLS), tmp_path)
    report, prompts, _ = shown(place, rows, policy=policy)
    assert report.startswith("(messages -> answer): 3 rows read")
    assert prompts[0] == '<user>3?<assistant>(add {"a": 1, "b": 2})<tool>3'
    assert prompts[1] == '<user>4?<assistant>(add {"a": 1, "b": 3})<tool>4'
    assert prompts[2] == '<user>5?<assistant>Well.(add {"a": 5})<tool>5'
    report, prompts, _ = shown(place, rows)  # the tiny policy has no chat template
    assert report.startswith("(messages -> answer; not shown to the policy: tool_calls in messages)")
    assert "row 1: the arguments of a function call are not JSON" in refused(place, [row(3, "{a")])


def test_system_and_tools_of_each_row_reach_the_chat_template(place: Place, tmp_path: Path) -> None:
    policy = policy_with(CHAT, tmp_path)
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows: Rows = [
        {"system": "One.", "question": "0?", "answer": "0", "tools": [add]},
        {"system": "", "question": "1?", "answer": "1", "tools": None},
        {"system": "Two.", "question": "2?", "answer": "2", "tools": json.dumps([add])},
    ]
    report, prompts, _ = shown(place, rows, "--data.train.system_prompt=All.", policy=policy)
    assert report.startswith("(question -> answer; system message: system; tools: tools): ")
    assert prompts == ["[add]<system>One.<user>0?", "<system>All.<user>1?", "[add]<system>Two.<user>2?"]
    assert shown(place, rows)[0].startswith(
        "(question -> answer; system message: system; not shown to the policy: tools)"
    )
    rows[1]["tools"] = "add"
    write_pool(place.path / "rows.jsonl", rows)
    assert "row 2: column 'tools' is not JSON" in place.refused(*command("rows.jsonl", policy=policy))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "0?", "chosen": "a", "rejected": "b"},
            ["is preference data: its columns 'chosen' and 'rejected'", "Set answer_column=chosen", "or null if"],
        ),
        (
            {"chosen": turns("0?", "a"), "rejected": turns("0?", "b")},
            ["is preference data", "Set prompt_column=chosen, of which the last reply is left out. Set answer_column"],
        ),
        ({"Chosen": "H: 0?", "Rejected": "H: 0?", "score": 1}, ["is preference data", "Add a column 'prompt'"]),
        (
            {"text": "0? 0"},
            ["no prompt column: its columns are 'text'", "Set prompt_column=text if it holds prompts"],
        ),
    ],
)
def test_other_data_are_one_line_that_says_what_to_do(place: Place, row: dict[str, Any], said: list[str]) -> None:
    line = refused(place, [row])
    for part in said:
        assert part in line


def test_preference_data_are_read_as_the_line_says(place: Place) -> None:
    rows = [{"chosen": turns(f"{n}?", f"a{n}"), "rejected": turns(f"{n}?", "b")} for n in range(3)]
    _, prompts, seen = shown(place, rows, "--data.train.prompt_column=chosen", "--data.train.answer_column=chosen")
    assert (prompts[1], seen[1]) == ("1?", "answer='a1'")
    plain = [{"prompt": f"{n}?", "chosen": f"a{n}", "rejected": "b"} for n in range(3)]
    assert shown(place, plain, "--data.train.answer_column=chosen")[2][1] == "answer='a1'"
    assert shown(place, plain, "--data.train.answer_column=null")[0].startswith("(prompt, no answers): 3 rows")


def test_columns_that_may_hold_the_answers_are_listed(place: Place) -> None:
    rows = [{"prompt": f"{n}?", "gold": str(n), "level": 3, "id": n} for n in range(3)]
    report, _, seen = shown(place, rows)
    assert report.endswith("3 prompts kept; if one of gold, level holds the answers, set answer_column to it")
    assert seen[0] == "no reference answer"
    assert shown(place, rows, "--data.train.answer_column=gold")[0] == "(prompt -> gold): 3 rows read, 3 prompts kept"
    assert "if one of" not in shown(place, rows, "--data.train.answer_column=null")[0]
    line = place.refused("fit", *command("rows.jsonl")[1:], "--data.prompts_per_step=2", touches=True)
    assert "no column with reference answers (columns that are not the prompt: 'gold', 'id', 'level')" in line
    assert "--data.train.answer_column" in line and "log_extra" not in line and "trainer_state" not in line


TABLE = 'question,answer,level\nwhat is 1 + 1?,2,easy\n"say ""é, 国""",国,hard\n'
LINES_OF_JSON = '{"question": "what is 1 + 1?", "answer": "2"}\n{"question": "say \\"é, 国\\"", "answer": "国"}\n'
OBJECTS = [json.loads(line) for line in LINES_OF_JSON.splitlines()]
FILES = {
    "a.tsv": 'question\tanswer\nwhat is 1 + 1?\t2\n"say ""é, 国"""\t国\n'.encode(),
    "b.csv": TABLE.replace(",", ";").replace("é; ", "é, ").encode(),
    "c.csv": TABLE.encode("utf-8-sig"),
    "d.csv": TABLE.encode("utf-16"),
    "e.jsonl.gz": gzip.compress(LINES_OF_JSON.encode()),
    "f.csv.bz2": bz2.compress(TABLE.encode()),
    "g.json.xz": lzma.compress(json.dumps(OBJECTS).encode()),
    "h.json": json.dumps({"version": "1.0", "data": OBJECTS}, indent=2).encode(),
    "i.json": json.dumps({"rows": OBJECTS}).encode(),
    "j.jsonl": LINES_OF_JSON.encode("utf-16"),
    "k.csv": TABLE.replace(",", "|").replace("é| ", "é, ").encode(),
    "l.csv": TABLE.replace(",", ", ").replace("é,  ", "é, ").encode(),
    "m.csv": TABLE.replace("question,answer", " question , answer").encode(),
}


def test_files_of_every_kind_hold_the_same_rows(place: Place) -> None:
    """A question or an answer that differed would be another prompt."""
    for name, content in FILES.items():
        (place.path / name).write_bytes(content)
    code, out, err = place.run_with_output(*command(f"[{', '.join(FILES)}]"))
    assert code == 0, err
    assert "train: a.tsv and 12 more (question -> answer): 26 rows read, 2 prompts kept, dropped 24 duplicate" in out
    assert "  | say \"é, 国\"\n  exact sees answer='国'" in out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", "question,answer\n国,1\n".encode("gbk"), ["'x.csv' line 2 is not UTF-8", "encoding: gbk"]),
        (
            "x.json",
            b'{"train": [{"question": "a"}], "test": [{"question": "b"}]}',
            ["several lists of rows ('train', 't"],
        ),
        ("x.jsonl.gz", b'{"question": "a"}\n', ["'x.jsonl.gz' cannot be read (Not a gzipped file"]),
        ("x.jsonl.gz", gzip.compress(b'{"question": "a"}\n' * 99, mtime=0)[:-20], ["'x.jsonl.gz' cannot be read ("]),
        ("x.xlsx", b"PK", ["ends in '.xlsx', expected one of .jsonl", ".tsv (also with .gz"]),
        ("x.jsonl.zst", b"(", ["ends in '.zst', expected one of"]),
    ],
)
def test_files_that_cannot_be_read(place: Place, name: str, content: bytes, said: list[str]) -> None:
    (place.path / name).write_bytes(content)
    line = place.refused(*command(name))
    for part in said:
        assert part in line


def test_an_encoding_is_used_and_a_wrong_one_named(place: Place) -> None:
    (place.path / "x.csv").write_bytes(TABLE.encode("gbk"))
    code, out, err = place.run_with_output(*command("x.csv", "--data.train.encoding=gbk"))
    assert code == 0, err
    assert "  | say \"é, 国\"\n  exact sees answer='国'" in out
    assert "'x.csv' is not ascii" in place.refused(*command("x.csv", "--data.train.encoding=ascii"))
    assert "'x.csv' is not nosuch" in place.refused(*command("x.csv", "--data.train.encoding=nosuch"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"prompt": "b?", "solution": "2"}, "folder/a.jsonl has no column 'prompt', which folder/b.jsonl has: its"),
        (
            {"question": "b?", "gold": "2"},
            "folder/b.jsonl has no column 'answer', which folder/a.jsonl has: its columns",
        ),
        ({"text": "b?"}, "folder/b.jsonl has no column 'question', which folder/a.jsonl has: its columns are 'text'."),
    ],
)
def test_a_folder_of_several_schemas_names_the_file_and_the_column(
    place: Place, other: dict[str, Any], said: str
) -> None:
    folder = place.path / "folder"
    folder.mkdir()
    for name in ("a", "c"):
        write_pool(folder / f"{name}.jsonl", [{"question": f"{name}?", "answer": "1"}] * 2)
    write_pool(folder / "b.jsonl", [other])
    assert said in place.refused(*command("folder"))
