"""What a piece of work allocates on the CPU, as torch's allocator reports it."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at a time while `work` ran, above what there was before."""
    live = peak = 0
    for change in _changes(work):
        live += change
        peak = max(peak, live)
    return peak


def held_bytes(work: Callable[[], object]) -> int:
    """What was allocated more at the end of `work`, while its result is alive, than before it."""
    kept: list[object] = []
    return sum(_changes(lambda: kept.append(work())))


def _changes(work: Callable[[], object]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    recorder = recorded.profiler
    assert recorder is not None and recorder.kineto_results is not None
    events = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
