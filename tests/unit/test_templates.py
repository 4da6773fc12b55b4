"""What the policy reads is what the tokenizer's own calls give."""

from __future__ import annotations

import pytest

from datamodules.errors import UserError
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
        ("{prompt}", "field 'prompt'"),
        ("{question.__class__}", "field 'question.__class__'"),
        ("no field", r"has no field \{question\}"),
    ],
)
def test_wrong_templates_say_why(template: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_template(template)


def test_refusing_chat_template_is_the_users_error() -> None:
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match="System role not supported"):
        Renderer(tokenizer, system_prompt="S")("x")
