"""The compiled CPU kernel on every instruction set of this machine, against fp64 and against itself."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tensor_oracle import DTYPES, KINDS, assert_product, assert_rounded, sample
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from aaac_ao import cpu_mode, ops
from aaac_ao.kernels import cpu
from aaac_ao.kernels.cpu import library

ROOT = Path(__file__).resolve().parents[1]
ISAS = cpu.isas()
#: All kinds that the kernel takes, those that are never stored included.
ALL_KINDS = [*KINDS, ("int4", 16), ("int4", 192), ("nvfp4", 32), ("nvfp4", 64), ("nvfp4", 128)]
SHAPES = [(37, 172), (100, 130), (16, 64), (17, 300), (1, 700)]
#: Largest relative error of a whole product.
BOUNDS = {"exact": 2e-6, "int16": 1e-3, "int8": 1.5e-2}


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected).norm() / expected.norm())


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each path in turn, also for the ops."""
    monkeypatch.setattr(cpu, "best_isa", lambda: request.param)
    return request.param


@pytest.fixture
def threads():
    """The number of threads of torch may be changed in the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# numbers


@pytest.mark.parametrize(("fmt", "group_size"), ALL_KINDS)
def test_exact(isa, fmt, group_size):
    for n, k in SHAPES:
        s = sample(n, k, fmt, group_size)
        for tokens, dtype in ((1, torch.float32), (2, torch.bfloat16), (5, torch.float32), (33, torch.bfloat16)):
            x, bias = torch.randn(tokens, k, dtype=dtype), torch.randn(n)
            assert_product(cpu.linear(x, *s.parts, group_size, bias, "exact"), x, s.dense(), bias)


@pytest.mark.parametrize("mode", cpu.MODES)
@pytest.mark.parametrize(("fmt", "group_size"), ALL_KINDS)
def test_error_of_a_product(isa, fmt, group_size, mode):
    for n, k in SHAPES:
        for tokens in (64, 33):
            products = []
            for _ in range(max(1, 16 // n)):  # the bound is about many rows
                s, x = sample(n, k, fmt, group_size), torch.randn(tokens, k)
                products.append((cpu.linear(x, *s.parts, group_size, None, mode), x.double() @ s.dense().t()))
            y, expected = (torch.cat(part) for part in zip(*products, strict=True))
            assert relative_error(y, expected) < BOUNDS[mode]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", cpu.MODES)
def test_the_op(isa, kind, mode, dtype):
    """Dtypes, leading dimensions and biases through `aaac_ao::linear`."""
    s = sample(100, 300, *kind)
    for leading, bias_dtype in (((), None), ((1,), dtype), ((2, 3), torch.float32), ((2, 0), None), ((100,), dtype)):
        x = torch.randn(*leading, 300, dtype=dtype)
        bias = None if bias_dtype is None else torch.randn(100, dtype=bias_dtype)
        with cpu_mode(mode):
            y = ops.linear(x, *s.parts, s.group_size, bias)
        expected = x.double() @ s.dense().t() + (0 if bias is None else bias.double())
        assert y.dtype == dtype
        assert y.numel() == 0 or relative_error(y, expected) < BOUNDS[mode] + torch.finfo(dtype).eps


def test_int16_is_closer_than_bf16_inputs(isa, kind):
    """Also where a few input channels are a hundred or a thousand times as large as the others."""
    s = sample(256, 512, *kind)
    for outliers in (1.0, 100.0, 1000.0):
        x = torch.randn(16, 512)
        x[:, torch.randperm(512)[:5]] *= outliers
        expected = x.double() @ s.dense().t()
        bf16 = relative_error(x.bfloat16().double() @ s.dense().t(), expected)
        assert relative_error(cpu.linear(x, *s.parts, s.group_size), expected) < bf16 / 3


def test_default_mode_is_int16(kind):
    s, x = sample(64, 256, *kind), torch.randn(3, 256)
    y = ops.linear(x, *s.parts, s.group_size, None)
    assert torch.equal(y, cpu.linear(x, *s.parts, s.group_size, None, "int16"))
    if cpu.best_isa() != "plain":
        assert not torch.equal(y, cpu.linear(x, *s.parts, s.group_size, None, "exact"))


@pytest.mark.parametrize("mode", cpu.MODES)
def test_tokens_do_not_see_each_other(isa, kind, mode):
    s, x = sample(40, 200, *kind), torch.randn(70, 200)
    together = cpu.linear(x, *s.parts, s.group_size, None, mode)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 10), slice(11, 15), slice(20, 25), slice(30, 69)):
        assert torch.equal(cpu.linear(x[rows], *s.parts, s.group_size, None, mode), together[rows])


@pytest.mark.parametrize("mode", cpu.MODES)
def test_inputs_larger_than_a_cache(isa, kind, mode):
    """They are worked on in blocks of fewer tokens."""
    s, x = sample(20, 16400, *kind), torch.randn(41, 16400)
    y = cpu.linear(x, *s.parts, s.group_size, None, mode)
    assert relative_error(y, x.double() @ s.dense().t()) < BOUNDS[mode]
    for token in (0, 9, 10, 25, 40):
        assert torch.equal(cpu.linear(x[token], *s.parts, s.group_size, None, mode), y[token])


@pytest.mark.parametrize("mode", cpu.MODES)
def test_values_that_integers_cannot_hold(isa, kind, mode):
    """Infinities and NaN come out where fp32 gives them; tiny and huge inputs keep their relative error."""
    s = sample(48, 256, *kind, zeros=False)
    x = torch.randn(9, 256)
    x[1, 7], x[2, 200], x[3, 100], x[3, 101] = float("inf"), float("nan"), float("inf"), -float("inf")
    x[4], x[5], x[6], x[7] = 0, x[5] * 1e-39, x[6] * 1e-30, x[7] * 1e35
    expected = F.linear(x, s.dense().float())
    y = cpu.linear(x, *s.parts, s.group_size, None, mode)
    finite = expected.isfinite()
    assert torch.equal(y[~finite].nan_to_num(nan=7.0), expected[~finite].nan_to_num(nan=7.0))
    assert bool(y[finite].isfinite().all())
    for row in (0, 5, 6, 7, 8):
        assert relative_error(y[row], x[row].double() @ s.dense().t()) < (1e-2 if row == 5 else 0) + 2 * BOUNDS[mode], (
            row
        )
    assert bool((y[4] == 0).all())


@pytest.mark.parametrize("mode", cpu.MODES)
def test_unloaded_weights_give_nan(isa, kind, mode):
    """NaN books mark a weight that nothing was loaded into."""
    s = sample(16, 128, *kind, zeros=False)
    s.books.fill_(float("nan"))
    assert bool(cpu.linear(torch.randn(2, 128), *s.parts, s.group_size, None, mode).isnan().all())


def test_books_of_zeros(isa, kind):
    s = sample(16, 128, *kind)
    s.books.zero_()
    assert bool((cpu.linear(torch.randn(2, 128), *s.parts, s.group_size) == 0).all())


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_every_e4m3_scale(isa, group_size):
    """All 256 codes: subnormals, both zeros, both NaN; also while torch flushes fp32 denormals."""
    s = sample(64, 4 * group_size, "nvfp4", group_size)
    s.scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(64, 4)
    expected = s.dense()
    bad = expected.isnan()
    assert int(bad.sum()) == 2 * group_size
    torch.set_flush_denormal(True)
    w = cpu.dequantize(*s.parts, group_size, 4 * group_size)
    x = torch.randn(3, 4 * group_size)
    y = cpu.linear(x, *s.parts, group_size)
    torch.set_flush_denormal(False)
    assert torch.equal(w.isnan(), bad)
    assert_rounded(w[~bad], expected[~bad])
    rows = ~bad.any(1)
    assert bool(y[:, ~rows].isnan().all())
    assert relative_error(y[:, rows], x.double() @ expected[rows].t()) < BOUNDS["int16"]


@pytest.mark.parametrize(("fmt", "group_size"), ALL_KINDS)
def test_dequantize(isa, fmt, group_size):
    for n, k in SHAPES:
        s = sample(n, k, fmt, group_size)
        w = cpu.dequantize(*s.parts, group_size, k)
        assert_rounded(w, s.dense())
        out = torch.full((n, k), torch.nan)
        assert cpu.dequantize(*s.parts, group_size, k, out=out) is out
        assert torch.equal(out, w)


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(37, 173),
        torch.empty(37, 172).bfloat16(),
        torch.empty(172, 37).t(),
        torch.empty(37, 172, device="meta"),
    ],
)
def test_wrong_place_for_weights(out):
    s = sample(37, 172)
    with pytest.raises(ValueError, match=r"out must be fp32 \[37, 172\], contiguous, on the CPU"):
        cpu.dequantize(*s.parts, s.group_size, 172, out=out)


def test_strided_parts(isa, kind):
    s = sample(80, 320, *kind)
    qdata, scale, books, pts = s.parts
    group_size = s.group_size
    parts = (qdata[1:4, 512:2048], scale[16:64, 64 // group_size : 256 // group_size], books, pts)
    w = s.dense()[16:64, 64:256]
    assert_rounded(cpu.dequantize(*parts, group_size, 192), w)
    for x in (
        torch.randn(192, 5).t(),
        torch.randn(5, 384)[:, ::2],
        torch.randn(5, 200)[:, 3:195],
        torch.randn(1, 192).expand(4, -1),
    ):
        assert_product(cpu.linear(x, *parts, group_size, torch.zeros(96)[::2], "exact"), x, w)
    odd = torch.zeros(48 * scale[:, : 192 // group_size].shape[1] * scale.element_size() + 1, dtype=torch.uint8)
    unaligned = odd[1:].view(torch.uint8)
    unaligned.copy_(parts[1].contiguous().view(torch.uint8).flatten())
    if scale.element_size() == 1:
        parts = (parts[0], unaligned.view(scale.dtype).view(48, -1), books, pts)
        assert_rounded(cpu.dequantize(*parts, group_size, 192), w)


# threads, processes, graphs


@pytest.mark.parametrize("mode", cpu.MODES)
def test_bits_do_not_depend_on_threads(isa, kind, mode, threads):
    s = sample(300, 520, *kind)
    for tokens in (1, 40):
        x = torch.randn(tokens, 520)
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [cpu.linear(x, *s.parts, s.group_size, None, mode) for _ in range(5)]
        assert all(torch.equal(result, results[0]) for result in results)


def test_many_python_threads(kind, threads):
    """One weight, eight callers at once, each with inputs and a mode of its own."""
    torch.set_num_threads(2)
    s = sample(256, 512, *kind)
    cases = [(torch.randn(1 + i % 3, 512), cpu.MODES[i % 3]) for i in range(8)]
    expected = [cpu.linear(x, *s.parts, s.group_size, None, mode) for x, mode in cases]
    start = threading.Barrier(8)

    def call(i):
        x, mode = cases[i]
        start.wait()
        with cpu_mode(mode):
            return all(torch.equal(ops.linear(x, *s.parts, s.group_size, None), expected[i]) for _ in range(100))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8)))


def test_forked_child():
    """A child has none of its parent's worker threads."""
    script = """
import os, torch
from aaac_ao.kernels import cpu
torch.set_num_threads(3)
scale, books = torch.ones(256, 4).bfloat16(), torch.randn(2, 16).bfloat16()
parts = torch.randint(0, 256, (16, 2048), dtype=torch.uint8), scale, books
x = torch.randn(2, 256)
y = cpu.linear(x, *parts, None, 64)
child = os.fork()
if child == 0:
    same = all(cpu.linear(x, *parts, None, 64).numpy().tobytes() == y.numpy().tobytes() for _ in range(20))
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(cpu.linear(x, *parts, None, 64), y)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]


def test_compiled_and_exported(kind):
    """A graph follows the mode of its caller without being compiled anew."""
    torch._dynamo.reset()
    s = sample(48, 128, *kind)
    layer = torch.nn.Linear(128, 48)
    layer.weight = torch.nn.Parameter(s.tensor(), requires_grad=False)
    x = torch.randn(3, 128)
    with torch.no_grad():
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        program = torch.export.export(layer, (x,)).module()
        for mode in cpu.MODES:
            with cpu_mode(mode):
                eager = layer(x)
                assert torch.equal(compiled(x), eager)
                assert torch.equal(program(x), eager)
                assert torch.equal(eager, cpu.linear(x, *s.parts, s.group_size, layer.bias, mode))
    assert counter.frame_count == 1


# modes and choices


def test_cpu_mode():
    modes = []
    with cpu_mode("int8"):
        modes.append(ops._cpu_mode.get())
        with contextlib.suppress(RuntimeError), cpu_mode("exact"):
            modes.append(ops._cpu_mode.get())
            raise RuntimeError
        modes.append(ops._cpu_mode.get())
        thread = threading.Thread(target=lambda: modes.append(ops._cpu_mode.get()))
        thread.start()
        thread.join()
    assert [*modes, ops._cpu_mode.get()] == ["int8", "exact", "int8", "int16", "int16"]
    with pytest.raises(ValueError, match="cpu_mode must be one of exact, int16, int8, got 'fp8'"):
        cpu_mode("fp8")


@pytest.mark.parametrize("halves", [False, True])
def test_beyond_the_crossover(isa, kind, halves, monkeypatch):
    """More tokens than the kernel is fastest for are multiplied in fp32, in every mode."""
    monkeypatch.setattr(cpu, "_halves_vectors", lambda: halves)
    s = sample(40, 200, *kind)
    for mode in cpu.MODES:
        if cpu.most_tokens(mode) == cpu.ANY:
            continue
        for more in (0, 1) if mode == "exact" or isa == "plain" else (1,):
            x = torch.randn(cpu.most_tokens(mode) + more, 200)
            with cpu_mode(mode):
                assert_product(ops.linear(x, *s.parts, s.group_size, None), x, s.dense())


def test_without_the_library(kind, monkeypatch, tmp_path, caplog):
    """The ops work, and one warning says what to do."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    for cached in (cpu._library, cpu.best_isa):
        cached.cache_clear()
    s, x = sample(40, 200, *kind), torch.randn(3, 200)
    try:
        with caplog.at_level(logging.WARNING, logger="aaac_ao"):
            for _ in range(3):
                assert_product(ops.linear(x, *s.parts, s.group_size, None), x, s.dense())
                assert_rounded(ops.dequantize(*s.parts, s.group_size, 200, torch.float32), s.dense())
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "Install a C compiler" in caplog.text
        with pytest.raises(ValueError, match="no CPU kernel"):
            cpu.linear(x, *s.parts, s.group_size)
    finally:
        monkeypatch.undo()
        for cached in (cpu._library, cpu.best_isa):
            cached.cache_clear()
    assert cpu.best_isa() is not None


