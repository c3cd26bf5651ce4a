"""How fast one linear layer is, against other ways to compute it: `python -m benchmarks.linear --device cpu`.

CPU: medians of visits in rotation within one process; every call reads another copy of its weight, at least 128 MB of
them in all. Ratios are to fp32 `F.linear`; ours takes fp32 x, the bf16, int4 and int8 of torch take bf16 x. The read
bandwidth is that of the best of three plain readers in the same run; bytes are codes, scales, x and y. The error is
relative to fp64 on the weight as stored and on unrounded x. All are timed as bare ops, as compiled code calls them.

On a machine with AVX-512, --isa avx2 times what a machine without it would do.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import torch

from benchmarks import bars, cpu_peers
from benchmarks.report import environment, headline, table, write_json
from benchmarks.shapes import CPU_SHAPES, CPU_TOKENS, parse_format, parse_shape, product_bytes
from benchmarks.timing import COLD_BYTES, interleaved, read_bandwidth
from benchmarks.variants import Variant, aaac, dense

CPU_FORMATS = [("int4", 128), ("int4", 32), ("nvfp4", 16)]
#: What limits torch, MKL, oneDNN and our kernel to AVX2.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def cpu_variants(n: int, k: int, formats: list, cold_bytes: int) -> tuple[list[Variant], dict[str, str]]:
    """Everything that can be timed at this shape, and why the rest cannot."""
    w = torch.randn(n, k) * 0.02
    variants = [dense("fp32", w, cold_bytes), dense("bf16", w.bfloat16(), cold_bytes)]
    missing = {}
    for name, make in cpu_peers.PEERS.items():
        try:
            variants.append(make(w, cold_bytes))
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    for fmt, group_size in formats:
        variants += aaac(n, k, fmt, group_size, "cpu", torch.float32, cold_bytes)
    return variants, missing


def cpu_rows(args: argparse.Namespace, report: dict) -> None:
    """Fill `report` with bandwidths, what is missing, and one row for each variant, shape, M and number of threads."""
    for threads in args.threads:
        torch.set_num_threads(threads)
        report["read_bandwidth"][threads] = read_bandwidth(max(args.cold_bytes, 2**20))
    for n, k in args.shapes:
        torch.set_num_threads(max(args.threads))
        variants, report["not_available"] = cpu_variants(n, k, args.formats, args.cold_bytes)
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
                for v in variants:
                    where = {"variant": v.name, **v.labels, "threads": threads, "N": n, "K": k, "M": m}
                    size = product_bytes(v.weight_bytes, m, n, k, v.dtype.itemsize)
                    rate = size / times[v.name]["us"] * 1e6
                    share = rate / report["read_bandwidth"][threads]
                    row = {**where, **times[v.name], "GB_per_s": rate / 1e9, "share_of_bandwidth": share}
                    report["rows"].append(row | errors[v.name])
            print(f"{n} x {k}, M = {m}: measured", file=sys.stderr)


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
            start = mine[min(mine)]
            speed = [f"{start['GB_per_s']:.1f}", f"{start['share_of_bandwidth']:.0%}".replace("%", " %")]
            lines.append([f"{n} x {k}", variant, *cells, *speed, f"{max(row['error'] for row in mine.values()):.1e}"])
    m = min(tokens)
    header = ["N x K", "variant", *(f"M = {m}" for m in tokens), f"GB/s, M = {m}", "of bandwidth", "error"]
    return table(lines, header)


def show_cpu(report: dict, check: bool) -> None:
    """Print the tables, and with `check` the bars."""
    print(headline(report["environment"]))
    for name, why in report["not_available"].items():
        print(f"{name}: not available ({why})")
    for threads, bandwidth in report["read_bandwidth"].items():
        plural = "" if threads == 1 else "s"
        print(f"\n{threads} thread{plural}, read bandwidth {bandwidth / 1e9:.1f} GB/s; speed over {bars.FP32}:\n")
        print(ratio_table([row for row in report["rows"] if row["threads"] == threads], bars.FP32))
    if check:
        print(f"\n{bars.bars_table(bars.cpu_linear_bars(report['rows']))}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; with --check the status is 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), required=True)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK", default=CPU_SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", default=CPU_TOKENS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", type=parse_format, nargs="+", metavar="FORMAT-GROUP", default=CPU_FORMATS)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each variant, shape, M and number of threads")
    parser.add_argument("--cold-bytes", type=int, default=COLD_BYTES["cpu"], help="weights that a rotation reads")
    parser.add_argument("--isa", choices=("avx2",), help="use no more than this instruction set")
    parser.add_argument("--check", action="store_true", help="print the bars and whether they were met")
    parser.add_argument("--json", type=pathlib.Path, help="write every figure to this file")
    args = parser.parse_args(argv)
    if args.isa and not AVX2.items() <= os.environ.items():
        # read when torch is loaded: start over
        command = [sys.executable, "-m", "benchmarks.linear", *(sys.argv[1:] if argv is None else argv)]
        os.execve(sys.executable, command, {**os.environ, **AVX2})
    torch.manual_seed(0)
    report = {"environment": environment(args.device), "not_available": {}, "read_bandwidth": {}, "rows": []}
    with torch.inference_mode():
        cpu_rows(args, report)
    judged = bars.cpu_linear_bars(report["rows"])
    report["bars"] = [vars(bar) for bar in judged]
    show_cpu(report, args.check)
    write_json(args.json, report)
    return int(args.check and any(bar.passed is False for bar in judged))


if __name__ == "__main__":
    sys.exit(main())
