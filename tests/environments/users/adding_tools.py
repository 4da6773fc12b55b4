"""A taskset of `verifiers` as a user writes one: sums, with a tool that keeps state, a stop, and two rewards."""

import os
import random
import time
from pathlib import Path

import verifiers.v1 as vf

__all__ = ["AddingTaskset"]


class AddingData(vf.TaskData):
    answer: int


class CalculatorState(vf.State):
    results: tuple[int, ...] = ()


class Calculator(vf.Toolset[vf.ToolsetConfig, CalculatorState]):
    TOOL_PREFIX = None  # the tool keeps its name

    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        self.state.results = (*self.state.results, a + b)
        return str(a + b)

    @vf.tool
    def increase(self, number: int) -> str:
        """Add one to a number."""
        if number < 0:
            Path("server.pid").write_text(str(os.getpid()))
            time.sleep(600)
        return self.add(number, 1)

    @vf.tool
    def draw(self) -> str:
        """Draw a number."""
        return str(random.random())


class AddingConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class AddingTask(vf.Task[AddingData, CalculatorState, AddingConfig]):
    @classmethod
    def toolsets(cls, config: AddingConfig) -> list[vf.Toolset]:
        return [Calculator(config.tools)]

    @vf.stop
    async def swears(self, trace: vf.Trace) -> bool:
        return any("damn" in (message.content or "") for message in trace.assistant_messages)

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        if "crash" in trace.last_reply:
            raise ZeroDivisionError("the score crashed")
        return float(str(self.data.answer) == trace.last_reply)

    @vf.reward(weight=0.25)
    async def used_tool(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.state.results)

    @vf.metric
    async def calls(self, trace: vf.Trace) -> float:
        return float(len(trace.state.results))


class AddingTasksetConfig(vf.TasksetConfig):
    count: int = 4
    endless: bool = False
    instruction: str | None = "Add."
    task: AddingConfig = AddingConfig()


class AddingTaskset(vf.Taskset[AddingTask, AddingTasksetConfig]):
    def __init__(self, config: AddingTasksetConfig) -> None:
        super().__init__(config)
        self.INFINITE = config.endless

    def load(self):
        print("what a taskset prints is not data")
        for a in range(self.config.count):
            prompt = f"State the final answer to the following arithmetic problem: {a} + 2 ="
            data = AddingData(prompt=prompt, system_prompt=self.config.instruction, answer=a + 2)
            yield AddingTask(data, self.config.task)


if __name__ == "__main__":
    Calculator.run()
