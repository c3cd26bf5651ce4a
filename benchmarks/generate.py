"""How fast whole models decode: static key-value cache, one compiled graph per step, CUDA graphs on a GPU.

    python -m benchmarks.generate --device cpu --check
    python -m benchmarks.generate --device cuda --check

Random weights of known shapes, built in the form in which they run. A variant is a form, such as bf16 or int4-128, with
"+head" if the output head has it too (else it is dense, as `quantize_(model.model, ...)` leaves it), and ":int8" for a
mode of `aaac_ao.cpu_mode`. Each is measured in a process of its own, one after the other, `--rounds` times over, and
the fastest round counts. Bytes are the weights that a step reads, the head included.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import torch

from aaac_ao.generate import generate
from benchmarks import bars, models
from benchmarks.parts import run_part
from benchmarks.report import environment, headline, table, write_json
from benchmarks.timing import copy_bandwidth, read_bandwidth
from benchmarks.variants import mode_context, modes

DEFAULTS = {
    "cpu": {
        "models": [models.DEMO, "Llama-3.2-1B"],
        "variants": ["fp32", "bf16", "int4-128", "int4-128+head", "nvfp4-16", "nvfp4-16+head"],
        "batches": [1],
        "new_tokens": 40,
        "rounds": 2,
    },
    "cuda": {
        "models": ["Llama-3-8B"],
        "variants": ["bf16", models.TORCHAO_INT4, "int4-128", "nvfp4-16"],
        "batches": [1, 4, 16, 64],
        "new_tokens": 128,
        "rounds": 1,
    },
}
PROMPT = 16


def measure(args: argparse.Namespace) -> dict:
    """Rows of one model and variant, in this process."""
    (name,), (variant,) = args.models, args.variants
    form, head, mode = parse_variant(variant)
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = {"environment": environment(args.device), "rows": []}
    bandwidth = copy_bandwidth() if args.device == "cuda" else read_bandwidth()
    start = time.perf_counter()
    model = models.build(name, form, args.device, head)
    build_seconds = time.perf_counter() - start
    size = models.bytes_per_step(model)
    for batch in args.batches:
        torch._dynamo.reset()
        prompts = torch.randint(0, model.config.vocab_size, (batch, PROMPT))
        compile_mode = "reduce-overhead" if args.device == "cuda" else None
        with mode_context(mode)():
            result = generate(model, prompts, args.new_tokens, args.compile, compile_mode)
        rate = result.tokens_per_second / batch * size
        row = {"model": name, "variant": variant, "batch": batch, "threads": torch.get_num_threads()}
        row |= {"tokens_per_second": result.tokens_per_second, "bytes_per_step": size, "GB_per_s": rate / 1e9}
        row |= {"share_of_bandwidth": rate / bandwidth, "compile_seconds": result.compile_seconds}
        report["rows"].append(row | {"build_seconds": build_seconds})
        write_json(args.json, report)
    return report


def measure_all(args: argparse.Namespace) -> dict:
    """Every model and variant in a process of its own; the fastest of the rounds."""
    report = {"environment": environment(args.device), "not_available": {}, "rows": []}
    fastest: dict[tuple, dict] = {}
    started = time.monotonic()
    for name in args.models:
        for number, variant in [(number, variant) for number in range(args.rounds) for variant in args.variants]:
            left = args.limit - (time.monotonic() - started)
            if left < 1:
                report["not_available"].setdefault(f"{name}, {variant}", "the time limit is over")
                continue
            part = run_part("benchmarks.generate", child_arguments(args, name, variant), left)
            for row in part.get("result", {}).get("rows", []):
                key = (name, variant, row["batch"])
                if key not in fastest or row["tokens_per_second"] > fastest[key]["tokens_per_second"]:
                    fastest[key] = row
            if part["status"] != "ok":
                last = (part["error"].strip().splitlines() or ["no output"])[-1]
                report["not_available"][f"{name}, {variant}"] = f"{part['status']}: {last[:200]}"
            print(f"{name}, {variant}, round {number + 1}: {part['status']}, {part['seconds']} s", file=sys.stderr)
            report["rows"] = sorted(fastest.values(), key=lambda row: list(fastest).index(key_of(row)))
            write_json(args.json, report)
    return report


def parse_variant(variant: str) -> tuple[str, bool, str | None]:
    """Form, whether the head has it too, and mode."""
    form, _, mode = variant.partition(":")
    return form.removesuffix("+head"), form.endswith("+head"), mode or None


def key_of(row: dict) -> tuple:
    """What a row is the fastest round of."""
    return row["model"], row["variant"], row["batch"]


def child_arguments(args: argparse.Namespace, name: str, variant: str) -> list[str]:
    """The command line that measures one model and variant."""
    command = ["--here", "--device", args.device, "--models", name, "--variants", variant]
    command += ["--batches", *map(str, args.batches), "--new-tokens", str(args.new_tokens)]
    command += ["--threads", str(args.threads)] if args.threads else []
    return command + ["--no-compile"] * (not args.compile)


def rows_table(rows: list[dict]) -> str:
    """One line for each row, with ratios to the dense variants in it."""
    dense = [name for name in models.DENSE if any(row["variant"] == name for row in rows)]
    lines = []
    for row in rows:
        ratios = [bars.decode_speedups([row], rows, name) for name in dense]
        cells = [f"{ratio[0]:.2f}" if ratio else "" for ratio in ratios]
        speed = [f"{row['tokens_per_second']:.1f}", *cells, f"{row['GB_per_s']:.1f}"]
        share = f"{100 * row['share_of_bandwidth']:.0f} %"
        weights = f"{row['bytes_per_step'] / 1e9:.3f}"
        lines.append([row["model"], row["variant"], row["batch"], *speed, share, weights])
    header = ["model", "variant", "batch", "tokens/s", *(f"times {name}" for name in dense)]
    return table(lines, [*header, "GB/s", "of bandwidth", "GB a step"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULTS), required=True)
    parser.add_argument("--models", nargs="+", choices=[models.DEMO, *models.SHAPES], metavar="MODEL")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help="such as bf16, int4-128, nvfp4-16:int8")
    parser.add_argument("--batches", type=int, nargs="+", metavar="BATCH")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default if not given")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="decode eagerly")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no more is measured")
    parser.add_argument("--check", action="store_true", help="print the bars and whether they were met")
    parser.add_argument("--json", type=pathlib.Path, help="write every figure to this file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for variant in args.variants:
        form, _, mode = parse_variant(variant)
        if mode and mode not in modes(args.device):
            parser.error(f"mode {mode!r} of {variant} is not there; on {args.device} there are: {modes(args.device)}")
        try:
            models.weight_maker(form, args.device, torch.float32)
        except ValueError as error:
            parser.error(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; with --check the status is 1 if a bar was missed."""
    args = parse(argv)
    if args.here:
        measure(args)
        return 0
    report = measure_all(args)
    judged = bars.decode_bars(report["rows"], args.device)
    report["bars"] = [vars(bar) for bar in judged]
    write_json(args.json, report)
    print(headline(report["environment"]))
    for name, why in report["not_available"].items():
        print(f"{name}: not available ({why})")
    print(f"\n{rows_table(report['rows'])}")
    if args.check:
        print(f"\n{bars.bars_table(judged)}")
    return int(args.check and any(bar.passed is False for bar in judged))


if __name__ == "__main__":
    sys.exit(main())
