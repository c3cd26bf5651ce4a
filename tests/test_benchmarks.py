"""The speed benchmarks: what they count and judge, the random weights they use, and every script once, tiny."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tensor_oracle import KINDS, dense_of

from aaac_ao.packing import TILE_BYTES
from benchmarks import bars, generate, gpu_all, linear, linear_peers, models, report, roofline, shapes, timing, variants
from benchmarks.parts import ROOT, run_part


def codes_by_the_document(qdata: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Codes [n, k], byte by byte as the layout is written down; an oracle that shares nothing with `packing`."""
    stored = qdata.reshape(-1).tolist()
    columns = qdata.shape[1] // TILE_BYTES
    codes = torch.empty(n, k, dtype=torch.uint8)
    for row in range(n):
        for column in range(k):
            tile = row // 16 * columns + column // 64
            h, g = divmod(row % 16, 8)
            c, inside = divmod(column % 64, 32)
            t, code = divmod(inside, 8)
            byte = stored[tile * 512 + (4 * g + t) * 16 + (2 * c + h) * 4 + code // 2]
            codes[row, column] = byte >> 4 if code % 2 else byte & 15
    return codes


@pytest.mark.parametrize(("fmt", "group_size"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(32, 128), (19, 133)])
def test_random_weights_mean_what_the_format_says(fmt, group_size, n, k):
    weight = shapes.random_weight(n, k, fmt, group_size)
    codes = codes_by_the_document(weight.qdata, n, k)
    exact = dense_of(codes, weight.scale, weight.codebooks, weight.per_tensor_scale, group_size)
    assert torch.allclose(weight.dequantize(torch.float32).double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(variants.exact_rows(weight, 0, n), exact)
    assert torch.equal(variants.exact_rows(weight, 16, n), exact[16:])
    assert 0.5 < weight.scale.float().sign().abs().mean() <= 1
    assert 0.005 < exact.std() < 0.1


def test_random_weights_use_all_codes_and_both_signs_and_spread():
    weight = shapes.random_weight(256, 512, "nvfp4", 16, dtype=torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    negative = weight.scale.view(torch.uint8) >= 128
    assert 0.4 < negative.float().mean() < 0.6
    zeros = weight.scale.float() == 0
    assert (zeros & negative).any()
    assert (zeros & ~negative).any()
    size = weight.scale.float().abs()[~zeros]
    assert size.max() / size.min() > 2


def test_bytes_are_codes_scales_x_and_y():
    weight = shapes.random_weight(64, 256, "int4", 128)
    size = shapes.bytes_of(weight.qdata, weight.scale)
    assert size == 64 * 256 // 2 + 64 * 2 * 2
    assert shapes.product_bytes(size, 3, 64, 256, 2) == size + 3 * 64 * 2 + 3 * 256 * 2
    ours = variants.aaac(64, 256, "int4", 128, "cpu", torch.float32, 1)
    assert {v.weight_bytes for v in ours} == {size}
    assert {v.labels["mode"] for v in ours} == set(variants.CPU_MODES)


@pytest.mark.parametrize("text", ["4096", "0x5", "1x2x3", "ax4"])
def test_bad_shapes(text):
    with pytest.raises(ValueError):  # noqa: PT011  (argparse shows its own message)
        shapes.parse_shape(text)


@pytest.mark.parametrize("text", ["int4", "int4-16", "fp8-16", "nvfp4-x"])
def test_bad_formats(text):
    with pytest.raises(ValueError):  # noqa: PT011
        shapes.parse_format(text)


def test_a_rotation_holds_distinct_copies_beyond_the_cache():
    assert timing.copies_for(100, 1000) == 10
    assert timing.copies_for(10**9, 1000) == 2
    stored = variants.copies((torch.ones(25), None, 7), 1000)
    assert len(stored) == 10
    assert len({parts[0].data_ptr() for parts in stored}) == 10
    assert all(parts[1:] == (None, 7) for parts in stored)


def test_interleaving_visits_all_and_reports_medians():
    order = []
    names = ("a", "b")
    rotations = {name: [lambda name=name, i=i: order.append((name, i)) for i in range(3)] for name in names}
    times = timing.interleaved(rotations, 0, visit_seconds=0, min_visits=6)
    assert order[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [i for name, i in order if name == "a"][:6] == [0, 1, 2, 0, 1, 2]
    assert all(0 < times[name]["us_20"] <= times[name]["us"] <= times[name]["us_80"] for name in names)
    assert timing.summary([1e-6, 2e-6, 3e-6], calls=2)["us"] == pytest.approx(1)


@pytest.mark.parametrize("name", ["torch-int4", "torch-int8"])
def test_peers_are_exact_about_what_they_store(name):
    w = torch.randn(64, 256) * 0.02
    variant = linear_peers.PEERS["cpu"][name](w, 1)
    exact = variant.exact(0, 64)
    assert 1e-3 < variants.relative(exact, w.double()) < (0.15 if name == "torch-int4" else 0.02)
    x = torch.randn(5, 256)
    errors = variant.errors(x, 64)
    y = x.bfloat16().double() @ exact.t()
    assert variants.relative(variant.products[0](x.bfloat16()).double(), y) < 4e-3
    assert errors["error"] < 8e-3


def test_errors_are_relative_and_of_unrounded_x():
    n, k = 300, 64
    w, x = torch.randn(n, k), torch.randn(4, k)
    broken = variants.Variant("", [lambda x: 1.01 * (x @ w.t())], torch.float32, 1, lambda a, b: w[a:b].double())
    errors = broken.errors(x, n)
    assert errors["error"] == pytest.approx(0.01, rel=1e-3)
    assert 5e-4 < errors["error_of_bf16_x"] < 4e-3


def cpu_row(variant: str, us: float, **labels) -> dict:
    where = {"threads": 1, "N": 4096, "K": 4096, "M": 1, "error": 1e-4, "error_of_bf16_x": 2e-3}
    return {"variant": variant, "us": us, **where, **labels}


def test_cpu_bars():
    ours = {"format": "int4 g32", "mode": "int16"}
    rows = [cpu_row(bars.FP32, 280.0), cpu_row(bars.INT4, 240.0), cpu_row("AAAC", 100.0, **ours)]
    judged = {bar.what: bar for bar in bars.cpu_linear_bars(rows)}
    first = judged["int16 int4 g32, 4096 x 4096, M = 1, 1 thread: times torch int4 g32"]
    assert (first.reached, first.passed) == (2.4, False)
    second = judged["int16 int4 g32, 4096 x 4096, M = 1, 1 thread: times fp32"]
    assert (second.reached, second.passed) == (2.8, True)
    assert judged["int16: error against fp64"].passed
    assert judged["int16: error over that of bf16 activations"].reached == pytest.approx(0.05)
    assert judged["int8: error against fp64"].passed is None
    # the worst of all rows counts, and a slower one somewhere fails the bar of every shape
    rows += [cpu_row(bars.FP32, 10.0, M=256), cpu_row("AAAC", 20.0, M=256, **ours)]
    judged = {bar.what: bar for bar in bars.cpu_linear_bars(rows)}
    assert judged["int16, every shape, M <= 256: times fp32"].reached == 0.5
    assert judged["int16, every shape, M <= 256: times fp32"].passed is False
    assert "FAIL" in bars.bars_table(list(judged.values()))


def test_errors_that_are_no_numbers_fail_the_bar():
    row = cpu_row("AAAC", 1.0, format="int4 g32", mode="exact", error=math.nan)
    for rows in ([row], [cpu_row("AAAC", 1.0, format="int4 g32", mode="exact", error=1e-7), row]):
        judged = {bar.what: bar for bar in bars.cpu_linear_bars(rows)}
        assert judged["exact: error against fp64"].passed is False


def cuda_rows(fmt: str, us: float, peer: str = bars.BF16, peer_us: float = 100.0, n: int = 8192, m: int = 1) -> list:
    where = {"N": n, "K": n, "M": m}
    ours = {"variant": "AAAC", "us": us, "format": fmt, "mode": "default", "share_of_bandwidth": 0.8, **where}
    return [{"variant": peer, "us": peer_us, **where}, ours]


def test_cuda_bars():
    judged = {bar.what: bar for bar in bars.cuda_linear_bars(cuda_rows("int4 g128", 40.0))}
    assert judged["int4 g128, M = 1, N, K >= 8192: times bf16"].passed is False
    assert judged["int4 g128, M = 1, N, K >= 8192: share of copy bandwidth"].passed
    assert judged["int4 g128, M = 1, 4096 x 4096: times bf16"].passed is None
    # the geometric mean over shapes, at the worst M
    peer = bars.CUDA_PEERS[0]
    rows = cuda_rows("int4 g128", 50.0, peer) + cuda_rows("int4 g128", 100.0, peer, n=4096)
    rows += cuda_rows("int4 g128", 200.0, peer, m=16)
    judged = {bar.what: bar for bar in bars.cuda_linear_bars(rows)}
    assert judged[f"int4 g128, geometric mean over shapes, every M: times {peer}"].reached == pytest.approx(0.5)
    assert bars.mean_speedups(rows[1:4:2], rows, peer) == [pytest.approx(2**0.5)]


def test_decode_bars():
    rows = [{"model": "Llama-3.2-1B", "batch": 1, "variant": "fp32", "tokens_per_second": 2.0}]
    rows += [{**rows[0], "variant": "int4-128+head", "tokens_per_second": 5.0}]
    (bar,) = bars.decode_bars(rows, "cpu")
    assert (bar.reached, bar.passed) == (2.5, True)


def test_unsteady_timings_are_counted():
    rows = [{"us_20": 1.0, "us_80": 1.4}, {"us_20": 1.0, "us_80": 1.6}]
    assert linear.unsteady(rows) == 1


def test_roofline_points():
    row = {"M": 2, "N": 8, "K": 4, "us": 1.0, "GB_per_s": 0.064}
    assert roofline.points([row]) == [(pytest.approx(2.0), pytest.approx(128e6))]


def test_the_cuda_path_on_a_cpu(monkeypatch, tmp_path):
    """Everything but the graphs themselves; a peer that fails in any way costs its own rows only."""

    def broken(w, cold_bytes):
        raise RuntimeError("no kernel\nfor this GPU")

    def late(w, cold_bytes):
        return variants.Variant("late", [lambda x: 1 / 0], torch.bfloat16, 1, lambda a, b: w[a:b].double())

    monkeypatch.setattr(linear, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(linear, "graph_times", lambda calls, seconds: timing.summary([len(calls) * 1e-6], len(calls)))
    monkeypatch.setitem(linear_peers.PEERS, "cuda", {"broken": broken, "late": late})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "out.json"
    args = linear.parse(["--device", "cuda", "--shapes", "48x128", "--tokens", "1", "8", "--json", str(out)])
    args.device, args.cold_bytes = "cpu", 1
    monkeypatch.setitem(linear_peers.PEERS, "cpu", linear_peers.PEERS["cuda"])
    content = {"environment": report.environment("cpu"), "not_available": {}, "bandwidth": {}, "rows": []}
    linear.measure_cuda(args, content)
    assert {row["variant"] for row in content["rows"]} >= {"bf16", "AAAC int4 g128 int16", "AAAC nvfp4 g16 exact"}
    assert content["not_available"]["broken, 48 x 128"] == "RuntimeError: no kernel"
    assert content["not_available"]["late, 48 x 128, M = 8"].startswith("ZeroDivisionError")
    assert json.loads(out.read_text())["rows"] == content["rows"]
    assert "48 x 128" in linear.ratio_table(content["rows"], bars.BF16)
    args.limit = 0
    with pytest.raises(TimeoutError, match="after 48 x 128, M = 1"):
        linear.measure_cuda(args, content)


def test_linear_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["--device", "cpu", "--shapes", "64x128", "--tokens", "1", "3", "--threads", "1", "--seconds", "0.001"]
    command += ["--cold-bytes", "10000", "--peers", "torch-int4", "--formats", "int4-32", "--json", str(out), "--check"]
    status = linear.main(command)
    content, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert len(content["rows"]) == 2 * (3 + len(variants.CPU_MODES))
    for row in content["rows"]:
        assert row["us"] > 0
        size = row["GB_per_s"] * row["us"] * 1e3
        assert size == pytest.approx(size_of(row), rel=1e-6)
        share = row["GB_per_s"] * 1e9 / content["bandwidth"]["1"]
        assert row["share_of_bandwidth"] == pytest.approx(share)
    assert {"date", "device", "isa", "versions"} <= content["environment"].keys()
    assert "| 64 x 128 | AAAC int4 g32 int16 |" in printed
    assert "exact: error against fp64" in printed
    failed = [bar for bar in content["bars"] if bar["passed"] is False]
    assert status == bool(failed)
    assert not [bar for bar in failed if "error" in bar["what"]]


def size_of(row: dict) -> int:
    """Bytes of a product of a [64, 128] weight, counted by hand."""
    stored = {"fp32": 4 * 64 * 128, "bf16": 2 * 64 * 128, "torch int4 g32": 64 * 128 // 2 + 64 * 4 * 4}
    item = 2 if row["variant"] in ("bf16", "torch int4 g32") else 4
    return stored.get(row["variant"], 64 * 128 // 2 + 64 * 4 * 2) + row["M"] * (64 + 128) * item


def test_bad_command_lines(capsys):
    for command, message in (
        (["--device", "cpu", "--peers", "marlin"], "unknown peers marlin"),
        (["--device", "cpu", "--shapes", "0x8"], "invalid parse_shape value"),
    ):
        with pytest.raises(SystemExit):
            linear.parse(command)
        assert message in capsys.readouterr().err
    for variant, message in (("int5-128", "unknown format"), ("int4-128:int3", "mode 'int3'")):
        with pytest.raises(SystemExit):
            generate.parse(["--device", "cpu", "--variants", variant])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("form", "head"), [("fp32", False), ("bf16", False), ("int4-64", True), ("nvfp4-16", False)])
def test_random_models_run_and_count_their_bytes(form, head):
    model = models.build("tiny", form, "cpu", head)
    with torch.no_grad():
        logits = model(torch.randint(0, 64, (2, 5))).logits
    assert logits.shape == (2, 5, 64)
    assert logits.isfinite().all()
    # q, o: 128 x 128; k, v: 64 x 128; gate, up, down: 192 x 128; two layers; the head: 64 x 128
    body, top = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 192 * 128), 64 * 128
    bits = {"fp32": 32, "bf16": 16, "int4-64": 4.25, "nvfp4-16": 4.5}[form]
    expected = body * bits / 8 + top * (bits if head else 16 if form == "bf16" else 32) / 8
    # the last group of each row of `down`, of 192 inputs, is a whole one in every format here
    assert models.bytes_per_step(model) == expected


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path):
    failed = run_part("benchmarks.no_such_part", [], 60)
    assert failed["status"] == "failed"
    assert "No module named" in failed["error"]
    hung = run_part("benchmarks.linear", ["--device", "cpu"], 0.2)
    assert hung["status"] == "timeout"
    assert hung["seconds"] < 30


def test_gpu_all_keeps_what_ran_and_shares_out_the_time(monkeypatch, tmp_path, capsys):
    limits = {}

    def fake(module, arguments, limit, env):
        name = arguments[0] if module == "benchmarks.gpu_checks" else module
        limits[name] = limit
        if name == "graphs":
            return {"status": "timeout", "seconds": 1.0, "code": None, "error": "hung"}
        if module == "benchmarks.gpu_checks":
            result = {"right": name != "large", "cases": 1, "wrong": 0, "largest_over_bound": []}
            return {"status": "ok", "seconds": 0.1, "result": result}
        rows = cuda_rows("int4 g128", 40.0) if "tinygemm" in arguments else []
        for row in rows:
            row |= {"GB_per_s": 1.0, "share_of_bandwidth": 0.8, "error": 1e-3}
        return {"status": "ok", "seconds": 0.1, "result": {"rows": rows, "not_available": {"gemlite": "missing"}}}

    monkeypatch.setattr(gpu_all, "run_part", fake)
    content = {"parts": {}, "bars": []}
    out = tmp_path / "out.json"
    gpu_all.run_all(list(gpu_all.PARTS), False, gpu_all.TOTAL, content, out)
    assert sum(part.seconds for part in gpu_all.PARTS.values()) <= gpu_all.TOTAL
    assert limits["numerics"] == pytest.approx(gpu_all.PARTS["numerics"].seconds, abs=1)
    assert limits["benchmarks.generate"] > 400  # all that the others left
    written = json.loads(out.read_text())
    assert list(written["parts"]) == list(gpu_all.PARTS)
    reached = {bar["what"]: bar["reached"] for bar in written["bars"]}
    assert reached["int4 g128, M = 1, N, K >= 8192: times bf16"] == 2.5
    bad = [name for name, part in written["parts"].items() if not gpu_all.is_good(part)]
    assert bad == ["graphs", "large"]
    assert "gemlite: not available (missing)" in capsys.readouterr().out


def test_gpu_all_dry_run(tmp_path):
    """A check, a benchmark and the bars, in processes of their own; `--dry-run` alone runs all parts."""
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_all.py"), "--out", str(out), "--dry-run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--parts", "large", "linear"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(out.read_text())
    assert content["dry_run"] is True
    assert {"date", "device", "versions"} <= content.keys()
    assert content["parts"]["large"]["result"]["right"]
    assert content["parts"]["linear"]["result"]["rows"]
    assert "| bar " in run.stdout
