"""Measure what `kernels/table.py` can only assume about a GPU, and write it to a file that is read from then on.

    python -m benchmarks.tune            # on the GPU, some minutes; writes kernels/tables/NAME-OF-THE-GPU.json
    python -m benchmarks.tune --dry-run  # on a CPU, in Triton's interpreter: proves nothing but that it runs

Times are medians of CUDA graph replays over copies of the weight that exceed the L2 cache together.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch

SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336))
COLD_BYTES = 256 * 2**20
FORMATS = ((torch.bfloat16, 128), (torch.float8_e4m3fn, 16))


def median_us(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Microseconds of one of `calls`, which do the same work on different memory."""
    for call in calls[:2]:
        call()  # compiles, and checks the kernel
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[5:])


class Tuner:
    """Times of `dispatch.linear` under different `Limits`.

    Attributes:
        device: where.
        shapes: (out_features, in_features) of the layers.
        measured: every figure, as [what, microseconds].
    """

    def __init__(self, device: torch.device, shapes: tuple[tuple[int, int], ...], cold_bytes: int):
        from aaac_ao.kernels import dispatch, table

        self.device, self.shapes, self.cold_bytes, self.measured = device, shapes, cold_bytes, []
        self.dispatch, self.table = dispatch, table
        self.limits, self.processors = table.of_device(device)
        table.of_device = lambda _: (self.limits, self.processors)

    def time(self, tokens: int, shape: tuple[int, int], **changes) -> float:
        """Geometric mean over the formats of the time of a product under changed limits."""
        from aaac_ao.kernels import verify

        before, times = self.limits, []
        self.limits = dataclasses.replace(before, **changes)
        for scale_dtype, group_size in FORMATS:
            problem = verify.problem(self.device, torch.bfloat16, scale_dtype, group_size, (tokens, *shape))
            x, qdata, scale, codebooks = problem
            copies = [qdata.clone() for _ in range(1 + self.cold_bytes // qdata.numel())]
            calls = [
                lambda q=q, s=scale, g=group_size, c=codebooks, x=x: self.dispatch.linear(x, q, s, c, None, g)
                for q in copies
            ]
            times.append(median_us(calls, self.device))
            self.measured.append([f"M={tokens} {shape} g{group_size} {changes}", round(times[-1], 3)])
        self.limits = before
        return math.exp(statistics.mean(map(math.log, times)))

    def total(self, tokens: int, **changes) -> float:
        """Sum of the logarithms of the times of all shapes."""
        return sum(math.log(self.time(tokens, shape, **changes)) for shape in self.shapes)

    def tune(self, slabs: tuple[int, ...], many: int):
        """The best `Limits`, one field after the other."""
        without = {"pair_weights": None}
        programs = min(
            (2, 4, 8, 16, 32), key=lambda n: self.total(1, programs=n, **without) + self.total(16, programs=n)
        )
        self.limits = dataclasses.replace(self.limits, programs=programs)
        slab = min(slabs, key=lambda n: self.total(many, slab_bytes=n))
        self.limits = dataclasses.replace(self.limits, slab_bytes=slab)
        fused = [n for n in (8, 16, 32, 64) if self.total(n, fused_tokens=64) <= self.total(n, fused_tokens=0)]
        self.limits = dataclasses.replace(self.limits, fused_tokens=max(fused, default=0))
        wins = None
        for shape in sorted(self.shapes, key=math.prod, reverse=True):
            if self.time(1, shape, pair_weights=1) >= self.time(1, shape, **without):
                break
            wins = math.prod(shape)
        self.limits = dataclasses.replace(self.limits, pair_weights=wins)
        return self.limits


def main() -> int:
    """Tune this machine's GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU; needs --folder")
    parser.add_argument("--folder", type=pathlib.Path, help="write the file here instead of kernels/tables/")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if arguments.folder is None:
            parser.error("--dry-run measures nothing worth keeping: give a --folder")
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; use --dry-run --folder FOLDER to walk through on a CPU")
    device = torch.device("cpu") if arguments.dry_run else torch.device("cuda", torch.cuda.current_device())
    tuner = Tuner(device, ((32, 128),) if arguments.dry_run else SHAPES, 0 if arguments.dry_run else COLD_BYTES)
    if arguments.folder:
        tuner.table.TABLES = arguments.folder
    slabs = (2**14, 2**20) if arguments.dry_run else tuple(2**20 * n for n in (16, 32, 64, 128))
    limits = tuner.tune(slabs, 70 if arguments.dry_run else 512)
    name = "dry run" if arguments.dry_run else torch.cuda.get_device_name(device)
    path = tuner.table.write(name, limits, {"times_us": tuner.measured})
    print(f"{path}: {limits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
