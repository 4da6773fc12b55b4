"""An environment of `verifiers` of several turns as a user writes one: it speaks first, and answers guesses."""

import verifiers.v1 as vf

__all__ = ["GuessingEnv", "GuessingTaskset"]


class GuessingData(vf.TaskData):
    secret: int


class GuessingTask(vf.Task[GuessingData, vf.State, vf.TaskConfig]):
    pass


class GuessingTaskset(vf.Taskset[GuessingTask, vf.TasksetConfig]):
    def load(self):
        for secret in range(10):
            data = GuessingData(name=f"secret-{secret}", system_prompt="Play.", secret=secret)
            yield GuessingTask(data, self.config.task)


class GuessingEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    first: str = "Guess a number below 10."


class GuessingEnv(vf.Env[GuessingEnvConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        right = False
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn(self.config.first)
            while not segment.terminated:
                guess = segment.last_reply
                right = guess == str(task.data.secret)
                if right:
                    break
                segment = await interaction.turn("higher" if guess < str(task.data.secret) else "lower")
        interaction.trace.record_reward("guessed", float(right), 2.0)
