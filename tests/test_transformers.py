"""Saving and loading through transformers: exact, and loud when something does not fit."""

import json

import pytest
import torch
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

from aaac_ao import AAACConfig, AAACTensor
from aaac_ao.integrations.transformers import attach_hf_quantizer, load_model, save_quantized

CONFIGS = [AAACConfig(format="nvfp4"), AAACConfig(group_size=64), AAACConfig(group_size=128, codebooks="if4")]


@pytest.fixture(params=CONFIGS, ids=lambda config: f"{config.format}-{config.group_size}")
def saved(request, tiny_llama, tmp_path):
    model = tiny_llama(tied=request.param.format == "nvfp4").to(torch.bfloat16)
    quantize_(model.model, request.param)
    save_quantized(model, request.param, tmp_path / "model")
    return model, tmp_path / "model"


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip_is_exact(saved):
    model, path = saved
    for loaded in (load_model(path), AutoModelForCausalLM.from_pretrained(path)):
        assert same_weights(model, loaded)
        assert isinstance(loaded.model.layers[1].mlp.down_proj.weight, AAACTensor)
    assert "AAACConfig" in (path / "config.json").read_text()
    assert (path / "model.safetensors").stat().st_size < model.num_parameters() * 2


def test_logits_and_second_generation_of_saving(saved, tmp_path):
    model, path = saved
    loaded = load_model(path)
    ids = torch.randint(0, 97, (2, 9))
    fresh = load_model(path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, fresh(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert same_weights(model, load_model(tmp_path / "again"))


def test_layers_left_out_stay_left_out(tiny_llama, tmp_path):
    model, config = tiny_llama(), AAACConfig(group_size=64)
    quantize_(model, config, lambda module, name: name.endswith(("q_proj", "down_proj")))
    save_quantized(model, config, tmp_path / "model")
    assert same_weights(model, load_model(tmp_path / "model"))
    skipped = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.k_proj" in skipped["modules_to_not_convert"]


def test_sharded_checkpoints(tiny_llama, tmp_path):
    model, config = tiny_llama(), AAACConfig(group_size=64)
    quantize_(model.model, config)
    attach_hf_quantizer(model, config)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert same_weights(model, load_model(tmp_path / "model"))


def test_plain_models_load_too(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "plain")
    assert same_weights(model, load_model(tmp_path / "plain"))


def test_presented_dtype_can_be_chosen(saved):
    _, path = saved
    loaded = load_model(path, torch.float32)
    assert loaded.model.norm.weight.dtype == torch.float32
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        assert loaded(ids).logits.dtype == torch.float32


def test_truncated_file(saved):
    _, path = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load"):
        load_model(path)


def test_missing_weights_are_not_made_up(saved):
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, path = saved
    with safe_open(path / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    tensors.pop("model.layers.0.mlp.up_proj._weight_scale")
    save_file(tensors, path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):
        load_model(path)


def test_foreign_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(tmp_path)


def test_unquantised_models_are_refused(tiny_llama):
    with pytest.raises(ValueError, match="no AAACTensor"):
        attach_hf_quantizer(tiny_llama(), AAACConfig())


def test_quantise_on_load(tiny_llama, tmp_path):
    from transformers import TorchAoConfig

    model, config = tiny_llama().to(torch.bfloat16), AAACConfig(group_size=64)
    model.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(config), dtype="auto"
    )
    quantize_(model.model, config)
    assert same_weights(model, loaded)


def test_a_config_that_does_not_describe_the_weights_is_refused(tiny_llama):
    model = tiny_llama()
    quantize_(model.model, AAACConfig(group_size=64))
    with pytest.raises(ValueError, match=r"q_proj holds AAACTensor.*'int4'.*format='nvfp4'"):
        attach_hf_quantizer(model, AAACConfig(format="nvfp4"))
    observed = tiny_llama()
    quantize_(observed.model, AAACConfig(group_size=64, step="prepare"))
    with pytest.raises(ValueError, match="still being observed"):
        attach_hf_quantizer(observed, AAACConfig(group_size=64))
