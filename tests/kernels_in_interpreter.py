"""Run the kernels in Triton's interpreter on CPU tensors and print, as JSON, how far they are from an fp64 oracle.

    TRITON_INTERPRET=1 python tests/kernels_in_interpreter.py PART SEED

PART is "portable" or "assembly"; in the second, the fast lookups run too, in the PTX machine of `ptx.py`. A process of
its own, because Triton decides when a kernel is defined whether it is interpreted. Each result is
{"kind", "case", "ratio"}: the largest error over its bound. A right kernel has ratios up to 1; the results of the
kinds that start with "broken" come from a damaged weight and must be above 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass

import gluon_stand_in
import ptx
import torch
import triton.language as tl

from aaac_ao.formats import load_scale
from aaac_ao.kernels import blocks, dispatch, fused, launch, table, verify
from aaac_ao.packing import pack, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_SIZES = (16, 32, 64, 128)
TOKENS = ((0, 0), (1, 1), (2, 8), (9, 16), (17, 32), (33, 64), (65, 130))
SHAPES = ((33, 200), (16, 64), (1, 1), (50, 130), (19, 300), (64, 512), (70, 47), (32, 192), (40, 600))
VIEWS = ("whole", "rows", "columns", "both")
#: Books in which the other entry of a code, and that of the code plus or minus 8, is far away.
WIDE_BOOKS = torch.stack([torch.linspace(-1, 1, 16), torch.linspace(2, 1, 16)])


@dataclass
class Weight:
    """A stored weight, perhaps a view into a larger one, and its exact value.

    Attributes:
        qdata: packed codes.
        scale: signed scales.
        codebooks: bf16 [2, 16].
        per_tensor_scale: fp32 0-D, or None.
        group_size: weights per scale.
        exact: the weight in fp64, [N, K].
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    codebooks: torch.Tensor
    per_tensor_scale: torch.Tensor | None
    group_size: int
    exact: torch.Tensor

    @property
    def stored(self) -> tuple:
        """The arguments that `dispatch.linear` takes after x."""
        return self.qdata, self.scale, self.codebooks, self.per_tensor_scale, self.group_size


def random_scale(n: int, groups: int, group_size: int) -> torch.Tensor:
    """Scales of both signs with zeros of both signs; E4M3 of every bit pattern but the two NaNs."""
    if group_size == 16:
        bits = torch.randint(0, 254, (n, groups))
        return torch.where(bits < 127, bits, bits + 1).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.randn(n, groups) * 2.0 ** torch.randint(-4, 1, (n, groups))
    zero = torch.rand(n, groups) < 0.1
    return torch.where(zero, torch.zeros_like(scale).copysign(scale), scale).bfloat16()


def scale_dtype(group_size: int) -> torch.dtype:
    return torch.float8_e4m3fn if group_size == 16 else torch.bfloat16


def exact_weight(qdata, scale, codebooks, per_tensor_scale, group_size: int, k: int) -> torch.Tensor:
    """The definition of the format in fp64."""
    codes = unpack(qdata, scale.shape[0], k).long()
    magnitude, selector = load_scale(scale)
    magnitude, selector = (t.repeat_interleave(group_size, dim=1)[:, :k] for t in (magnitude, selector))
    w = magnitude.double() * codebooks.double()[selector.long(), codes]
    return w if per_tensor_scale is None else w * per_tensor_scale.double()


