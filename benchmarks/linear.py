"""How fast one linear layer is, against other ways to compute it.

    python -m benchmarks.linear --device cpu --check
    python -m benchmarks.linear --device cuda --check --plot roofline.png

Weights stream from memory: every call reads another copy of its weight, enough of them to exceed the caches. Bytes are
codes, scales, x and y; the error is relative to fp64 on the weight as stored and on unrounded x. All are timed as bare
ops, as compiled code calls them.

CPU: medians of visits in rotation within one process; speed over fp32 `F.linear`. Ours takes fp32 x, the bf16, int4 and
int8 of torch take bf16 x. Bandwidth is that of the best of three plain readers in the same run. On a machine with
AVX-512, --isa avx2 and --isa avx_vnni time what machines without it would do.

CUDA: medians of replays of a CUDA graph; speed over bf16 `F.linear` (cuBLAS); x in bf16. Bandwidth is that of a copy in
the same run, bytes read and written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys
import time

import torch

from benchmarks import bars, roofline
from benchmarks.linear_peers import PEERS
from benchmarks.report import environment, headline, table, write_json
from benchmarks.shapes import (
    CPU_SHAPES,
    CPU_TOKENS,
    CUDA_SHAPES,
    CUDA_TOKENS,
    parse_format,
    parse_shape,
    product_bytes,
)
from benchmarks.timing import COLD_BYTES, copies_for, copy_bandwidth, graph_times, interleaved, read_bandwidth
from benchmarks.variants import Variant, aaac, dense

#: What limits torch, MKL, oneDNN and our kernel to AVX2, or to AVX2 and AVX-VNNI.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
LIMITS = {
    "avx2": {**AVX2, "ONEDNN_MAX_CPU_ISA": "AVX2", "AAAC_CPU_ISA": "avx2"},
    "avx_vnni": {**AVX2, "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "AAAC_CPU_ISA": "avx_vnni"},
}
DEFAULTS = {
    "cpu": {
        "shapes": CPU_SHAPES,
        "tokens": CPU_TOKENS,
        "formats": [("int4", 128), ("int4", 32), ("nvfp4", 16)],
        "seconds": 0.3,
    },
    "cuda": {
        "shapes": CUDA_SHAPES,
        "tokens": CUDA_TOKENS,
        "formats": [("int4", 128), ("nvfp4", 16)],
        "seconds": 0.05,
    },
}
#: What ratios are taken to.
BASELINE = {"cpu": bars.FP32, "cuda": bars.BF16}


def variants_of(n: int, k: int, args: argparse.Namespace, missing: dict[str, str]) -> list[Variant]:
    """Everything that can be timed at this shape; why another cannot goes to `missing`."""
    w = torch.randn(n, k, device=args.device) * 0.02
    variants = [dense(bars.FP32, w, args.cold_bytes)] if args.device == "cpu" else []
    w = w if args.device == "cpu" else w.bfloat16()
    variants.append(dense(bars.BF16, w.bfloat16(), args.cold_bytes))
    for name in args.peers:
        try:
            variants.append(PEERS[args.device][name](w, args.cold_bytes))
        except Exception as error:  # a peer may fail in any way, and the others still count
            missing[f"{name}, {n} x {k}"] = reason(error)
    for fmt, group_size in args.formats:
        variants += aaac(n, k, fmt, group_size, args.device, w.dtype, args.cold_bytes)
    return variants


def reason(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def rows_of(variants: list[Variant], times: dict, errors: dict, bandwidth: float, where: dict) -> list[dict]:
    """One row for each timed variant."""
    n, k, m = where["N"], where["K"], where["M"]
    rows = []
    for v in variants:
        if v.name in times:
            rate = product_bytes(v.weight_bytes, m, n, k, v.dtype.itemsize) / times[v.name]["us"] * 1e6
            speed = {**times[v.name], "GB_per_s": rate / 1e9, "share_of_bandwidth": rate / bandwidth}
            rows.append({"variant": v.name, **v.labels, **where, **speed, **errors[v.name]})
    return rows


def measure_cpu(args: argparse.Namespace, report: dict) -> None:
    """Fill `report` with bandwidths and rows."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        report["bandwidth"][threads] = read_bandwidth(args.cold_bytes)
    for n, k in args.shapes:
        torch.set_num_threads(max(args.threads))
        variants = variants_of(n, k, args, report["not_available"])
        for v in variants:
            v.warm(torch.randn(1, k))
        for m in args.tokens:
            x = torch.randn(m, k)
            torch.set_num_threads(max(args.threads))
            errors = {v.name: v.errors(x, n) for v in variants}
            for threads in args.threads:
                torch.set_num_threads(threads)
                rotations = {v.name: v.calls(x) for v in variants}
                times = interleaved(rotations, args.seconds, {v.name: v.context for v in variants})
                where = {"threads": threads, "N": n, "K": k, "M": m}
                report["rows"] += rows_of(variants, times, errors, report["bandwidth"][threads], where)
        yield_to(args, report, f"{n} x {k}")


