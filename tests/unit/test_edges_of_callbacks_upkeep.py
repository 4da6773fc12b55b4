"""Borders of the callbacks that keep a run going: random state, stops, checks, budgets, checkpoints and messages."""

from __future__ import annotations

import atexit
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.engines import Sampling, Transformers
from app.policy.model import Policy
from app.ranks import LostRankError
from app.runs.checkpoint_files import seal
from app.runs.folder import RunTrainer
from app.runs.ownership import Claim, Owner
from app.runs.sharded_strategy import ShardedStrategy
from callbacks import (
    ClockBudget,
    GracefulStop,
    RandomState,
    Rollouts,
    RunCheckpoint,
    RunChecks,
    RunFolder,
    RunLedger,
    ShardedPolicy,
)
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import can_validate, check_places, is_over, validation_follows
from callbacks.upkeep.failed_step import FailedStep
from callbacks.watching.validation import EndValidation, StartValidation
from datamodules.errors import UserError
from datamodules.types import TrainBatch
from tests.support.builders import group, prompt
from tests.support.scripted_run import HALF, scripted_run
from tests.support.selector_builders import saved_and_loaded
from tests.support.trainers import MODULE, trainer_with

# --- Random state ---------------------------------------------------------------------------------------------------


@pytest.fixture
def generators() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draws() -> list[object]:
    return [
        random.random(), random.gauss(0, 1), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist(),
    ]  # fmt: skip


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("normals", [0, 1])  # the second of two normal numbers is kept by Python and NumPy
def test_all_global_generators_continue_bit_by_bit(generators: None, normals: int) -> None:
    seed_all(3)
    for _ in range(normals):
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(5)
    state = saved_and_loaded(RandomState().state_dict())
    expected = draws() + draws()
    seed_all(4)
    untouched = draws()
    one = RandomState()
    one.load_state_dict(state)
    seed_all(4)
    assert draws() == untouched  # what is drawn between loading and training is the start's own
    one.on_train_start(trainer_with(), MODULE)
    assert draws() + draws() == expected
    seed_all(4)
    one.on_train_start(trainer_with(), MODULE)  # another call of fit goes on
    assert draws() == untouched


@pytest.mark.parametrize(("saved", "devices", "restored"), [(0, 0, False), (2, 2, True), (2, 1, False), (2, 0, False)])
def test_generators_of_gpus_are_restored_where_there_are_as_many(
    generators: None, monkeypatch: pytest.MonkeyPatch, saved: int, devices: int, restored: bool
) -> None:
    given: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    one, states = RandomState(), [torch.tensor([number]) for number in range(saved)]
    one.load_state_dict(RandomState().state_dict() | {"cuda": states})
    one.on_train_start(trainer_with(), MODULE)
    assert given == ([states] if restored else [])


# --- The end of a run, and the validation before it ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        ({}, False),
        ({"global_step": 7}, False),
        ({"global_step": 8}, True),
        ({"global_step": 9}, True),
        ({"max_steps": -1}, False),
        ({"should_stop": True}, True),
        ({"should_stop": True, "min_steps": 4}, False),
        ({"should_stop": True, "min_steps": 3}, True),
        ({"is_last_batch": True, "max_epochs": 1}, True),
        ({"is_last_batch": True, "max_epochs": 2}, False),
        ({"is_last_batch": True, "max_epochs": 2, "current_epoch": 1}, True),
        ({"is_last_batch": True, "max_epochs": -1}, False),
        ({"is_last_batch": True, "max_epochs": None}, False),
        ({"is_last_batch": False, "max_epochs": 1}, False),
    ],
)
def test_when_a_run_is_over(changes: dict[str, Any], over: bool) -> None:
    trainer = trainer_with(**changes)
    assert is_over(trainer) is over
    EndValidation().on_train_batch_end(trainer, MODULE, None, TrainBatch(2, ()), 2)
    assert trainer.should_stop is (over or changes.get("should_stop", False))


@pytest.mark.parametrize(
    ("changes", "batch_idx", "follows"),
    [
        ({}, 3, True),
        ({}, 2, False),
        ({}, 4, False),
        ({}, 7, True),
        ({"global_step": 8}, 2, True),
        ({"val_check_batch": math.inf}, 3, False),
        ({"val_check_batch": math.inf, "global_step": 8}, 3, True),
        ({"num_val_batches": [0, 0]}, 3, False),
        ({"num_val_batches": [0, 1]}, 3, True),
        ({"enable_validation": False}, 3, False),
        ({"enable_validation": False, "global_step": 8}, 3, False),
    ],
)
def test_when_a_validation_follows_a_step(changes: dict[str, Any], batch_idx: int, follows: bool) -> None:
    trainer = trainer_with(**changes)
    assert validation_follows(trainer, batch_idx) is follows
    assert can_validate(trainer) is not bool(
        changes.keys() & {"enable_validation"} or changes.get("num_val_batches") == [0, 0]
    )


