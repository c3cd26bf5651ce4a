"""Whether the kernels compute the right thing on the CUDA device at hand; a part of `benchmarks.gpu_all`.

    python -m benchmarks.gpu_checks numerics --json numerics.json

With --dry-run on a CPU: the kernels run in Triton's interpreter (set TRITON_INTERPRET=1), on tiny shapes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import pathlib
import sys
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F

import aaac_ao
from aaac_ao import AAACTensor
from aaac_ao.encode import annealing
from aaac_ao.encode import rounding as encoder
from aaac_ao.formats import FORMATS
from aaac_ao.generate import generate
from aaac_ao.kernels import annealing as annealing_kernel
from aaac_ao.kernels import dispatch
from aaac_ao.kernels import rounding as rounding_kernel
from benchmarks.models import build
from benchmarks.report import write_json
from benchmarks.shapes import random_weight
from benchmarks.variants import exact_rows

FORMAT_OF = {size: name for name, fmt in FORMATS.items() for size in fmt.group_sizes}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: (N, K, first row, first column): ragged shapes, and slices of larger weights.
SHAPES = [(1000, 1234, 0, 0), (1, 1, 0, 0), (4096, 4096, 0, 0), (528, 2000, 64, 256), (16, 64, 16, 128)]
TOKENS = [1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 130, 200, 300, 1000]
DRY_SHAPES, DRY_TOKENS = [(33, 200, 0, 0), (16, 64, 16, 128)], [1, 17]
#: (columns, group size) of what the encoder rounds at once, in feedback and in descent.
BLOCKS, DRY_BLOCKS = [(256, 16), (256, 64), (256, 128), (64, 16), (64, 64), (128, 128)], [(16, 16)]
ROUNDED_ROWS = 4096
#: Decode steps with CUDA graphs: warm-up, recording, replays.
STEPS = 8


class Warnings(logging.Handler):
    """Keeps what the package warns about: a kernel that does not pass its check on first use says so there."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(f"{record.name}: {record.getMessage()}")


