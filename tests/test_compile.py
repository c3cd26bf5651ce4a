"""`torch.compile` and `torch.export` of models with `AAACTensor` weights."""

from __future__ import annotations

import pytest
import torch
from tensor_oracle import BOTH, sample
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

LAYERS = 12


class Block(nn.Module):
    """A residual block with two quantised layers, ragged in every dimension."""

    def __init__(self, kind: tuple, dtype: torch.dtype, act_pre_scale: bool = False):
        super().__init__()
        self.up, self.down = nn.Linear(80, 100, dtype=dtype), nn.Linear(100, 80, bias=False, dtype=dtype)
        for layer in (self.up, self.down):
            s = sample(*layer.weight.shape, *kind)
            s.books.mul_(0.05)
            optional = {"act_pre_scale": torch.rand(layer.in_features) + 0.5} if act_pre_scale else {}
            layer.weight = nn.Parameter(s.tensor(dtype, **optional), requires_grad=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


def _stack(kind, dtype=torch.float32, layers=LAYERS, **options) -> nn.Sequential:
    return nn.Sequential(*[Block(kind, dtype, **options) for _ in range(layers)])


@pytest.fixture(params=BOTH, ids=lambda kind: kind[0])
def kind(request):
    torch._dynamo.reset()
    return request.param


@pytest.fixture(autouse=True)
def _no_fallback():
    """Too many recompilations are an error, not a silent return to eager."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize("act_pre_scale", [False, True])
def test_one_graph_for_all_blocks(kind, act_pre_scale):
    """Regional compilation: blocks that differ in nothing but their numbers share one graph."""
    model, counter = _stack(kind, act_pre_scale=act_pre_scale), CompileCounterWithBackend("aot_eager")
    books = {tuple(block.up.weight.codebooks.flatten().tolist()) for block in model}
    assert len(books) == LAYERS
    x = torch.randn(3, 80)
    with torch.no_grad():
        expected = model(x)
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == 1


def test_the_counter_sees_a_recompilation(kind):
    """The test above would notice one graph per block: here the blocks do differ."""
    counter = CompileCounterWithBackend("aot_eager")
    blocks = [Block(kind, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
        block(torch.randn(3, 80, dtype=block.up.bias.dtype))
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model(kind, dtype):
    """With the default backend, which must not break a model of many layers into several graphs."""
    model = _stack(kind, dtype, layers=3)
    x = torch.randn(2, 3, 80, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        y = compiled(x)
    assert counter.frame_count == 1
    assert y.dtype == dtype
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2)


def test_dynamic_batch(kind):
    model, counter = _stack(kind, layers=2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = [torch.randn(m, 80) for m in (2, 3, 5, 17, 64)]
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count <= 2  # once for the first size, once for any size
        torch._dynamo.reset()
        counter.frame_count = 0
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for x in inputs:
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == 1


def test_gradients(kind):
    """Compiled training of what surrounds frozen quantised layers."""
    model = _stack(kind, layers=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (model, compiled):
        x = torch.ones(3, 80, requires_grad=True)
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([x.grad, *[block.up.bias.grad.clone() for block in model]])
    torch.testing.assert_close(grads[1], grads[0])
    assert all(bool(g.abs().sum() > 0) for g in grads[0])


def test_views_in_a_graph(kind):
    """Products of views, joins and rows of a weight trace as well as the weight itself."""
    w = sample(96, 256, *kind).tensor()

    def function(x, w):
        q, k = w.chunk(2)
        turned = w.t()
        return x @ turned, nn.functional.linear(x, q), torch.cat([q, k]).dequantize(), w[:, 64:].dequantize()

    x = torch.randn(3, 256)
    with torch.no_grad():
        got = torch.compile(function, backend="aot_eager")(x, w)
    torch.testing.assert_close(got, function(x, w))


@pytest.mark.parametrize("act_pre_scale", [False, True])
def test_export(kind, act_pre_scale):
    model = Block(kind, torch.float32, act_pre_scale).requires_grad_(False)
    x = torch.randn(3, 80)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("m", min=2, max=64)}})
    used = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert used.count(torch.ops.aten.linear.default) + used.count(torch.ops.aaac_ao.linear.default) == 2
    x = torch.randn(7, 80)
    torch.testing.assert_close(program.module()(x), model(x))
