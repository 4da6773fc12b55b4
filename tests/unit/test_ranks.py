"""Communication between ranks and the split of work; the collectives run in separate processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy

from app.cli.trainer import DotsTrainer
from app.engines.requests import EngineError
from app.engines.server.client import LostServerError
from app.engines.server.rank_zero import lost_server_of_any_rank, on_rank_zero
from app.objective.packing import ScoredSequence
from app.ranks import LostRankError, Ranks, deal, imbalance
from app.rollouts.exchange import Rolled, exchange
from app.update.gradient_sum import sum_gradients
from app.update.minibatch import CompletionId, MiniBatch, shares, token_imbalance
from datamodules.errors import UserError
from datamodules.ledger import WeightedMean
from datamodules.types import Completion, Prompt, RolloutGroup
from tests.support.builders import conversation


@pytest.mark.parametrize("strategy", ["ddp", "auto", "ddp_find_unused_parameters_true", "class"])
def test_ddp_trains_without_its_wrapper(strategy: str, tmp_path: Path) -> None:
    """What the wrapper would hold, and that weights are those of rank 0, is in `test_memory_peaks.py`."""
    given = DDPStrategy(bucket_cap_mb=25) if strategy == "class" else strategy
    trainer = DotsTrainer(accelerator="cpu", devices=2, strategy=given, logger=False, default_root_dir=tmp_path)
    module = LightningModule()
    module.policy_model = torch.nn.Linear(2, 3)
    found = trainer.strategy
    assert isinstance(found, DDPStrategy)
    found._lightning_module = found.model = module
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        found.configure_ddp()
    finally:
        dist.destroy_process_group()
    assert found.model is module


def test_a_deal_is_a_partition_within_grahams_bound():
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = random.integers(1, 40, size=7).tolist()
        dealt = deal(sizes, 3)
        assert sorted(itertools.chain.from_iterable(dealt)) == list(range(7))
        found = max(sum(sizes[piece] for piece in share) for share in dealt)
        best = min(
            max(sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(3))
            for owners in itertools.product(range(3), repeat=7)
        )
        assert best <= found <= best * (4 / 3 - 1 / 9)


def test_equal_pieces_are_dealt_in_equal_numbers():
    assert deal([5] * 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert deal([5], 2) == [[0], []]


def test_imbalance_is_what_the_others_wait():
    assert imbalance([3, 1], [[0], [1]]) == pytest.approx(0.5)  # 3 against a mean of 2
    assert imbalance([2, 2], [[0], [1]]) == 0
    assert imbalance([], [[], []]) == 0


def test_shares_keep_prompts_together_while_they_balance():
    even = _minibatch({"a": [10, 10], "b": [10, 10]})
    first, second = shares(even, 2)
    assert [one.prompt_id for one in first.ids] == ["a", "a"]
    assert [one.prompt_id for one in second.ids] == ["b", "b"]
    assert (first.tokens, first.skipped_tokens) == (even.tokens, even.skipped_tokens)


def test_shares_split_a_prompt_rather_than_wait():
    uneven = _minibatch({"a": [10] * 6, "b": [10] * 2})
    dealt = shares(uneven, 2)
    assert [len(share.sequences) for share in dealt] == [4, 4]
    assert token_imbalance(dealt) == 0
    together = {str(one) for share in dealt for one in share.ids}
    assert together == {str(one) for one in uneven.ids}
    for share in dealt:
        for name, sequence in zip(share.ids, share.sequences, strict=True):
            assert sequence is uneven.sequences[uneven.ids.index(name)]


def test_one_process_needs_no_communication():
    ranks = Ranks.of_run()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather(b"word", "test") == [b"word"]
    assert ranks.any(True)
    assert not ranks.any(False)


def test_messages_and_sums(tmp_path: Path):
    _on_ranks(3, _messages, tmp_path)


def test_gradients_are_summed_where_some_rank_has_one(tmp_path: Path):
    _on_ranks(2, _gradients, tmp_path)


def test_rollouts_reach_every_rank_unchanged_and_in_order(tmp_path: Path):
    _on_ranks(2, _rollouts, tmp_path)


def test_ranks_that_chose_different_prompts_raise(tmp_path: Path):
    _on_ranks(2, _different_choices, tmp_path)


def test_results_and_errors_of_rank_0_reach_all(tmp_path: Path):
    _on_ranks(3, _first_for_all, tmp_path)


def test_a_lost_server_of_one_rank_is_lost_for_all(tmp_path: Path):
    _on_ranks(3, _losses, tmp_path)


def test_a_rank_that_ended_is_named(tmp_path: Path):
    _on_ranks(3, _one_leaves, tmp_path)


def _messages(ranks: Ranks) -> None:
    given = bytes(range(ranks.rank * 5)) if ranks.rank else b""
    assert ranks.gather(given, "test") == [b"", bytes(range(5)), bytes(range(10))]
    assert ranks.sum(torch.tensor([1.0, ranks.rank])).tolist() == [3.0, 3.0]
    assert ranks.max(torch.tensor([-1.0, ranks.rank])).tolist() == [-1.0, 2.0]
    assert ranks.any(ranks.rank == 2)
    assert not ranks.any(False)


def _gradients(ranks: Ranks) -> None:
    both, one, none = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    both.grad = torch.full((2, 2), 1.0 + ranks.rank)
    if ranks.rank == 1:
        one.grad = torch.full((2, 2), 5.0)
    sum_gradients([both, one, none], ranks)
    assert both.grad.unique().tolist() == [3.0]
    assert one.grad is not None
    assert one.grad.unique().tolist() == [5.0]
    assert none.grad is None


def _rollouts(ranks: Ranks) -> None:
    groups = [_group(f"p{index}", index) for index in range(4)]
    talks = conversation(("assistant", [3, 4]), ("tool", [5]), ("assistant", [6]), context=[1, 2, 7])
    groups[2] = replace(groups[2], completions=(groups[2].completions[0], talks))
    # A group that lost all its completions, and texts that are no valid UTF-8, are passed on too.
    dealt = [[0, 3], [1, 2]]
    mine = [groups[position] for position in dealt[ranks.rank]]
    rolled = Rolled(mine, {"train/prompts": 2}, {"exact/length": WeightedMean(2.0 * ranks.rank, 3 - ranks.rank)})
    whole = exchange(ranks, [group.prompt for group in groups], dealt, rolled)
    assert whole.counts == {"train/prompts": 4}
    assert whole.logged == {"exact/length": WeightedMean(2.0, 5)}
    for found, expected in zip(whole.groups, groups, strict=True):
        assert found.prompt is expected.prompt
        assert (found.source, found.birth_step) == (expected.source, expected.birth_step)
        np.testing.assert_array_equal(found.rewards, expected.rewards)
        np.testing.assert_array_equal(found.components["other"], expected.components["other"])
        for ours, theirs in zip(found.completions, expected.completions, strict=True):
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
            assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
            assert [asdict(turn) for turn in ours.turns] == [asdict(turn) for turn in theirs.turns]
            assert (ours.context is None) == (theirs.context is None)
            np.testing.assert_array_equal(ours.context, theirs.context)


def _different_choices(ranks: Ranks) -> None:
    prompts = [_group(f"{ranks.rank}", 0).prompt]
    with pytest.raises(UserError, match="chose different prompts"):
        exchange(ranks, prompts, [[0], []], Rolled([_group(f"{ranks.rank}", 0)] if ranks.rank == 0 else []))


def _first_for_all(ranks: Ranks) -> None:
    done: list[int] = []

    def work() -> dict[str, int]:
        done.append(ranks.rank)
        return {"limit": 512}

    def fail(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert on_rank_zero(ranks, work, "test") == {"limit": 512}
    assert done == ([0] if ranks.rank == 0 else [])
    with pytest.raises(LostServerError, match=r"^no answer$"):
        on_rank_zero(ranks, fail(LostServerError("no answer")), "test")
    with pytest.raises(UserError if ranks.rank == 0 else EngineError, match=r"^no room$"):
        on_rank_zero(ranks, fail(UserError("no room")), "test")


def _losses(ranks: Ranks) -> None:
    assert lost_server_of_any_rank(ranks, None, "test") is None
    found = lost_server_of_any_rank(ranks, LostServerError(f"seen by {ranks.rank}") if ranks.rank else None, "test")
    assert str(found) == "seen by 1"


def _one_leaves(ranks: Ranks) -> None:
    ranks.barrier("start")
    if ranks.rank == 2:
        return
    with pytest.raises(LostRankError, match=r"lost rank 2 \(its process has ended\)" if ranks.rank == 0 else "rank 0"):
        ranks.barrier("test")


def _group(name: str, size: int) -> RolloutGroup:
    """Return a group with `size` completions, the first with a lone surrogate in its text."""
    random = np.random.default_rng(size)
    completions = tuple(
        Completion(
            random.integers(0, 9, size=one + 1).astype(np.int32),
            random.normal(size=one + 1).astype(np.float32),
            "stop" if one % 2 else "length",
            3,
            "\udcff" if one == 0 else "é",
        )
        for one in range(size)
    )
    scores = random.normal(size=size).astype(np.float32)
    other = np.full(size, np.nan, dtype=np.float32)
    prompt = Prompt(name, size, "q", "q", (1, 2), {})
    return RolloutGroup(prompt, completions, scores, scores, {"other": other}, "reference", 7)


def _minibatch(lengths: dict[str, list[int]]) -> MiniBatch:
    ids = [CompletionId(prompt, sample) for prompt, sizes in lengths.items() for sample in range(len(sizes))]
    sequences = [
        ScoredSequence([1], np.arange(size - 1), np.zeros(size - 1), 1.0, 0.1)
        for sizes in lengths.values()
        for size in sizes
    ]
    return MiniBatch(sequences, ids, 100, 7)


def _on_ranks(count: int, check: Callable[[Ranks], None], folder: Path) -> None:
    """Run `check` in `count` processes that meet through a file; fail if one of them fails."""
    # Forked, so that imports are not repeated.
    arguments = (count, check, str(folder / "meeting"))
    multiprocessing.start_processes(_rank, arguments, nprocs=count, start_method="fork")


def _rank(rank: int, count: int, check: Callable[[Ranks], None], meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    check(Ranks.of_run())
    if check is not _one_leaves:
        dist.destroy_process_group()
