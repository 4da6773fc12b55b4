"""Objects of users' classes as environments, and the options that name them."""

import pickle
import subprocess
import sys

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from app.environments import EnvironmentOptions, Plain, ToolCall, Tools
from app.environments.tools import ToolEnvironment
from datamodules.errors import UserError


class Base:
    def inherited(self) -> str:
        """Return a word."""
        return "word"


class Garden(Base):
    """A class as TRL's `environment_factory` takes it."""

    def __init__(self):
        self.loop, self.rows = None, []

    @property
    def weather(self):
        raise AssertionError("listing tools must not evaluate properties")

    @staticmethod
    def double(x: int) -> int:
        """Double a number.

        Args:
            x: the number.
        """
        return 2 * x

    async def reset(self, **columns) -> str | None:
        import asyncio

        self.loop = asyncio.get_running_loop()
        self.rows.append(columns)
        return columns.get("hint")

    async def water(self, row: int) -> dict:
        """Water a row.

        Args:
            row: which.
        """
        import asyncio

        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(0)
        return {"watered": row}

    def fill(self) -> str:
        """Raise that no memory is left."""
        raise MemoryError

    def _helper(self) -> None: ...

    async def get_reward(self) -> float:
        return 0.5


class Silent:
    def reset(self) -> None: ...


def test_tools_are_the_public_methods_of_the_class():
    environment = ToolEnvironment(Garden)
    assert [one["function"]["name"] for one in environment.tools()] == ["double", "fill", "inherited", "water"]
    assert environment.tools()[0]["function"] == {
        "name": "double",
        "description": "Double a number.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "description": "the number."}},
            "required": ["x"],
        },
        "return": {"type": "integer"},
    }


def test_methods_may_be_async_and_share_a_loop():
    environment = ToolEnvironment(Garden)
    assert environment.reset({"prompt": [{"role": "user", "content": "?"}], "hint": "Dig."}) == "Dig."
    assert environment.reset({"prompt": "?"}) is None
    assert environment.final().rows[1] == {"prompt": "?"}
    calls = [
        ("water", {"row": 1}),
        ("double", {"x": 4}),
        ("reset", {}),
        ("get_reward", {}),
        ("_helper", {}),
        ("double", {}),
    ]
    reply = environment.respond("text", [ToolCall(*call) for call in calls])
    assert [message["content"] for message in reply.messages] == [
        "{'watered': 1}",
        "8",
        *(str({"error": f"Tool {name} not found."}) for name in ("reset", "get_reward", "_helper")),
        str({"error": "Garden.double() missing 1 required positional argument: 'x'"}),
    ]
    assert {message["role"] for message in reply.messages} == {"tool"}
    assert [message["name"] for message in reply.messages] == [name for name, _ in calls]
    assert (reply.calls, reply.failed_calls, reply.done) == (6, 4, False)
    assert environment.reward() == 0.5
    assert environment.respond("text", []).done
    with pytest.raises(MemoryError):
        environment.respond("", [ToolCall("fill", {})])


def test_an_environment_without_reward_or_tools():
    environment = ToolEnvironment(Silent)
    assert environment.reward() is None
    assert environment.tools() == []
    with pytest.raises(TypeError):  # as with TRL, `reset` takes the columns of the data
        environment.reset({"prompt": "?"})


@pytest.fixture
def file(tmp_path):
    made = tmp_path / "gardens.py"
    made.write_text("class Garden:\n    def reset(self, **columns): pass\n")
    return made


def test_options_are_configured_and_pickle(file):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--environment", type=EnvironmentOptions)

    def built(**arguments) -> Tools:
        config = {"class_path": "app.environments.Tools", "init_args": {"factory": f"{file}:Garden", **arguments}}
        return parser.instantiate(parser.parse_object({"environment": config})).environment

    calc = {"start": "<c>", "end": "</c>", "tool": "t", "argument": "a"}
    made = pickle.loads(pickle.dumps(built(max_turns=3, protocol=calc)))  # noqa: S301 (our own)
    assert (made.max_turns, made.time_limit_s, made.protocol) == (3, 10.0, Plain("<c>", "</c>", "t", "a"))
    assert (made.names, made.preload) == (("",), (str(file),))
    several = built(factory={"a": f"{file}:Garden", "b": f"{file}:Other", "c": "json:JSONDecoder"})
    assert (several.names, several.preload) == (("a", "b", "c"), (str(file), "json"))
    with pytest.raises(ArgumentError, match="max_turn"):
        built(max_turn=3)


@pytest.mark.parametrize(
    ("factory", "limits", "told"),
    [
        ("absent.py:Garden", {}, "Environment factory 'absent.py:Garden': there is no file absent.py"),
        ("absent_module:Garden", {}, "there is no module 'absent_module'"),
        ("Garden", {}, "is neither 'module.factory' nor 'file.py:factory'. Write e.g. 'my_env.py:MyEnv'."),
        ({}, {}, "model.environment.factory is empty"),
        ("json:JSONDecoder", {"max_turns": 0}, "model.environment.max_turns is 0, but must be above 0"),
        ("json:JSONDecoder", {"time_limit_s": float("nan")}, "model.environment.time_limit_s is nan"),
    ],
)
def test_options_are_refused_in_one_line(factory, limits, told):
    with pytest.raises(UserError) as refusal:
        Tools(factory, **limits)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


def test_processes_are_light():
    program = "import sys, app.environments.worker; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