def random_weight(n: int, k: int, group_size: int, view: str) -> Weight:
    """A random [n, k] weight; `view` says in which direction it is a slice of a larger one."""
    above = 32 if view in ("rows", "both") else 0
    left = math.lcm(64, group_size) if view in ("columns", "both") else 0
    below, right = (16 if above else 0), (128 if left else 0)
    # a slice ends at the end of a tile or of the whole weight, so a ragged one has nothing behind it
    below, right = below * (n % 16 == 0), right * (k % 128 == 0)
    big_n, big_k = above + n + below, left + k + right
    qdata = pack(torch.randint(0, 16, (big_n, big_k), dtype=torch.uint8))
    scale = random_scale(big_n, -(-big_k // group_size), group_size)
    codebooks = torch.randn(2, 16).bfloat16()
    per_tensor_scale = torch.tensor(0.0123) if group_size == 16 else None
    exact = exact_weight(qdata, scale, codebooks, per_tensor_scale, group_size, big_k)
    tiles = slice(above // 16, above // 16 - (-n // 16)), slice(left * 8, left * 8 - (-k // 64) * 512)
    groups = slice(above, above + n), slice(left // group_size, left // group_size - (-k // group_size))
    exact = exact[above : above + n, left : left + k]
    return Weight(qdata[tiles], scale[groups], codebooks, per_tensor_scale, group_size, exact)


def random_x(m: int, k: int, dtype: torch.dtype, layout: int) -> torch.Tensor:
    """Return x [m, k]: contiguous, a column slice, or transposed."""
    if layout == 0:
        return torch.randn(m, k).to(dtype)
    return torch.randn(m, k + 8).to(dtype)[:, 8:] if layout == 1 else torch.randn(k, m).to(dtype).T


def random_act(k: int, index: int) -> torch.Tensor | None:
    """Factors of x of one float dtype after the other, at addresses that are no multiples of 16 bytes, or none."""
    dtype = (None, torch.float32, None, torch.bfloat16, torch.float16)[index % 5]
    return None if dtype is None else torch.randn(k + 3).to(dtype)[3:]


def times(x: torch.Tensor, act: torch.Tensor | None) -> torch.Tensor:
    """What the kernels multiply weights with, fp64: the factors and then the products rounded to x's dtype."""
    return (x if act is None else (x.double() * act.to(x.dtype).double()).to(x.dtype)).double()


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of `dtype`, subnormals included: the interpreter cuts fp32 to bf16, it rounds not."""
    info = torch.finfo(dtype)
    return info.eps * (exact.abs() + info.smallest_normal)


def multiplied_weight(weight: Weight, dtype: torch.dtype, tokens: int) -> torch.Tensor:
    """The weight that `linear` multiplies x with, in fp64: exact, or rounded to x's dtype where that is documented.

    Few tokens: |scale| * entry is rounded, in fp16 with scale and entry in fp16 and the entry in units of the power of
    two below the largest. Many tokens: the whole weight is, as `dequantize` does.
    """
    if not dispatch.rounds_weights(dtype, tokens, weight.group_size, weight.qdata.device):
        return weight.exact
    if tokens > table.Limits().fused_tokens:
        return weight.exact.to(dtype).double()
    unit = 1.0 if weight.per_tensor_scale is None else weight.per_tensor_scale.double()
    if dtype == torch.float16:
        unit = unit * 2.0 ** weight.codebooks.double().abs().max().log2().floor()
    return (weight.exact / unit).to(dtype).double() * unit


def linear_ratio(
    weight: Weight, x: torch.Tensor, bias: torch.Tensor | None, act: torch.Tensor | None = None, damage: float = 1.0
) -> float:
    """Error of `dispatch.linear` over: rounding of y's dtype + K + 8 fp32 roundings of the sum of magnitudes.

    The kernel gets the factor of column 8 times `damage`.
    """
    given = act if damage == 1 else torch.where(torch.arange(len(act)) == 8, act * damage, act)
    y = dispatch.linear(x, *weight.stored, bias=bias, act_pre_scale=given)
    w, tokens, wide = multiplied_weight(weight, x.dtype, len(x)), len(x), times(x, act)
    exact = wide @ w.T
    size = wide.abs() @ w.abs().T
    before_bias = rounding(exact, x.dtype) if tokens > table.Limits().fused_tokens else 0.0
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert (y.shape, y.dtype, y.is_contiguous()) == (exact.shape, x.dtype, True)
    bound = rounding(exact, x.dtype) + (x.shape[1] + 8) * 2.0**-24 * size + before_bias
    return ratio(y, exact, bound)


def dequantize_ratio(weight: Weight, dtype: torch.dtype) -> float:
    """Error of `dispatch.dequantize` over the rounding of `dtype`; fp32 without per_tensor_scale must be exact."""
    w = dispatch.dequantize(*weight.stored, weight.exact.shape[1], dtype)
    assert (w.shape, w.dtype, w.is_contiguous()) == (weight.exact.shape, dtype, True)
    if dtype == torch.float32 and weight.per_tensor_scale is None:
        return 0.0 if torch.equal(w.double(), weight.exact) else math.inf
    return ratio(w, weight.exact, rounding(weight.exact, dtype))


def ratio(value: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> float:
    """Largest error over its bound; a NaN counts as infinite."""
    worst = ((value.double() - exact).abs() / bound).nan_to_num(nan=math.inf)
    return worst.max().item() if worst.numel() else 0.0


def linear_results():
    shapes, views, layouts = itertools.cycle(SHAPES), itertools.cycle(VIEWS + VIEWS[:3]), itertools.cycle(range(3))
    for index, (group_size, (low, high), dtype) in enumerate(itertools.product(GROUP_SIZES, TOKENS, DTYPES)):
        (n, k), view, layout, m = next(shapes), next(views), next(layouts), random.randint(low, high)
        weight, x = random_weight(n, k, group_size, view), random_x(m, k, dtype, layout)
        bias, act = torch.randn(n).to(dtype) if index % 2 else None, random_act(k, index)
        case = f"M={m} N={n} K={k} G={group_size} {dtype} {view} x{layout} bias={bias is not None} {act_name(act)}"
        yield {"kind": f"linear G={group_size}", "case": case, "ratio": linear_ratio(weight, x, bias, act)}


def act_results():
    """Factors of x in every dtype, in every kernel."""
    sizes, dtypes = itertools.cycle(((33, 300), (17, 130), (20, 1400))), itertools.cycle((1, 3, 4, 3))
    for group_size, m, dtype in itertools.product((16, 64, 128), (3, 12, 40, 70), DTYPES):
        n, k = next(sizes)
        weight, x, act = random_weight(n, k, group_size, "whole"), random_x(m, k, dtype, 0), random_act(k, next(dtypes))
        case = f"M={m} N={n} K={k} G={group_size} {dtype} {act_name(act)}"
        yield {"kind": "act_pre_scale", "case": case, "ratio": linear_ratio(weight, x, None, act)}
        x, act = x.abs(), act.abs()  # no sign, so that nothing cancels what column 8 adds
        x[:, 8], act[8] = 8, 4
        weight.codebooks.abs_(), weight.scale.fill_(1)
        weight.exact = exact_weight(*weight.stored, k)
        yield {"kind": "broken act_pre_scale", "case": case, "ratio": linear_ratio(weight, x, None, act, 1.5)}


def act_name(act: torch.Tensor | None) -> str:
    return "" if act is None else f"act {act.dtype}"


def split_results():
    """K long enough to be split; the last range of the second is short, that of the third empty."""
    for (n, k), group_size, dtype in itertools.product(((20, 1024), (20, 1400), (16, 2330)), (16, 128), DTYPES):
        weight, x = random_weight(n, k, group_size, "whole"), random_x(3, k, dtype, 0)
        splits = table.choose_splits(launch.ceil_div(n, 16), k // 256, 128)
        assert splits > 1
        case = f"M=3 N={n} K={k} G={group_size} {dtype} splits={splits}"
        act = random_act(k, n + group_size // 64)
        yield {"kind": "split K", "case": case, "ratio": linear_ratio(weight, x, torch.randn(n).to(dtype), act)}


def rounding_results():
    """The documented rounding is the only one: half a unit in the last place of every weight."""
    for group_size, m, dtype in itertools.product((16, 64), (2, 40, 70), DTYPES[:2]):
        weight, x = random_weight(40, 300, group_size, "whole"), random_x(m, 300, dtype, 0)
        y, exact = dispatch.linear(x, *weight.stored).double(), x.double() @ weight.exact.T
        size = x.double().abs() @ weight.exact.abs().T
        bound = rounding(exact, dtype) + (torch.finfo(dtype).eps / 2 + 308 * 2.0**-24) * size + 1e-6
        yield {"kind": "rounding", "case": f"M={m} G={group_size} {dtype}", "ratio": ratio(y, exact, bound)}


def dequantize_results():
    views = itertools.cycle(VIEWS)
    for group_size, (n, k), dtype in itertools.product(GROUP_SIZES, SHAPES[:6], DTYPES):
        view = next(views)
        case = f"N={n} K={k} G={group_size} {dtype} {view}"
        weight = random_weight(n, k, group_size, view)
        yield {"kind": f"dequantize G={group_size}", "case": case, "ratio": dequantize_ratio(weight, dtype)}


def flip_scale(weight: Weight) -> None:
    """Move the first group of row 17 to the other codebook."""
    bits = weight.scale.view(launch.BITS[weight.scale.dtype])
    bits[17, 0] ^= -(2**15) if bits.dtype == torch.int16 else 2**7


def flip_code(weight: Weight) -> None:
    """Change the code of row 17, column 8: the first byte of lane 5 in the second tile row."""
    weight.qdata[1, 5 * 16] ^= 8


def damaged_weight(group_size: int, damage) -> Weight:
    """A weight that was damaged after its exact value was noted."""
    weight = random_weight(33, 200, group_size, "whole")
    weight.scale[17] = 1.5  # the damaged row is made of groups of one size
    weight.codebooks.copy_(WIDE_BOOKS)
    weight.exact = exact_weight(*weight.stored, 200)
    damage(weight)
    return weight


def broken_results():
    """The same checks on damaged weights."""
    for group_size, dtype, damage in itertools.product(GROUP_SIZES, DTYPES, (flip_scale, flip_code)):
        weight = damaged_weight(group_size, damage)
        x = torch.rand(2, 200).to(dtype)  # no sign, so that the damages of a group cannot cancel
        x[:, 8] = 8  # one code out of 200 must show through the rounding of y
        for kind, worst in (("linear", linear_ratio(weight, x, None)), ("dequantize", dequantize_ratio(weight, dtype))):
            yield {"kind": f"broken {kind}", "case": f"{damage.__name__} G={group_size} {dtype}", "ratio": worst}


def special_results():
    """Zeros of both signs, an infinite token, and x as large as fp32 goes."""
    for group_size in GROUP_SIZES:
        weight = random_weight(20, 150, group_size, "whole")
        weight.scale.view(launch.BITS[weight.scale.dtype])[::2] = 0
        weight.scale[1::2] = -0.0
        zero = dispatch.linear(torch.randn(3, 150), *weight.stored)
        yield {"kind": "special", "case": f"zero scales G={group_size}", "ratio": 2.0 * zero.abs().max().item()}
    weight = random_weight(16, 128, 128, "whole")
    weight.scale.fill_(2.0**-9), weight.codebooks.fill_(1.0)
    for dtype in DTYPES:
        x = torch.zeros(2, 128, dtype=dtype)
        x[0, 0], x[1, 5] = math.inf, torch.finfo(dtype).max
        y = dispatch.linear(x, *weight.stored)
        good = bool((y[0] == math.inf).all()) and torch.equal(y[1], (x[1, 5] * 2.0**-9).expand(16))
        yield {"kind": "special", "case": f"infinity and largest x {dtype}", "ratio": 0.0 if good else math.inf}


def far_results(folder: str):
    """Rows of codes and of scales that start more than 2^31 bytes apart, in files with holes."""
    codes = torch.from_file(f"{folder}/codes", shared=True, size=9 * 2**28, dtype=torch.uint8)
    scales = torch.from_file(f"{folder}/scales", shared=True, size=3 * 2**30, dtype=torch.uint8)
    for m, dtype in ((2, torch.bfloat16), (2, torch.float32), (70, torch.float16)):
        weight = random_weight(130, 200, 16, "whole")
        far = codes.as_strided(weight.qdata.shape, (2**28, 1)).copy_(weight.qdata)
        case = f"codes M={m} {dtype}"
        far_weight = dataclasses.replace(weight, qdata=far)
        yield {"kind": "far", "case": case, "ratio": linear_ratio(far_weight, random_x(m, 200, dtype, 0), None)}
        yield {"kind": "far", "case": f"dequantize {case}", "ratio": dequantize_ratio(far_weight, dtype)}
        weight = random_weight(3, 200, 16, "whole")
        far = scales.as_strided(weight.scale.shape, (2**30, 1)).copy_(weight.scale.view(torch.uint8))
        far_weight = dataclasses.replace(weight, scale=far.view(weight.scale.dtype))
        case = f"scales M={m} {dtype}"
        yield {"kind": "far", "case": case, "ratio": linear_ratio(far_weight, random_x(m, 200, dtype, 0), None)}
        yield {"kind": "far", "case": f"dequantize {case}", "ratio": dequantize_ratio(far_weight, dtype)}


def fast_results():
    """The kernels with their assembly, against the oracle and bit for bit against the portable twin."""
    tl.inline_asm_elementwise = ptx.inline_asm_elementwise
    portable, fast = (lambda *_: False), (lambda *_: True)
    shapes, views = itertools.cycle(((33, 300), (50, 600), (17, 130))), itertools.cycle(VIEWS)
    for index, (group_size, (low, high), dtype) in enumerate(itertools.product(GROUP_SIZES, TOKENS[2:6], DTYPES[:2])):
        (n, k), view, m = next(shapes), next(views), random.randint(low, high)
        weight, x, bias = random_weight(n, k, group_size, view), random_x(m, k, dtype, 0), torch.randn(n).to(dtype)
        act = random_act(k, index)
        verify.fast_is_right = portable
        twin = dispatch.linear(x, *weight.stored, bias=bias, act_pre_scale=act)
        verify.fast_is_right = fast
        case = f"M={m} N={n} K={k} G={group_size} {dtype} {view} {act_name(act)}"
        equal = torch.equal(dispatch.linear(x, *weight.stored, bias=bias, act_pre_scale=act), twin)
        yield {"kind": "assembly is the twin", "case": case, "ratio": 0.0 if equal else math.inf}
        yield {"kind": "assembly", "case": case, "ratio": linear_ratio(weight, x, bias, act)}
    for group_size, m, words in itertools.product(GROUP_SIZES, (5, 40), (True, False)):
        shape = (m, 37, 64 * 4 * 2 + 80)
        layer = (
            *verify.problem(torch.device("cpu"), DTYPES[0], scale_dtype(group_size), group_size, shape, words),
            None,
        )
        assert launch.in_words(layer[2]) == words
        verify.fast_is_right = portable
        twin = dispatch.linear(*layer, group_size)
        verify.fast_is_right = fast
        y = dispatch.linear(*layer, group_size)
        case = f"M={m} G={group_size} words={words}"
        yield {"kind": "assembly is the twin", "case": case, "ratio": 0.0 if torch.equal(y, twin) else math.inf}
        # the order of columns for other versions of Triton; sums in another order may round to a neighbour
        usual, fused.OPERAND_WIDTH = fused.OPERAND_WIDTH, tl.constexpr(6 - fused.OPERAND_WIDTH.value)
        other = dispatch.linear(*layer, group_size)
        fused.OPERAND_WIDTH = usual
        difference = ((other - twin).abs().amax(0) / twin.abs().amax(0)).max().item()
        yield {"kind": "other order", "case": case, "ratio": difference / torch.finfo(DTYPES[0]).eps}
    for group_size, damage in itertools.product((16, 64), (flip_scale, flip_code)):
        weight = damaged_weight(group_size, damage)
        x = torch.rand(2, 200).bfloat16()
        x[:, 8] = 8
        case = f"{damage.__name__} G={group_size}"
        yield {"kind": "broken assembly", "case": case, "ratio": linear_ratio(weight, x, None)}


def far_in_temporary_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield from far_results(folder)


def pair_results():
    """The kernel with the pair table and its assembly, on a stand-in for Gluon, against the portable twin."""
    with tempfile.TemporaryDirectory() as folder:
        launch.pairs = gluon_stand_in.load_pairs(folder)
    for index, (group_size, m) in enumerate(itertools.product((16, 64, 128), (3, 11))):
        dtype = DTYPES[index % 2]
        n, k = random.choice(((130, 512), (261, 768), (40, 1024)))
        problem = verify.problem(torch.device("cpu"), dtype, scale_dtype(group_size), group_size, (m, n, k))
        problem[0][:, 8] = 8  # one code must show through the rounding of y
        problem[3].copy_(WIDE_BOOKS)
        per_tensor_scale = torch.tensor(0.7) if group_size == 16 else None
        if (act := random_act(k, index)) is not None:
            act[8] = 1
        layer = (*problem, per_tensor_scale, group_size, torch.randn(n).to(dtype), act)
        twin = launch.launch_fused(*layer, blocks.block_for(m), asm=False)
        y = launch.launch_pairs(*layer)
        difference = ((y - twin).abs().amax(0) / twin.abs().amax(0)).max().item()
        case = f"M={m} N={n} K={k} G={group_size} {dtype} {act_name(act)}"
        # another order of fp32 sums may round y to its neighbour
        yield {"kind": "pair table", "case": case, "ratio": difference / torch.finfo(dtype).eps}
        problem[1][n // 16, 5 * 16] ^= 8
        difference = ((launch.launch_pairs(*layer) - twin).abs().amax(0) / twin.abs().amax(0)).max().item()
        yield {"kind": "broken pair table", "case": case, "ratio": difference / torch.finfo(dtype).eps}


PARTS = {
    "portable": (
        far_in_temporary_folder,
        linear_results,
        act_results,
        split_results,
        rounding_results,
        dequantize_results,
        special_results,
        broken_results,
    ),
    "assembly": (fast_results, pair_results),
}

if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2])), random.seed(int(sys.argv[2]))
    torch.set_num_threads(1)
    json.dump([result for part in PARTS[sys.argv[1]] for result in part()], sys.stdout, allow_nan=True)
