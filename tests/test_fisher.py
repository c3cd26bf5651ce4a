"""Fisher information of layers' outputs, against its definition; `calibrate_(fisher=True)`."""

import copy
import weakref

import pytest
import torch
from torch import nn

from aaac_ao import AAACConfig, AAACTensor, calibrate_, fisher
from aaac_ao.encode import OutputMetric
from aaac_ao.encode.rows import OUTPUT_DAMPING
from aaac_ao.fisher import Importance, importance_of
from aaac_ao.moments import InputSums
from aaac_ao.shifts import OutputShifts

CONFIG = AAACConfig(group_size=64)


class Small(nn.Module):
    """Two linear layers on embeddings; logits by themselves."""

    def __init__(self, vocab: int = 11):
        super().__init__()
        self.embed, self.first, self.head = nn.Embedding(vocab, 64), nn.Linear(64, 64), nn.Linear(64, vocab)

    def forward(self, ids):
        return self.head(torch.tanh(self.first(self.embed(ids))))


def test_it_is_the_expectation_over_the_model_s_own_labels():
    model = Small()
    ids = torch.randint(0, 11, (40, 200))
    metric = importance_of(model, [ids], {"first": model.first}, progress=False).metrics["first"].matrix
    hidden = model.first(model.embed(ids)).detach().flatten(0, 1).requires_grad_()
    log_p = model.head(torch.tanh(hidden)).log_softmax(-1)
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for label in range(11):  # every label with its probability, none drawn
        (g,) = torch.autograd.grad(log_p[:, label].sum(), hidden, retain_graph=True)
        exact += ((g * log_p[:, label].detach().exp()[:, None]).T @ g).double()
    expected = exact / exact.diagonal().mean() + OUTPUT_DAMPING * torch.eye(64)
    assert (metric.double() - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("small", [64, 2048])
def test_only_what_can_be_used_is_gathered_and_the_model_stays_as_it_is(tiny_llama, monkeypatch, small):
    monkeypatch.setattr(fisher, "SMALL_OUTPUTS", small)
    model = tiny_llama().train()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    importance = importance_of(model, [torch.randint(0, 97, (2, 12))], layers, progress=False)
    metrics = importance.metrics
    wide = ("gate_proj", "up_proj") if small < 172 else ()
    assert set(metrics) == {n for n in layers if not n.endswith(wide)}
    assert set(importance.sizes) == set(layers)
    for name, metric in metrics.items():
        assert len(metric) == layers[name].out_features
        assert torch.equal(metric.matrix, metric.matrix.T) or torch.allclose(metric.matrix, metric.matrix.T, atol=1e-5)
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_does_not_count(tiny_llama):
    model = tiny_llama()
    layers = {"o": model.model.layers[0].self_attn.o_proj}
    ids = torch.randint(1, 97, (3, 10))  # the embedding of token 0 is zero: its derivatives are huge and rule all
    padded = torch.cat([ids, torch.randint(1, 97, (3, 5))], dim=1)
    mask = (torch.arange(15) < 10).long().expand(3, 15)
    seen = []
    for batch in ({"input_ids": ids, "attention_mask": mask[:, :10]}, {"input_ids": padded, "attention_mask": mask}):
        seen.append(importance_of(model, [batch] * 40, layers, progress=False).metrics["o"].matrix)
    # other labels are drawn, so equal up to noise; the padding alone would be a third of all tokens
    assert (seen[0] - seen[1]).norm() / seen[0].norm() < 0.3


def test_sizes_of_tokens(monkeypatch):
    """|g| of every token, batch by batch, for labels that are known."""
    model = Small()
    batches = [torch.randint(0, 11, shape) for shape in ((4, 9), (2, 30))]
    monkeypatch.setattr(fisher, "_draw", lambda logits, generator: logits.argmin(-1))
    sizes = importance_of(model, batches, {"first": model.first}, progress=False).sizes["first"]
    for ids, size in zip(batches, sizes, strict=True):
        hidden = model.first(model.embed(ids)).detach().flatten(0, 1).requires_grad_()
        log_p = model.head(torch.tanh(hidden)).log_softmax(-1)
        (g,) = torch.autograd.grad(log_p.amin(-1).sum(), hidden)
        torch.testing.assert_close(size.float(), g.norm(dim=1), rtol=5e-3, atol=0)


def test_weights_of_tokens():
    one = [torch.tensor([0.0, 2.0, 4.0]).bfloat16(), torch.tensor([6.0]).bfloat16()]
    two = [torch.tensor([1.0, 1.0, 0.0]).bfloat16(), torch.tensor([3.0]).bfloat16()]
    importance = Importance(sizes={"one": one, "two": two, "other": one, "zero": [torch.zeros(3), torch.zeros(1)]})
    weights = torch.cat(importance.token_weights(["one", "two"]))
    squares = torch.tensor([0.0, 4, 16, 36]) / 56 + torch.tensor([1.0, 1, 0, 9]) / 11
    expected = squares**fisher.TOKEN_POWER
    torch.testing.assert_close(weights, expected / expected.mean())
    assert importance.token_weights(["one", "two"]) is None  # taken out
    assert importance.token_weights(["other", "unknown"]) is None
    assert importance.token_weights(["zero"]) is None
    assert importance.sizes == {}


def test_layers_that_see_some_tokens_or_all_twice_have_no_weights():
    class Twice(Small):
        def forward(self, ids):
            h = self.embed(ids)
            h = h + self.first(torch.tanh(self.first(h)))
            return self.head(torch.cat([self.few(h[:, :1]), h[:, 1:]], dim=1))

    model = Twice()
    model.few = nn.Linear(64, 64)
    layers = {"first": model.first, "few": model.few, "head": model.head}
    assert set(importance_of(model, [torch.randint(0, 11, (3, 7))] * 2, layers, progress=False).sizes) == {"head"}


@pytest.mark.parametrize("outputs", [8, 200])
def test_a_weight_is_a_number_of_times(outputs):
    """In the sums over inputs, and in those over differences of outputs."""
    first, base = nn.Linear(40, outputs), nn.Identity()
    then, now = ({first: torch.randn(1, 30, 40), base: torch.randn(1, 30, outputs)} for _ in range(2))
    times = torch.randint(0, 4, (30,))
    results = []
    for weights, index in ((times.float(), torch.arange(30)), (None, torch.arange(30).repeat_interleave(times))):
        picked = [{m: [x[:, index]] for m, x in seen.items()} for seen in (then, now)]
        sums, shifts = InputSums.zeros(40, "cpu", full=True), OutputShifts({"first": first}, {"first": base})
        sums.add(picked[1][first][0], weights)
        shifts.add(*picked, weights)
        assert int(sums.tokens) == len(index)
        results.append((sums.squares, sums.hessian, shifts.take("first", 1)))
    for weighted, repeated in zip(*results, strict=True):
        torch.testing.assert_close(weighted, repeated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_every_layer_has_weighted_tokens_and_padding_none(tiny_llama, monkeypatch, propagate):
    seen, add = [], InputSums.add
    monkeypatch.setattr(InputSums, "add", lambda self, x, weights=None: seen.append(weights) or add(self, x, weights))
    mask = (torch.arange(12) < 9).long().expand(4, 12)
    batches = [{"input_ids": torch.randint(0, 97, (4, 12)), "attention_mask": mask} for _ in range(3)]
    calibrate_(tiny_llama(), CONFIG, batches, progress=False, fisher=True, propagate=propagate)
    assert len(seen) >= 3 * 4 * 2  # batches, stages, blocks
    for weights in seen:
        assert weights.shape == (48,)
        assert bool((weights.view(4, 12)[:, 9:] == 0).all())
        assert bool((weights > 0).any())


def test_calibrate_with_fisher_is_repeatable_and_another_result(tiny_llama, monkeypatch):
    batches, models = [torch.randint(0, 97, (4, 32)) for _ in range(3)], []
    start = tiny_llama()
    joined = []
    monkeypatch.setattr(
        OutputMetric, "joined", classmethod(lambda cls, parts: joined.append(weakref.ref(parts[0])) or parts[0])
    )
    for weighed in (True, True, False):
        model = copy.deepcopy(start)
        calibrate_(model, CONFIG, batches, progress=False, fisher=weighed)
        models.append(
            {n: m.weight for n, m in model.named_modules() if isinstance(getattr(m, "weight", 0), AAACTensor)}
        )
    assert len(joined) == 2 * 2 * 7  # runs, blocks, layers
    assert all(metric() is None for metric in joined)  # gone as soon as they were used
    assert models[0].keys() == models[2].keys()
    assert all(torch.equal(w, models[1][name]) for name, w in models[0].items())
    changed = {name.rsplit(".", 1)[1] for name, w in models[0].items() if not torch.equal(w, models[2][name])}
    assert {"q_proj", "o_proj", "down_proj"} <= changed


@pytest.mark.parametrize("rounding", ["gptq", "gptq-thorough"])
def test_with_shared_books_and_original_inputs(tiny_llama, rounding):
    model, config = tiny_llama(), AAACConfig(group_size=64, rounding=rounding)
    calibrate_(model, config, [torch.randint(0, 97, (4, 32))], progress=False, fisher=True, share_codebooks=True,
               propagate="original")  # fmt: skip
    q, v = (getattr(model.model.layers[1].self_attn, f"{name}_proj").weight for name in "qv")
    assert torch.equal(q.codebooks, v.codebooks)


def test_what_cannot_be_done(tiny_llama, tmp_path):
    model, batches = tiny_llama(), [torch.randint(0, 97, (2, 8))]
    with pytest.raises(ValueError, match="do not go together"):
        calibrate_(model, CONFIG, batches, progress=False, fisher=True, awq=True)
    with pytest.raises(ValueError, match="needs rounding 'gptq', 'gptq-thorough' or 'auto', got 'nearest'"):
        calibrate_(model, AAACConfig(group_size=64, rounding="nearest"), batches, progress=False, fisher=True)
    with pytest.raises(ValueError, match="needs batches"):
        calibrate_(model, CONFIG, statistics=tmp_path / "none", progress=False, fisher=True)
    with pytest.raises(ValueError, match="has logits"):
        calibrate_(model.model, CONFIG, batches, progress=False, fisher=True)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    layers = {"down": model.model.layers[0].mlp.down_proj}
    with pytest.raises(ValueError, match="calibration batch 0 gives NaN"):
        importance_of(model, batches, layers, progress=False)
    assert not any(isinstance(getattr(m, "weight", None), AAACTensor) for m in model.modules())
