"""What every benchmark prints and writes: where it ran, a table, one JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Sequence

import torch
from tabulate import tabulate

PACKAGES = ("torch", "triton", "torchao", "transformers", "numpy", "bitsandbytes", "gemlite", "fbgemm-gpu-genai")


def environment(device: str) -> dict:
    """Date, device, driver and versions: what figures depend on."""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
        result |= {"sms": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        result |= {"l2_bytes": properties.L2_cache_size, "driver": _driver()}
    return result


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def headline(where: dict) -> str:
    """One line over a table."""
    isa = "" if "capability" in where else f", {where['isa']}"
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}{isa}, {versions}"


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A table in GitHub's format; the cells are printed as they are."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def write_json(path: pathlib.Path | None, content: dict) -> None:
    """Write `content` to `path`, unless that is None."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
