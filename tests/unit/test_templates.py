"""What the policy reads is what the tokenizer's own calls give."""

from __future__ import annotations

import pytest

from datamodules.errors import UserError
from datamodules.prompts.reading import read_pool
from datamodules.prompts.schemas import Schema
from datamodules.prompts.tables import ListTable
from datamodules.prompts.templates import Renderer, check_template
from tests.support.reading_helpers import character_tokenizer

TURNS = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "twice that?"},
]


def test_chat_template_ids_are_the_tokenizers_own() -> None:
    tokenizer = character_tokenizer(chat=True)
    render = Renderer(tokenizer, system_prompt="Be brief.")
    rendered = render(TURNS)
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render.encode([rendered.text]) == [expected]
    assert rendered.prompt == messages
    assert rendered.text.endswith("<|user|>twice that?<|end|><|assistant|>")


def test_plain_question_goes_through_the_chat_template_as_text() -> None:
    rendered = Renderer(character_tokenizer(chat=True))("2+3?")
    assert rendered.prompt == rendered.text == "<|user|>2+3?<|end|><|assistant|>"


def test_own_system_message_stays() -> None:
    own = [{"role": "system", "content": "Think."}, TURNS[0]]
    assert Renderer(character_tokenizer(chat=True), system_prompt="Be brief.")(own).prompt == own


def test_begun_reply_is_continued() -> None:
    rendered = Renderer(character_tokenizer(chat=True))(TURNS[:2])
    assert rendered.text == "<|user|>2+3?<|end|><|assistant|>5"


def test_plain_text_without_chat_template() -> None:
    tokenizer = character_tokenizer()
    assert Renderer(tokenizer)("2+3?").text == "2+3?"
    assert Renderer(tokenizer, system_prompt="Be brief.")("2+3?").text == "Be brief.\n\n2+3?"
    rendered = Renderer(tokenizer, system_prompt="Be brief.")(TURNS)
    assert rendered.text == "Be brief.\n\nUser: 2+3?\nAssistant: 5\nUser: twice that?\nAssistant:"
    assert [message["role"] for message in rendered.prompt] == ["system", "user", "assistant", "user"]


def test_template_takes_the_last_question() -> None:
    template = "Q: {question}\nAnswer in \\boxed{{}}:"
    rendered = Renderer(character_tokenizer(chat=True), template)(TURNS)
    assert rendered.prompt == rendered.text == "Q: twice that?\nAnswer in \\boxed{}:"
    with_system = Renderer(character_tokenizer(), "{system_prompt}|{question}", system_prompt="S")
    assert with_system("a {b} c").text == "S|a {b} c"
    assert Renderer(character_tokenizer(), "Q {question}", system_prompt="S")("x").text == "S\n\nQ x"


def test_plain_text_begins_but_does_not_end_with_special_tokens() -> None:
    tokenizer = character_tokenizer(closes=True)
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    (ids,) = Renderer(tokenizer).encode(["ab"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "b"]


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{question} in \\boxed{}", r"field '' .* Write literal braces as \{\{ and \}\}"),
        ("{question} {", "Write literal braces"),
        ("no field", r"has no field \{question\}"),
        ("{system_prompt}", r"has no field \{question\}"),
    ],
)
def test_wrong_templates_say_why(template: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_template(template)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{prompt}", r"field 'prompt' is unknown, .* or a column of x \('question', 'answer', 'level', 'extra'\)"),
        ("{question.__class__}", "field 'question.__class__'"),
        ("{question} {extra.nosuch}", "field 'extra.nosuch'"),
        ("{level}", r"has no field \{question\}"),
        ("{question} {answer}", "names 'answer', so that the policy would read the answer"),
    ],
)
def test_templates_name_columns_of_the_data(template: str, match: str) -> None:
    row = {"question": "2+3?", "answer": "5", "level": 3, "extra": {"unit": None, "hint": ["a"]}}
    schema = Schema("question", "answer")
    with pytest.raises(UserError, match=match):
        read_pool(ListTable([row]), schema, Renderer(character_tokenizer(), template), "x")
    fine = Renderer(character_tokenizer(), "{question} {level} {extra.hint} {extra}")
    read = read_pool(ListTable([row]), schema, fine, "x")[0]
    assert (read.question, read.prompt) == ("2+3?", '2+3? 3 ["a"] {"unit": null, "hint": ["a"]}')


def test_refusing_chat_template_is_the_users_error() -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        Renderer(tokenizer, system_prompt="S")("x")


