"""`warmup` runs one product per kind of layer and number of tokens."""

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, warmup
from aaac_ao.warming import _distinct_layers


def model() -> nn.Module:
    layers = [nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)]
    result = nn.Sequential(*layers, nn.Linear(64, 32, bias=True), nn.LayerNorm(32)).bfloat16()
    quantize_(result, AAACConfig(group_size=32, codebooks="nf4"))
    return result


def test_layers_of_one_kind_count_once():
    layers = list(_distinct_layers(model(), "cpu"))
    assert [(tuple(weight.shape), bias is None) for weight, bias in layers] == [
        ((32, 64), True),
        ((64, 32), True),
        ((32, 64), False),
    ]


def test_factors_of_x_make_a_kind_of_their_own():
    """A kernel that multiplies them in is another one, for every dtype they have."""
    layers = model()
    layers[1].weight = nn.Parameter(layers[1].weight.data._replace(act_pre_scale=torch.ones(64)), requires_grad=False)
    assert len(list(_distinct_layers(layers, "cpu"))) == 4


def test_every_kind_runs_for_every_number_of_tokens(monkeypatch):
    calls = []
    real = nn.functional.linear
    monkeypatch.setattr("aaac_ao.warming._distinct_layers", lambda model, device: _distinct_layers(model, "cpu"))
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: calls.append(x.shape[0]) or real(x, *rest))
    assert warmup(model(), [4, 1, 4]) == 6
    assert calls == [1, 4] * 3


def test_a_model_on_a_cpu_needs_none():
    assert warmup(model()) == 0


def test_batch_sizes_are_checked():
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        warmup(model(), (2, 0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_can_be_captured_after_warming_up(caplog):
    layers = model().cuda()
    x = torch.randn(4, 64, device="cuda").bfloat16()
    warmup(layers, (4,))
    expected = layers[0](x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers[0](x)
    graph.replay()
    assert torch.equal(y, expected)
    assert not caplog.records