@pytest.mark.parametrize(
    ("options", "changes", "runs"),
    [
        ({}, {"global_step": 0}, True),
        ({}, {"global_step": 1}, False),
        ({}, {"global_step": 0, "num_val_batches": [0]}, False),
        ({"enabled": False}, {"global_step": 0}, False),
    ],
)
def test_a_new_run_is_validated_before_its_first_step(
    options: dict[str, bool], changes: dict[str, Any], runs: bool
) -> None:
    states: list[tuple[bool, bool]] = []
    trainer = trainer_with(validating=False, training=True, **changes)

    def run() -> None:
        states.append((trainer.validating, trainer.training))
        trainer.training = False  # Lightning has one state, of which these are names

    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=SimpleNamespace(run=run)))
    StartValidation(**options).on_train_start(trainer, MODULE)
    assert states == ([(True, True)] if runs else [])
    assert trainer.training is True


@pytest.mark.parametrize(
    ("seconds", "changes", "batch_idx", "stops"),
    [
        (9.9, {}, 3, False),
        (10.0, {}, 3, True),
        (10.0, {}, 2, False),  # at the next validation
        (10.0, {"num_val_batches": [0]}, 2, True),
        (10.0, {"val_check_batch": math.inf}, 2, True),  # by time: a validation follows when the run stops
        (9.9, {"num_val_batches": [0]}, 2, False),
    ],
)
def test_a_budget_ends_a_run_after_its_validation(
    seconds: float, changes: dict[str, Any], batch_idx: int, stops: bool
) -> None:
    ledger, budget = RunLedger(), ClockBudget(10.0)
    trainer = trainer_with(callbacks=[ledger, budget], **changes)
    budget.setup(trainer, MODULE, "fit")
    ledger.clock.seconds = seconds
    budget.on_train_batch_end(trainer, MODULE, None, TrainBatch(batch_idx, ()), batch_idx)
    assert trainer.should_stop is stops


@pytest.mark.parametrize(("steps", "seconds", "stops"), [(3, 10.0, True), (3, 9.0, False), (0, 10.0, False)])
def test_a_run_whose_budget_is_spent_has_nothing_to_do(steps: int, seconds: float, stops: bool) -> None:
    ledger, budget = RunLedger(), ClockBudget(10.0)
    trainer = trainer_with(callbacks=[ledger, budget])
    budget.setup(trainer, MODULE, "fit")
    ledger.steps, ledger.clock.seconds = steps, seconds
    budget.on_fit_start(trainer, MODULE)
    assert trainer.should_stop is stops


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_without_an_end_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match="expected a number above 0"):
        ClockBudget(seconds)


# --- Signals --------------------------------------------------------------------------------------------------------


class Ranks:
    """Of a run of two processes, one of which has received a signal or not."""

    size = 2

    def __init__(self, received: bool) -> None:
        self.received = received
        self.asked: list[bool] = []

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return self.received


@pytest.fixture
def stop() -> Iterator[GracefulStop]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    one = GracefulStop()
    one._take_over()
    yield one
    for number, handler in before.items():
        signal.signal(number, handler)


ALONE = SimpleNamespace(size=1, any=None)


def stopped(trainer: Any) -> bool:
    return bool(trainer._signal_connector.received_sigterm)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_obeyed_once_the_step_is_over(
    stop: GracefulStop, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    module: Any = SimpleNamespace(ranks=ALONE)
    quiet = trainer_with()
    stop.on_train_batch_end(quiet, module, None, TrainBatch(0, ()), 0)
    assert not stopped(quiet)
    os.kill(os.getpid(), number)
    trainer = trainer_with()
    assert not stopped(trainer)
    assert signal.getsignal(signal.SIGINT) is (
        signal.default_int_handler if number == signal.SIGINT else signal.getsignal(signal.SIGINT)
    )
    stop.on_train_batch_end(trainer, module, None, TrainBatch(3, ()), 3)  # whose validation is still to come
    assert not stopped(trainer)
    stop.on_validation_end(trainer, module)
    assert stopped(trainer)
    trainer = trainer_with()
    stop.on_train_batch_end(trainer, module, None, TrainBatch(2, ()), 2)
    assert stopped(trainer)
    validation = trainer_with(state=SimpleNamespace(fn="validate"))
    stop.on_validation_end(validation, module)
    assert not stopped(validation)
    if number == signal.SIGTERM:
        os.kill(os.getpid(), number)  # says nothing more
    else:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err.count("dots: stopping after the step in progress") == 1


def test_handlers_are_those_of_before_once_the_run_is_over() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    one = GracefulStop()
    one._take_over()
    assert all(signal.getsignal(number) != handler for number, handler in before.items())
    one.teardown(trainer_with(), MODULE, "fit")
    assert all(signal.getsignal(number) == handler for number, handler in before.items())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    one.teardown(trainer_with(), MODULE, "fit")  # which has nothing left to put back
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])