def tokens(renderer: Renderer, text: str) -> list[str]:
    (ids,) = renderer.encode([text])
    return renderer.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("template", [None, "{question}", "<s>{question}"])
@pytest.mark.parametrize("question", ["ab", "<s>ab"])
def test_a_prompt_begins_once(template: str | None, question: str) -> None:
    renderer = Renderer(character_tokenizer(), template)
    begun = template == "<s>{question}" and question == "<s>ab"
    # The text holds one of its own, and one more only if both the template and the question do.
    assert tokens(renderer, renderer(question).text) == ["<s>", *["<s>"] * begun, "a", "b"]


def test_a_chat_template_that_begins_the_text_begins_it_once() -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    renderer = Renderer(tokenizer)
    assert tokens(renderer, renderer("ab").text) == tokens(renderer, renderer("<s>ab").text) == ["<s>", "a", "b"]


def test_a_second_first_token_is_kept_where_the_tokenizer_adds_none() -> None:
    tokenizer = character_tokenizer(begins=False)
    assert tokens(Renderer(tokenizer), "ab") == ["a", "b"]
    assert tokens(Renderer(tokenizer), "<s>ab") == ["<s>", "a", "b"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", ["<|end|>"]),
        ("a", ["a"]),
        ("<|end|>", ["<|end|>"]),
        ("a<|end|>", ["a", "<|end|>"]),
        ("<|end|>a", ["<|end|>", "a"]),
    ],
)
def test_an_appended_end_token_goes_unless_nothing_else_is_left(text: str, read: list[str]) -> None:
    assert tokens(Renderer(character_tokenizer(begins=False, closes=True)), text) == read


def test_a_prompts_own_end_token_stays() -> None:
    assert tokens(Renderer(character_tokenizer()), "a<|end|>") == ["<s>", "a", "<|end|>"]


BROKEN = {
    "{{ 1 // 0 }}": "ZeroDivisionError: integer division or modulo by zero",
    "{{ messages + 1 }}": "TypeError: ",
    "{{ {}['x'].y }}": "UndefinedError: ",
    "{{ messages[0].content.nosuch() }}": "UndefinedError: ",
    "{{ strftime_now(7) }}": "TypeError: ",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "RecursionError: maximum recursion depth exceeded",
    "{% if %}": "TemplateSyntaxError: ",
    "{{ raise_exception('no\n system') }}": "user: no system. Set a plain template",
    "{{ ''.__class__ }}{{ ''.__class__.mro() }}": "SecurityError: ",
    "{{ '%d' % 'x' }}": "TypeError: ",
    "{{ 'x' * 100000000000 }}": "MemoryError",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}": "TimeoutError: it takes more",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "MemoryError",
}


@pytest.mark.parametrize("template", BROKEN)
def test_whatever_a_chat_template_does_is_one_line_with_its_row(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.prompts.bounded.SECONDS", 1)
    monkeypatch.setattr("datamodules.prompts.bounded.MEMORY", 2**29)
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{% if messages[0].content != 'bad' %}fine{% else %}" + template + "{% endif %}"
    if template == "{% if %}":
        tokenizer.chat_template = template
    rows = [{"question": "good" * (template != "{% if %}")}, {"question": "bad"}]
    with pytest.raises(UserError) as raised:
        read_pool(ListTable(rows), Schema("question"), Renderer(tokenizer), "x.jsonl")
    assert str(raised.value).startswith("x.jsonl: row 2: The chat template rejects messages with the roles user: ")
    assert BROKEN[template] in str(raised.value)


@pytest.mark.parametrize(
    "power", ["{{ 10**10**9 }}", "{%- set n = 10 %}{{ n **n**n }}", "{{ 1|round(999999999, 'floor') }}"]
)
def test_a_power_in_a_chat_template_is_refused_before_it_is_compiled(power: str) -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}" + power
    with pytest.raises(UserError, match=r"x: row 1: The chat template rejects .* may take any time\. Set a plain temp"):
        read_pool(ListTable([{"question": "a"}]), Schema("question"), Renderer(tokenizer), "x")
    tokenizer.chat_template = "a ** b {# 2 ** 3 #}{{ '2 ** 3' }}{{ 1.4 | round }}"  # text, and a whole number
    read_pool(ListTable([{"question": "a"}]), Schema("question"), Renderer(tokenizer), "x")


def test_limits_end_with_the_reading() -> None:
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    read_pool(ListTable([{"question": "a"}]), Schema("question"), Renderer(character_tokenizer(chat=True)), "x")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


