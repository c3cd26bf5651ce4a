"""The speed and exactness that the kernels aim at, and what a run reached of it.

A row is what `benchmarks.linear` or `benchmarks.generate` writes to JSON; a bar that the rows say nothing about counts
as not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.report import table

FP32, INT4 = "fp32", "torch int4 g32"
#: (mode, M, peer, at least this many times its speed) at 4096 x 4096 on one thread.
CPU_SPEED = (
    ("int16", 1, INT4, 2.5),
    ("int16", 1, FP32, 2.8),
    ("int16", 4, INT4, 1.8),
    ("int16", 16, INT4, 1.7),
    ("int8", 1, INT4, 3.2),
    ("int8", 1, FP32, 3.6),
)
#: (peer, at least this many times its speed) at every measured shape, M and number of threads.
CPU_ALWAYS = ((FP32, 0.9), (INT4, 1.0))
#: Relative error against fp64 stays below.
CPU_ERROR = {"exact": 2e-6, "int16": 1e-3, "int8": 1.5e-2}


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: what is measured.
        limit: the bar, as text.
        reached: the worst figure of the run; None if it was not measured.
        passed: None if it was not measured.
    """

    what: str
    limit: str
    reached: float | None
    passed: bool | None


def at_least(what: str, limit: float, values: Iterable[float]) -> Bar:
    """The smallest of `values` must be `limit` or more."""
    worst = min(values, default=None)
    return Bar(what, f">= {limit:g}", worst, None if worst is None else worst >= limit)


def below(what: str, limit: float, values: Iterable[float]) -> Bar:
    """The largest of `values` must be less than `limit`."""
    worst = max(values, default=None)
    return Bar(what, f"< {limit:g}", worst, None if worst is None else worst < limit)


def bars_table(bars: list[Bar]) -> str:
    """The bars as a table."""
    words = {True: "pass", False: "FAIL", None: "not measured"}
    reached = [["" if bar.reached is None else f"{bar.reached:.3g}", words[bar.passed]] for bar in bars]
    rows = [[bar.what, bar.limit, *cells] for bar, cells in zip(bars, reached, strict=True)]
    return table(rows, ["bar", "limit", "reached", ""])


def cpu_linear_bars(rows: list[dict]) -> list[Bar]:
    """Bars of `benchmarks.linear --device cpu`."""
    ours = [row for row in rows if "mode" in row]
    formats = sorted({row["format"] for row in ours})
    bars = []
    for mode, tokens, peer, limit in CPU_SPEED:
        for fmt in formats:
            setting = {"format": fmt, "mode": mode, "M": tokens, "N": 4096, "K": 4096, "threads": 1}
            chosen = [row for row in ours if setting.items() <= row.items()]
            what = f"{mode} {fmt}, 4096 x 4096, M = {tokens}, 1 thread: times {peer}"
            bars.append(at_least(what, limit, speedups(chosen, rows, peer)))
    for mode in CPU_ERROR:
        chosen = [row for row in ours if row["mode"] == mode and row["M"] <= 256]
        for peer, limit in CPU_ALWAYS:
            bars.append(at_least(f"{mode}, every shape, M <= 256: times {peer}", limit, speedups(chosen, rows, peer)))
    for mode, limit in CPU_ERROR.items():
        chosen = [row for row in ours if row["mode"] == mode]
        bars.append(below(f"{mode}: error against fp64", limit, (row["error"] for row in chosen)))
        if mode == "int16":
            shares = (row["error"] / row["error_of_bf16_x"] for row in chosen)
            bars.append(below("int16: error over that of bf16 activations", 1, shares))
    return bars


def speedups(chosen: list[dict], rows: list[dict], peer: str) -> list[float]:
    """How many times faster than `peer` each chosen row is, where both were measured."""
    keys = ("N", "K", "M", "threads")
    times = {tuple(row.get(key) for key in keys): row["us"] for row in rows if row["variant"] == peer}
    found = [(times.get(tuple(row.get(key) for key in keys)), row["us"]) for row in chosen]
    return [peer_us / us for peer_us, us in found if peer_us is not None]
