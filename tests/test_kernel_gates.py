"""What can be proven about the fast kernels without a GPU: they compile for every target, within their budgets."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("triton is not installed or only interprets", allow_module_level=True)

import triton

from benchmarks import budgets, sass

GATES = sass.variants(dtypes=("bf16",)) + sass.variants((budgets.CAPABILITY,), ("fp16",))
UNALIGNED = [
    sass.Variant("fused", budgets.CAPABILITY, "bf16", group_size, tokens, words=False)
    for group_size in sass.GROUP_SIZES
    for tokens in (8, 64)
]
#: With factors of x: bf16 ones, which fp16 kernels have to convert.
ACT = [
    sass.Variant(kernel, budgets.CAPABILITY, dtype, group_size, tokens, act=True)
    for kernel, group_size, tokens in (("fused", 16, 8), ("fused", 32, 16), ("fused", 64, 64), ("pairs", 16, 16))
    for dtype in ("bf16", "fp16")
]
TWINS = [sass.Variant("fused", capability, "bf16", 16, 8, asm=False) for capability in (80, 120)]


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[sass.Variant, sass.Count]:
    """Every variant compiled once, in two processes, with a cache of their own: an old one would hide a failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        results = sass.count_all(GATES + UNALIGNED + ACT)
        assert not [result for result in results if isinstance(result, str)]
        return {result.variant: result for result in results}


needs_budget_triton = pytest.mark.skipif(
    not triton.__version__.startswith(budgets.TRITON + "."), reason=f"the budgets are for Triton {budgets.TRITON}"
)


@needs_budget_triton
@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_gates(counts, capability):
    mine = [counts[variant] for variant in GATES if variant.capability == capability]
    assert len(mine) >= 16
    wrong = {result.variant: reasons for result in mine if (reasons := sass.gate(result))}
    assert not wrong


@needs_budget_triton
def test_scales_in_single_bytes_cost_no_spills_and_no_shared_memory(counts):
    for variant in UNALIGNED:
        assert counts[variant].stack == 0, variant
        assert counts[variant].shared == 0, variant
        assert counts[variant].converted == 0, variant


@needs_budget_triton
def test_factors_of_x_cost_no_spills_and_no_shared_memory(counts):
    for variant in ACT:
        result, without = counts[variant], counts[dataclasses.replace(variant, act=False)]
        assert result.stack == 0, variant
        assert (result.shared, result.converted) == (without.shared, without.converted), variant
        assert result.opcodes["HMUL2"] > without.opcodes["HMUL2"], variant


def test_budgets_are_within_reach_of_what_is_needed():
    """A budget far above the count would gate nothing."""
    assert budgets.BUDGETS["small", "int4"] <= 4.0
    assert budgets.BUDGETS["small", "nvfp4"] <= 4.4
    assert budgets.BUDGETS["pairs", "nvfp4"] <= 2.6
    assert max(budgets.BUDGETS.values()) <= 5.2
    assert budgets.NEWEST_SMALL <= 5.2


def test_gate_notices_each_fault(counts):
    good = counts[next(variant for variant in GATES if variant.kernel == "fused")]
    good = dataclasses.replace(good, variant=dataclasses.replace(good.variant, capability=budgets.CAPABILITY))
    assert not sass.gate(good)
    faults = {
        "instructions": {"instructions": good.variant.budget + 0.1},
        "spill": {"stack": 8},
        "shared memory": {"shared": 1},
        "operations move": {"converted": 1},
        "loads of 16": {"loads": good.loads - 1},
        "shuffles": {"opcodes": {"SHFL": 1.25}},
    }
    for word, change in faults.items():
        reasons = sass.gate(dataclasses.replace(good, **change))
        assert len(reasons) == 1
        assert word in reasons[0]


def test_twin_is_the_same_work_without_shuffles(tmp_path, monkeypatch):
    """The portable twin compiles for the oldest and the newest target; the counter sees that it is another kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for variant in TWINS:
        result = sass.count(variant)
        assert result.opcodes.get("SHFL", 0) < 0.5
        assert result.instructions > 2 * variant.budget
        assert result.stack == 0


def test_pair_table_reads_once_for_two_weights_and_has_the_shared_memory_to_itself(counts):
    pairs = [counts[variant] for variant in GATES if variant.kernel == "pairs"]
    assert len(pairs) == 18
    for result in pairs:
        assert result.opcodes["LDS"] == 0.5
        assert result.memory == 65536
        assert "SHFL" not in result.opcodes
    worse = dataclasses.replace(pairs[0], shared=pairs[0].shared + 1)
    assert "shared memory" in sass.gate(worse)[0]
    assert "does not start" in sass.gate(dataclasses.replace(pairs[0], memory=65536 + 16))[0]


def test_loops_are_found():
    code = """
.L_x_0:
        /*0000*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   SHFL.IDX PT, R8, R9, R4, 0x1f ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    assert sass.loops(code) == [["SHFL.IDX PT, R8, R9, R4, 0x1f ", "BRA `(.L_x_1) "]]


def test_readme_has_the_table_of_the_counter(counts):
    """The figures in benchmarks/README.md for the budgets' target are those that this version compiles to."""
    readme = (pathlib.Path(sass.__file__).parent / "README.md").read_text()
    if not triton.__version__.startswith(budgets.TRITON + "."):
        pytest.skip("the table is for another Triton")
    column = 5 + sass.CAPABILITIES.index(budgets.CAPABILITY)
    for result in (counts[v] for v in GATES if v.capability == budgets.CAPABILITY):
        v = result.variant
        row = re.search(rf"^\| {v.kernel} +\| {v.dtype} +\| {v.group_size} +\| {v.tokens} +\|.*$", readme, re.MULTILINE)
        assert row, v
        assert float(row[0].strip("| ").split("|")[column]) == pytest.approx(result.instructions, abs=0.051), v