NO_SYSTEM = "{% for message in messages %}{% if message.role != 'system' %}{{ message.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [NO_SYSTEM, "{{ messages[-1].content }}", "{{ messages | selectattr('role', 'equalto', 'user') | list }}"],
)
@pytest.mark.parametrize("own", [False, True])
def test_a_chat_template_that_leaves_out_the_system_prompt_is_refused(template: str, own: bool) -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "Be brief."}, TURNS[0]]
    with pytest.raises(UserError, match="The chat template leaves out system messages"):
        Renderer(tokenizer)(messages) if own else Renderer(tokenizer, system_prompt="Be brief.")("2+3?")
    assert "2+3?" in Renderer(tokenizer)("2+3?").text


def test_a_chat_template_may_write_the_system_prompt_as_it_likes() -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[1].content }} ({{ messages[0].content | upper | tojson }})"
    assert Renderer(tokenizer, system_prompt="Be\nbrief.")("x").text == 'x ("BE\\nBRIEF.")'


@pytest.mark.parametrize(
    ("chat", "kwargs", "match"),
    [
        (
            True,
            {"enable_thinkng": False},
            r"has 'enable_thinkng', which the chat template does not use. Did you mean 'enable_thinking'",
        ),
        (True, {"enable_thinking": False, "zzz": 1}, r"has 'zzz', which the chat template does not use\.$"),
        (True, {"thinking": 1}, "does not use"),
        (False, {"enable_thinking": False}, "no chat template is used: the tokenizer has no chat template"),
    ],
)
def test_arguments_that_nothing_reads_are_refused(chat: bool, kwargs: dict[str, object], match: str) -> None:
    tokenizer = character_tokenizer(chat)
    if chat:
        tokenizer.chat_template += "{% if enable_thinking is false %}<think></think>{% endif %}"
        assert Renderer(tokenizer, None, None, {"enable_thinking": False})("x").text.endswith("<think></think>")
    with pytest.raises(UserError, match=match):
        Renderer(tokenizer, None, None, kwargs)
    with pytest.raises(UserError, match="no chat template is used: template replaces it"):
        Renderer(tokenizer, "{question}", None, {"enable_thinking": False})


@pytest.mark.parametrize("template", ["{question:d}", "{question!x}", "{question:{width}}", "{question:>99999999999}"])
def test_a_format_that_cannot_be_applied_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="template '"):
        check_template(template)


def test_prompts_show_the_tools_of_their_environment_and_what_is_added_to_them() -> None:
    tokenizer = character_tokenizer(chat=True)
    named = "{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif %}"
    tokenizer.chat_template = named + tokenizer.chat_template
    tools = {
        name: [{"type": "function", "function": {"name": one}} for one in its]
        for name, its in {"sums": ("add", "take"), "talk": ()}.items()
    }
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    rows = [
        {"question": "2+3", "environment": "sums", "answer": "5"},
        {"question": turns, "environment": "talk", "answer": "6"},
        {"question": turns[:2], "environment": "talk", "answer": "7"},
    ]
    schema = Schema("question", "answer")
    pool = read_pool(ListTable(rows), schema, Renderer(tokenizer, tools=tools), "x")
    shown = [tokenizer.decode(list(prompt.token_ids)) for prompt in pool]
    assert shown[0] == "[add take ]<|user|>2+3<|end|><|assistant|>"
    assert shown[1] == "<|user|>Hi<|end|><|assistant|>Ho<|end|><|user|>?<|end|><|assistant|>"
    assert pool[0].extended is not None and pool[1].extended is not None
    assert tokenizer.decode(list(pool[0].extended("=?"))) == "[add take ]<|user|>2+3=?<|end|><|assistant|>"
    assert tokenizer.decode(list(pool[1].extended("!"))) == shown[1].replace("?<", "?!<")
    assert pool[2].extended is None  # it has no last message of the user
    assert read_pool(ListTable(rows), schema, Renderer(tokenizer), "x")[0].extended is None
    rows[0]["environment"] = "sum"
    with pytest.raises(UserError, match=r"'sum', expected one of sums, talk.*did you mean 'sums'"):
        read_pool(ListTable(rows), schema, Renderer(tokenizer, tools=tools), "x")
    one = read_pool(ListTable(rows), schema, Renderer(tokenizer, tools={"": tools["sums"]}), "x")
    assert tokenizer.decode(list(one[0].token_ids)) == shown[0]
