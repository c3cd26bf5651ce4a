"""How fast layers are encoded: `python -m benchmarks.encode_speed`.

Times whole square layers with random weights and correlated random inputs, each method in turn on the same layer: our
encoder with nearest and with second-order rounding, torchao's HQQ, and torchao's GPTQ prototype (in the environment
that `make peers` builds). What depends on data alone, the Hessian, is given to all. Every method is warmed up on
a part of the layer; then ours and torchao's take turns, as a shared machine is slower at times, and the median counts.
Such figures are good for ratios within one run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tabulate import tabulate

from aaac_ao import AAACConfig, Statistics
from aaac_ao.encode import encode
from benchmarks.peer_job import WARM_UP, median_seconds
from benchmarks.peers import interpreter
from benchmarks.report import environment, write_json

HERE = Path(__file__).resolve().parent
#: Linear weights of the blocks of Llama-3-8B, for the projection.
LLAMA_8B_WEIGHTS = 6_979_321_856
#: Torchao's methods: GPTQ in every setting, HQQ in int4 with groups of 64.
GPTQ, HQQ = "torchao GPTQ", "torchao int4 HQQ"
ROUNDINGS = ("nearest", "gptq", "gptq-thorough")
SETTINGS = {"nvfp4 g16": {"format": "nvfp4"}, "int4 g64": {"group_size": 64}, "int4 g128": {"group_size": 128}}


def random_layer(size: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A weight [size, size] and the second moments of inputs with correlated channels, some of them large."""
    generator = torch.Generator(device).manual_seed(size)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    x = draw(2 * size, size // 4) @ draw(size // 4, size) / (size // 4) ** 0.5 + 0.5 * draw(2 * size, size)
    x *= (0.7 * draw(size)).exp()
    return {"weight": 0.02 * draw(size, size), "hessian": x.t() @ x / len(x)}


def our_seconds(layer: dict[str, torch.Tensor], config: AAACConfig, repeats: int) -> float:
    """Time to encode the layer, the factorisation of its Hessian included."""
    weight, hessian = layer["weight"], layer["hessian"]

    def call(weight: torch.Tensor, hessian: torch.Tensor) -> None:
        full = hessian if config.needs_hessian else None
        encoding = encode(weight, config, Statistics(hessian.diagonal().contiguous(), len(weight), full))
        float(encoding.error)  # waits for an accelerator

    call(weight[:WARM_UP, :WARM_UP], hessian[:WARM_UP, :WARM_UP])
    return median_seconds(lambda: call(weight, hessian), repeats)


def peer_seconds(layer: dict[str, torch.Tensor], repeats: int, threads: int) -> dict[str, float | str]:
    """Times of torchao's methods by name, or why there is none, from a process in the environment of the peers."""
    try:
        python = interpreter("light")
    except FileNotFoundError as error:
        return {HQQ: str(error), GPTQ: str(error)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(layer, Path(folder) / "layer.safetensors")
        command = [str(python), "-O", str(HERE / "peer_speed.py"), folder, str(repeats)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MSLK_PYTHON_ONLY": "1"}
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        result = Path(folder) / "seconds.json"
        if not result.exists():
            reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
            return {HQQ: reason, GPTQ: reason}
        return json.loads(result.read_text())


def all_seconds(
    size: int, roundings: list[str], repeats: int, turns: int, device: str, peers: bool
) -> dict[str, float | str]:
    """Times of all methods on one layer, or why there is none; thorough rounding, which takes long, has one turn."""
    layer, found = random_layer(size, device), {}
    for turn in range(turns):
        seconds: dict[str, float | str] = {
            f"AAAC {rounding}, {name}": our_seconds(layer, AAACConfig(**setting, rounding=rounding), repeats)
            for rounding in roundings
            for name, setting in SETTINGS.items()
            if turn == 0 or rounding != "gptq-thorough"
        }
        if peers:
            seconds |= peer_seconds(layer, repeats, torch.get_num_threads())
        for name, one in seconds.items():
            found.setdefault(name, []).append(one)
    reasons = {name: next((s for s in every if isinstance(s, str)), None) for name, every in found.items()}
    return {name: reasons[name] or statistics.median(every) for name, every in found.items()}


def rows_of(size: int, seconds: dict[str, float | str]) -> list[list[str]]:
    """Lines of the table for one layer."""
    lines = []
    for name, found in seconds.items():
        if isinstance(found, str):
            lines.append([f"{size} x {size}", name, f"not available: {found}", *[""] * 4])
            continue
        setting = next((s for s in SETTINGS if name.endswith(s)), "int4 g64")  # HQQ's
        against = [seconds.get(peer) for peer in (HQQ, f"{GPTQ} {setting}")]
        ratios = [f"{other / found:.1f}" if isinstance(other, float) else "" for other in against]
        projected = LLAMA_8B_WEIGHTS / size**2 * found / 60
        speed = f"{size**2 / found / 1e6:.2f}"
        lines.append([f"{size} x {size}", name, f"{found:.2f}", speed, *ratios, f"{projected:.0f}"])
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="square layers")
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    parser.add_argument("--turns", type=int, default=3, help="how often ours and torchao's take turns")
    parser.add_argument("--repeats", type=int, default=3, help="calls in a turn, of which the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="only our encoder")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    peers = args.peers and args.device == "cpu"
    header = ["layer", "method", "seconds", "M weights/s", "times HQQ", "times GPTQ", "8B, minutes"]
    lines = []
    for size in args.sizes:
        repeats = args.repeats if size < 4096 else 1
        lines += rows_of(size, all_seconds(size, args.roundings, repeats, args.turns, args.device, peers))
        rows = [dict(zip(header, line, strict=True)) for line in lines]
        write_json(args.json, {"environment": environment(args.device), "rows": rows})
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads\n")
    print(tabulate(lines, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
