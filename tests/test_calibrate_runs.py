"""`calibrate_` over interruptions, files and processes: the same bits, or a clear refusal."""

import copy
import dataclasses

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from aaac_ao import AAACConfig, AAACTensor, block_pass, calibrate_, collect_statistics, merge_statistics, resume
from aaac_ao.blocks import residual_bases
from aaac_ao.statistics import StatisticsFile

CONFIG = AAACConfig(group_size=64)


def ids(batches: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 97, (4, 61 + i % 3)) for i in range(batches)]


def quantised(model: nn.Module) -> dict[str, AAACTensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), AAACTensor)}


def same_model(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stop_at(monkeypatch, call: int) -> None:
    """Interrupt the encoding of the `call`-th layer."""
    original, calls = block_pass.encode, []

    def encode(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(block_pass, "encode", encode)


# repeatability and interruptions


@pytest.mark.parametrize("options", [{}, {"propagate": "original"}, {"awq": True}, {"share_codebooks": True}])
def test_interrupted_and_resumed_is_bit_equal_to_a_run_in_one_go(tiny_llama, tmp_path, monkeypatch, options):
    original, batches = tiny_llama(layers=3), ids()
    expected = calibrate_(copy.deepcopy(original), CONFIG, batches, progress=False, **options)
    again = calibrate_(copy.deepcopy(original), CONFIG, batches, progress=False, **options)
    assert same_model(expected, again)
    assert len(quantised(expected)) == 21

    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            calibrate_(copy.deepcopy(original), CONFIG, batches, progress=False, resume_dir=tmp_path, **options)
    assert [path.name for path in sorted(tmp_path.glob("block*"))] == [
        f"block-{i:05d}.safetensors" for i in range(2 if "share_codebooks" in options else 1)
    ]
    encoded = []
    original_encode = block_pass.encode
    monkeypatch.setattr(block_pass, "encode", lambda *args: encoded.append(args) or original_encode(*args))
    resumed = calibrate_(copy.deepcopy(original), CONFIG, batches, progress=False, resume_dir=tmp_path, **options)
    assert same_model(expected, resumed)
    assert len(encoded) == (4 if "share_codebooks" in options else 14)


def test_a_folder_of_another_run_is_refused(tiny_llama, tmp_path):
    model, batches = tiny_llama(), ids()
    calibrate_(copy.deepcopy(model), CONFIG, batches, progress=False, resume_dir=tmp_path)
    for other, config, data, differing in (
        (model, AAACConfig(group_size=32), batches, "group_size"),
        (model, CONFIG, ids(), "batches"),
        (tiny_llama(), CONFIG, batches, "weights"),
        (tiny_llama(layers=3), CONFIG, batches, "layers, weights"),
    ):
        with pytest.raises(ValueError, match=f"holds a run that differs in {differing}"):
            calibrate_(other, config, data, progress=False, resume_dir=tmp_path)
        assert not quantised(other)


def test_damaged_folders_are_refused(tiny_llama, tmp_path):
    model, batches = tiny_llama(), ids()
    calibrate_(copy.deepcopy(model), CONFIG, batches, progress=False, resume_dir=tmp_path)
    block = tmp_path / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"block-00000\.safetensors is damaged"):
        calibrate_(model, CONFIG, batches, progress=False, resume_dir=tmp_path)
    assert not quantised(model)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="no record of a run"):
        calibrate_(model, CONFIG, batches, progress=False, resume_dir=tmp_path)