@pytest.mark.parametrize(
    ("value", "expected"), [("plain", "plain"), ("none", None), ("", ISAS[-1]), (ISAS[-1], ISAS[-1])]
)
def test_choice_by_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("AAAC_CPU_ISA", value)
    assert cpu._choose_isa() == expected


def test_wrong_choice_by_the_environment(monkeypatch):
    monkeypatch.setenv("AAAC_CPU_ISA", "sse9")
    message = "AAAC_CPU_ISA must be one of plain, avx2, avx_vnni, avx512 or none, got 'sse9'"
    with pytest.raises(ValueError, match=message):
        cpu._choose_isa()
    monkeypatch.setattr(cpu, "isas", lambda: ["plain", "avx2"])
    monkeypatch.setenv("AAAC_CPU_ISA", "avx_vnni")
    with pytest.raises(ValueError, match="AAAC_CPU_ISA is avx_vnni, but this machine has only plain, avx2"):
        cpu._choose_isa()


def test_a_group_size_without_kernel(kind):
    """The op still takes what the kernel does not."""
    fmt, _ = kind
    s, x = sample(20, 120, fmt, 24), torch.randn(2, 120)
    assert not cpu.supports(s.scale, 24)
    assert_product(ops.linear(x, *s.parts, 24, None), x, s.dense())


# errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 172).half()}, r"x must be fp32 or bf16 \[..., K\] on the CPU, got 2-D torch.float16"),
        ({"x": torch.randn(())}, "got 0-D"),
        ({"x": torch.randn(171 - 64)}, "qdata must be uint8"),
        ({"x": torch.randn(3, 193)}, "qdata must be uint8"),
        ({"x": torch.randn(3, 172, device="meta")}, "on the CPU"),
        ({"mode": "fp8"}, "mode must be one of exact, int16, int8, got 'fp8'"),
        ({"isa": "sse9"}, "isa must be one of"),
        ({"qdata": torch.zeros(3, 1536, dtype=torch.int8)}, "qdata must be uint8"),
        ({"qdata": torch.zeros(2, 1536, dtype=torch.uint8)}, "qdata must be uint8"),
        ({"qdata": torch.zeros(3, 1024, dtype=torch.uint8)}, "qdata must be uint8"),
        ({"qdata": torch.zeros(3, 1536, dtype=torch.uint8, device="meta")}, "on the CPU"),
        ({"scale": torch.ones(37, 3)}, "no CPU kernel for torch.float32 scales"),
        ({"scale": torch.ones(37, 2).bfloat16()}, "scale must be"),
        ({"scale": torch.ones(111).bfloat16()}, "scale must be|qdata must be"),
        ({"codebooks": torch.ones(2, 16)}, "codebooks must be bf16"),
        ({"codebooks": torch.ones(2, 8).bfloat16()}, "codebooks must be bf16"),
        ({"per_tensor_scale": torch.ones(2)}, "per_tensor_scale must be one fp32 number"),
        ({"per_tensor_scale": torch.ones((), dtype=torch.float64)}, "per_tensor_scale must be one fp32 number"),
        ({"group_size": 24}, "no CPU kernel for torch.bfloat16 scales with group_size 24"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -64}, "group_size -64"),
        ({"group_size": 128}, "scale must be"),
        ({"bias": torch.ones(36)}, "bias must have shape"),
        ({"bias": torch.ones(37, device="meta")}, "bias must have shape .* on meta"),
    ],
)
def test_bad_input(changes, message):
    s = sample(37, 172)
    named = dict(zip(("qdata", "scale", "codebooks", "per_tensor_scale"), s.parts, strict=True))
    with pytest.raises(ValueError, match=message):
        cpu.linear(**{"x": torch.randn(3, 172), **named, "group_size": 64, **changes})


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="needs a C compiler and make")
def test_sanitizers():
    run = subprocess.run(["make", "sanitize"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert f"0 failures with {len(ISAS)} instruction sets" in run.stdout
    rows = 16 if "avx512" in ISAS else 8 if "avx2" in ISAS else 4
    assert f"0 failures of the encoder with vectors of up to {rows} rows" in run.stdout
