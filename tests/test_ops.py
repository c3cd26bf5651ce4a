"""`aaac_ao::linear` and `aaac_ao::dequantize` on plain tensors, against fp64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tensor_oracle import BOTH, DTYPES, KINDS, RAGGED, assert_product, assert_rounded, sample
from torch.profiler import ProfilerActivity, profile

from aaac_ao import ops

pytestmark = pytest.mark.usefixtures("exact")

LEADING = [(), (1,), (3,), (2, 5), (0,), (2, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
@pytest.mark.parametrize(("n", "k"), RAGGED)
def test_dequantize(n, k, fmt, group_size, dtype):
    s = sample(n, k, fmt, group_size)
    w = ops.dequantize(*s.parts, group_size, k, dtype)
    assert w.dtype == dtype
    assert_rounded(w, s.dense())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
@pytest.mark.parametrize(("n", "k"), RAGGED)
def test_linear(n, k, fmt, group_size, dtype):
    s = sample(n, k, fmt, group_size)
    for leading, bias_dtype in zip(LEADING, [None, *DTYPES, torch.float32, None], strict=True):
        x = torch.randn(*leading, k, dtype=dtype)
        bias = None if bias_dtype is None else torch.randn(n, dtype=bias_dtype)
        y = ops.linear(x, *s.parts, group_size, bias)
        assert y.dtype == dtype
        assert_product(y, x, s.dense(), bias)


@pytest.mark.parametrize("act_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_act_pre_scale(dtype, act_dtype):
    """Factors and products are rounded to x's dtype, for few and for many tokens."""
    s = sample(37, 172)
    factors = (torch.rand(172) + 0.5).to(act_dtype)
    for leading in ((), (2, 3), (0,), (100,)):
        x = torch.randn(*leading, 172, dtype=dtype)
        y = ops.linear(x, *s.parts, 64, None, factors)
        assert y.dtype == dtype
        assert_product(y, (x.double() * factors.to(dtype).double()).to(dtype), s.dense())


