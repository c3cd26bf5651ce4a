"""How much memory calibration takes: `python -m benchmarks.memory`.

First `calibrate_` on a model in memory, then `calibrate_checkpoint` on a model of many blocks that is written to disk
with random weights. Each run has a process of its own. On the CPU the peak is the high-water mark of the resident
memory, mapped files included, above what it was before the call, after a warm-up; on CUDA it is what torch allocated.
For `calibrate_` glibc and MKL are told to hand freed memory back (`HANDS_BACK`), so that what they keep for later is
not counted; the last column is the peak without that. `calibrate_checkpoint` runs as it is.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate

from aaac_ao import AAACConfig, block_pass, calibrate_, calibrate_checkpoint
from aaac_ao.blocks import find_blocks

#: hidden_size, intermediate_size and number of blocks
SIZES = {"in memory": (512, 3072, 2), "on disk": (1024, 2816, 24)}
VOCABULARY, HEAD_SIZE = 8192, 64
MB = 1 << 20
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}


def config_of(hidden: int, intermediate: int, blocks: int) -> Any:
    """A Llama of this size in bf16."""
    from transformers import LlamaConfig

    heads = hidden // HEAD_SIZE
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        dtype="bfloat16",
    )


def model_of(hidden: int, intermediate: int, blocks: int) -> torch.nn.Module:
    """The same with random weights."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(config_of(hidden, intermediate, blocks)).to(torch.bfloat16).eval()


def write_checkpoint(directory: Path, hidden: int, intermediate: int, blocks: int) -> None:
    """Write a random model, one shard per block, without holding it."""
    model = model_of(hidden, intermediate, 1)
    state, index = model.state_dict(), {}
    parts = [{n: t for n, t in state.items() if ".layers." not in n}]
    for number in range(blocks):
        block = {n.replace("layers.0.", f"layers.{number}."): t for n, t in state.items() if ".layers." in n}
        parts.append({n: t if t.dim() == 1 else torch.randn_like(t) * 0.02 for n, t in block.items()})
        save_file(parts.pop(), directory / f"model-{number}.safetensors", {"format": "pt"})
        index.update(dict.fromkeys(block, f"model-{number}.safetensors"))
    save_file(parts[0], directory / "model-rest.safetensors", {"format": "pt"})
    index.update(dict.fromkeys(parts[0], "model-rest.safetensors"))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config_of(hidden, intermediate, blocks).save_pretrained(directory)


# measuring


class Meter:
    """Peaks above the start, in bytes, while layers are encoded and otherwise."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if not self.cuda:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start = torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")
        self.peaks = {"encoding": 0, "gathering": 0}
        self.take("gathering")
        self.peaks["gathering"] = 0

    def take(self, phase: str) -> None:
        """Note the peak since the last call for a phase, and begin anew."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        self.peaks[phase] = max(self.peaks[phase], peak - self.start)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))

    @contextmanager
    def watching_the_encoder(self) -> Iterator[None]:
        """Tell the encoder from everything else."""
        original = block_pass.encode

        def encode(*args: Any) -> Any:
            self.take("gathering")
            encoding = original(*args)
            self.take("encoding")
            return encoding

        block_pass.encode = encode
        try:
            yield
        finally:
            block_pass.encode = original


def statistics_bytes(block: torch.nn.Module) -> int:
    """Second moments of all different inputs in a Llama block, fp32."""
    inputs = (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj)
    return sum(4 * layer.in_features * (layer.in_features + 1) for layer in inputs)


def activation_bytes(model: torch.nn.Module, batch: torch.Tensor, device: str) -> int:
    """The peak of running the blocks plainly, without gradients, on one batch."""
    with torch.no_grad():
        model.model(batch, use_cache=False)  # warms up
        meter = Meter(device)
        model.model(batch, use_cache=False)
        meter.take("gathering")
    return meter.peaks["gathering"]


def warm_up(config: AAACConfig, propagate: str, device: str) -> None:
    """Load everything that is loaded once."""
    model = model_of(128, 256, 2).to(device)
    calibrate_(model, config, [torch.randint(0, VOCABULARY, (2, 256))], progress=False, propagate=propagate)


