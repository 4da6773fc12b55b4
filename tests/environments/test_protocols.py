"""How turns are written: what is parsed, and replies as tokens against chat templates of real models."""

import copy
import importlib.util
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from app.environments import Plain, ToolCall
from app.environments.protocols import protocol_of
from datamodules.errors import UserError
from tests.support.policies import TINY

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
CALC = Plain("<calc>", "</calc>", "calculate", "expression", "<result>{content}</result>")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "One."},
                    "b": {"type": "string", "description": "Other."},
                },
                "required": ["a", "b"],
            },
        },
    }
]
JSON = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "2"}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
    "</tool_call>"
)
LLAMA = '{"name": "add", "parameters": {"a": 1, "b": "2"}}'
THOUGHT = "I add.\n</think>\n\n"
# What each template makes of an assistant's turn with one call, after its generation prompt.
WRITTEN = {
    "qwen2_5": JSON,
    "qwen3": JSON,
    "qwen3_instruct_2507": JSON,
    "qwen3_vl": JSON,
    "qwen3_5_nothink": XML,
    "qwen3_5_think": THOUGHT + XML,
    "qwen3_6": THOUGHT + XML,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES_FORM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ {'name': m['name'] or raise_exception('Which tool?'), "
    "'content': m.content} | tojson }}\n</tool_response> "
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n{{ {'arguments': c.function.arguments, "
    "'name': c.function.name} | tojson }}\n</tool_call> {% endfor %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Hermes 3 writes messages: a role of its own for tools, which name themselves, and spaces before the ends."""
WRITTEN["hermes"] = '<tool_call>\n{"arguments": {"a": 1, "b": "2"}, "name": "add"}\n</tool_call> '


@cache
def tokenizer(template: str = ""):
    """A tokenizer of bytes with the chat template of a model and its special tokens; ChatML without a template."""
    if not template:
        made = AutoTokenizer.from_pretrained(TINY)
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.eos_token, made.chat_template = "<|im_end|>", CHATML
        return made
    made = copy.deepcopy(tokenizer())
    if template == "hermes":
        made.chat_template = {"default": "{{ raise_exception('Not this one!') }}", "tool_use": HERMES_FORM}
    else:
        made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    if template.startswith("llama"):
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
        made.add_special_tokens({"additional_special_tokens": special})
        made.bos_token, made.eos_token = special[0], special[3]
    if template.startswith("qwen3"):
        made.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return made


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(template: str, messages) -> str:
    return tokenizer(template).apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("template", WRITTEN)
def test_replies_are_written_as_the_template_writes_the_whole_conversation(template, ended):
    tok = tokenizer(template)
    protocol = protocol_of("auto", tok, None, TOOLS)
    assert protocol.stop == []
    assistant = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}],
    }
    if WRITTEN[template].startswith(THOUGHT):
        assistant["reasoning_content"] = "I add."
    end = "<|eot_id|>" if template.startswith("llama") else "<|im_end|>"
    assert ids_of(tok, end)[0] in protocol.end_ids
    messages = [{"role": "user", "content": "1 + 2?"}]
    ids = ids_of(tok, rendered(template, messages))
    rounds = [["3"], ["an error\nof two lines", 'with "quotes" DotsDummyTurn']]
    for results in rounds:
        ids += ids_of(tok, WRITTEN[template] + (end if ended else ""))
        said = [{"role": "tool", "name": "add", "content": result} for result in results]
        reply = protocol.reply_ids(said, last_token_is_end=ended)
        ids += reply
        messages += [assistant, *said]
        assert tok.decode(ids) == rendered(template, messages)
        if ended:
            assert ids_of(tok, rendered(template, messages))[-len(reply) :] == reply


@pytest.mark.parametrize("template", WRITTEN)
def test_what_a_template_writes_is_parsed(template):
    protocol = protocol_of("auto", tokenizer(template), None, TOOLS)
    end = "<|eot_id|>" if template.startswith("llama") else "<|im_end|>"
    for text in (WRITTEN[template], WRITTEN[template] + end):
        plain, calls, malformed = protocol.parse(text)
        thought = THOUGHT.strip() if WRITTEN[template].startswith(THOUGHT) else ""
        assert (plain, calls, malformed) == (thought, [ToolCall("add", {"a": 1, "b": "2"})], [])


def test_replies_of_users_without_tools():
    tok = tokenizer()
    protocol = protocol_of("auto", tok)
    reply = [{"role": "user", "content": "Another?"}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    whole = tok.apply_chat_template([*turns, *reply], tokenize=False, add_generation_prompt=True)
    prompt = tok.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    for text, ended in (("Yo", False), ("Yo<|im_end|>", True)):
        assert ids_of(tok, prompt + text) + protocol.reply_ids(reply, ended) == ids_of(tok, whole)
    assert protocol.parse("<tool_call>?") == ("<tool_call>?", [], [])


def test_arguments_of_the_chat_template_are_used():
    def said(**kwargs) -> str:
        tok = tokenizer("qwen3")
        return tok.decode(protocol_of("auto", tok, kwargs, TOOLS).reply_ids([{"role": "tool", "content": "3"}], True))

    assert said(enable_thinking=False) == said() + "<think>\n\n</think>\n\n"
    template = (TEMPLATES / "qwen2_5.jinja").read_text().replace("tool_response", "answer")
    assert "<answer>" in said(chat_template=template)


HERMES = [
    ("Let me see. " + JSON, "Let me see.", [("add", {"a": 1, "b": "2"})], 0),
    (JSON + "\n" + JSON, "", [("add", {"a": 1, "b": "2"})] * 2, 0),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": [1]}"}</tool_call>', "", [("f", {"x": [1]})], 0),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})], 0),
    ("<tool_call><function=f><parameter=x>True</parameter></function></tool_call>", "", [("f", {"x": True})], 0),
    ("<tool_call><function=f><parameter=x>a b</parameter></function></tool_call>", "", [("f", {"x": "a b"})], 0),
    ("No call.", "No call.", [], 0),
    ('<tool_call>{"name": "f", "arguments": {}}', "", [], 1),
    ("<tool_call>{name: f}</tool_call> or " + JSON, "or", [("add", {"a": 1, "b": "2"})], 1),
    ('<tool_call>["f"]</tool_call><tool_call>{"name": 1}</tool_call>', "", [], 2),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", [], 1),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", "", [], 1),
    ("<tool_call>" + "9" * 5000 + "</tool_call>", "", [], 1),
    ("<tool_call><function=f><parameter=x>1</function></tool_call>", "", [], 1),
    ("<tool_call><function=f>x<parameter=x>1</parameter></function></tool_call>", "", [], 1),
    ("<tool_call><function=f</tool_call>", "", [], 1),
    ("<tool_call>" * 20_000, "", [], 20_000),
]


@pytest.mark.parametrize(("text", "plain", "calls", "malformed"), HERMES)
def test_hermes(text, plain, calls, malformed):
    found = protocol_of("hermes", tokenizer(), None, TOOLS).parse(text)
    assert found[:2] == (plain, [ToolCall(*one) for one in calls])
    assert len(found[2]) == malformed
    assert all("\n" not in error and len(error) < 300 for error in found[2])


LLAMAS = [
    ("<|python_tag|>" + LLAMA + "<|eom_id|>", "", [("add", {"a": 1, "b": "2"})], 0),
    (LLAMA + "; " + LLAMA, "", [("add", {"a": 1, "b": "2"})] * 2, 0),
    (LLAMA + "\nThat gives 3.", "That gives 3.", [("add", {"a": 1, "b": "2"})], 0),
    ("The answer is 3.", "The answer is 3.", [], 0),
    ('{"answer": 3}', '{"answer": 3}', [], 0),
    ("{3}", "{3}", [], 0),
    ('{"name": "add", "parameters": {"a": 1,}}', "", [], 1),
    ("<|python_tag|>print(3)", "", [], 1),
]


@pytest.mark.parametrize(("text", "plain", "calls", "malformed"), LLAMAS)
def test_llama(text, plain, calls, malformed):
    found = protocol_of("auto", tokenizer("llama3_1"), None, TOOLS).parse(text)
    assert (*found[:2], len(found[2])) == (plain, [ToolCall(*one) for one in calls], malformed)


def test_plain_strings():
    tok = tokenizer()
    protocol = protocol_of(CALC, tok)
    assert (protocol.stop, protocol.end_ids) == (["</calc>"], frozenset())
    call = ToolCall("calculate", {"expression": "1 + 2"})
    assert protocol.parse("So <calc> 1 + 2</calc>") == ("So", [call], [])
    assert protocol.parse("3") == ("3", [], [])
    assert protocol.parse("So <calc>1") == ("So", [], ["The tool call is not closed by </calc>"])
    messages = [{"role": "tool", "content": "3"}, {"role": "tool", "content": "{content}"}]
    for ended in (True, False):
        assert tok.decode(protocol.reply_ids(messages, ended)) == "<result>3</result><result>{content}</result>"


def test_what_cannot_be_used_is_refused_in_one_line():
    def refusal(*arguments) -> str:
        with pytest.raises(UserError) as refused:
            protocol_of(*arguments)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "shows no tool calls" in refusal("auto", tokenizer(), None, TOOLS)
    assert "shows no tool calls" in refusal("auto", tokenizer("glm4moe"), None, TOOLS)
    bare = copy.deepcopy(tokenizer())
    bare.chat_template = None
    assert "has no chat template" in refusal("auto", bare, None, TOOLS)
    bare.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert "does not end the assistant's turns by a token" in refusal("hermes", bare, None, TOOLS)
    bare.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endfor %}"
    assert "does not write messages of the role 'tool'" in refusal("hermes", bare, None, TOOLS)
    bare.chat_template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools!') }}{% endif %}"
    bare.chat_template += "{{ m.content }}<|im_end|>{% endfor %}"
    assert "The chat template rejects messages with the roles user, assistant, tool: No tools!" in refusal(
        "hermes", bare, None, TOOLS
    )
    with pytest.raises(UserError, match=r"protocol\.end is empty"):
        Plain("<calc>", "", "calculate", "expression")
    with pytest.raises(UserError, match="would not read what the tool returned"):
        Plain("<calc>", "</calc>", "calculate", "expression", "result")
