"""`quantize_` with an AAACConfig: every step, in place, all or nothing."""

import copy
import logging

import pytest
import torch
from encode_oracle import torchao_version
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

from aaac_ao import AAACConfig, AAACTensor
from aaac_ao.encode import Statistics
from aaac_ao.observer import ObserverTensor


def mlp(dtype=torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 192), nn.ReLU(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 37)).to(dtype)


def weights(model: nn.Module) -> list:
    return [module.weight.data for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("kwargs", [{"group_size": 64}, {"format": "nvfp4"}])
def test_without_data(kwargs):
    model = mlp()
    expected = [AAACTensor.from_hp(w, AAACConfig(**kwargs)) for w in weights(model)]
    modules = list(model)
    quantize_(model, AAACConfig(**kwargs))
    assert list(model) == modules  # in place: the very same modules
    assert all(torch.equal(a, b) for a, b in zip(weights(model), expected, strict=True))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("weight"))
    assert "AAACTensor" in repr(model)


def test_prepare_and_convert_use_what_was_seen():
    model, config = mlp(), AAACConfig(format="nvfp4", rounding="nearest")
    x, original = torch.randn(50, 128) * torch.linspace(0.01, 3, 128), copy.deepcopy(model)
    quantize_(model, AAACConfig(format="nvfp4", rounding="nearest", step="prepare"))
    assert torch.equal(model(x), original(x))
    quantize_(model, AAACConfig(format="nvfp4", rounding="nearest", step="convert"))
    expected = AAACTensor.from_hp(original[0].weight, config, Statistics(x.square().mean(0), 50))
    assert torch.equal(model[0].weight.qdata, expected.qdata)
    without_data = AAACTensor.from_hp(original[0].weight, config)
    assert not torch.equal(expected.qdata, without_data.qdata)


def test_convert_without_batches_names_the_layers_and_changes_nothing():
    model = mlp()
    quantize_(model, AAACConfig(step="prepare"))
    model[0](torch.randn(3, 128))  # only the first layer sees data
    with pytest.raises(ValueError, match=r"2 layer\(s\).*\n  2: 0 batches seen.*\n  4: 0 batches seen"):
        quantize_(model, AAACConfig(step="convert"))
    assert all(isinstance(w, ObserverTensor) for w in weights(model))
    quantize_(model, AAACConfig(step="convert"), lambda module, name: name == "0")  # the others are not asked for
    assert [type(w) for w in weights(model)] == [AAACTensor, ObserverTensor, ObserverTensor]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named_and_nothing_changes(bad):
    model = mlp()
    with torch.no_grad():
        model[4].weight[3, 5] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"4: .*1 NaN or infinite"):
        quantize_(model, AAACConfig())
    assert all(torch.equal(before[k].nan_to_num(), v.nan_to_num()) for k, v in model.state_dict().items())
    assert not any(isinstance(w, AAACTensor) for w in weights(model))
    quantize_(model, AAACConfig(), lambda module, name: name == "0")
    assert isinstance(weights(model)[0], AAACTensor)


def test_nan_inputs_are_an_error():
    model = mlp()
    quantize_(model, AAACConfig(step="prepare"))
    model(torch.full((2, 128), float("nan")))
    with pytest.raises(ValueError, match="NaN or infinite inputs"):
        quantize_(model, AAACConfig(step="convert"))
    assert all(isinstance(w, ObserverTensor) for w in weights(model))


def test_one_config_serves_several_models():
    config, good, bad = AAACConfig(), mlp(), mlp()
    quantize_(good, config)
    with torch.no_grad():
        bad[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_(bad, config)
    assert not any(isinstance(w, AAACTensor) for w in weights(bad))


def test_twice_is_a_no_op_with_a_log_line(caplog):
    model = mlp()
    quantize_(model, AAACConfig())
    before = weights(model)
    with caplog.at_level(logging.INFO, logger="aaac_ao"):
        quantize_(model, AAACConfig(format="nvfp4"))
    assert all(a is b for a, b in zip(weights(model), before, strict=True)) or all(
        torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)
    )
    assert caplog.text.count("quantised already") == 3


def test_small_layers_are_skipped_with_a_log_line(caplog):
    model = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 256))
    with caplog.at_level(logging.INFO, logger="aaac_ao"):
        quantize_(model, AAACConfig(group_size=128))
    assert [type(w) for w in weights(model)] == [AAACTensor, torch.Tensor]
    assert "in_features 96, fewer than group_size 128: left as it is" in caplog.text


def test_convert_skips_what_was_not_prepared(caplog):
    model = mlp()
    with caplog.at_level(logging.INFO, logger="aaac_ao"):
        quantize_(model, AAACConfig(step="convert"))
    assert caplog.text.count("was not prepared") == 3
    assert not any(isinstance(w, AAACTensor) for w in weights(model))


