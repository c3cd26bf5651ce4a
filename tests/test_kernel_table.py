"""Which kernel runs for how many tokens, how K is split, and the files with figures of single GPUs."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from aaac_ao.kernels import blocks, dispatch, table


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