class Signalled(StepCallback):
    """Gets SIGTERM while the engine starts."""

    stage = Stage.PUSH_WEIGHTS

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_while_an_engine_starts_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lightning's own handler would broadcast, and hang where the other ranks wait for something else."""
    with pytest.raises(SystemExit) as raised:
        scripted_run(tmp_path, monkeypatch, [HALF] * 4, [Rollouts(), GracefulStop(), Signalled()], steps=3)
    said = capfd.readouterr().err
    assert said.index("dots: stopping after the step in progress") < said.index("stopped by SIGTERM after 1 of 3")
    assert raised.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("updates", "limit", "stops"), [(7, 8, True), (8, 8, False), (9, 8, False), (9, -1, True), (1, 1, False)]
)
def test_a_run_at_its_end_simply_ends(updates: int, limit: int, stops: bool) -> None:
    trainer, one = trainer_with(global_step=updates, max_steps=limit), GracefulStop()
    one._received = signal.SIGTERM
    one.agree(trainer, ALONE)  # type: ignore[arg-type]
    assert stopped(trainer) is stops


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("anywhere", [False, True])
def test_processes_stop_together(here: bool, anywhere: bool) -> None:
    trainer, one, ranks = trainer_with(), GracefulStop(), Ranks(anywhere)
    one._received = signal.SIGINT if here else None
    one.agree(trainer, ranks)  # type: ignore[arg-type]
    assert ranks.asked == [here]
    assert stopped(trainer) is anywhere


@pytest.mark.parametrize(
    ("number", "limit", "told"),
    [
        (signal.SIGINT, 8, "dots: stopped by SIGINT after 3 of 8 updates, which are saved."),
        (signal.SIGTERM, -1, "dots: stopped by SIGTERM after 3 updates, which are saved."),
        (None, 8, "dots: stopped by SIGTERM after 3 of 8 updates, which are saved."),  # another rank received it
    ],
)
def test_what_a_signal_stopped_is_told_by_exit_code_and_line(
    capsys: pytest.CaptureFixture[str], number: int | None, limit: int, told: str
) -> None:
    one, error = GracefulStop(), SIGTERMException()
    one._received = number
    one.on_exception(trainer_with(max_steps=limit), MODULE, error)
    assert error.code == 128 + (number or signal.SIGTERM)
    assert capsys.readouterr().err == f"{told} Run the same command with --ckpt_path last to continue.\n"
    one.on_exception(trainer_with(is_global_zero=False), MODULE, SIGTERMException())
    one.on_exception(trainer_with(), MODULE, ValueError("another"))
    assert capsys.readouterr().err == ""


def test_only_a_lost_process_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[object, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *given: registered.append(given))
    launcher = SimpleNamespace(kill=None)
    monkeypatch.setattr("callbacks.upkeep.graceful_stop.is_subprocess_launcher", lambda one: one is launcher)
    ours, others = (trainer_with(strategy=SimpleNamespace(launcher=one)) for one in (launcher, object()))
    GracefulStop().on_exception(others, MODULE, LostRankError("lost"))
    GracefulStop().on_exception(ours, MODULE, ValueError("another"))
    assert registered == []
    GracefulStop().on_exception(ours, MODULE, LostRankError("lost"))
    assert registered == [(launcher.kill, signal.SIGKILL)]


# --- A step that fails ----------------------------------------------------------------------------------------------


def run_trainer(callbacks: list[Any], folder: Path) -> RunTrainer:
    return RunTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=callbacks, enable_checkpointing=len(callbacks) > 1,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "shown"), [(15, "p14. "), (16, "p15. "), (17, "p15 and 1 more. ")])
def test_the_note_of_a_failed_step_names_step_prompts_and_checkpoint(tmp_path: Path, count: int, shown: str) -> None:
    failed = FailedStep()
    other = tmp_path / "other"
    trainer = run_trainer([failed, *(RunCheckpoint(dirpath=str(one)) for one in (tmp_path, other))], tmp_path)
    batch = TrainBatch(5, [prompt(i) for i in range(count)])
    batch.add([group(prompt(0), [0, 1]), group(prompt(count - 1), [0, 1], source="replay")])
    failed.on_train_batch_start(trainer, MODULE, batch, 5)
    error = ValueError("broken")
    failed.on_exception(trainer, MODULE, error)
    assert trainer.begun
    (note,) = error.__notes__
    assert note.startswith("dots: stopped in step 5 with prompts p0, p1, ")
    assert f"{shown}There is no checkpoint yet. Lower --checkpoint.every" in note
    for step in (3, 4):
        (tmp_path / f"step_0000000{step}.ckpt").write_bytes(b"weights")
        seal(tmp_path / f"step_0000000{step}.ckpt")
    error = ValueError("broken")
    failed.on_exception(trainer, MODULE, error)
    assert f"The newest checkpoint is {tmp_path / 'step_00000004.ckpt'}. Run" in error.__notes__[0]
    other.mkdir()
    (other / "step_00000005.ckpt").write_bytes(b"weights")
    error = ValueError("broken")
    failed.on_exception(trainer, MODULE, error)
    assert f"The newest checkpoint is {other / 'step_00000005.ckpt'}. Run" in error.__notes__[0]


