"""Timing: interleaved medians on a CPU, CUDA graphs on a GPU, and the memory bandwidth that both are held against.

Every call of a timed list reads another copy of its weight, and the copies together exceed the caches, so that weights
stream from memory as they do when a model runs.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]
#: Bytes of weights that a rotation reads at least: several times the last cache of common CPUs, and of large GPUs.
COLD_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}


def copies_for(num_bytes: int, cold_bytes: int) -> int:
    """How many copies of a weight of `num_bytes` a rotation needs: at least two."""
    return max(2, -(-cold_bytes // num_bytes))


def summary(times: list[float], calls: int = 1) -> dict[str, float]:
    """Median, 20 % and 80 % quantiles in microseconds of one call, from seconds of `calls` calls."""
    low, *_, high = statistics.quantiles(times, n=5) if len(times) > 1 else times * 2
    names = {"us": statistics.median(times), "us_20": low, "us_80": high}
    return {name: value * 1e6 / calls for name, value in names.items()}


def interleaved(
    rotations: dict[str, list[Call]],
    seconds: float,
    contexts: dict[str, Callable[[], contextlib.AbstractContextManager]] | None = None,
    visit_seconds: float = 2e-3,
    min_visits: int = 5,
) -> dict[str, dict[str, float]]:
    """Times of several variants, visited in turn, so that a disturbance of the machine meets all of them.

    Args:
        rotations: for each variant its calls, one for each copy of the weight; they are called in rotation.
        seconds: how long each variant is measured in all; one that needs longer for `min_visits` takes that.
        contexts: for a variant, what makes the context manager it runs in.
        visit_seconds: a visit makes as many calls as fit in here, at least one.
        min_visits: how often each variant is visited at least.
    """
    contexts = contexts or {}
    rounds = {name: itertools.cycle(calls) for name, calls in rotations.items()}

    def visit(name: str, calls: int) -> float:
        rotation = rounds[name]
        with contexts.get(name, contextlib.nullcontext)():
            start = time.perf_counter()
            for _ in range(calls):
                next(rotation)()
            return (time.perf_counter() - start) / calls

    for name in rotations:
        visit(name, 1)
    once = {name: visit(name, 1) for name in rotations}
    calls = {name: max(1, round(visit_seconds / max(once[name], 1e-9))) for name in rotations}
    times: dict[str, list[float]] = {name: [] for name in rotations}
    spent = dict.fromkeys(rotations, 0.0)
    while waiting := [name for name in rotations if spent[name] < seconds or len(times[name]) < min_visits]:
        for name in waiting:
            times[name].append(visit(name, calls[name]))
            spent[name] += times[name][-1] * calls[name]
    return {name: summary(times[name]) for name in rotations}


def graph_times(calls: list[Call], seconds: float = 0.1) -> dict[str, float]:
    """Times of one call on the current CUDA device: replays of one graph of all `calls`, one after the other."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return summary(replay_times(graph.replay, seconds), len(calls))


def replay_times(replay: Call, seconds: float) -> list[float]:
    """Seconds of each of 5 to 200 calls of `replay`, about `seconds` in all, by CUDA events."""

    def once() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    once()
    return [once() for _ in range(min(200, max(5, int(seconds / max(once(), 1e-7)))))]


def read_bandwidth(num_bytes: int = COLD_BYTES["cpu"], repeats: int = 9) -> float:
    """Bytes per second that the CPU reads from memory with the current threads: the best of three plain readers."""
    side = int((num_bytes // 4) ** 0.5)
    matrix, x = torch.rand(side, side), torch.rand(side)
    readers = {"sum": [matrix.sum], "max": [matrix.amax], "mv": [lambda: matrix @ x]}
    times = interleaved(readers, 0, min_visits=repeats)
    return matrix.numel() * 4 / (min(t["us"] for t in times.values()) * 1e-6)


def copy_bandwidth(num_bytes: int = 2**30, seconds: float = 0.3) -> float:
    """Bytes per second, read and written, of a copy on the current CUDA device."""
    source = torch.rand(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / statistics.median(replay_times(lambda: target.copy_(source), seconds))
