"""Perplexity, divergence and gaps against plain formulas in fp64."""

import copy
import math
import sys
import types

import pytest
import torch
from torch import nn

from aaac_ao import AAACConfig, AAACTensor
from aaac_ao.evaluate import (
    evaluate,
    gap_recovered,
    linear_bits_per_weight,
    unigram_perplexity,
    wikitext2_test,
    windows_of,
)


def test_perplexity_and_kl(tiny_llama, monkeypatch):
    import aaac_ao.evaluate

    monkeypatch.setattr(aaac_ao.evaluate, "_CHUNK_TOKENS", 7)
    model, other = tiny_llama(), tiny_llama()
    windows = torch.randint(0, 97, (5, 12))
    result = evaluate(other, windows, model, batch_size=2)
    with torch.no_grad():
        q = other(windows).logits[:, :-1].double().log_softmax(-1)
        p = model(windows).logits[:, :-1].double().log_softmax(-1)
    loss = -q.gather(2, windows[:, 1:, None]).mean()
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.tokens == 55
    assert evaluate(model, windows, model).kl == pytest.approx(0, abs=1e-9)
    assert evaluate(model, windows).kl is None


def test_perplexity_equals_transformers_own_loss(tiny_llama):
    model, windows = tiny_llama(), torch.randint(0, 97, (1, 20))
    with torch.no_grad():
        assert math.log(evaluate(model, windows).perplexity) == pytest.approx(
            float(model(windows, labels=windows).loss), rel=1e-5
        )


def test_windows():
    ids = torch.arange(23)
    assert windows_of(ids, 5).tolist() == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert windows_of(ids.tolist(), 5, limit=2)[:, 0].tolist() == [0, 15]
    for bad in (torch.arange(3), ids.view(1, -1)):
        with pytest.raises(ValueError, match="cannot cut windows of 5"):
            windows_of(bad, 5)
    with pytest.raises(ValueError, match="windows of 1"):
        windows_of(ids, 1)


def test_nan_logits_are_an_error(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, torch.randint(0, 97, (1, 8)))
    with pytest.raises(ValueError, match=r"\[0, 8\]"):
        evaluate(model, torch.zeros(0, 8, dtype=torch.long))


def test_gap_recovered():
    assert gap_recovered(2.0, 2.0, 1.0) == 0
    assert gap_recovered(1.0, 2.0, 1.0) == 1
    assert gap_recovered(1.25, 2.0, 1.0) == 0.75
    assert gap_recovered(3.0, 2.0, 1.0) == -1
    with pytest.raises(ValueError, match="no gap"):
        gap_recovered(1.0, 2.0, 2.0)


def test_unigram_perplexity_of_uniform_tokens():
    train = torch.arange(10).repeat(50)
    windows = torch.randint(0, 10, (3, 9))
    assert unigram_perplexity(train, windows, 10) == pytest.approx(10, rel=1e-6)


def test_bits_are_counted_from_storages():
    linear = nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    quantised = copy.deepcopy(linear)
    quantised.weight = nn.Parameter(AAACTensor.from_hp(linear.weight, AAACConfig(format="nvfp4")), requires_grad=False)
    assert linear_bits_per_weight([linear]) == 16
    books_and_tensor_scale = 64 + 4
    assert linear_bits_per_weight([quantised]) == 4.5 + 8 * books_and_tensor_scale / (256 * 512)


def test_masked_vocabulary_and_training_mode(tiny_llama):
    class Masked(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.dropout = model, nn.Dropout(0.5)

        def forward(self, ids):
            out = self.model(ids)
            out.logits = self.dropout(out.logits)
            out.logits[..., 90:] = -math.inf
            return out

    reference, model = Masked(tiny_llama()).train(), Masked(tiny_llama()).train()
    windows = torch.randint(0, 90, (2, 9))
    first, second = evaluate(model, windows, reference), evaluate(model, windows, reference)
    assert first == second
    assert math.isfinite(first.kl)
    assert first.kl > 0
    assert model.training
    assert model.dropout.training


def test_wikitext2_is_joined_as_gptq_does(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return {"text": ["", " = Title = \n", "", " First line . \n"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert wikitext2_test() == "\n\n = Title = \n\n\n\n\n First line . \n"
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_wikitext2_that_cannot_be_had(monkeypatch):
    def load_dataset(*arguments, **options):
        raise RuntimeError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(OSError, match=r"no route to host.*evaluate on a text file"):
        wikitext2_test()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"aaac-ao\[eval\]"):
        wikitext2_test()