def test_what_fails_before_the_first_completions_is_a_failed_start(tmp_path: Path) -> None:
    failed = FailedStep()
    trainer = run_trainer([failed], tmp_path)
    first, second = TrainBatch(0, [prompt(0)]), TrainBatch(1, [prompt(1)])

    def notes() -> int:
        error = ValueError("broken")
        failed.on_exception(trainer, MODULE, error)
        return len(getattr(error, "__notes__", []))

    assert (notes(), failed.begun) == (0, False)
    failed.on_train_batch_start(trainer, MODULE, first, 0)
    assert (notes(), failed.begun, trainer.begun) == (0, False, False)
    first.add([group(prompt(0), [0, 1])])
    assert (failed.begun, trainer.begun) == (True, False)
    assert (notes(), trainer.begun) == (1, True)
    trainer.begun = False
    failed.on_train_batch_start(trainer, MODULE, second, 1)
    assert (failed.begun, trainer.begun) == (True, True)
    assert notes() == 1
    failed.check(trainer, MODULE, MODULE)  # another call of fit
    assert (notes(), failed.begun) == (0, False)
    failed.on_train_batch_start(trainer, MODULE, first, 0)
    failed.on_train_batch_start(trainer_with(), MODULE, second, 1)  # a trainer without a run
    error = ValueError("broken")
    failed.on_exception(trainer_with(), MODULE, error)
    assert len(error.__notes__) == 1


# --- Checks ---------------------------------------------------------------------------------------------------------


def checked(trainer: Any, prompts: int = 4, generations: int = 2, length: int = 10, mini_batches: int = 1,
            val: tuple[int, int, int] = (1, 1, 1)) -> None:  # fmt: skip
    module: Any = SimpleNamespace(
        policy=Policy(path="unread"),
        sampling=Sampling(generations, length),
        val_sampling=Sampling(val[1], val[2]),
        mini_batches=mini_batches,
        engine=Transformers(),
    )
    data: Any = SimpleNamespace(prompts_per_step=prompts, val_batch_size=val[0])
    RunChecks().check(trainer, module, data)


def plain(**changes: Any) -> Any:
    return trainer_with(**({"precision": "32-true", "strategy": SingleDeviceStrategy("cpu")} | changes))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_precisions_that_train(precision: str) -> None:
    checked(plain(precision=precision))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "16-mixed", "transformer-engine"])
def test_precisions_that_do_not(precision: str) -> None:
    with pytest.raises(UserError, match=f"trainer.precision is {precision}"):
        checked(plain(precision=precision))


def test_a_step_needs_12_bytes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(pages: int, size: int = 1) -> None:
        monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else size)

    memory(4 * 2 * 10 * 12)
    checked(plain())
    memory(4 * 2 * 10 * 12 - 1)
    with pytest.raises(UserError, match=r"model.sampling generates 2 completions of up to 10 tokens for each of 4"):
        checked(plain())
    memory(5 * 7 * 11 * 12)
    checked(plain(), val=(5, 7, 11))
    memory(5 * 7 * 11 * 12 - 1)
    with pytest.raises(UserError, match=r"model.val_sampling generates 7 completions of up to 11 tokens for each of 5"):
        checked(plain(), val=(5, 7, 11))
    memory(2**18, 2**12)  # 1 GiB
    with pytest.raises(UserError, match="which take 12 GiB, but this machine has 1 GiB"):
        checked(plain(), prompts=2**10, generations=2**10, length=2**10)


def test_a_step_is_divided_among_mini_batches_and_processes() -> None:
    checked(plain(), mini_batches=4)
    with pytest.raises(UserError, match=r"model.mini_batches is 5, but a step has 4 prompts"):
        checked(plain(), mini_batches=5)
    both = plain(world_size=2, strategy=DDPStrategy())
    checked(both, prompts=4, mini_batches=2)
    with pytest.raises(UserError, match=r"Set data.prompts_per_step to at least 6, or use fewer"):
        checked(both, prompts=5, mini_batches=3)
    sharded = plain(world_size=2, strategy=ShardedStrategy(), callbacks=[ShardedPolicy()])
    checked(sharded)
    with pytest.raises(UserError, match=r"lists no callbacks.ShardedPolicy"):
        checked(plain(strategy=ShardedStrategy(), callbacks=[RandomState()]))
    with pytest.raises(UserError, match="SingleDeviceStrategy with 2 processes, but only DDP and FSDP2"):
        checked(plain(world_size=2))
    checked(plain(world_size=1))


