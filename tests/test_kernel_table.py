"""Which kernel runs for how many tokens, how K is split, and the files with figures of single GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from aaac_ao.kernels import blocks, dispatch, launch, table

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 32, 33, 64])
def test_a_block_holds_all_tokens_and_no_smaller_one_does(tokens):
    block = blocks.block_for(tokens)
    assert block.tokens >= tokens
    assert all(other.tokens < tokens for other in blocks.BLOCKS if other.tokens < block.tokens)


def test_number_of_compiled_kernels_does_not_grow_with_tokens():
    assert len({blocks.block_for(tokens) for tokens in range(1, 65)}) == len(blocks.BLOCKS)


def test_weights_of_few_tokens_and_large_groups_are_not_rounded():
    cpu = torch.device("cpu")
    assert not any(dispatch.rounds_weights(torch.float32, tokens, 16, cpu) for tokens in (1, 16, 64, 1000))
    assert not any(dispatch.rounds_weights(torch.bfloat16, 8, group_size, cpu) for group_size in (32, 64, 128))
    assert not dispatch.rounds_weights(torch.bfloat16, 16, 128, cpu)
    assert all(dispatch.rounds_weights(torch.float16, tokens, 16, cpu) for tokens in (1, 16, 64, 1000))
    assert dispatch.rounds_weights(torch.bfloat16, 65, 128, cpu)


def test_splits_fill_the_machine_and_keep_their_steps():
    wanted = 8 * 132
    assert table.choose_splits(4, 1, wanted) == 1
    assert table.choose_splits(4096 // 16, 16, wanted) == 8
    assert table.choose_splits(14336 // 16, 16, wanted) == 2
    assert table.choose_splits(128256 // 16, 16, wanted) == 1
    for programs, steps in ((1, 2), (256, 56), (1, 10**4)):
        splits = table.choose_splits(programs, steps, wanted)
        assert splits == 1 or steps / splits >= table.MIN_STEPS
        assert splits <= table.MAX_SPLITS


def test_written_tables_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "TABLES", tmp_path / "tables")
    assert table.read("NVIDIA H200") is None
    limits = table.Limits(fused_tokens=32, programs=4, pair_weights=None, slab_bytes=2**24)
    path = table.write("NVIDIA H200", limits, {"fused_tokens": []})
    assert path.name == "nvidia-h200.json"
    assert table.read("NVIDIA H200") == limits
    assert table.read("NVIDIA H100 80GB HBM3") is None


@pytest.mark.parametrize("content", ["{", "{}", '{"limits": {"tokens": 3}}', '{"limits": {"fused_tokens": 65}}'])
def test_broken_tables_are_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(table, "TABLES", tmp_path)
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ValueError, match=r"gpu\.json is not a table"):
        table.read("GPU")


def test_shipped_tables_can_be_read():
    for path in table.TABLES.glob("*.json"):
        assert table.read(json.loads(path.read_text())["gpu"])


@pytest.mark.parametrize("limits", [{"fused_tokens": -1}, {"programs": 0}, {"slab_bytes": 0}])
def test_limits_are_checked(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        table.Limits(**limits)


def test_the_table_is_for_known_capabilities():
    assert all(limits.fused_tokens <= blocks.BLOCKS[-1].tokens for limits in table.TABLE.values())
    assert table.of_device(torch.device("cpu")) == (table.Limits(), 16)


def test_even_splits_leave_no_program_much_more_to_do_than_the_others():
    for row_blocks, steps in ((112, 16), (32, 16), (64, 32), (1002, 16), (1, 1)):
        splits = table.choose_even_splits(row_blocks, steps, 396)
        assert 1 <= splits <= max(1, steps // table.MIN_STEPS)
        rounds = -(-row_blocks * splits // 396)
        without = -(-row_blocks // 396) * (steps + 1)
        assert rounds * (-(-steps // splits) + 1) <= without
    assert table.choose_even_splits(112, 16, 396) == 3  # 336 ranges of 6 steps; 7 would take two rounds of 3 steps


def layer(n: int, k: int, group_size: int, tokens: int = 4) -> tuple:
    """A layer without memory, as `launch.fits_pairs` takes it."""
    scale = torch.empty(n, k // group_size, dtype=torch.float8_e4m3fn if group_size == 16 else torch.bfloat16)
    qdata = torch.empty(n // 16, k * 8, dtype=torch.uint8)
    return torch.empty(tokens, k).bfloat16(), qdata, scale, torch.empty(2, 16).bfloat16(), None, group_size, None, None


def test_the_pair_table_is_for_large_layers_that_it_takes_and_after_its_check(monkeypatch):
    monkeypatch.setattr(launch.verify, "fast_is_right", lambda *_: True)
    if launch.pairs is None:
        pytest.skip("no Gluon")
    assert launch.fits_pairs(*layer(256, 512, 16), 256 * 512)
    refused = {
        "small": (*layer(256, 512, 16), 256 * 512 + 1),
        "never": (*layer(256, 512, 16), None),
        "tokens": (*layer(256, 512, 16, tokens=17), 1),
        "group": (*layer(256, 512, 32), 1),
        "columns": (*layer(256, 512 + 128, 16), 1),
    }
    assert {name for name, arguments in refused.items() if launch.fits_pairs(*arguments)} == set()
    monkeypatch.setattr(launch.verify, "fast_is_right", lambda *_: False)
    assert not launch.fits_pairs(*layer(256, 512, 16), 1)


def test_factors_of_x_make_a_variant_that_is_checked_for_itself(monkeypatch):
    if launch.pairs is None:
        pytest.skip("no Gluon")
    variants = []
    monkeypatch.setattr(launch.verify, "fast_is_right", lambda variant, *_: variants.append(variant) or True)
    for act in (None, torch.ones(512), torch.ones(512).bfloat16()):
        assert launch.fits_pairs(*layer(256, 512, 16)[:-1], act, 1)
    assert len(set(variants)) == 3


def test_without_gluon_the_shuffle_kernel_runs(monkeypatch):
    monkeypatch.setattr(launch.verify, "fast_is_right", lambda *_: True)
    monkeypatch.setattr(launch, "pairs", None)
    assert not launch.fits_pairs(*layer(256, 512, 16), 1)


@pytest.mark.parametrize("fault", ["sys.modules[name] = None", "sys.modules[name] = types.ModuleType(name)"])
def test_a_missing_or_changed_gluon_is_noticed_on_import(fault):
    code = f"""
import sys, types
name = "triton.experimental.gluon"
{fault}
from aaac_ao.kernels import launch
assert launch.pairs is None
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_tuner_writes_a_table_that_is_read(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "benchmarks.tune", "--dry-run", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    monkeypatch.setattr(table, "TABLES", tmp_path)
    assert isinstance(table.read("dry run"), table.Limits)
