"""Everything that only a CUDA machine can say about the kernels, in one command of less than nine minutes.

    python -m benchmarks.gpu_all --out gpu.json            # or: python benchmarks/gpu_all.py --out gpu.json
    python -m benchmarks.gpu_all --out dry.json --dry-run  # every part on a CPU, tiny shapes, kernels interpreted

Needs torch, triton, torchao, transformers, tabulate and this checkout; nothing has to be installed. Each part runs in a
process of its own with a time limit, so that a crash or a hang costs that part only; what a part leaves of its time
goes to the parts behind it. The status is 0 if every part ran and every result was right; missed bars do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
import time

import torch

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import bars, generate, linear
from benchmarks.parts import run_part
from benchmarks.report import environment, headline, table, write_json

#: Seconds for all parts together.
TOTAL = 520.0
#: Shapes that the bars speak of.
SHAPES = "4096x4096 14336x4096 8192x8192 28672x8192"
DRY_LINEAR = "--device cpu --shapes 48x128 --tokens 1 33 --threads 1 --cold-bytes 16384 --seconds 0.002"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        module: run as `python -m module arguments --json FILE`.
        arguments: on a GPU.
        dry: on a CPU.
        seconds: it has at least this long.
        reserve: seconds before its end at which it is told to stop by itself (--limit), or None if it cannot.
    """

    module: str
    arguments: str
    dry: str
    seconds: float
    reserve: float | None = None


def check(name: str, seconds: float, reserve: float | None = None) -> Part:
    """A part of `benchmarks.gpu_checks`."""
    return Part("benchmarks.gpu_checks", name, f"{name} --dry-run", seconds, reserve)


PARTS = {
    "numerics": check("numerics", 100, 15),
    "graphs": check("graphs", 30),
    "compiled": check("compiled", 45),
    "large": check("large", 40),
    "rounding": check("rounded_blocks", 30),
    "encode": Part(
        "benchmarks.encode_speed",
        "--device cuda --sizes 1024 2048 4096 --repeats 2",
        "--device cpu --sizes 128 --repeats 1 --no-peers",
        30,
    ),
    "linear": Part(
        "benchmarks.linear",
        f"--device cuda --peers tinygemm torchao-nvfp4 --shapes {SHAPES} 4096x14336 8192x28672",
        f"{DRY_LINEAR} --peers torch-int4 --formats int4-128 nvfp4-16",
        95,
        20,
    ),
    "peers": Part(
        "benchmarks.linear",
        f"--device cuda --peers bitsandbytes gemlite fbgemm --formats --shapes {SHAPES} --tokens 1 4 16 64 256 1024",
        f"{DRY_LINEAR} --peers torch-int8 --formats",
        45,
        20,
    ),
    "generate": Part(
        "benchmarks.generate",
        "--device cuda --batches 1 16 --new-tokens 64 --variants bf16 int4-128 torchao-int4 nvfp4-16",
        "--device cpu --models tiny --variants fp32 int4-64 --new-tokens 4 --rounds 1 --no-compile",
        105,
        10,
    ),
}


def run_all(names: list[str], dry: bool, total: float, report: dict, out: pathlib.Path | None) -> None:
    """Run the parts one after the other; each adds its result to `report`, which is written every time."""
    end = time.monotonic() + total
    for index, name in enumerate(names):
        part = PARTS[name]
        kept_for_others = sum(PARTS[later].seconds for later in names[index + 1 :])
        limit = max(part.seconds, end - time.monotonic() - kept_for_others)
        arguments = (part.dry if dry else part.arguments).split()
        if part.reserve is not None:
            arguments += ["--limit", str(max(limit - part.reserve, 1))]
        # a CPU interprets the kernels only where they are called as kernels
        interpret = dry and part.module == "benchmarks.gpu_checks" and name != "compiled"
        result = run_part(part.module, arguments, limit, {"TRITON_INTERPRET": "1"} if interpret else None)
        report["parts"][name] = result
        show(name, result, dry)
        report["bars"] = [vars(bar) for bar in judge(report)]
        write_json(out, report)


def rows_of(report: dict, *names: str) -> list[dict]:
    """The rows of some parts."""
    return [row for name in names for row in report["parts"].get(name, {}).get("result", {}).get("rows", [])]


def judge(report: dict) -> list[bars.Bar]:
    """The bars, from what the parts measured."""
    measured = rows_of(report, "linear", "peers")
    return bars.cuda_linear_bars(measured) + bars.decode_bars(rows_of(report, "generate"), "cuda")


def is_good(result: dict) -> bool:
    """Whether a part ran and found nothing wrong."""
    return result["status"] == "ok" and result["result"].get("right", True)


def show(name: str, result: dict, dry: bool) -> None:
    """Print one part."""
    print(f"\n## {name}: {result['status']}, {result['seconds']} s\n")
    content = result.get("result", {})
    if result["status"] != "ok":
        print(result["error"][-1500:])
    for what, why in content.get("not_available", {}).items():
        print(f"{what}: not available ({why})")
    if "cases" in content:
        print(f"{content['cases']} cases, {content['wrong']} wrong; worst: {content['largest_over_bound'][:3]}")
        print("\n".join(content.get("warnings", [])))
        print("\n".join(f"{case}: {ms} ms" for case, ms in content.get("milliseconds", {}).items()))
    elif rows := content.get("rows", []):
        if name == "generate":
            print(generate.rows_table(rows))
        elif name == "encode":
            print(table([list(row.values()) for row in rows], list(rows[0])))
        else:
            print(linear.ratio_table(rows, linear.BASELINE["cpu" if dry else "cuda"]))
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; use --dry-run to walk through the parts on a CPU")
    report = {**environment("cpu" if args.dry_run else "cuda"), "dry_run": args.dry_run, "parts": {}, "bars": []}
    print(headline(report))
    run_all(args.parts, args.dry_run, args.seconds, report, args.out)
    print(f"\n{bars.bars_table(judge(report))}")
    bad = [name for name, result in report["parts"].items() if not is_good(result)]
    good = len(report["parts"]) - len(bad)
    print(f"\n{good} of {len(report['parts'])} parts are good", *(f"not {name}" for name in bad), sep=", ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
