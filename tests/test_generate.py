"""Greedy generation equals transformers' own, compiled as one graph."""

import pytest
import torch
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

from aaac_ao import AAACConfig
from aaac_ao.generate import generate


def assert_greedy(model, prompt, ids, new_tokens):
    """Every new token is the best one by a pass without a cache, up to rounding: random models are close to ties."""
    assert len(ids) == len(prompt) + new_tokens
    assert torch.equal(ids[: len(prompt)], prompt)
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, ids[len(prompt) :, None])[:, 0]
    assert (chosen >= logits.amax(1) - 1e-4 * logits.abs().amax()).all()


@pytest.mark.parametrize("config", [None, AAACConfig(format="nvfp4"), AAACConfig(group_size=64)])
def test_equals_decoding_without_a_cache(tiny_llama, config):
    model = tiny_llama()
    if config is not None:
        quantize_(model.model, config)
    prompt = torch.randint(0, 97, (5,))
    assert_greedy(model, prompt, generate(model, prompt, 12, compile_step=False).ids, 12)


def test_compiled_decoding_is_one_graph_for_all_steps(tiny_llama):
    model = tiny_llama(layers=3)
    quantize_(model.model, AAACConfig(format="nvfp4"))
    prompt = torch.randint(0, 97, (5,))
    torch._dynamo.reset()
    counters.clear()
    result = generate(model, prompt, 10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_greedy(model, prompt, result.ids, 10)
    assert result.tokens_per_second > 0


def test_a_batch_equals_its_prompts_one_by_one(tiny_llama):
    model = tiny_llama()
    prompts = torch.randint(0, 97, (3, 5))
    together = generate(model, prompts, 8, compile_step=False).ids
    assert together.shape == (3, 13)
    for prompt, ids in zip(prompts, together, strict=True):
        assert_greedy(model, prompt, ids, 8)


def test_bad_requests(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match="64 positions"):
        generate(model, torch.zeros(60, dtype=torch.long), 10)
    for shape in ((0,), (2, 0), (1, 1, 3)):
        with pytest.raises(ValueError, match="need prompts of shape"):
            generate(model, torch.zeros(shape, dtype=torch.long), 10)
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        generate(model, torch.zeros(3, dtype=torch.long), 1)