@pytest.mark.parametrize(("stage", "asked"), [("fit", False), ("validate", True)])
def test_other_commands_are_checked_in_their_setup(monkeypatch: pytest.MonkeyPatch, stage: str, asked: bool) -> None:
    calls: list[object] = []
    monkeypatch.setattr(RunChecks, "check", lambda *given: calls.append(given))
    monkeypatch.setattr("callbacks.upkeep.checks.OnlinePromptDataModule", SimpleNamespace(of=lambda trainer: None))
    RunChecks().setup(plain(), MODULE, stage)
    assert bool(calls) is asked


# --- A sharded policy -----------------------------------------------------------------------------------------------


def strategy_on(device: str) -> ShardedStrategy:
    strategy = ShardedStrategy()
    strategy.parallel_devices = [torch.device(device)]
    strategy._local_rank = 0
    return strategy


@pytest.mark.parametrize(
    ("options", "device", "precision", "size", "dtypes"),
    [
        ({}, "cpu", "32-true", 4, (None, torch.float32)),
        ({}, "cpu", "bf16-mixed", 4, (None, torch.float32)),
        ({}, "cuda", "bf16-mixed", 4, (torch.bfloat16, torch.float32)),
        ({}, "cuda", "32-true", 4, (None, torch.float32)),
        ({"shard_size": 2, "compute_dtype": "bfloat16", "reduce_dtype": None}, "cpu", "32-true", 2,
         (torch.bfloat16, None)),
        ({"shard_size": 4, "reshard_after_forward": False}, "cpu", "32-true", 4, (None, torch.float32)),
    ],
)  # fmt: skip
def test_how_a_policy_is_sharded(
    options: dict[str, Any], device: str, precision: str, size: int, dtypes: tuple[object, object]
) -> None:
    module: Any = SimpleNamespace(sharding=None)
    strategy = strategy_on(device)
    ShardedPolicy(**options).setup(trainer_with(strategy=strategy, world_size=4, precision=precision), module, "fit")
    found = module.sharding
    assert (found.device, found.shard_size, found.offload) == (torch.device(device), size, False)
    assert (found.precision.param_dtype, found.precision.reduce_dtype) == dtypes
    assert found.reshard_after_forward is options.get("reshard_after_forward", True)


