"""The speed and exactness that the kernels aim at, and what a run reached of it.

A row is what `benchmarks.linear` or `benchmarks.generate` writes to JSON; a bar that the rows say nothing about counts
as not measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.report import table

FP32, BF16, INT4 = "fp32", "bf16", "torch int4 g32"
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
#: Layers that count: at least this many in_features and out_features.
LAYER, LARGE_LAYER = 3584, 8192
#: (M, at least this many times the speed of bf16) for every layer.
CUDA_SPEED = ((16, 2.4), (64, 1.3), (256, 0.55), (512, 0.70), (1024, 0.83), (2048, 0.90))
#: Other libraries that the geometric mean over layers must be ahead of at every M.
CUDA_PEERS = ("tinygemm int4 g128", "bitsandbytes nf4", "gemlite int4 g128")
#: (model, peer, at least this many times its tokens per second) with one sequence.
DECODE = {
    "cpu": (("Llama-3.2-1B", "fp32", 2.3),),
    "cuda": (("Llama-3-8B", "bf16", 2.3), ("Llama-3-8B", "torchao-int4", 1.0)),
}


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        what: what is measured.
        limit: the bar, as text.
        reached: the worst figure of the run; None if nothing was measured.
        passed: None if nothing was measured.
    """

    what: str
    limit: str
    reached: float | None
    passed: bool | None


def at_least(what: str, limit: float, values: Iterable[float]) -> Bar:
    """The smallest of `values` must be `limit` or more; NaN is worse than any."""
    worst = min(values, key=lambda value: -math.inf if math.isnan(value) else value, default=None)
    return Bar(what, f">= {limit:g}", worst, None if worst is None else worst >= limit)


def below(what: str, limit: float, values: Iterable[float]) -> Bar:
    """The largest of `values` must be less than `limit`; NaN is worse than any."""
    worst = max(values, key=lambda value: math.inf if math.isnan(value) else value, default=None)
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


def cuda_linear_bars(rows: list[dict]) -> list[Bar]:
    """Bars of `benchmarks.linear --device cuda`."""
    ours = [row for row in rows if "mode" in row]
    bars = []

    def times_bf16(fmt: str, tokens: int, limit: float, layers: str, inside: Callable[[dict], bool]) -> None:
        chosen = [row for row in ours if row["format"] == fmt and row["M"] == tokens and inside(row)]
        bars.append(at_least(f"{fmt}, M = {tokens}, {layers}: times bf16", limit, speedups(chosen, rows, BF16)))

    def large(row: dict) -> bool:
        return min(row["N"], row["K"]) >= LARGE_LAYER

    times_bf16("int4 g128", 1, 2.9, "N, K >= 8192", large)
    chosen = [row for row in ours if row["format"] == "int4 g128" and row["M"] == 1 and large(row)]
    shares = (row["share_of_bandwidth"] for row in chosen)
    bars.append(at_least("int4 g128, M = 1, N, K >= 8192: share of copy bandwidth", 0.78, shares))
    times_bf16("nvfp4 g16", 1, 2.6, "N, K >= 8192", large)
    for fmt in sorted({row["format"] for row in ours}):
        for n, k in ((4096, 4096), (14336, 4096)):
            times_bf16(fmt, 1, 2.2, f"{n} x {k}", lambda row, n=n, k=k: (row["N"], row["K"]) == (n, k))
        for tokens, limit in CUDA_SPEED:
            layers = f"N, K >= {LAYER}"
            times_bf16(fmt, tokens, limit, layers, lambda row: min(row["N"], row["K"]) >= LAYER)
        for peer in CUDA_PEERS:
            means = mean_speedups([row for row in ours if row["format"] == fmt], rows, peer)
            bars.append(at_least(f"{fmt}, geometric mean over shapes, every M: times {peer}", 1, means))
    return bars


def mean_speedups(chosen: list[dict], rows: list[dict], peer: str) -> list[float]:
    """The geometric mean over shapes of how many times faster than `peer` the chosen rows are, one for each M."""
    of_tokens = [speedups([row for row in chosen if row["M"] == m], rows, peer) for m in {row["M"] for row in chosen}]
    return [statistics.geometric_mean(ratios) for ratios in of_tokens if ratios]


def speedups(chosen: list[dict], rows: list[dict], peer: str) -> list[float]:
    """How many times faster than `peer` each chosen row is, where both were measured."""
    keys = ("N", "K", "M", "threads")
    times = {tuple(row.get(key) for key in keys): row["us"] for row in rows if row["variant"] == peer}
    found = [(times.get(tuple(row.get(key) for key in keys)), row["us"]) for row in chosen]
    return [peer_us / us for peer_us, us in found if peer_us is not None]


def decode_bars(rows: list[dict], device: str) -> list[Bar]:
    """Bars of `benchmarks.generate` on a device."""
    bars = []
    for variant in sorted({row["variant"] for row in rows if row["variant"].startswith(("int4-", "nvfp4-"))}):
        for model, peer, limit in DECODE[device]:
            setting = {"model": model, "variant": variant, "batch": 1}
            chosen = [row for row in rows if setting.items() <= row.items()]
            what = f"{variant}, decoding {model}, batch 1: times {peer}"
            bars.append(at_least(what, limit, decode_speedups(chosen, rows, peer)))
    return bars


def decode_speedups(chosen: list[dict], rows: list[dict], peer: str) -> list[float]:
    """How many times the tokens per second of `peer` each chosen row has, where both were measured."""
    keys = ("model", "batch")
    rates = {tuple(row[key] for key in keys): row["tokens_per_second"] for row in rows if row["variant"] == peer}
    found = [(row["tokens_per_second"], rates.get(tuple(row[key] for key in keys))) for row in chosen]
    return [rate / peer_rate for rate, peer_rate in found if peer_rate]
