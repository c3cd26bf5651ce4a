"""Everything that only a CUDA machine can say about the kernels, in one command of less than ten minutes.

    python -m benchmarks.gpu_all --out gpu.json            # or: python benchmarks/gpu_all.py --out gpu.json
    python -m benchmarks.gpu_all --out dry.json --dry-run  # every part on a CPU, in Triton's interpreter, tiny shapes

Needs torch, triton and this checkout; nothing has to be installed. Each part runs in a process of its own with a time
limit, so that a crash or a hang costs that part only. The exit status is 0 if every part ran and every result was
right. Errors are compared with an fp64 oracle, times are medians over replays of a CUDA graph that walks through copies
of the weight larger than the L2 cache together; GB/s are 1e9 bytes of codes, scales, x and y per second.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: Seconds each part may take.
LIMITS = {"environment": 45, "correctness": 200, "large": 90, "decode": 110, "prefill": 130}
#: Bytes of weights that a timed graph reads at least: several times the L2 cache of the largest chips.
COLD_BYTES = 256 * 2**20
FORMATS = (("int4", 128), ("nvfp4", 16))
SHAPES = ((4096, 4096), (14336, 4096))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(name: str, path: str):
    """Import a file of this checkout under a name of its own, without the package around it and what that needs."""
    if name not in sys.modules:
        folder = [str((ROOT / path).parent)] if path.endswith("__init__.py") else None
        spec = importlib.util.spec_from_file_location(name, ROOT / path, submodule_search_locations=folder)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def dispatch():
    """The kernels' host side."""
    load("aaac_gpu_kernels", "kernels/__init__.py")
    return importlib.import_module("aaac_gpu_kernels.dispatch")


