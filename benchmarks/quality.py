"""Quality of all methods on models at hand: `python -m benchmarks.quality`.

Prints a Markdown table of models and methods: stored bits per weight, perplexity, KL divergence to the original, the
shares of round-to-nearest's loss that each method wins back, and what it cost. Every method runs in a process of its
own, which hands back dequantised weights; all are then evaluated alike, as plain fp32 weights in the original.

    python -m benchmarks.quality --methods ours --settings int4-g64
    python -m benchmarks.quality --models MODEL_DIR --text TEXT --calibration-text TEXT --json quality.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aaac_ao.evaluate import Evaluation, evaluate
from benchmarks import quality_report
from benchmarks.methods import SETTINGS, Method, ablation_methods, choose, our_methods, with_baselines
from benchmarks.peer_job import CHECK_WINDOWS, loss_of
from benchmarks.peers import PEERS, interpreter
from benchmarks.subjects import DEMO, Replayed, Subject, load

HERE = Path(__file__).resolve().parent
#: A method's own forward pass and its dequantised weights in fp32 may differ by this share of the loss.
CHECK_TOLERANCE = 2e-3


class NotAvailable(Exception):  # noqa: N818  (a row of the table, not a failure of the run)
    """A method that could not be run, and why."""


def run_method(method: Method, subject: Subject, ids: torch.Tensor, seed: int, args: argparse.Namespace) -> dict:
    """Quantise with one method in a child process.

    Returns:
        What the script reported, and its dequantised `weights`.

    Raises:
        NotAvailable: no environment, a crash, a time-out, or an error of the method.
    """
    try:
        python = sys.executable if method.environment is None else interpreter(method.environment)
    except FileNotFoundError as error:
        raise NotAvailable(str(error)) from None
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / key) for key in ("calibration", "weights", "result")}
        save_file({"ids": ids.contiguous()}, paths["calibration"])
        job = {"model": str(subject.directory), "options": method.options, "seed": seed, **paths}
        job_path = Path(folder) / "job.json"
        job_path.write_text(json.dumps(job))
        command = [str(python), *method.flags, str(HERE / method.script), str(job_path)]
        try:
            child = subprocess.run(
                command,
                cwd=folder,
                env=_environment(args.threads),
                capture_output=True,
                text=True,
                timeout=args.timeout,
            )
        except subprocess.TimeoutExpired:
            raise NotAvailable(f"stopped after {args.timeout} s") from None
        if args.verbose:
            print(child.stdout, child.stderr, sep="\n", file=sys.stderr)
        if not Path(paths["result"]).exists():
            lines = child.stderr.strip().splitlines() or ["no output"]
            raise NotAvailable(f"exit code {child.returncode}: {lines[-1]}")
        result = json.loads(Path(paths["result"]).read_text())
        if "error" in result:
            raise NotAvailable(result["error"])
        return {**result, "weights": load_file(paths["weights"])}


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MSLK_PYTHON_ONLY": "1",  # its library needs CUDA, its quantiser does not
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc else keeps freed memory, and a peak would say little about what a method holds
        "MALLOC_MMAP_THRESHOLD_": "4194304",
        "MALLOC_TRIM_THRESHOLD_": "8388608",
    }


class Evaluator:
    """Evaluates dequantised weights of one model against the original."""

    def __init__(self, subject: Subject):
        self._original, self._windows = subject.model, subject.held_out
        self._reference = Replayed(subject.model)
        self._model = copy.deepcopy(subject.model)
        self.original = evaluate(self._reference, self._windows)

    def __call__(self, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[Evaluation, float]:
        """Evaluation of the original with these parameters replaced, and the loss on the first calibration windows."""
        self._model.load_state_dict(self._original.state_dict())
        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        return evaluate(self._model, self._windows, self._reference), loss_of(self._model, ids[:CHECK_WINDOWS])


def run_subject(subject: Subject, methods: list[Method], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one model: the original, then every method with every seed that matters to it."""
    evaluator = Evaluator(subject)
    original = evaluator.original
    yield {"model": subject.name, "method": "original", "perplexity": original.perplexity, "tokens": original.tokens}
    calibration = [subject.calibration(args.calibration_windows, seed) for seed in range(args.seeds)]
    for method in methods:
        for seed in range(args.seeds if method.uses_data else 1):
            row = {"model": subject.name, "method": method.name, "setting": method.setting, "ours": method.ours}
            row |= {"seed": seed, "note": method.note}
            try:
                result = run_method(method, subject, calibration[seed], seed, args)
                evaluation, loss = evaluator(result.pop("weights"), calibration[seed])
            except (NotAvailable, ValueError) as error:
                yield {**row, "error": str(error)}
                continue
            own = result.pop("check_loss")
            if own is not None and abs(own - loss) > CHECK_TOLERANCE * loss:
                result["notes"].append(f"its own forward pass has loss {own:.4f}, its dequantised weights {loss:.4f}")
            yield {**row, **result, "perplexity": evaluation.perplexity, "kl": evaluation.kl}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[DEMO], help=f"{DEMO}, or directories in transformers' format")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help='all, ours, peers, ablation, or keys like "aaac*"'
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="of our methods")
    parser.add_argument("--windows", type=_positive, default=64, help="evaluation windows of 512 tokens")
    parser.add_argument("--calibration-windows", type=_positive, default=256)
    parser.add_argument("--seeds", type=_positive, default=1, help="repeat with other calibration windows")
    parser.add_argument("--text", type=Path, help="what model directories are evaluated on")
    parser.add_argument("--calibration-text", type=Path, help="default: text sampled from the model itself")
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="of every method")
    parser.add_argument("--timeout", type=_positive, default=3600, help="seconds for one method")
    parser.add_argument("--json", type=Path, help="write all rows here, after every row")
    parser.add_argument("--plot", type=Path, help="write a plot of KL against bits here (needs matplotlib)")
    parser.add_argument("--verbose", action="store_true", help="show what the methods print")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run everything and print the tables."""
    args = parse(arguments)
    if args.plot is not None:
        quality_report.require_matplotlib()
    try:
        methods = with_baselines(
            choose([*our_methods(args.settings), *ablation_methods(args.settings), *PEERS], args.methods)
        )
        subjects = [load(name, args.windows, args.text, args.calibration_text) for name in args.models]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        for row in run_subject(subject, methods, args):
            rows.append(row)
            _progress(row)
            if args.json is not None:
                args.json.write_text(
                    json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}, indent=1)
                )
        print(f"\n## {subject.name}\n\n{subject.data}; {args.calibration_windows} windows, {args.seeds} seed(s).\n")
        print(quality_report.table([row for row in rows if row["model"] == subject.name]))
    if args.plot is not None:
        quality_report.plot(rows, args.plot)


def _progress(row: dict[str, Any]) -> None:
    outcome = row.get("error") or f"KL {row.get('kl', 0):.5f}, {row.get('seconds', 0):.1f} s"
    print(
        f"{time.strftime('%H:%M:%S')} {row['model']} {row.get('setting', '')} {row['method']}: {outcome}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