def run_in_memory(rounding: str, propagate: str, tokens: int, batches: int, device: str) -> dict[str, float]:
    """One run of `calibrate_`; sizes in bytes."""
    config = AAACConfig(format="nvfp4", rounding=rounding)
    warm_up(config, propagate, device)
    model = model_of(*SIZES["in memory"]).to(device)
    data = [torch.randint(0, VOCABULARY, (max(1, tokens // 512), min(tokens, 512))) for _ in range(batches)]
    streams = 2 if propagate == "quantized" else 1
    hidden = streams * batches * tokens * model.config.hidden_size * 2
    statistics = statistics_bytes(find_blocks(model)[0]) * streams if rounding == "gptq" else 0
    widest = max(layer.in_features for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    sizes = {
        "statistics": statistics,
        "activations": activation_bytes(model, data[0].to(device), device),
        "hidden": 0 if device.startswith("cuda") else hidden,
        "matrix": 4 * widest * widest if rounding == "gptq" else 0,
    }
    meter = Meter(device)
    with meter.watching_the_encoder():
        calibrate_(model, config, data, progress=False, propagate=propagate)
        meter.take("gathering")
    return {**sizes, **meter.peaks}


def run_on_disk(rounding: str, tokens: int, device: str) -> dict[str, float]:
    """One run of `calibrate_checkpoint`; sizes in bytes."""
    config = AAACConfig(format="nvfp4", rounding=rounding)
    propagate = "original" if rounding == "nearest" else "quantized"
    warm_up(config, propagate, device)
    with tempfile.TemporaryDirectory(prefix="aaac-memory-") as folder:
        source = Path(folder) / "source"
        source.mkdir()
        write_checkpoint(source, *SIZES["on disk"])
        block = model_of(*SIZES["on disk"][:2], 1)
        sizes = {
            "block": sum(2 * p.numel() for p in find_blocks(block)[0].parameters()),
            "embeddings": sum(2 * e.weight.numel() for e in (block.get_input_embeddings(), block.lm_head)),
            "model": sum(path.stat().st_size for path in source.glob("*.safetensors")),
            "statistics": statistics_bytes(find_blocks(block)[0]) if rounding == "gptq" else 0,
        }
        del block
        data = list(torch.randint(0, VOCABULARY, (4, 1, tokens)))
        meter = Meter("cpu")
        calibrate_checkpoint(source, config, data, Path(folder) / "out", progress=False, device=device)
        meter.take("gathering")
    return {**sizes, "peak": meter.peaks["gathering"]}


# the tables


def in_process(*call: Any, hands_back: bool = False) -> dict[str, float]:
    """The result of a run in a process of its own, in MB."""
    environment = {**os.environ, **(HANDS_BACK if hands_back else {})}
    command = [sys.executable, "-m", "benchmarks.memory", "--call", json.dumps(call)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return {key: value / MB for key, value in json.loads(result.stdout.splitlines()[-1]).items()}


def held(peak: float, bound: float) -> str:
    """The verdict."""
    return f"{'yes' if peak <= bound else 'NO'} ({peak / bound:.2f})"


def in_memory_row(rounding: str, propagate: str, tokens: int, batches: int, device: str) -> dict[str, Any]:
    """A row of the first table."""
    call = ("run_in_memory", rounding, propagate, tokens, batches, device)
    run, default = in_process(*call, hands_back=True), in_process(*call)
    bound = run["statistics"] + run["activations"] + run["hidden"]
    return {
        "rounding": rounding,
        "propagate": propagate,
        "statistics": run["statistics"],
        "activations": run["activations"],
        "hidden states": run["hidden"],
        "sum": bound,
        "peak gathering": run["gathering"],
        "within sum": held(run["gathering"], bound),
        "peak encoding": run["encoding"],
        "within sum ": held(run["encoding"], bound),
        "matrix of the widest": run["matrix"],
        "peak, default malloc": max(default["gathering"], default["encoding"]),
    }


def on_disk_row(rounding: str, tokens: int, device: str) -> dict[str, Any]:
    """A row of the second table."""
    run = in_process("run_on_disk", rounding, tokens, device)
    bound = 2.5 * run["block"] + run["embeddings"]
    return {
        "rounding": rounding,
        "model": run["model"],
        "blocks": SIZES["on disk"][2],
        "block": run["block"],
        "embeddings": run["embeddings"],
        "statistics": run["statistics"],
        "2.5 blocks + embeddings": bound,
        "peak": run["peak"],
        "within": held(run["peak"], bound),
        "within, + statistics": held(run["peak"], bound + run["statistics"]),
    }


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch, in memory")
    parser.add_argument("--batches", type=int, default=2, help="batches, in memory")
    parser.add_argument("--threads", type=int, help="threads of a process; default: torch's")
    parser.add_argument("--only", choices=("memory", "disk"), help="one of the two tables")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        name, *values = json.loads(arguments.call)
        print(json.dumps({"run_in_memory": run_in_memory, "run_on_disk": run_on_disk}[name](*values)))
        return
    device = arguments.device
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.only != "disk":
        cases = [("nearest", "original"), ("gptq", "original"), ("gptq", "quantized")]
        rows = [in_memory_row(*case, arguments.tokens, arguments.batches, device) for case in cases]
        print(f"\ncalibrate_ on {device}, MB above the model itself:\n")
        print(tabulate(rows, headers="keys", floatfmt=".0f", tablefmt="github"))
    if arguments.only != "memory":
        rows = [on_disk_row(rounding, 256, device) for rounding in ("nearest", "gptq")]
        print(f"\ncalibrate_checkpoint with blocks on {device}, MB of main memory above the interpreter:\n")
        print(tabulate(rows, headers="keys", floatfmt=".0f", tablefmt="github"))


if __name__ == "__main__":
    main()