def linear(x: torch.Tensor, weight: AAACTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`aaac_ao::linear`; on a CPU the kernels themselves, which Triton's interpreter runs."""
    parts = (weight.qdata, weight.scale, weight.codebooks, weight.per_tensor_scale, weight.group_size)
    parts = (*parts, bias, weight.act_pre_scale)
    return torch.ops.aaac_ao.linear(x, *parts) if x.is_cuda else dispatch.linear(x, *parts)


def dequantize(weight: AAACTensor, dtype: torch.dtype) -> torch.Tensor:
    """`aaac_ao::dequantize`, likewise."""
    parts = (weight.qdata, weight.scale, weight.codebooks, weight.per_tensor_scale, weight.group_size)
    run = torch.ops.aaac_ao.dequantize if weight.qdata.is_cuda else dispatch.dequantize
    return run(*parts, weight.in_features, dtype)


def over(value: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """The largest error over `bound`; infinite where the value is not a number."""
    return ((value.double() - exact).abs() / bound).nan_to_num(nan=math.inf).max().item()


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of `exact` in `dtype`."""
    info = torch.finfo(dtype)
    return info.eps * (exact.abs() + info.smallest_normal)


def linear_over(weight: AAACTensor, x: torch.Tensor, bias: torch.Tensor | None, first: int = 0) -> float:
    """Error over bound of the columns of y from `first`, a multiple of 16.

    The bound: y rounded once, fp32 sums cut at every step (as tensor cores do), and where `dispatch` rounds weights to
    x's dtype, half a unit of each of them.
    """
    y = linear(x, weight, bias)[:, first:]
    tokens, k = x.shape
    w, info = exact_rows(weight, first, weight.out_features), torch.finfo(x.dtype)
    wide = (x if weight.act_pre_scale is None else x * weight.act_pre_scale.to(x.dtype)).double()
    exact, size = wide @ w.t(), wide.abs() @ w.abs().t()
    if bias is not None:
        exact, size = exact + bias.double()[first:], size + bias.double().abs()[first:]
    bound = rounding(exact, y.dtype) + (k + 8) * 2.0**-23 * size
    if getattr(dispatch, "rounds_weights", lambda *_: False)(x.dtype, tokens, weight.group_size, x.device):
        underflow = wide.abs().sum(1, keepdim=True) * info.smallest_normal
        # a product of dense weights rounds once more, before the bias
        bound = bound + info.eps / 2 * (size + underflow) + rounding(size, y.dtype) * (tokens > 64)
    return over(y, exact, bound)


def checked(rows: list[list]) -> dict:
    """Summary of [case, error over bound]; `right` is whether there are any and all are within their bounds."""
    wrong = [row for row in rows if not row[1] <= 1]
    worst = sorted(rows, key=lambda row: -row[1])[:10]
    return {"right": bool(rows) and not wrong, "cases": len(rows), "wrong": len(wrong), "largest_over_bound": worst}


def numerics(args: argparse.Namespace) -> dict:
    """Every group size and dtype against fp64, for numbers of tokens that reach every kernel, on ragged and cut shapes.

    The first use of a kernel makes it check itself: a warning of the package is a failure too.
    """
    handler, started, rows = Warnings(), time.monotonic(), []
    logging.getLogger("aaac_ao").addHandler(handler)
    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if args.dry_run else (SHAPES, TOKENS)
    result = {}
    for (n, k, row, column), dtype, group_size in itertools.product(shapes, DTYPES, FORMAT_OF):
        weight = random_weight(row + n, column + k, FORMAT_OF[group_size], group_size, args.device)[row:, column:]
        case = f"{n}x{k} g{group_size} {dtype}"
        w = dequantize(weight, dtype)
        exact = exact_rows(weight, 0, n)
        rows.append([f"dequantize {case}", over(w, exact, rounding(exact, dtype))])
        with_factors = weight._replace(act_pre_scale=(torch.rand(k, device=args.device) + 0.5).bfloat16())
        for m in tokens:
            x = torch.randn(m, k, device=args.device).to(dtype)
            bias = torch.randn(n, device=args.device).to(dtype) if m % 2 else None
            rows.append([f"linear M={m} {case}", linear_over(weight, x, bias)])
            rows.append([f"linear M={m} {case} act_pre_scale", linear_over(with_factors, x, bias)])
        late = time.monotonic() - started > args.limit
        result = {**checked(rows), "warnings": handler.messages, "stopped_after": case if late else None}
        result["right"] = result["right"] and not handler.messages
        write_json(args.json, result)
        if late:
            break
    return result


def large(args: argparse.Namespace) -> dict:
    """Tensors with more than 2^31 elements: of y, and of the weight. Only their last rows are compared."""
    tokens, n, k = (40, 48, 64) if args.dry_run else (2**17 + 16, 2**14 + 16, 64)
    weight = random_weight(n, k, "nvfp4", 16, args.device)
    x = torch.randn(tokens, k, device=args.device).bfloat16()
    y = linear(x, weight)[-16:]
    x, w = x[-16:].double(), exact_rows(weight, 0, n)
    exact, size = x @ w.t(), x.abs() @ w.abs().t()
    bound = rounding(exact, y.dtype) + 2.0**-8 * size
    rows = [[f"y {tokens}x{n}", over(y, exact, bound)]]
    del y, w
    n, k = (64, 128) if args.dry_run else (2**20 + 16, 4224)
    weight = random_weight(n, k, "int4", 128, args.device)
    x = torch.randn(2, k, device=args.device).bfloat16()
    rows.append([f"linear w {n}x{k}", linear_over(weight, x, None, first=n - 16)])
    w, exact = dequantize(weight, torch.bfloat16)[-16:], exact_rows(weight, n - 16, n)
    rows.append([f"dequantize w {n}x{k}", over(w, exact, rounding(exact, w.dtype))])
    return checked(rows)


def graphs(args: argparse.Namespace) -> dict:
    """A captured CUDA graph gives, for new inputs, the bits that an eager call gives."""
    n, k = (48, 192) if args.dry_run else (1024, 1344)
    rows = []
    for group_size, m in itertools.product(FORMAT_OF, DRY_TOKENS if args.dry_run else (1, 4, 16, 17, 64, 65, 512)):
        weight = random_weight(n, k, FORMAT_OF[group_size], group_size, args.device)
        x = torch.randn(m, k, device=args.device).bfloat16()
        replay = captured(lambda x=x, weight=weight: linear(x, weight), x.is_cuda)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            same = torch.equal(replay(), linear(x, weight))
            rows.append([f"graph M={m} g{group_size}", 0.0 if same else math.inf])
    return checked(rows)


def captured(call, on_cuda: bool):
    """A function that replays `call` and returns its result; on a CPU `call` itself."""
    call()
    if not on_cuda:
        return call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return y

    return replay


def compiled(args: argparse.Namespace) -> dict:
    """`torch.compile(mode="reduce-overhead")`: a layer for changing M, and decoding, each in few graphs, unbroken."""
    from torch._dynamo.utils import counters

    rows = []
    for fmt, group_size in (("int4", 128), ("nvfp4", 16)):
        weight = random_weight(256, 512, fmt, group_size, args.device, torch.bfloat16)
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(lambda x, w=weight: F.linear(F.silu(x), w), mode="reduce-overhead", fullgraph=True)
        for m in DRY_TOKENS if args.dry_run else (1, 1, 1, 4, 4, 4, 40, 40, 200):
            x = torch.randn(m, 512, device=args.device).bfloat16()
            with torch.no_grad():
                y, eager = run(x).clone(), F.linear(F.silu(x), weight)
            close = 2 * rounding(eager.double(), y.dtype) + 2.0**-7 * eager.double().abs().amax()
            rows.append([f"compiled {fmt} M={m}", over(y, eager.double(), close)])
        graphs_made = counters["stats"]["unique_graphs"]
        rows.append([f"graphs for changing M, {fmt}: {graphs_made}", graphs_made / 2])  # static, then dynamic
        rows.append(decoded_in_one_graph(f"{fmt}-{group_size}", args, counters))
    return checked(rows)


def decoded_in_one_graph(form: str, args: argparse.Namespace, counters) -> list:
    """Whether a tiny model, warmed up where that is offered, decodes in one graph without breaks."""
    model = build("tiny", form, args.device)
    if hasattr(aaac_ao, "warmup") and not args.dry_run:
        aaac_ao.warmup(model, [2])
    torch._dynamo.reset()
    counters.clear()
    prompt = torch.randint(0, model.config.vocab_size, (2, 5))
    mode = None if args.dry_run else "reduce-overhead"
    generate(model, prompt, STEPS, compile_step=not args.dry_run, compile_mode=mode)
    bad = counters["stats"]["unique_graphs"] != (not args.dry_run) or bool(counters["graph_break"])
    skipped = counters["inductor"].get("cudagraph_skips", 0)
    return [f"decoding {form}: cudagraph skips {skipped}", math.inf if bad or skipped else 0.0]


def rounded_blocks(args: argparse.Namespace) -> dict:
    """The encoder's kernels leave the error that PyTorch leaves; the one of blocks the same bytes every time.

    "milliseconds" has what one block of `ROUNDED_ROWS` rows takes.
    """
    handler, device, rows, times = Warnings(), torch.device(args.device), [], {}
    logging.getLogger("aaac_ao").addHandler(handler)
    for columns, group_size in DRY_BLOCKS if args.dry_run else BLOCKS:
        case = f"rounding {columns} columns g{group_size}"
        error, expected = encoder.errors_of_both(rounding_kernel, device, columns, group_size)
        rows.append([case, over(error, expected.double(), 1e-3 * expected)])
        sizes = [group_size] * (columns // group_size)
        target = torch.randn(columns, 5 if args.dry_run else ROUNDED_ROWS, device=device)
        factor = torch.eye(columns, device=device) + torch.randn(columns, columns, device=device).triu(1) / columns
        books = torch.randn(2, 16, device=device).sort(dim=1).values
        shares = torch.linspace(0.1, 0.3, 9, device=device)[:, None, None]
        scale = torch.stack([part.abs().amax(0) for part in target.split(sizes)])
        block = (target, encoder.Metric.of_factor(factor), sizes, books, shares * scale)
        run = encoder.round_block if target.is_cuda else functools.partial(encoder.round_with, rounding_kernel)
        first, start = run(*block), time.perf_counter()
        for _ in range(3):
            again = run(*block)
        same = all(torch.equal(part, getattr(again, name)) for name, part in vars(first).items())  # waits for them
        times[case] = round((time.perf_counter() - start) / 3 * 1e3, 3)
        rows.append([f"{case} again", 0.0 if same else math.inf])
    for columns, group_size in ((40, 16),) if args.dry_run else ((64, 64), (600, 16), (1000, 128)):
        error, expected = annealing.errors_of_both(annealing_kernel.anneal, device, columns, group_size)
        rows.append(
            [f"annealing {columns} columns g{group_size}", over(error, expected.double(), 0.01 * expected.abs())]
        )
    result = {**checked(rows), "warnings": handler.messages, "milliseconds": times}
    return {**result, "right": result["right"] and not handler.messages}


PARTS = {part.__name__: part for part in (numerics, large, graphs, compiled, rounded_blocks)}


def main(argv: Iterable[str] | None = None) -> int:
    """Run one part and write its result; the status is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no more is checked")
    parser.add_argument("--json", type=pathlib.Path, help="write the result to this file")
    args = parser.parse_args(argv)
    args.device = "cpu" if args.dry_run else "cuda"
    torch.manual_seed(0)
    result = PARTS[args.part](args)
    write_json(args.json, result)
    print(result)
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