def test_quantising_an_observed_model_without_convert_is_an_error():
    model = mlp()
    quantize_(model, AAACConfig(step="prepare"))
    with pytest.raises(ValueError, match="step='convert'"):
        quantize_(model, AAACConfig())


def test_prepare_for_loading_needs_no_valid_values():
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    quantize_(model, AAACConfig(format="nvfp4", step="prepare_for_loading"))
    source = mlp()
    quantize_(source, AAACConfig(format="nvfp4"))
    for target, value in zip(weights(model), weights(source), strict=True):
        assert {k: v.shape for k, v in target._inner().items()} == {k: v.shape for k, v in value._inner().items()}
        target.copy_(value)
        assert torch.equal(target, value)


def test_meta_model_is_refused():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="meta device"):
        quantize_(model, AAACConfig())


def test_fqn_to_config():
    model = mlp()
    configs = {"0": AAACConfig(format="nvfp4"), "re:[24]": AAACConfig(group_size=64)}
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    assert [w.format for w in weights(model)] == ["nvfp4", "int4", "int4"]


@pytest.mark.skipif(torchao_version() < (0, 17), reason="torchao targets parameters of other packages from 0.17 on")
def test_fqn_to_config_with_a_parameter_name():
    parameter = mlp()
    quantize_(parameter, FqnToConfig({"2.weight": AAACConfig()}), filter_fn=None)
    assert [type(w) for w in weights(parameter)] == [torch.Tensor, AAACTensor, torch.Tensor]


def test_a_bare_linear_is_changed_in_place():
    """Transformers hands over single layers and drops what is returned."""
    linear = nn.Linear(128, 16)
    quantize_(linear, AAACConfig())
    assert isinstance(linear.weight, AAACTensor)


def test_tied_weights_are_quantised_one_by_one():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].weight = model[0].weight
    quantize_(model, AAACConfig())
    assert torch.equal(model[0].weight, model[1].weight)


def test_modules_that_cannot_be_quantised_are_named_before_any_change():
    model = nn.Sequential(nn.Linear(128, 128), nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"2 layer\(s\).*\n  1: weight must be 2-D.*\n  2: has no parameter 'weight'"):
        quantize_(model, AAACConfig(), lambda module, name: name != "")
    assert not isinstance(model[0].weight, AAACTensor)
    parametrised = nn.Sequential(nn.Linear(128, 128), nn.utils.parametrizations.weight_norm(nn.Linear(128, 128)))
    with pytest.raises(ValueError, match="1: has no parameter 'weight'"):
        quantize_(parametrised, AAACConfig(), lambda module, name: name in "01" and name != "")
    assert not isinstance(parametrised[0].weight, AAACTensor)


def test_names_in_the_callers_scope_do_not_matter():
    def user_code(model, filter_fn):
        quantize_(model[0], AAACConfig())

    model = nn.Sequential(mlp(), mlp())
    with torch.no_grad():
        model[1][0].weight[0, 0] = float("nan")
    user_code(model, [1, 2, 3])
    assert all(isinstance(w, AAACTensor) for w in weights(model[0]))


def test_mixed_with_other_torchao_configs():
    from torchao.quantization import Int8WeightOnlyConfig

    model = mlp()
    quantize_(model, FqnToConfig({"0": Int8WeightOnlyConfig(), "re:[24]": AAACConfig()}), filter_fn=None)
    int8 = type(model[0].weight.data)
    assert int8 not in (AAACTensor, torch.Tensor)
    assert [type(w) for w in weights(model)] == [int8, AAACTensor, AAACTensor]
    quantize_(model, AAACConfig())
    assert type(model[0].weight.data) is int8
    assert model(torch.randn(3, 128)).isfinite().all()


def test_inside_torchaos_awq():
    from torchao.prototype.awq import AWQConfig

    # no ReLU: torchao's search gives channels that are always zero scales of 0.01 to 100
    model = nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 37)).bfloat16()
    x = (torch.randn(64, 128) * torch.linspace(0.1, 4, 128)).bfloat16()
    dense = model(x)
    quantize_(model, AWQConfig(AAACConfig(format="nvfp4"), step="prepare"))
    model(x)
    quantize_(model, AWQConfig(AAACConfig(format="nvfp4"), step="convert"))
    assert all(isinstance(w, AAACTensor) and w.act_pre_scale is not None for w in weights(model))
    y = model(x).float()
    assert (y - dense).norm() < 0.15 * dense.float().norm()
    first, last = (w.dequantize(torch.float32) * w.act_pre_scale.float() for w in weights(model))
    hidden = nn.functional.linear(x.float(), first, model[0].bias.float()).tanh()
    expected = nn.functional.linear(hidden, last, model[2].bias.float())
    assert (y - expected).norm() < 0.02 * expected.norm()  # a few roundings to bf16
