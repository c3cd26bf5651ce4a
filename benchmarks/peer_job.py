"""One method quantising one model in a process of its own: what `benchmarks.quality` and its scripts share.

`benchmarks.quality` writes a job; a script (`ours.py`, `peer_*.py`) hands two functions to `main`, which reads the job,
measures seconds and memory around the first one, and writes the dequantised weights and the costs.

Nothing here imports aaac_ao: the scripts run in the environments of the peers. They are run by path, so that the
repository's `kernels` folder is hidden from packages that look for the one on PyPI.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Two windows on which the quantised model, as its package runs it, is compared with its dequantised weights.
CHECK_WINDOWS = 2
#: Rows and columns of the part of a layer on which a method is warmed up before it is timed.
WARM_UP = 256


@dataclass(frozen=True)
class Job:
    """What a script is asked to do.

    Attributes:
        model: directory of the original model.
        ids: calibration windows [count, tokens].
        options: settings of the method, as in the tables of `benchmarks.methods` and `benchmarks.peers`.
        seed: for methods that draw random numbers.
    """

    model: str
    ids: torch.Tensor
    options: dict[str, Any]
    seed: int


@dataclass
class Outcome:
    """What a script hands back.

    Attributes:
        weights: dense values of every parameter that changed, by name.
        stored_bytes: for every quantised linear layer, by name, all that is stored for it: codes, scales, zeros, books.
        notes: what a reader of the figures must know.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stored_bytes: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def linear_layers(model: nn.Module, multiple: int = 1) -> dict[str, nn.Linear]:
    """All linear layers but the output head whose inputs are a multiple of some number, by name."""
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {name: layer for name, layer in layers.items() if layer.in_features % multiple == 0}


def bytes_of(*tensors: torch.Tensor) -> int:
    """Bytes of plain tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main(
    packages: tuple[str, ...],
    quantise: Callable[[nn.Module, Job], Any],
    outcome: Callable[[nn.Module, Job, Any], Outcome],
) -> None:
    """Run the job named on the command line and write its result, which says `error` if anything failed.

    Args:
        packages: their versions are recorded.
        quantise: (model in fp32, job) -> state; changes the model in place; this is what is timed.
        outcome: (model, job, state) -> what it became.
    """
    path = Path(sys.argv[1])
    job = json.loads(path.read_text())
    try:
        result = _run(job, packages, quantise, outcome)
    except Exception as error:  # whatever a package raises becomes a row of the table
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    Path(job["result"]).write_text(json.dumps(result))


def _run(job: dict[str, Any], packages: tuple[str, ...], quantise: Callable, outcome: Callable) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    ids = load_file(job["calibration"])["ids"]
    torch.manual_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"]).float().eval()
    weights = sum(layer.weight.numel() for layer in linear_layers(model).values())
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    todo = Job(job["model"], ids, job["options"], job["seed"])
    with cost() as costs:
        state = quantise(model, todo)
    found = outcome(model, todo, state)
    if not found.stored_bytes:
        raise RuntimeError("it left every layer as it was")
    left = [name for name in sizes if name not in found.stored_bytes]
    notes = list(found.notes)
    if left:
        notes.append(f"{len(left)} of {len(sizes)} layers left in 16 bits")
    stored = sum(found.stored_bytes.values()) + sum(2 * sizes[name] for name in left)
    save_file({name: t.detach().float().contiguous() for name, t in found.weights.items()}, job["weights"])
    return {
        **costs,
        "bits": 8 * stored / weights,
        "notes": notes,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *packages)},
        "check_loss": _loss_or_none(model, ids[:CHECK_WINDOWS]),
    }


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call; the first one is not counted where there are several."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[repeats > 1 :])


def loss_of(model: nn.Module, ids: torch.Tensor) -> float:
    """Mean loss in nats per predicted token."""
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _loss_or_none(model: nn.Module, ids: torch.Tensor) -> float | None:
    try:
        return loss_of(model, ids)
    except Exception:  # kernels for CUDA only
        return None


@contextmanager
def cost() -> Iterator[dict[str, float]]:
    """Seconds, CPU seconds of all threads, and how far memory (RSS) rose above its start; filled in at the end."""
    costs: dict[str, float] = {}
    gc.collect()
    before = _reset_peak()
    start, cpu_start = time.perf_counter(), time.process_time()
    yield costs
    costs["seconds"] = time.perf_counter() - start
    costs["cpu_seconds"] = time.process_time() - cpu_start
    costs["peak_mb"] = (_status("VmHWM") or _max_rss()) - before


def _reset_peak() -> float:
    """Set the high-water mark of this process to its present size, in MB, where Linux allows it."""
    with suppress(OSError):  # the mark then includes what loading the model needed
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _max_rss()


def _status(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def _max_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)
