"""`calibrate_checkpoint`: the bytes that `calibrate_` in memory would give, whatever happens on the way."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import quantize_
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from aaac_ao import AAACConfig, AAACTensor, block_pass, blocks, calibrate_, calibrate_checkpoint, output
from aaac_ao.integrations.transformers import load_model, save_quantized

CONFIG = AAACConfig(group_size=64)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "mistral": (MistralForCausalLM, MistralConfig),
}


def write_model(
    path: Path, kind: str = "llama", dtype=torch.bfloat16, layers: int = 2, tied: bool = False, shard: str = "100KB"
) -> Path:
    model_class, config_class = MODELS[kind]
    config = config_class(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=172,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def ids(batches: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 97, (2, 31 + i % 2)) for i in range(batches)]


def in_memory(source: Path, config: AAACConfig, batches, out: Path, **options) -> Path:
    model = load_model(source)
    if batches is None:
        quantize_(model.model, config)
    else:
        calibrate_(model, config, batches, progress=False, **options)
    save_quantized(model, config, out)
    return out


def on_disk(source: Path, config: AAACConfig, batches, out: Path, **options) -> Path:
    calibrate_checkpoint(source, config, batches, out, progress=False, **options)
    return out


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not tensors.keys() & found.keys()
        found.update(tensors)
    return found


def same_bytes(a: Path, b: Path) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))
        for n in left
    )


def cannot_be_loaded(path: Path) -> bool:
    try:
        load_model(path)
    except (ValueError, OSError):
        return True
    return False


# the same as in memory


@pytest.mark.parametrize(
    ("kind", "dtype", "tied", "shard", "options"),
    [
        ("llama", torch.bfloat16, False, "100KB", {}),
        ("qwen2", torch.float32, True, "1GB", {"awq": True}),
        ("mistral", torch.float16, False, "200KB", {"propagate": "original", "share_codebooks": True}),
        ("qwen2", torch.bfloat16, False, "100KB", None),
    ],
)
def test_equals_loading_calibrating_and_saving(tmp_path, kind, dtype, tied, shard, options):
    source = write_model(tmp_path / "source", kind, dtype, tied=tied, shard=shard)
    assert len(list(source.glob("*.safetensors"))) == 1 or shard != "1GB"
    batches = None if options is None else ids()
    expected = in_memory(source, CONFIG, batches, tmp_path / "expected", **options or {})
    cache = {"cache_dir": tmp_path / "cache"} if tied else {}
    out = on_disk(source, CONFIG, batches, tmp_path / "out", **options or {}, **cache)
    assert same_bytes(out, expected)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((expected / name).read_text())
    assert {p.suffix for p in out.iterdir()} == {".json", ".safetensors"}
    ours, theirs = load_model(out), AutoModelForCausalLM.from_pretrained(out)
    reference = load_model(expected)
    assert isinstance(ours.model.layers[1].mlp.up_proj.weight, AAACTensor)
    x = ids(1)[0]
    with torch.no_grad():
        assert torch.equal(ours(x).logits, reference(x).logits)
        assert torch.equal(theirs(x).logits, reference(x).logits)


def test_returns_the_shapes_of_what_was_written(tmp_path):
    source = write_model(tmp_path / "source")
    model = calibrate_checkpoint(source, AAACConfig(format="nvfp4"), ids(), tmp_path / "out", progress=False)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    loaded = load_model(tmp_path / "out")
    for name, parameter in loaded.model.layers.named_parameters():
        other = model.model.layers.get_parameter(name)
        assert (type(other.data), other.shape, other.dtype) == (type(parameter.data), parameter.shape, parameter.dtype)


def test_no_more_than_one_block_is_in_memory(tmp_path, monkeypatch):
    source, seen = write_model(tmp_path / "source", layers=3), []
    original, real = block_pass.encode, AutoModelForCausalLM.from_config
    models = []

    def encode(*args):
        state = models[0].state_dict()
        present = [name for name, tensor in state.items() if not tensor.is_meta]
        seen.append({name.split(".")[2] for name in present if ".layers." in name})
        assert all(".layers." in name for name in present)
        return original(*args)

    def from_config(*args, **kwargs):
        models.append(real(*args, **kwargs))
        assert all(parameter.is_meta for parameter in models[0].parameters())
        return models[0]

    monkeypatch.setattr(block_pass, "encode", encode)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    on_disk(source, CONFIG, ids(), tmp_path / "out")
    assert seen == [{"0"}] * 7 + [{"1"}] * 7 + [{"2"}] * 7


def test_zero_constant_and_dead_layers(tmp_path):
    source = write_model(tmp_path / "source", shard="1GB")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(0.25)
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()  # o_proj sees zeros only
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    # with the original inputs, for which weights are not corrected
    model = load_model(on_disk(source, CONFIG, ids(), tmp_path / "out", propagate="original"))
    assert not model.model.layers[0].mlp.down_proj.weight.dequantize().any()
    assert (model.model.layers[1].mlp.up_proj.weight.dequantize() == 0.25).all()
    assert torch.isfinite(model.model.layers[1].self_attn.o_proj.weight.dequantize()).all()


# interruptions

KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from aaac_ao import AAACConfig, block_pass, calibrate_checkpoint
original, calls = block_pass.encode, []
def encode(*args):
    calls.append(args)
    if len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
block_pass.encode = encode
source, out, data = sys.argv[1:]
calibrate_checkpoint(source, AAACConfig(group_size=64), torch.load(data), out, progress=False, awq=True)
"""


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, monkeypatch):
    source, batches, out = write_model(tmp_path / "source", "qwen2", layers=3), ids(), tmp_path / "out"
    torch.save(batches, tmp_path / "data.pt")
    command = [sys.executable, "-c", KILLED, str(source), str(out), str(tmp_path / "data.pt")]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert [path.name for path in sorted(out.glob("*.safetensors"))] == ["model-00001-of-00004.safetensors"]
    assert cannot_be_loaded(out)
    with pytest.raises(ValueError, match="holds a run that differs in batches"):
        on_disk(source, CONFIG, ids(), out, awq=True)

    expected = in_memory(source, CONFIG, batches, tmp_path / "expected", awq=True)
    encoded, original = [], block_pass.encode
    monkeypatch.setattr(block_pass, "encode", lambda *args: encoded.append(args) or original(*args))
    on_disk(source, CONFIG, batches, out, awq=True)
    assert len(encoded) == 14
    assert same_bytes(out, expected)
    assert {p.suffix for p in out.iterdir()} == {".json", ".safetensors"}


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(tmp_path, monkeypatch):
    source, batches, out = write_model(tmp_path / "source"), ids(), tmp_path / "out"
    before = tensors_of(source)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, hard))  # the shard of a block is larger
    try:
        with pytest.raises(OSError, match=r"cannot write .*model-00001.* free some space"):
            on_disk(source, CONFIG, batches, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(out.iterdir()) == []

    save, calls = output.save_file, []

    def failing(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:  # all blocks are done
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_file", failing)
        with pytest.raises(OSError, match=r"cannot write .*model-00003.* free some space"):
            on_disk(source, CONFIG, batches, out)
    assert cannot_be_loaded(out)
    assert not list(out.rglob("*.part"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(source).items())
    monkeypatch.setattr(block_pass, "encode", None)  # nothing is left to encode
    on_disk(source, CONFIG, batches, out)
    monkeypatch.undo()
    assert same_bytes(out, in_memory(source, CONFIG, batches, tmp_path / "expected"))


# refusals


def refused(source: Path, out: Path, match: str, batches=None, **options) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        on_disk(source, CONFIG, batches or ids(), out, **options)
    assert not out.exists() or not list(out.iterdir())


def test_bad_sources(tmp_path):
    good, out = write_model(tmp_path / "good"), tmp_path / "out"

    def copy() -> tuple[Path, Path]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        bad = Path(shutil.copytree(good, tmp_path / "bad"))
        return bad, sorted(bad.glob("*.safetensors"))[1]

    refused(tmp_path / "nowhere", out, "not a local directory")
    bad, shard = copy()
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(bad, out, f"{shard.name} is truncated, damaged or no safetensors file")
    bad, shard = copy()
    shard.unlink()
    refused(bad, out, f"lacks files that .*index.json names: {shard.name}")
    bad, shard = copy()
    save_file({"other.weight": torch.zeros(3)}, shard)
    refused(bad, out, f"{shard.name} lacks model.*, which .*index.json says it holds")
    bad, shard = copy()
    (bad / "model.safetensors.index.json").write_text("{")
    refused(bad, out, "index.json is damaged")
    bad, shard = copy()
    for file in bad.glob("*.safetensors*"):
        file.unlink()
    refused(bad, out, "has neither model.safetensors nor")
    bad, shard = copy()
    (bad / "config.json").unlink()
    refused(bad, out, "cannot load")
    quantised = in_memory(good, CONFIG, None, tmp_path / "quantised")
    refused(quantised, out, "quantised already")


def test_checkpoints_that_do_not_fit(tmp_path):
    good, out = write_model(tmp_path / "good", shard="1GB", tied=True), tmp_path / "out"
    tensors, file = load_file(good / "model.safetensors"), good / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = "model.layers.1.mlp.up_proj.weight"
    changed = {
        f"missing: {name}": {n: t for n, t in tensors.items() if n != name},
        "left over: model.layers.7.extra": {**tensors, "model.layers.7.extra": torch.zeros(2)},
        rf"of another shape: {name} \[128, 3\] instead of \[172, 128\]": {**tensors, name: torch.zeros(128, 3)},
        "model.embed_tokens.weight and lm_head.weight should be tied": {
            **tensors,
            "lm_head.weight": tensors["model.embed_tokens.weight"] + 1,
        },
    }
    for message, state in changed.items():
        save_file(state, file, {"format": "pt"})
        refused(good, out, message)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert not cannot_be_loaded(on_disk(good, CONFIG, None, out))  # tied and stored twice


def test_bad_values_are_refused_before_anything_is_written(tmp_path):
    source, out = write_model(tmp_path / "source", dtype=torch.float32, shard="1GB"), tmp_path / "out"
    file = source / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}

    def changed(name: str, value: float) -> None:
        new = tensors[name].clone()
        new.view(-1)[:] = value
        save_file({**tensors, name: new}, file, {"format": "pt"})

    changed("model.layers.1.mlp.down_proj.weight", float("nan"))
    refused(source, out, r"model\.layers\.1\.mlp\.down_proj: .*NaN or infinite values")
    changed("model.layers.1.input_layernorm.weight", float("inf"))
    refused(source, out, r"layers\.1\.self_attn\.q_proj: calibration batch 0 gives it NaN")
    changed("model.layers.1.input_layernorm.weight", 1.5e17)  # 62 tokens of 128 inputs: 1.8e38 a batch
    refused(source, out, r"layers\.1\.self_attn\.q_proj: the squares of its inputs leave .* calibration batch 1")
    with pytest.raises(ValueError, match="the squares of its inputs leave the range of fp32"):
        calibrate_(load_model(source), CONFIG, ids(), progress=False)


def test_bad_arguments(tmp_path, monkeypatch):
    source, out = write_model(tmp_path / "source"), tmp_path / "out"
    refused(source, out, r"not in a decoder block: lm_head", filter_fn=lambda module, name: True)
    refused(source, out, r"no nn\.Linear .* is selected", filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="need data: give batches"):
        on_disk(source, CONFIG, None, out, awq=True)
    with pytest.raises(ValueError, match="neither empty nor an unfinished run"):
        on_disk(source, CONFIG, ids(), source)
    monkeypatch.setattr(blocks, "_is_plain", lambda value: False)
    refused(source, out, "cannot be worked on block by block, because a block takes something else")


def test_unreached_layers_and_few_tokens(tmp_path, caplog, monkeypatch):
    source = write_model(tmp_path / "source")
    with caplog.at_level("WARNING", logger="aaac_ao"):
        on_disk(source, CONFIG, [torch.randint(0, 97, (1, 20))], tmp_path / "out")
    assert "14 layer(s) see fewer calibration tokens than they have inputs" in caplog.text
    assert "20 tokens for 172 inputs" in caplog.text


def test_the_memory_benchmark_measures(tmp_path, monkeypatch):
    from benchmarks import memory

    monkeypatch.setattr(memory, "SIZES", dict.fromkeys(memory.SIZES, (128, 192, 2)))
    monkeypatch.setattr(memory, "VOCABULARY", 97)
    memory.write_checkpoint(tmp_path, 128, 192, 3)
    assert len(load_model(tmp_path).model.layers) == 3
    assert all(value >= 0 for value in memory.run_in_memory("gptq", "quantized", 64, 2, "cpu").values())
    assert memory.run_on_disk("nearest", 16, "cpu")["block"] > 200_000
    meter = memory.Meter("cpu")
    held = torch.ones(25 << 20)
    meter.take("gathering")
    assert meter.peaks["gathering"] >= 0.99 * held.nbytes
    assert memory.held(90.0, 100.0) == "yes (0.90)"
    assert memory.held(110.0, 100.0) == "NO (1.10)"
