"""`dots plan`: what it reads, the splits that it looks at, and what it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from app.cli.dots import main
from app.objective.packing import plan_microbatches
from app.studies.plan_gpu import Machine
from app.studies.plan_run import Run, read_run
from app.studies.plan_shapes import shape_of
from app.studies.plan_split import remedies, splits
from app.studies.plan_time import GPUS, Efficiency, Rollout, exchange_seconds, rollout_seconds
from tests.support.policies import TINY

GIB = 2**30
PAPER = "configs/paper/qwen2.5_math_1.5b_deepscaler.yaml"


def machine(gpus: int, gib: float = 72, **options: float) -> Machine:
    return Machine(gpus, GPUS["H100"], int(gib * GIB), **options)  # type: ignore[arg-type]


def test_a_configuration_says_what_is_planned() -> None:
    run, known = read_run([PAPER], {"model": "1.5B", "prompts": None})
    assert run == Run(
        model="1.5B", dtype="float32", precision="bf16-mixed", checkpointing=True, prompts=512, rolled_out=256,
        references=128, generations=8, prompt_length=1024, completion_length=3072, mean_length=1536, max_tokens=32768,
    )  # fmt: skip
    assert known == {"gpus": 8}


def test_options_come_before_configurations(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(
        "model:\n  init_args:\n    policy: {lora: {rank: 4}}\n    surrogate: {beta: 0.1}\n    engine:\n"
        "      class_path: app.engines.VllmServer\n      init_args: {server: {tensor_parallel_size: 2}}\n"
    )
    given = {"prompts": 8, "completion_length": 100, "dtype": "bfloat16"}
    run, known = read_run(["configs/quickstart.yaml", str(more)], given)
    assert (run.model, run.dtype, run.lora_rank, run.reference_policy) == ("configs/tiny_policy", "bfloat16", 4, True)
    # Half of the prompts are fresh, whatever their number.
    assert (run.prompts, run.rolled_out, run.completion_length, run.mean_length) == (8, 4, 100, 50)
    assert known == {"gpus": 1, "engine": "vllm", "tensor_parallel": 2}


def test_microbatches_are_those_of_the_trainer() -> None:
    sizes = {"generations": 4, "prompt_length": 100, "completion_length": 300, "mean_length": 150, "max_tokens": 1000}
    run = Run("7B", prompts=32, rolled_out=32, **sizes)  # type: ignore[arg-type]
    # Two completions with their prompt are 100 + 2 * 299 tokens, three 997, four too many: groups are torn.
    shared, passes = run.microbatches(trainers=2)
    assert (shared.prompts, shared.completions, shared.positions) == (1, 3, 997)
    assert passes >= 16 * 4 // 3
    # Without sharing two of 400 fit, 64 are to be read by each of 2.
    bucketed, passes = dataclasses.replace(run, share_prompts=False).microbatches(trainers=2)
    assert (bucketed.completions, bucketed.positions, passes) == (2, 800, 32)
    assert passes == len(plan_microbatches([400] * 64, 1000))


def test_rollout_time_by_hand() -> None:
    shape, gpu = shape_of("7B"), dataclasses.replace(GPUS["H100"], memory_gbs=1000)
    how = Efficiency(update=1.0, decode=1.0)
    # One completion of 100 tokens after none, decoded alone: the weights 100 times, and 100 * 100 / 2 tokens of cache.
    alone = Rollout(1, 1, 0, 100, 100, concurrent=1)
    expected = (100 * 7_615_616_512 * 2 + 5000 * 2 * 28 * 4 * 128 * 2) / 1e12
    assert rollout_seconds(shape, 2, alone, gpu, 989, how, 0.0) == pytest.approx(expected)
    # Kernels started one by one: 2 ms per layer are more than that.
    assert rollout_seconds(shape, 2, alone, gpu, 989, how, 2.0) == pytest.approx(100 * 28 * 0.002)
    # Twice as many as can be decoded together take a second round; cut over two GPUs, half of the traffic each.
    twice = Rollout(2, 1, 0, 100, 100, concurrent=1, tensor_parallel=2)
    assert rollout_seconds(shape, 2, twice, gpu, 989, how, 0.0) == pytest.approx(expected)
    # Very many at a time are bound by arithmetic: two operations per parameter of matrices and token.
    many = Rollout(1e6, 1, 0, 100, 100, concurrent=10**6)
    matrices = 28 * shape.layer_matrices + 152_064 * 3584
    assert rollout_seconds(shape, 2, many, gpu, 1, how, 0.0) == pytest.approx(2e8 * matrices / 1e12)


def test_exchange_time_by_hand() -> None:
    shape, how, gpu = shape_of("7B"), Efficiency(link=1.0), dataclasses.replace(GPUS["H100"], link_gbs=100)
    numbers, parameters = Run("7B").numbers(sharded=True), 7_615_616_512
    # Four trainers: a ring passes three quarters of the gradients, twice; FSDP2 per pass 2 + 2 + 4 bytes of each.
    ddp = exchange_seconds(shape, numbers, gpu, how, ranks=4, sharded=False, passes=9)
    fsdp2 = exchange_seconds(shape, numbers, gpu, how, ranks=4, sharded=True, passes=9)
    assert ddp == pytest.approx(2 * 0.75 * parameters * 4 / 1e11)
    assert fsdp2 == pytest.approx(9 * 0.75 * parameters * 8 / 1e11)


def test_the_first_split_fits_and_is_the_fastest() -> None:
    shape, run = shape_of("7B"), Run("7B", checkpointing=True)
    found = splits(shape, run, machine(8))
    fitting = [one for one in found if one.fits]
    assert found[: len(fitting)] == fitting
    assert found[0].seconds.total == min(one.seconds.total for one in fitting)
    assert all(one.gpus == 8 for one in found)
    # All ways with one GPU per engine, DDP and FSDP2 (one trainer is never sharded), and all eight training.
    assert len(found) == 2 * 8 - 1
    for one in found:
        holds = one.trainer.peak <= 72 * GIB and (one.engine is None or one.engine.sequences >= 1)
        assert one.fits == holds
    # 16 bytes of weights, gradients and moments per parameter: no GPU of 80 GB holds a whole copy.
    assert not any(one.fits for one in found if not one.sharded)


def test_sharded_states_fall_with_the_trainers() -> None:
    shape, run = shape_of("7B"), Run("7B", checkpointing=True)
    lasting = {one.trainers: one.trainer.lasting for one in splits(shape, run, machine(8)) if one.sharded}
    for trainers, size in lasting.items():
        assert size == pytest.approx(16 * 7_615_616_512 / trainers, rel=1e-6)


def test_engines_hold_their_part_of_weights_and_cache() -> None:
    run = Run("32B", checkpointing=True)
    found = splits(shape_of("32B"), run, machine(16), engine="vllm")
    engines = [one for one in found if one.engine is not None]
    # 65 GB of weights in bfloat16 leave no cache on one GPU of 72 GiB, and half of it does.
    assert {one.tensor_parallel for one in engines} == {2}
    engine = engines[0].engine
    assert engine is not None
    assert engine.weights == 32_763_876_352
    assert engine.cache == int(72 * GIB * 0.9) - engine.weights - engine.workspace
    # 8 completions of 2048 tokens share a prompt of 512; a token takes 2 x 64 layers x 4 heads of 128, 2 bytes each.
    assert engine.per_token == 2 * 64 * 4 * 128 * 2
    assert engine.sequences == engine.cache * 8 // (engine.per_token * (512 + 8 * 2048))


def test_each_change_that_is_named_makes_it_fit() -> None:
    shape, run = shape_of("7B"), Run("7B")
    assert not any(one.fits for one in splits(shape, run, machine(8)))
    found = remedies(shape, run, machine(8), "auto")
    assert found[:2] == ["--max_tokens 8192", "--checkpointing true"]
    assert any(one.fits for one in splits(shape, dataclasses.replace(run, max_tokens=8192), machine(8)))
    assert any(one.fits for one in splits(shape, dataclasses.replace(run, checkpointing=True), machine(8)))
    if not any(text.startswith("--gpus") for text in found):
        assert not any(one.fits for gpus in (16, 64) for one in splits(shape, run, machine(gpus)))


def test_as_it_is_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plans" / "plan.json"
    main(["plan", "--model", "7B", "--gpus", "8", "--gpu-memory=80", "--checkpointing", "true", "--out", str(out)])
    printed, plan = capsys.readouterr().out, json.loads(out.read_text())
    best = plan["recommended"]
    assert best == plan["splits"][0] and best["fits"] and plan["to_change"] == []
    assert "7,615,616,512 parameters" in printed
    assert f"recommended: {best['trainers']} trainers (FSDP2), {best['engines']} vLLM engines" in printed
    assert "Times are a model, not a measurement" in printed
    parts = [f"{best['trainer'][name] / GIB:,.2f}" for name in ("parameters", "optimizer", "unsharded", "activations")]
    assert all(part in printed for part in parts)
    assert f"{best['engine']['sequences']:,}" in printed


def test_what_does_not_fit_is_said_with_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "7B", "--gpus", "2", "--gpu", "L40S", "--checkpointing", "true"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "does not fit: the closest" in printed and "recommended" not in printed
    assert "any one of these makes it fit: " in printed and "--gpus" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "no model: give --model 7B"),
        (["--model", "9B"], "did you mean '8B'"),
        (["--model", "7B", "--gpu", "H20"], "did you mean 'H200'?"),
        (["--model", "7B", "--gpus", "0"], "--gpus 0"),
        (["--model", "7B", "--generations", "0"], "generations=0: expected at least 1"),
        (["--model", "7B", "--precision", "bf16-mix"], "did you mean 'bf16-mixed'?"),
        (["--model", "7B", "--mean_length", "9999"], "mean_length=9999: expected above 0 and at most"),
        (["--model", "7B", "--engine", "sglang"], "--engine sglang"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--model", "7B", "--prompts", "2", "--engine", "transformers"], "no split has a prompt for every trainer"),
        (["--model", "7B", "--gpus", "eight"], "gpus"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dots: error:") and message in error


def test_a_folder_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    main(["plan", "--model", str(tmp_path), "--gpus", "1", "--precision", "32-true", "--max_tokens", "1024",
          "--prompt_length", "64", "--completion_length", "128"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "888,192 parameters" in printed and "MiB per GPU" in printed