def measure_cuda(args: argparse.Namespace, report: dict) -> None:
    """Fill `report` with the bandwidth and rows."""
    report["bandwidth"][0] = copy_bandwidth()
    for n, k in args.shapes:
        variants = variants_of(n, k, args, report["not_available"])
        for m in args.tokens:
            x = torch.randn(m, k, device=args.device, dtype=torch.bfloat16)
            times, errors = {}, {}
            for v in variants:
                size = product_bytes(v.weight_bytes, m, n, k, v.dtype.itemsize)
                try:
                    errors[v.name] = v.errors(x, n)
                    times[v.name] = graph_times(v.calls(x)[: copies_for(size, args.cold_bytes)], args.seconds)
                except Exception as error:  # as above
                    report["not_available"][f"{v.name}, {n} x {k}, M = {m}"] = reason(error)
            report["rows"] += rows_of(variants, times, errors, report["bandwidth"][0], {"N": n, "K": k, "M": m})
            yield_to(args, report, f"{n} x {k}, M = {m}")


def yield_to(args: argparse.Namespace, report: dict, done: str) -> None:
    """Keep what was measured so far, say how far it is, and stop when the time is over."""
    write_json(args.json, report)
    print(f"{done}: measured", file=sys.stderr)
    if time.monotonic() - args.started > args.limit:
        raise TimeoutError(f"the time limit of {args.limit:g} s is over after {done}")


def ratio_table(rows: list[dict], baseline: str) -> str:
    """One line for each shape and variant: speed over `baseline` at every M, bandwidth at the smallest, worst error."""
    tokens = sorted({row["M"] for row in rows})
    lines = []
    for n, k in dict.fromkeys((row["N"], row["K"]) for row in rows):
        of_shape = [row for row in rows if (row["N"], row["K"]) == (n, k)]
        for variant in dict.fromkeys(row["variant"] for row in of_shape):
            mine = {row["M"]: row for row in of_shape if row["variant"] == variant}
            ratios = [bars.speedups([mine[m]], rows, baseline) if m in mine else [] for m in tokens]
            cells = [f"{ratio[0]:.2f}" if ratio else "" for ratio in ratios]
            least = mine[min(mine)]
            speed = [f"{least['GB_per_s']:.1f}", f"{100 * least['share_of_bandwidth']:.0f} %"]
            lines.append([f"{n} x {k}", variant, *cells, *speed, f"{max(row['error'] for row in mine.values()):.1e}"])
    header = ["N x K", "variant", *(f"M = {m}" for m in tokens), "GB/s, least M", "of bandwidth", "error"]
    return table(lines, header)


def unsteady(rows: list[dict]) -> int:
    """How many rows scatter so much that their median says little: 80 % quantile over 1.5 times the 20 % one."""
    return sum(row["us_80"] > 1.5 * row["us_20"] for row in rows)


def show(report: dict, device: str) -> None:
    """Print the tables."""
    print(headline(report["environment"]))
    for name, why in report["not_available"].items():
        print(f"{name}: not available ({why})")
    for threads, bandwidth in report["bandwidth"].items():
        what = f"{threads} thread{'s' * (threads > 1)}, read" if threads else "copy"
        rows = [row for row in report["rows"] if row.get("threads", 0) == threads]
        print(f"\n{what} bandwidth {bandwidth / 1e9:.1f} GB/s; speed over {BASELINE[device]}:\n")
        print(ratio_table(rows, BASELINE[device]))
        if count := unsteady(rows):
            print(f"\n{count} of {len(rows)} timings scatter by more than half: the machine is busy, measure again.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(PEERS), required=True)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M")
    parser.add_argument("--formats", type=parse_format, nargs="*", metavar="FORMAT-GROUP")
    parser.add_argument("--peers", nargs="*", metavar="PEER", help="other libraries; all of them if not given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one table each")
    parser.add_argument("--seconds", type=float, help="for each variant, shape, M and number of threads")
    parser.add_argument("--cold-bytes", type=int, help="weights that a rotation reads at least")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no more is measured")
    parser.add_argument("--isa", choices=tuple(LIMITS), help="let a CPU use no more than this")
    parser.add_argument("--check", action="store_true", help="print the bars and whether they were met")
    parser.add_argument("--plot", type=pathlib.Path, help="draw a roofline to this file (needs matplotlib)")
    parser.add_argument("--json", type=pathlib.Path, help="write every figure to this file")
    args = parser.parse_args(argv)
    for name, value in {**DEFAULTS[args.device], "cold_bytes": COLD_BYTES[args.device]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    known = list(PEERS[args.device])
    args.peers = known if args.peers is None else args.peers
    if unknown := sorted(set(args.peers) - set(known)):
        parser.error(f"unknown peers {', '.join(unknown)}; on {args.device} there are: {', '.join(known)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; install the extra: pip install 'aaac-ao[bench]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    args.started = time.monotonic()
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; with --check the status is 1 if a bar was missed."""
    args = parse(argv)
    if args.isa and not LIMITS[args.isa].items() <= os.environ.items():
        # these are read when torch is loaded: start over
        command = [sys.executable, "-m", "benchmarks.linear", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, {**os.environ, **LIMITS[args.isa]})
    torch.manual_seed(0)
    report = {"environment": environment(args.device), "not_available": {}, "bandwidth": {}, "rows": []}
    measure, judge = (
        (measure_cpu, bars.cpu_linear_bars) if args.device == "cpu" else (measure_cuda, bars.cuda_linear_bars)
    )
    try:
        with torch.inference_mode():
            measure(args, report)
    except TimeoutError as error:
        print(error, file=sys.stderr)
    judged = judge(report["rows"])
    report["bars"] = [vars(bar) for bar in judged]
    write_json(args.json, report)
    show(report, args.device)
    if args.check:
        print(f"\n{bars.bars_table(judged)}")
    if args.plot:
        roofline.draw(report, args.plot)
    return int(args.check and any(bar.passed is False for bar in judged))


if __name__ == "__main__":
    sys.exit(main())