@dataclass
class Weight:
    """A random stored weight [n, k]; `row0` and `column0` cut it out of a larger one.

    Attributes:
        stored: qdata, scale, codebooks, per_tensor_scale, group_size: the arguments of `dispatch.linear` after x.
        shape: (n, k).
    """

    stored: tuple
    shape: tuple[int, int]

    @classmethod
    def random(cls, n: int, k: int, group_size: int, device: str, row0: int = 0, column0: int = 0) -> Weight:
        """Random codes, scales of both signs, random books. row0 % 16 == 0 and column0 % lcm(64, group_size) == 0."""
        rows, columns = row0 // 16 + -(-n // 16), column0 // 64 + -(-k // 64)
        qdata = torch.randint(0, 256, (rows, columns * 512), dtype=torch.uint8, device=device)
        scale = torch.randn(row0 + n, -(-(column0 + k) // group_size), device=device)
        scale[row0 // 2 :: 7] = -0.0
        scale = scale.to(torch.float8_e4m3fn if group_size == 16 else torch.bfloat16)
        codebooks = torch.randn(2, 16, device=device).bfloat16()
        per_tensor_scale = torch.tensor(0.0123, device=device) if group_size == 16 else None
        stored = (qdata[row0 // 16 :, column0 * 8 :], scale[row0:, column0 // group_size :])
        return cls((*stored, codebooks, per_tensor_scale, group_size), (n, k))

    def exact(self, first: int = 0) -> torch.Tensor:
        """The definition of the format in fp64, rows `first` (a multiple of 16) to n."""
        qdata, scale, codebooks, per_tensor_scale, group_size = self.stored
        n, k = self.shape
        packing, formats = (
            load("aaac_gpu_packing", "aaac_ao/packing.py"),
            load("aaac_gpu_formats", "aaac_ao/formats.py"),
        )
        codes = packing.unpack(qdata[first // 16 :], n - first, k).long()
        magnitude, selector = formats.load_scale(scale[first:])
        magnitude, selector = (t.repeat_interleave(group_size, 1)[:, :k] for t in (magnitude, selector))
        w = magnitude.double() * codebooks.double()[selector.long(), codes]
        return w if per_tensor_scale is None else w * per_tensor_scale.double()

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return self.stored[0].numel() + self.stored[1].numel() * self.stored[1].element_size()


def worst_ratio(value: torch.Tensor, exact: torch.Tensor, k: int = 0, size: torch.Tensor | None = None) -> float:
    """Largest error over one unit in the last place + k + 8 cut fp32 sums (tensor cores do not round) of `size`."""
    info = torch.finfo(value.dtype)
    bound = info.eps * (exact.abs() + info.smallest_normal)
    if size is not None:
        bound = bound + (k + 8) * 2.0**-23 * size
    return ((value.double() - exact).abs() / bound).nan_to_num(nan=math.inf).max().item()


def linear_ratio(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None, first: int = 0) -> float:
    """Error over bound of `linear`, for the columns of y from `first` on."""
    y = dispatch().linear(x, *weight.stored, bias=bias)[:, first:]
    w, x = weight.exact(first), x.double()
    exact, size = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double()[first:], size + bias.double().abs()[first:]
    return worst_ratio(y, exact, x.shape[1], size)


def environment(device: str, dry: bool) -> dict:
    """What the numbers of the other parts depend on."""
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        "device": device_name(device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count}
        result |= {"memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size}
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem", "--format=csv"]
        with contextlib.suppress(OSError):
            result["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return result


def correctness(device: str, dry: bool) -> dict:
    """Every kernel, group size and dtype against the oracle, on ragged, sliced and ordinary shapes."""
    torch.manual_seed(0)
    shapes = [(33, 200, 0, 0), (16, 64, 16, 128)]
    if not dry:
        shapes += [(1000, 1234, 0, 0), (1, 1, 0, 0), (4096, 4096, 0, 0), (528, 2000, 64, 256)]
    tokens = (1, 17) if dry else (1, 3, 8, 11, 16, 17, 32, 33, 64, 200)
    rows = []
    for (n, k, row0, column0), group_size in itertools.product(shapes, (16, 32, 64, 128)):
        weight = Weight.random(n, k, group_size, device, row0, column0)
        for dtype in DTYPES:
            w = dispatch().dequantize(*weight.stored, k, dtype)
            rows.append([f"dequantize {n}x{k} g{group_size} {dtype}", worst_ratio(w, weight.exact())])
            for m in tokens:
                x = torch.randn(m, k, device=device).to(dtype)
                bias = torch.randn(n, device=device).to(dtype) if m % 2 else None
                case = f"linear M={m} {n}x{k} g{group_size} {dtype}"
                rows.append([case, linear_ratio(weight, x, bias)])
    return checked(rows)


def large(device: str, dry: bool) -> dict:
    """Tensors with more than 2^31 elements: of y, and of the weight. Only their last rows are compared."""
    torch.manual_seed(0)
    tokens, n, k = (40, 48, 64) if dry else (2**17 + 16, 2**14 + 16, 64)
    rows = []
    weight = Weight.random(n, k, 16, device)
    x = torch.randn(tokens, k, device=device).bfloat16()
    y, w = dispatch().linear(x, *weight.stored)[-16:], weight.exact()
    x = x[-16:].double()
    rows.append([f"y {tokens}x{n}", worst_ratio(y, x @ w.T, k, x.abs() @ w.abs().T)])
    del y, w
    n, k = (64, 128) if dry else (2**20 + 16, 4224)
    weight = Weight.random(n, k, 128, device)
    x = torch.randn(2, k, device=device).bfloat16()
    rows.append([f"linear w {n}x{k}", linear_ratio(weight, x, None, first=n - 16)])
    w = dispatch().dequantize(*weight.stored, k, torch.bfloat16)[-16:]
    rows.append([f"dequantize w {n}x{k}", worst_ratio(w, weight.exact(n - 16))])
    return checked(rows)


def checked(rows: list) -> dict:
    """Summary of [case, ratio] rows; `right` is whether all are within their bounds."""
    rows = sorted(rows, key=lambda row: -row[1])
    wrong = [row for row in rows if not row[1] <= 1]
    return {"right": not wrong, "cases": len(rows), "wrong": len(wrong), "largest_error_over_bound": rows[:10]}


def measure(calls: list, device: str) -> dict:
    """Microseconds of one call: median, 20 % and 80 % quantiles over graph replays (on a CPU: over runs)."""
    for call in calls[:2]:
        call()  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = replay_times(graph)
    else:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) * 1e6)
    low, *_, high = statistics.quantiles(times, n=5)
    return {"us": statistics.median(times) / len(calls), "us_20": low / len(calls), "us_80": high / len(calls)}


def replay_times(graph: torch.cuda.CUDAGraph, seconds: float = 0.5) -> list[float]:
    """Microseconds of each of 10 to 200 replays, about `seconds` in all."""

    def once() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3

    once()
    number = min(200, max(10, int(seconds * 1e6 / once())))
    return [once() for _ in range(number)]


def timing(device: str, dry: bool, tokens: tuple[int, ...]) -> dict:
    """`linear`, and dequantising then F.linear, against bf16 F.linear."""
    torch.manual_seed(0)
    cold = 2**14 if dry else COLD_BYTES
    rows = []
    for n, k in ((48, 128),) if dry else SHAPES:
        dense = [torch.randn(n, k, device=device).bfloat16() for _ in range(1 + cold // (2 * n * k))]
        xs = {m: torch.randn(m, k, device=device).bfloat16() for m in tokens}
        base = {m: measure([lambda w=w, x=x: F.linear(x, w) for w in dense], device)["us"] for m, x in xs.items()}
        for (name, group_size), m in itertools.product(FORMATS, tokens):
            count = 1 + cold // (n * k // 2)
            weights = [Weight.random(n, k, group_size, device) for _ in range(count)]
            x = xs[m]
            time_us = measure([lambda w=w, x=x: dispatch().linear(x, *w.stored) for w in weights], device)
            row = {"format": f"{name} g{group_size}", "M": m, "N": n, "K": k, **time_us, "bf16_us": base[m]}
            row["speedup"] = base[m] / row["us"]
            row["GB_per_s"] = (weights[0].num_bytes + 2 * m * (n + k)) / row["us"] / 1e3
            calls = [
                lambda w=w, x=x: F.linear(x, dispatch().dequantize(*w.stored, x.shape[1], torch.bfloat16))
                for w in weights
            ]
            row["dequantize_linear_us"] = measure(calls, device)["us"]
            rows.append(row)
    return {"rows": rows}


def decode(device: str, dry: bool) -> dict:
    """Times with few tokens."""
    return timing(device, dry, (1,) if dry else (1, 4, 16))


def prefill(device: str, dry: bool) -> dict:
    """Times with many tokens."""
    return timing(device, dry, (33,) if dry else (128, 1024))


PARTS = {f.__name__: f for f in (environment, correctness, large, decode, prefill)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else f"{platform.machine()} CPU, Triton's interpreter"


def run_part(name: str, dry: bool, limit: float) -> dict:
    """Run one part in a fresh process: its result, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", name, "--out", str(out), *(["--dry-run"] if dry else [])]
        env = {**os.environ, "TRITON_INTERPRET": "1"} if dry else os.environ
        start = time.monotonic()
        try:
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as error:
            text = error.stderr or ""
            text = (
                text.decode(errors="replace") if isinstance(text, bytes) else text
            )  # bytes on POSIX, even with text=True
            return {"status": "timeout", "seconds": limit, "error": text[-4000:]}
        seconds = round(time.monotonic() - start, 1)
        if run.returncode or not out.exists():
            return {"status": "failed", "seconds": seconds, "code": run.returncode, "error": run.stderr[-4000:]}
        return {"status": "ok", "seconds": seconds, "result": json.loads(out.read_text())}


def show(name: str, part: dict) -> None:
    """Print one part as a few lines."""
    print(f"{name}: {part['status']}, {part['seconds']} s")
    if part["status"] != "ok":
        print("   ", part["error"][-600:].replace("\n", "\n    "))
    for row in part.get("result", {}).get("rows", []):
        shape = f"{row['format']:10} M={row['M']:<5} {row['N']}x{row['K']:<6}"
        speed = f"{row['us']:9.1f} us {row['GB_per_s']:7.0f} GB/s {row['speedup']:6.2f} x bf16"
        print(f"    {shape} {speed}  (dequantize + linear {row['dequantize_linear_us']:.1f} us)")
    if "cases" in part.get("result", {}):
        result = part["result"]
        print(f"    {result['cases']} cases, {result['wrong']} wrong; worst {result['largest_error_over_bound'][:2]}")


def main() -> int:
    """Run all parts, or with --part one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--part", choices=PARTS, help="run this part only, in this process")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; use --dry-run to walk through the parts on a CPU")
    if arguments.part:
        arguments.out.write_text(json.dumps(PARTS[arguments.part](device, arguments.dry_run)))
        return 0
    report = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    report |= {"device": device_name(device), "dry_run": arguments.dry_run, "parts": {}}
    for name, limit in LIMITS.items():
        part = report["parts"][name] = run_part(name, arguments.dry_run, limit)
        show(name, part)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    good = all(p["status"] == "ok" and p["result"].get("right", True) for p in report["parts"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