@pytest.mark.parametrize("error", [OSError("No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_an_error_and_leaves_a_whole_model(tiny_llama, tmp_path, monkeypatch, error):
    original, batches = tiny_llama(), ids()
    model = copy.deepcopy(original)
    save, calls = resume.save_file, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            args[1].write_bytes(b"half")
            raise error
        return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", failing)
        with pytest.raises(OSError, match=r"cannot write .*block-00001.* free some space"):
            calibrate_(model, CONFIG, batches, progress=False, resume_dir=tmp_path)
    assert len(quantised(model)) == 7  # the first block; the second is as it was
    assert torch.isfinite(model(batches[0]).logits).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-00000.safetensors", "run.json"]
    expected = calibrate_(copy.deepcopy(original), CONFIG, batches, progress=False)
    assert same_model(calibrate_(original, CONFIG, batches, progress=False, resume_dir=tmp_path), expected)


def test_inputs_that_break_on_the_way_name_layer_and_batch(tiny_llama, monkeypatch):
    model, batches, calls = tiny_llama(), ids(), []
    original = block_pass.encode

    def breaking(*args):
        calls.append(args)
        encoding = original(*args)
        return dataclasses.replace(encoding, scale=encoding.scale * 0 + 2e38) if len(calls) == 11 else encoding

    monkeypatch.setattr(block_pass, "encode", breaking)
    message = r"layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj: after .* calibration batch 0 gives it NaN"
    with pytest.raises(ValueError, match=message):
        calibrate_(model, CONFIG, batches, progress=False)
    assert len(quantised(model)) == 7  # the first block; the second is as it was
    assert torch.isfinite(model(batches[0]).logits).all()


def test_hidden_states_on_disk_change_nothing(tiny_llama, tmp_path):
    model, batches = tiny_llama(), ids()
    expected = calibrate_(copy.deepcopy(model), CONFIG, batches, progress=False)
    assert same_model(calibrate_(model, CONFIG, batches, progress=False, cache_dir=tmp_path / "new"), expected)
    assert list((tmp_path / "new").iterdir()) == []


# what the streams are good for


def test_residual_streams_are_found(tiny_llama):
    model = tiny_llama().eval()
    block = model.model.layers[0]
    seen = {}
    hook = block.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True)
    with torch.no_grad():
        model(ids(1)[0], use_cache=False)
    hook.remove()
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        found = residual_bases(block, lambda: block(*seen["args"], **seen["kwargs"]), layers)
    assert found == {"self_attn.o_proj": block, "mlp.down_proj": block.post_attention_layernorm} or found == {
        "self_attn.o_proj": block.input_layernorm,
        "mlp.down_proj": block.post_attention_layernorm,
    }


def test_the_quantised_stream_loses_less(tiny_llama):
    model = tiny_llama(layers=3).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.randn(97, 8) @ torch.randn(8, 128))  # correlated inputs
    batches, held_out = ids(16), ids(4)
    errors = {}
    for propagate in ("original", "quantized"):
        other = calibrate_(copy.deepcopy(model), CONFIG, batches, progress=False, propagate=propagate)
        with torch.no_grad():
            errors[propagate] = sum((other.model(b)[0] - model.model(b)[0]).square().mean() for b in held_out)
    assert errors["quantized"] < 0.97 * errors["original"]
    with pytest.raises(ValueError, match="propagate must be 'quantized' or 'original', got 'both'"):
        calibrate_(model, CONFIG, batches, propagate="both")


def test_shared_codebooks_make_layers_that_can_be_fused(tiny_llama):
    model, batches = tiny_llama(), ids()
    calibrate_(model, AAACConfig(format="nvfp4"), batches, progress=False, share_codebooks=True)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for layers in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        weights = [layer.weight for layer in layers]
        assert all(torch.equal(w.codebooks, weights[0].codebooks) for w in weights)
        assert all(torch.equal(w.per_tensor_scale, weights[0].per_tensor_scale) for w in weights)
    weights = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    fused = torch.cat(weights)
    assert isinstance(fused, AAACTensor)
    assert torch.equal(fused.dequantize(), torch.cat([w.dequantize() for w in weights]))
    assert not torch.equal(attention.q_proj.weight.codebooks, attention.o_proj.weight.codebooks)


# statistics as files


def test_quantising_from_a_file_is_quantising_from_the_data(tiny_llama, tmp_path):
    model, batches, file = tiny_llama(), ids(), tmp_path / "statistics.safetensors"
    before = copy.deepcopy(model)
    collect_statistics(model, batches, file, progress=False)
    assert same_model(model, before)
    expected = calibrate_(copy.deepcopy(model), CONFIG, batches, progress=False, propagate="original")
    assert same_model(calibrate_(model, CONFIG, statistics=file, progress=False), expected)


def test_merged_files_are_one_run_over_all_data(tiny_llama, tmp_path):
    model, batches = tiny_llama(), ids(4)
    parts = [tmp_path / "a", tmp_path / "b"]
    collect_statistics(model, batches[:1], parts[0], progress=False)
    collect_statistics(model, batches[1:], parts[1], progress=False)
    collect_statistics(model, batches, tmp_path / "all", progress=False)
    merge_statistics(parts, tmp_path / "merged")
    merged, whole = StatisticsFile(tmp_path / "merged"), StatisticsFile(tmp_path / "all")
    assert merged.layers == whole.layers
    assert len(set(whole.layers.values())) == 8  # q/k/v and gate/up share
    for entry in set(whole.layers.values()):
        a, b = merged.sums(entry), whole.sums(entry)
        assert int(a.tokens) == int(b.tokens) == sum(batch.numel() for batch in batches)
        torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-5, atol=1e-5 * float(b.hessian.abs().max()))
        torch.testing.assert_close(a.squares, b.squares, rtol=1e-5, atol=0)
        torch.testing.assert_close(b.squares, b.hessian.diagonal(), rtol=1e-5, atol=0)


def test_bad_statistics_files(tiny_llama, tmp_path):
    model, batches, file = tiny_llama(), ids(), tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="no statistics file"):
        calibrate_(model, CONFIG, statistics=file)
    with pytest.raises(ValueError, match="either batches or a statistics file"):
        calibrate_(model, CONFIG, batches, statistics=file)
    with pytest.raises(ValueError, match="either batches or a statistics file"):
        calibrate_(model, CONFIG)
    collect_statistics(model, batches, file, progress=False, full=False)
    with pytest.raises(ValueError, match="holds diagonals only"):
        calibrate_(model, AAACConfig(rounding="gptq"), statistics=file)
    with pytest.raises(ValueError, match="has no statistics of it"):
        calibrate_(tiny_llama(layers=3), CONFIG, statistics=file, strict=True)
    collect_statistics(tiny_llama(layers=3), batches, tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="not of the same layers"):
        merge_statistics([file, tmp_path / "other"], tmp_path / "merged")
    with pytest.raises(ValueError, match="no statistics files"):
        merge_statistics([], tmp_path / "merged")
    with pytest.raises(TypeError, match="wrap it in a list"):
        merge_statistics(file, tmp_path / "merged")
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="damaged"):
        calibrate_(model, CONFIG, statistics=file)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="no statistics file of this version"):
        calibrate_(model, CONFIG, statistics=file)
    assert not quantised(model)
    assert not (tmp_path / "merged").exists()