@pytest.mark.parametrize(
    ("options", "strategy", "told"),
    [
        ({"shard_size": 3}, lambda: strategy_on("cpu"), "shard_size is 3, expected a divisor of the 4 processes"),
        ({"cpu_offload": True}, lambda: strategy_on("cpu"), "cpu_offload is true, but the policy is already on the"),
        ({}, DDPStrategy, "is used with trainer.strategy DDPStrategy"),
    ],
)
def test_what_cannot_be_sharded(options: dict[str, Any], strategy: Callable[[], Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ShardedPolicy(**options).setup(trainer_with(strategy=strategy(), world_size=4), SimpleNamespace(), "fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="shard_size is -1"):
        ShardedPolicy(shard_size=-1)


def test_shards_in_host_memory_are_for_gpus() -> None:
    module: Any = SimpleNamespace()
    ShardedPolicy(cpu_offload=True).setup(
        trainer_with(strategy=strategy_on("cuda:0"), world_size=4, precision="32-true"), module, "fit"
    )
    assert module.sharding.offload is True and module.sharding.device == torch.device("cuda:0")


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def test_the_best_validation_is_the_highest_after_a_step() -> None:
    one = RunCheckpoint(keep_best="val/accuracy")
    assert one._is_best("val/accuracy", {"val/accuracy": 0.9}) is False  # of the initial policy
    assert one.state_dict() == {}
    found = []
    for step, value in enumerate([0.2, 0.2, 0.1, 0.3, math.nan, 0.3, 0.31], start=1):
        one._step = step
        found.append(one._is_best("val/accuracy", {"val/accuracy": value}))
    assert found == [True, False, False, True, False, False, True]
    assert one._is_best("val/accuracy", {}) is False  # a set that was not due
    assert one.state_dict() == {"best": [0.31, 7]}
    again = RunCheckpoint(keep_best="val/accuracy")
    again.load_state_dict(saved_and_loaded(one.state_dict()))
    again._step = 8
    assert again._is_best("val/accuracy", {"val/accuracy": 0.31}) is False
    assert again._is_best("val/accuracy", {"val/accuracy": 0.32}) is True and again._best == (0.32, 8)


def test_a_metric_that_is_not_measured_is_named_by_the_first_validation() -> None:
    one = RunCheckpoint(keep_best="val/acuracy")
    with pytest.raises(UserError, match="did you mean 'val/accuracy'"):
        one._is_best("val/acuracy", {"val/accuracy": 0.5})
    one._step = 1
    assert one._is_best("val/acuracy", {"val/accuracy": 0.5}) is False
    one._step, one._best = 0, (0.5, 3)
    assert one._is_best("val/acuracy", {"val/accuracy": 0.5}) is False


class Saves(RunCheckpoint):
    """Notes when it would save instead of doing so."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.saved: list[tuple[int, int | None]] = []

    def _save(self, trainer: Any, pl_module: Any, *, ends: bool = False) -> None:
        self.saved.append((self._step, self._due))
        self._due = None


@pytest.mark.parametrize(
    ("diverges", "saved"), [(False, [(1, None), (2, 2), (3, None)]), (True, [(1, 1), (2, 2), (3, 3), (4, 4)])]
)
def test_a_step_is_saved_when_it_is_due_and_when_updates_diverge(
    diverges: bool, saved: list[tuple[int, int | None]]
) -> None:
    one, module = Saves(every=2), SimpleNamespace(diverged=diverges, last_measured={})
    for step in range(4):
        one.on_train_batch_end(trainer_with(), module, None, TrainBatch(step, ()), step)  # type: ignore[arg-type]
    assert one.saved == saved  # a validation follows the fourth, after which it is saved
    one.on_validation_end(trainer_with(state=SimpleNamespace(fn="validate")), module)  # type: ignore[arg-type]
    assert one.saved == saved
    one.on_validation_end(trainer_with(), module)  # type: ignore[arg-type]
    assert one.saved == [*saved, (4, None if diverges else 4)]


def test_a_best_validation_is_saved_though_no_checkpoint_is_due() -> None:
    one = Saves(every=100, keep_best="val/accuracy")
    for step, accuracy in ((1, 0.5), (2, 0.4), (3, 0.6)):
        one._step = step
        module: Any = SimpleNamespace(last_measured={"val/accuracy": accuracy})
        one.on_validation_end(trainer_with(), module)
    assert one.saved == [(1, 1), (2, None), (3, 3)]


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}])
def test_checkpoints_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected at least 1 each"):
        RunCheckpoint(**options)  # type: ignore[arg-type]
    RunCheckpoint(every=1, keep=1)


def test_two_callbacks_may_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b, here = (RunCheckpoint(dirpath=name) for name in ("a", "b", "./b/../a"))
    check_places([a, b, RunCheckpoint()])
    for pair in ([RunCheckpoint(), b, RunCheckpoint()], [a, b, here]):
        with pytest.raises(UserError, match=r"Two callbacks.RunCheckpoint write to"):
            check_places(pair)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(measured=lambda stage: [], val_size=0)
    RunCheckpoint(dirpath=str(tmp_path / "a" / "b")).check(trainer_with(), MODULE, data)
    assert not list(tmp_path.iterdir())  # what was tried is removed
    (tmp_path / "file").write_text("")
    blocked = RunCheckpoint(dirpath=str(tmp_path / "file" / "b"))
    blocked.check(trainer_with(is_global_zero=False), MODULE, data)  # it is rank 0 that writes
    with pytest.raises(UserError, match="Checkpoints cannot be written to"):
        blocked.check(trainer_with(), MODULE, data)
    best = RunCheckpoint(keep_best="val/accuracy")
    with pytest.raises(UserError, match="the run has no validation prompts"):
        best.check(trainer_with(), MODULE, data)
    best.check(trainer_with(), MODULE, SimpleNamespace(measured=lambda stage: ["val"], val_size=0))  # type: ignore[arg-type]
    best.check(trainer_with(), MODULE, SimpleNamespace(measured=lambda stage: [], val_size=4))  # type: ignore[arg-type]


class Writes:
    """A trainer that writes checkpoints of a few bytes, or fails to."""

    def __init__(self, **given: Any) -> None:
        self.error: Exception | None = None
        self.asked: list[bool] = []
        self.logs: list[str] = []
        logger = SimpleNamespace(save=lambda: self.logs.append("saved"))
        self.trainer = trainer_with(save_checkpoint=self.save, loggers=[logger], **given)

    def save(self, path: Path, weights_only: bool) -> None:
        self.asked.append(weights_only)
        path.write_bytes(b"half")
        if self.error is not None:
            raise self.error
        path.write_bytes(b"whole")


def module_saved(**given: Any) -> Any:
    barriers: list[str] = []
    ranks = SimpleNamespace(barrier=barriers.append)
    return SimpleNamespace(**({"ranks": ranks, "diverged": False, "barriers": barriers} | given))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder, writes, module = tmp_path / "new" / "checkpoints", Writes(), module_saved()
    one = RunCheckpoint(every=1, keep=2, keep_best="val/accuracy", dirpath=str(folder))
    later = folder / "step_00000009.ckpt"  # damaged, so the run has resumed from one before it
    later.parent.mkdir(parents=True)
    later.write_bytes(b"damaged")
    for step, accuracy in enumerate([0.2, 0.9, 0.3, 0.4, 0.5], start=1):
        one._step = step
        module.last_measured = {"val/accuracy": accuracy}
        writes.trainer.global_step = step
        one.on_train_batch_end(writes.trainer, module, None, TrainBatch(step - 1, ()), 3)  # a validation follows
        assert one._saved == step - 1
        one.on_validation_end(writes.trainer, module)
        assert one._saved == step
        assert os.readlink(folder / "last.ckpt") == f"step_{step:08d}.ckpt"
        assert os.readlink(folder / "best.ckpt") == f"step_0000000{min(step, 2)}.ckpt"
    kept = [f"step_0000000{step}.ckpt" for step in (2, 4, 5)]
    assert names_in(folder) == sorted(["best.ckpt", "last.ckpt", later.name, *kept, *(f"{one}.sha256" for one in kept)])
    assert all((folder / name).read_bytes() == b"whole" for name in kept)
    assert writes.asked == [False] * 5 and module.barriers == ["checkpoint"] * 5 and len(writes.logs) == 5
    assert one.seconds > 0
    plain = RunCheckpoint(every=1, keep=1, dirpath=str(folder / "plain"))
    for step in (1, 2):
        plain._step = plain._due = step
        plain._save(writes.trainer, module)
    assert names_in(folder / "plain") == ["last.ckpt", "step_00000002.ckpt", "step_00000002.ckpt.sha256"]


def test_the_end_of_a_run_is_saved_once(tmp_path: Path) -> None:
    writes, module = Writes(), module_saved()
    one = RunCheckpoint(every=100, dirpath=str(tmp_path))
    for changes, its in (
        ({"global_step": 8}, {}), ({"received_sigterm": True}, {}), ({}, {"diverged": True}), ({}, {"ends": True}),
    ):  # fmt: skip
        trainer = trainer_with(save_checkpoint=writes.save, loggers=[], **changes)
        one._step = one._saved + 1
        for _ in range(2):
            one._save(trainer, module_saved(diverged="diverged" in its), ends="ends" in its)
        assert one._due is None and one._saved == one._step
    assert len(writes.asked) == 4
    one._step += 1
    one._save(writes.trainer, module)  # in the middle of the run, and not due
    assert len(writes.asked) == 4
    one.on_train_end(writes.trainer, module_saved(diverged=True))
    assert len(writes.asked) == 4
    one.on_train_end(writes.trainer, module)
    assert len(writes.asked) == 5


FULL = OSError(28, "No space left on device")
TORN = RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3\nmore")


@pytest.mark.parametrize("error", [FULL, TORN])
def test_a_checkpoint_that_cannot_be_written_costs_itself_alone(tmp_path: Path, error: Exception) -> None:
    writes, module = Writes(), module_saved()
    one = RunCheckpoint(every=3, dirpath=str(tmp_path))
    one._step = one._due = 3
    writes.error = error
    with pytest.warns(UserWarning, match=r"step_00000003.ckpt cannot be written \(.*next one is due in 3 steps"):
        one._save(writes.trainer, module)
    assert names_in(tmp_path) == []
    assert (one._due, one._saved) == (None, 3)
    for options, changes, ends in (
        ({"on_write_error": "stop"}, {}, False), ({}, {"world_size": 2}, False), ({}, {}, True),
    ):  # fmt: skip
        one = RunCheckpoint(every=3, dirpath=str(tmp_path), **options)  # type: ignore[arg-type]
        writes = Writes(**changes)
        one._step = one._due = 3
        writes.error = error
        with pytest.raises(UserError, match=r"older checkpoints are intact. Free disk space .*, then resume\."):
            one._save(writes.trainer, module, ends=ends)
    writes.error = RuntimeError("of the policy")
    one._step = one._due = 6
    with pytest.raises(RuntimeError, match="of the policy"):
        one._save(writes.trainer, module)


def test_other_ranks_write_their_shards_only(tmp_path: Path) -> None:
    writes = Writes(is_global_zero=False)
    one = RunCheckpoint(dirpath=str(tmp_path))
    one._step = one._due = 1
    one._save(writes.trainer, module_saved())
    assert names_in(tmp_path) == [".step_00000001.ckpt.tmp"]  # which rank 0 renames
    trainer = trainer_with(
        is_global_zero=False, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=4))
    )
    one.on_train_start(trainer, MODULE)
    assert (one._step, one._saved) == (5, 5) and len(names_in(tmp_path)) == 1
    trainer.is_global_zero = True
    one.on_train_start(trainer, MODULE)  # what a killed process has left
    assert names_in(tmp_path) == []


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    run = Claim(tmp_path / "run", Owner("me", "fit"))
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir()
    one, ours = RunCheckpoint(dirpath=str(folder)), (folder / "step_00000002.ckpt", folder / "step_00000004.ckpt")
    one._check_owner(folder, run, None, continues=False)  # nothing to mix with
    for path in ours:
        path.write_bytes(b"weights")
        seal(path)
    # The folder is the run's by its own `run.json`, if the run continues in it.
    one._check_owner(folder, run, ours[1], continues=True)
    one._check_owner(folder, run, ours[1], continues=False)
    with pytest.raises(UserError, match=r"has checkpoints of another run \(step_00000004.ckpt\)"):
        one._check_owner(folder, run, None, continues=False)
    with pytest.raises(UserError, match=r"set callbacks.RunCheckpoint.dirpath to"):
        one._check_owner(folder, run, tmp_path / "elsewhere" / "step_00000004.ckpt", continues=False)
    with pytest.raises(UserError, match=r"set the version of the first logger to"):
        RunCheckpoint()._check_owner(folder, run, None, continues=False)
    with pytest.raises(UserError, match=r"has step_00000004.ckpt, which is later than the checkpoint that is resumed"):
        one._check_owner(folder, run, ours[0], continues=True)
    one._check_owner(folder, run, tmp_path / "any.ckpt", continues=True)  # whose step nothing says
    ours[1].write_bytes(b"damaged")
    one._check_owner(folder, run, ours[0], continues=True)
    other = tmp_path / "copy" / "checkpoints"  # another folder of the same run
    other.mkdir(parents=True)
    (tmp_path / "copy" / "run.json").write_text((tmp_path / "run" / "run.json").read_text())
    (other / "step_00000004.ckpt").write_bytes(b"weights")
    one._check_owner(folder, run, other / "step_00000004.ckpt", continues=False)
    run.release()


def test_a_folder_of_its_own_is_claimed_while_the_run_lasts(tmp_path: Path) -> None:
    run = Claim(tmp_path / "run", Owner("me", "fit"))
    trainer: Any = SimpleNamespace(continued=None, begun=False, logger=None, default_root_dir=tmp_path / "run")
    folder = tmp_path / "apart"
    one = RunCheckpoint(dirpath=str(folder))
    with pytest.raises(ValueError, match="start"), one.own_folder(trainer, run, None):
        raise ValueError("start")
    assert not folder.exists() and run.owner.checkpoints == (str(folder),)  # a failed start leaves nothing
    trainer.begun = True
    with pytest.raises(ValueError, match="step"), one.own_folder(trainer, run, None):
        raise ValueError("step")
    assert folder.exists()
    with one.own_folder(trainer, run, None), pytest.raises(UserError, match="another process is writing to"):
        Claim(folder, Owner("other", "fit"))
    assert Owner.of(folder) == Owner("me", "fit")
    Claim(folder, Owner("other", "fit")).release()
    (folder / "step_00000001.ckpt").write_bytes(b"weights")
    trainer.begun, trainer.continued = False, tmp_path / "run"
    with pytest.raises(ValueError, match="start"), one.own_folder(trainer, run, None):
        raise ValueError("start")
    assert (folder / "step_00000001.ckpt").exists()
    with RunCheckpoint().own_folder(trainer, run, None):  # in the run's own folder, which is claimed already
        pass
    run.release()


# --- The run's folder -----------------------------------------------------------------------------------------------


def test_the_folder_is_named_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, line = RunFolder(), f"run folder: {tmp_path}\n"
    asked: list[str] = []

    def broadcast(given: str) -> str:
        asked.append(given)
        return str(tmp_path)

    def trainer(**given: Any) -> Any:
        usual = {"run": tmp_path, "begun": True, "strategy": SimpleNamespace(broadcast=broadcast)}
        return trainer_with(**(usual | given))

    first, other = trainer(), trainer(run=None, is_global_zero=False)
    one.setup(first, MODULE, "fit")
    assert capsys.readouterr().out == line
    one.setup(other, MODULE, "fit")
    assert other.run == tmp_path and asked == [str(tmp_path), ""]
    nowhere = trainer(run=None, strategy=SimpleNamespace(broadcast=lambda given: given))
    one.setup(nowhere, MODULE, "fit")
    assert nowhere.run is None and capsys.readouterr().out == ""


def test_loggers_resume_after_the_steps_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[int] = []
    monkeypatch.setattr(
        "callbacks.upkeep.run_folder.media_of", lambda trainer: [SimpleNamespace(resume=resumed.append)]
    )
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=6))
    RunFolder().on_train_start(trainer_with(fit_loop=loop), MODULE)
    assert resumed == [7]
