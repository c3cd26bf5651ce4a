"""How fast weights are encoded: `python -m benchmarks.encode_speed`.

Times `aaac_ao.encode.encode` (nearest rounding, scale search on) on the linear layers of the demo model and on random
square layers, in millions of weights per second; the median of several runs. Figures of a shared machine are good for
ratios within one run only.
"""

from __future__ import annotations

import argparse
import time

import torch
from tabulate import tabulate

from aaac_ao import AAACConfig, Statistics
from aaac_ao.blocks import find_blocks
from aaac_ao.demo.compare import load_demo_model
from aaac_ao.encode import encode

CONFIGS = [
    AAACConfig(format="nvfp4"),
    AAACConfig(format="int4", group_size=64),
    AAACConfig(format="int4", group_size=128),
    AAACConfig(format="int4", group_size=64, codebooks="if4"),
    AAACConfig(format="int4", group_size=64, codebooks="int4", scale_search=False),
]


def seconds_of(weights: list[torch.Tensor], config: AAACConfig, repeats: int) -> float:
    """Median time to encode all weights with random input statistics."""
    statistics = {w.shape[1]: Statistics(torch.rand(w.shape[1]).exp(), 1) for w in weights}
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for weight in weights:
            encode(weight, config, statistics[weight.shape[1]])
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048], help="square layers to time as well")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, _ = load_demo_model()
    demo = [m.weight.data for b in find_blocks(model) for m in b.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {"demo model": demo, **{f"{n} x {n}": [torch.randn(n, n) * 0.02] for n in args.sizes}}
    rows = []
    for name, weights in inputs.items():
        count = sum(w.numel() for w in weights)
        for config in CONFIGS:
            seconds = seconds_of(weights, config, args.repeats)
            search = "search" if config.scale_search else "no search"
            setting = f"{config.format} g{config.group_size}"
            rows.append([name, f"{count / 1e6:.2f}", setting, config.codebooks, search, f"{count / seconds / 1e6:.1f}"])
    header = ["layers", "M weights", "format", "codebooks", "scales", "M weights/s"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(tabulate(rows, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
