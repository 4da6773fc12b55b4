"""An environment of `verifiers` with two agents, as a user writes one."""

import verifiers.v1 as vf

__all__ = ["TwoPlayersEnv", "TwoPlayersTaskset"]


class TwoPlayersTaskset(vf.Taskset[vf.Task, vf.TasksetConfig]):
    def load(self):
        yield vf.Task(vf.TaskData(prompt="Play."), self.config.task)


class TwoPlayersConfig(vf.EnvConfig):
    first: vf.AgentConfig = vf.AgentConfig()
    second: vf.AgentConfig = vf.AgentConfig()


class TwoPlayersEnv(vf.Env[TwoPlayersConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        await agents.first.run(task)
        await agents.first.run(task)