@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
def test_negative_zero_selects_the_second_book(fmt, group_size):
    """A -0.0 scale gives zeros that carry the signs of book 1, and a wrong book would show in those signs."""
    s = sample(16, 128, fmt, group_size)
    s.scale.fill_(-0.0)
    s.books[0], s.books[1] = 1.0, -1.0
    w = ops.dequantize(*s.parts, group_size, 128, torch.float32)
    assert bool((w == 0).all())
    assert bool(w.signbit().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_code_is_noticed(dtype):
    """The tolerance of `assert_product` is tight enough to see the smallest possible damage."""
    s = sample(37, 172, zeros=False)
    s.books[:] = torch.linspace(-1, 1, 16)
    x = torch.randn(4, 172, dtype=dtype).sign()
    expected = s.dense()
    s.codes[20, 171] = (s.codes[20, 171] + 8) % 16
    y = ops.linear(x, *s.parts, 64, None)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_product(y, x, expected)


@pytest.mark.parametrize("fmt_group", BOTH)
def test_strided_operands(fmt_group):
    """Inputs that are no rows in memory, and parts that are slices of larger ones."""
    s = sample(80, 320, *fmt_group)
    group_size = s.group_size
    qdata, scale, books, pts = s.parts
    parts = (qdata[1:4, 512:2048], scale[16:64, 64 // group_size : 256 // group_size], books, pts)
    assert not parts[0].is_contiguous()
    assert not parts[1].is_contiguous()
    w = s.dense()[16:64, 64:256]
    assert_rounded(ops.dequantize(*parts, group_size, 192, torch.float32), w)
    rows = torch.tensor([47, 0, 16])
    assert_rounded(ops.dequantize_rows(rows, *parts, group_size, 192, torch.float32), w[rows])
    for x in (
        torch.randn(192, 5).t(),
        torch.randn(5, 384)[:, ::2],
        torch.randn(3, 192, 5).mT,
        torch.randn(192).expand(4, -1),
    ):
        assert_product(ops.linear(x, *parts, group_size, None), x, w)


@pytest.mark.parametrize("fmt_group", BOTH)
def test_chunks_do_not_show(monkeypatch, fmt_group):
    s, x, bias = sample(100, 300, *fmt_group), torch.randn(7, 300), torch.randn(100)
    whole = ops.linear(x, *s.parts, s.group_size, bias)
    w = ops.dequantize(*s.parts, s.group_size, 300, torch.bfloat16)
    for weights, inputs in ((1, 1), (16 * 320, 300), (32 * 320, 900), (1 << 20, 2000)):
        monkeypatch.setattr(ops, "CHUNK_WEIGHTS", weights)
        monkeypatch.setattr(ops, "CHUNK_INPUTS", inputs)
        y = ops.linear(x, *s.parts, s.group_size, bias)
        assert_product(y, x, s.dense(), bias)
        torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-4)
        assert torch.equal(ops.dequantize(*s.parts, s.group_size, 300, torch.bfloat16), w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
def test_dequantize_rows(fmt, group_size, dtype):
    s = sample(100, 130, fmt, group_size)
    for rows in (torch.randint(0, 100, (40,)), torch.tensor([99]), torch.empty(0, dtype=torch.int64)):
        assert_rounded(ops.dequantize_rows(rows, *s.parts, group_size, 130, dtype), s.dense()[rows])


# registration and autograd


@pytest.mark.parametrize("fmt_group", BOTH)
def test_opcheck(fmt_group):
    s = sample(37, 172, *fmt_group)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if s.scale.dtype == torch.float8_e4m3fn:
        checks.remove("test_schema")  # it compares the arguments before and after, which torch cannot do in float8
    for leading, dtype in (((3,), torch.float32), ((2, 3), torch.bfloat16), ((), torch.float32)):
        x = torch.randn(*leading, 172, dtype=dtype, requires_grad=True)
        bias = torch.randn(37, requires_grad=True)
        torch.library.opcheck(torch.ops.aaac_ao.linear.default, (x, *s.parts, s.group_size, bias), test_utils=checks)
    torch.library.opcheck(
        torch.ops.aaac_ao.linear.default, (x.detach(), *s.parts, s.group_size, None), test_utils=checks
    )
    for factors in (torch.rand(172), torch.rand(172, dtype=torch.bfloat16, requires_grad=True)):
        x = torch.randn(3, 172, requires_grad=True)
        arguments = (x, *s.parts, s.group_size, None, factors)
        torch.library.opcheck(torch.ops.aaac_ao.linear.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.aaac_ao.dequantize.default, (*s.parts, s.group_size, 172, torch.float16), test_utils=checks
    )


def _gradients(function, x, bias, upstream):
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = function(x, bias)
    (y * upstream).sum().backward()
    return x.grad, bias.grad


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fmt_group", BOTH)
def test_gradients(fmt_group, compiled):
    s = sample(37, 172, *fmt_group)
    parts = s.parts

    def function(x, bias):
        return ops.linear(x, *parts, s.group_size, bias)

    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    for leading in ((2, 3),) if compiled else ((), (3,), (2, 3), (0,)):
        x, bias, upstream = torch.randn(*leading, 172), torch.randn(37), torch.randn(*leading, 37)
        got = _gradients(function, x, bias, upstream)
        want = _gradients(
            lambda x, b: torch.nn.functional.linear(x, s.dense(), b), x.double(), bias.double(), upstream.double()
        )
        for grad, expected in zip(got, want, strict=True):
            assert grad.dtype == torch.float32
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_through_act_pre_scale(compiled):
    """Those of x and of the factors, each where it is asked for."""
    s = sample(37, 172)
    parts = s.parts

    def function(x, factors):
        return ops.linear(x, *parts, 64, None, factors)

    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    upstream = torch.randn(2, 3, 37)
    for of_x, of_factors in ((True, True), (True, False), (False, True)):
        x, factors = torch.randn(2, 3, 172, requires_grad=of_x), (torch.rand(172) + 0.5).requires_grad_(of_factors)
        wide = [t.detach().double().requires_grad_() for t in (x, factors)]
        (torch.nn.functional.linear(wide[0] * wide[1], s.dense()) * upstream.double()).sum().backward()
        (function(x, factors) * upstream).sum().backward()
        for tensor, exact, wanted in zip((x, factors), wide, (of_x, of_factors), strict=True):
            assert (tensor.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(tensor.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_gradient_dtypes():
    """Each operand gets a gradient of its own dtype, and a bias in fp32 one that is summed in fp32."""
    s = sample(32, 64)
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(32, requires_grad=True)
    ops.linear(x, *s.parts, 64, bias).backward(torch.full((4096, 32), 1.0078125, dtype=torch.bfloat16))
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(bias.grad, torch.full((32,), 4096 * 1.0078125), rtol=1e-6, atol=0)


def test_second_derivative():
    """The gradient of x is itself differentiable with respect to the incoming gradient, as of a dense layer."""
    s = sample(17, 80)
    x, g = torch.randn(3, 80, requires_grad=True), torch.randn(3, 17, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear(x, *s.parts, 64, None), x, g, create_graph=True)
    v = torch.randn_like(grad)
    (second,) = torch.autograd.grad((grad * v).sum(), g)
    assert_product(second, v, s.dense())


def test_weight_gets_no_gradient():
    s = sample(16, 64)
    qdata, scale, books, _ = s.parts
    books = books.requires_grad_()
    x = torch.randn(2, 64, requires_grad=True)
    ops.linear(x, qdata, scale, books, None, 64, None).sum().backward()
    assert books.grad is None
    assert x.grad is not None


def test_adapter_trains():
    """A LoRA branch next to a frozen quantised layer, behind a trained one: all trained parts receive gradients."""
    s = sample(24, 64, zeros=False)
    s.scale.mul_(0.1)
    before = torch.nn.Linear(64, 64)
    a, b = torch.nn.Parameter(torch.randn(4, 64) / 8), torch.nn.Parameter(torch.zeros(24, 4))
    x, target = torch.randn(64, 64), torch.randn(64, 24)
    optimizer = torch.optim.Adam([*before.parameters(), a, b], lr=1e-2)
    losses = []
    for _ in range(30):
        h = before(x)
        loss = (ops.linear(h, *s.parts, 64, None) + h @ a.t() @ b.t() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert bool(b.abs().sum() > 0)
    assert float(before.weight.grad.abs().sum()) > 0


# memory


def _peak_beyond(call) -> int:
    """Peak of the bytes that torch's CPU allocator handed out during a call, minus those of the result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak >= result.nbytes, "the profiler saw no allocation: this measures nothing"
    return peak - result.nbytes


@pytest.mark.parametrize(
    ("tokens", "n", "k"), [(4, 8192, 4096), (2048, 1024, 1024), (8192, 16384, 64)], ids=["decode", "prefill", "narrow"]
)
def test_memory_of_linear(tokens, n, k):
    parts = (torch.zeros(n // 16, k * 8, dtype=torch.uint8), torch.ones(n, k // 64).bfloat16(), sample(1, 64).books)
    x = torch.zeros(tokens, k, dtype=torch.bfloat16)
    assert _peak_beyond(lambda: ops.linear(x, *parts, None, 64, None)) < 40 << 20


def test_memory_of_dequantize():
    n, k = 8192, 4096
    parts = (torch.zeros(n // 16, k * 8, dtype=torch.uint8), torch.ones(n, k // 64).bfloat16(), sample(1, 64).books)
    assert _peak_beyond(lambda: ops.dequantize(*parts, None, 64, k, torch.bfloat16)) < 40 << 20


def test_resident_memory_of_linear():
    """The same bound as the operating system sees it: a dense bf16 copy alone would be 64 MB."""
    script = """
import resource, torch
from aaac_ao import ops
torch.set_num_threads(1)
def parts(n, k):
    qdata, scale = torch.zeros(n // 16, k * 8, dtype=torch.uint8), torch.ones(n, k // 64)
    return qdata, scale.bfloat16(), torch.ones(2, 16).bfloat16()
ops.linear(torch.zeros(4, 64).bfloat16(), *parts(16, 64), None, 64, None)
large, x = parts(8192, 4096), torch.ones(4, 4096).bfloat16()
large[0].fill_(17)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = ops.linear(x, *large, None, 64, None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.splitlines()[-1]) < 40 * 1024


# errors


def _arguments(**changes) -> dict:
    s = sample(37, 172)
    named = zip(("qdata", "scale", "codebooks", "per_tensor_scale"), s.parts, strict=True)
    return {**dict(named), "group_size": 64, "x": torch.randn(3, 172), "bias": None, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(3, 129 - 1)}, ValueError, "in_features 128 does not fit .* 129 to 192 features"),
        ({"x": torch.randn(3, 193)}, ValueError, "in_features 193 does not fit"),
        ({"x": torch.randint(0, 9, (3, 172))}, TypeError, "x must be float32, bfloat16 or float16, got torch.int64"),
        ({"x": torch.randn(3, 172).double()}, TypeError, "float64"),
        ({"group_size": 32}, ValueError, r"scale \[37, 3\] does not fit in_features 172 with group_size 32"),
        ({"group_size": 128}, ValueError, "group_size 128"),
        ({"group_size": 0}, ValueError, "group_size must be positive, got 0"),
        ({"scale": torch.randn(37, 3, 2).bfloat16()}, ValueError, r"scale \[37, 3, 2\] does not fit"),
        (
            {"codebooks": torch.randn(16, 2).bfloat16()},
            ValueError,
            r"codebooks must have shape \[2, 16\], got \[16, 2\]",
        ),
        ({"codebooks": torch.randn(2, 16).bfloat16().to("meta")}, ValueError, "parts on different devices: .*meta"),
        ({"scale": torch.randn(37, 3).bfloat16().to("meta")}, ValueError, "parts on different devices: .*meta"),
        ({"scale": torch.randn(16, 3).bfloat16()}, ValueError, "does not fit"),
        ({"x": torch.randn(3, 172, device="meta")}, ValueError, "x is on meta, the weight on cpu"),
        ({"bias": torch.randn(37, device="meta")}, ValueError, "bias is on meta, the weight on cpu"),
        ({"bias": torch.randn(38)}, ValueError, r"bias must have shape \[37\], got \[38\]"),
        ({"bias": torch.randn(1)}, ValueError, r"bias must have shape \[37\], got \[1\]"),
        ({"bias": torch.randn(3, 37)}, ValueError, "bias must have shape"),
        ({"act_pre_scale": torch.ones(171)}, ValueError, r"act_pre_scale must have shape \[172\], got \[171\]"),
        ({"act_pre_scale": torch.ones(1, 172)}, ValueError, r"act_pre_scale must have shape \[172\]"),
        (
            {"act_pre_scale": torch.ones(172).int()},
            TypeError,
            "act_pre_scale must be of a float dtype, got torch.int32",
        ),
        ({"act_pre_scale": torch.ones(172, device="meta")}, ValueError, "act_pre_scale is on meta, the weight on cpu"),
    ],
)
def test_linear_errors(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        ops.linear(**_arguments(**changes))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"in_features": 200}, ValueError, "in_features 200 does not fit"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32, bfloat16 or float16, got torch.int32"),
        ({"dtype": torch.float64}, TypeError, "float64"),
        ({"group_size": 16}, ValueError, "group_size 16"),
    ],
)
def test_dequantize_errors(changes, error, message):
    arguments = {"in_features": 172, "dtype": torch.float32, **_arguments()}
    del arguments["x"], arguments["bias"]
    with pytest.raises(error, match=message):
        ops.dequantize(**{**arguments, **changes})
