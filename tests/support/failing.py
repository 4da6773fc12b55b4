"""User code that raises anything at any stage of a run, as the text of modules that a test writes to its folder."""

MODULES = {
    "dots_failing_raise": """import os
import sys


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Closed(Exception):
    __notes__ = 5

    def add_note(self, note):
        raise RuntimeError("no notes")


def recurse(depth=0):
    return recurse(depth + 1)


RAISE = {
    "RuntimeError": lambda: throw(RuntimeError("first line\\n\\n  second line")),
    "RecursionError": recurse,
    "MemoryError": lambda: throw(MemoryError()),
    "ModuleNotFoundError": lambda: __import__("dots_no_such_module"),
    "SyntaxError": lambda: compile("def f(:\\n", "my_other_rewards.py", "exec"),
    "UnicodeDecodeError": lambda: b"\\xff".decode(),
    "KeyError": lambda: throw(KeyError(("a", 1), None, {})),
    "Unprintable": lambda: throw(Unprintable()),
    "Closed": lambda: throw(Closed("closed")),
    "ExceptionGroup": lambda: throw(ExceptionGroup("both", [ValueError("one"), KeyError("two")])),
    "BaseExceptionGroup": lambda: throw(BaseExceptionGroup("both", [GeneratorExit(), ValueError("one")])),
    "SystemExit": lambda: sys.exit(0),
    "StopIteration": lambda: next(iter(())),
    "GeneratorExit": lambda: throw(GeneratorExit()),
    "AssertionError": lambda: throw(AssertionError()),
    "OSError": lambda: throw(OSError("x" * 1_000_000)),
    "ValueError": lambda: throw(ValueError("\\udcff \\x1b[31m red \\x00")),
    "ZeroDivisionError": lambda: 1 / 0,
    "FloatingPointError": lambda: throw(FloatingPointError(float("nan"))),
    "TypeError": lambda: throw(TypeError(["a", "list"])),
}


def throw(error):
    raise error


def at(place):
    if os.environ.get("FAIL_AT") == place:
        RAISE[os.environ["FAIL_WITH"]]()
""",
    # Reward workers import this one, and nothing slow with it.
    "dots_failing_rewards": """from app.rewards import Numeric
from dots_failing_raise import at


class Score(Numeric):
    def __init__(self):
        at("reward")
        super().__init__()
""",
    "dots_failing_code": """from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from app.engines import Transformers
from app.module import GRPOModule
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from datamodules.selectors import Uniform
from dots_failing_raise import at

at("import")


class Watch(Callback):
    def __init__(self):
        at("callback")

    def setup(self, trainer, pl_module, stage):
        at("callback setup")

    def on_fit_start(self, trainer, pl_module):
        at("on_fit_start")

    def on_train_start(self, trainer, pl_module):
        at("on_train_start")

    def on_validation_start(self, trainer, pl_module):
        at("on_validation_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        at(f"end of step {batch.step}")


class Logger(CSVLogger):
    def __init__(self):
        at("logger")
        super().__init__("runs", name="small")


class Model(GRPOModule):
    def __init__(self, **options):
        at("model")
        super().__init__(**options)

    @property
    def tokenizer(self):
        at("tokenizer")
        return self.policy.load_tokenizer()

    def configure_model(self):
        at("configure_model")
        super().configure_model()

    def configure_optimizers(self):
        at("configure_optimizers")
        return super().configure_optimizers()


class Data(OnlinePromptDataModule):
    def __init__(self, **options):
        at("data")
        super().__init__(**options)


class Source(PromptFile):
    def load(self, tokenizer, seed):
        at("data loading")
        return super().load(tokenizer, seed)


class Choice(Uniform):
    def __init__(self):
        at("selector")
        super().__init__()

    def choose(self, n, exclude=(), refill=False):
        at("first choice")
        return super().choose(n, exclude, refill)


class Engine(Transformers):
    def __init__(self):
        at("engine")
        super().__init__()

    def prepare(self):
        at("engine start")
        super().prepare()

    def generate(self, prompts, sampling, seeds):
        at("first rollout")
        return super().generate(prompts, sampling, seeds)
""",
}
