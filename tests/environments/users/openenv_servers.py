"""Servers of OpenEnv as a user writes them: `python openenv_servers.py FILE KIND SESSIONS` writes its port to FILE."""

import socket
import sys
from pathlib import Path

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation


class Guess(Action):
    """Guess the number."""

    number: int
    comment: str = ""


class Answer(Observation):
    text: str = ""


class Guessing(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, **kwargs):
        if seed == 99:
            raise ValueError("there is no such game")
        self.secret, self.guesses = seed or 0, 0
        return Answer(text="Guess a number below 10.")

    def step(self, action, timeout_s=None, **kwargs):
        if action.comment:
            raise ValueError("no comments")
        self.guesses += 1
        if action.number == self.secret:
            return Answer(text="right", done=True, reward=1.0)
        return Answer(text="higher" if action.number < self.secret else "lower", reward=-0.125)

    @property
    def state(self):
        return State(step_count=self.guesses)


class Adding(MCPEnvironment):
    """Tools by name, which OpenEnv calls MCP."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        server = FastMCP("adding")

        @server.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        @server.tool
        def divide(a: float, b: float) -> str:
            """Divide two numbers."""
            return f"{a / b:g}"

        super().__init__(server)

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Observation(done=False)

    def _step_impl(self, action, timeout_s=None, **kwargs):
        return Observation(done=False)

    @property
    def state(self):
        return State()


KINDS = {"guessing": (Guessing, Guess, Answer), "adding": (Adding, CallToolAction, CallToolObservation)}

if __name__ == "__main__":
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # so that who knows the port is heard
    app = create_fastapi_app(*KINDS[sys.argv[2]], max_concurrent_envs=int(sys.argv[3]))
    Path(sys.argv[1]).write_text(str(listening.getsockname()[1]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
