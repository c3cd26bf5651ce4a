"""Shared fixtures: a fresh seed per test, shown when it fails, and small random Llamas."""

import os

import pytest
import torch
from tensor_oracle import BOTH

import aaac_ao  # (first, so that its import is what every test sees)

torch.set_num_threads(1)  # the tensors here are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seed(request):
    """Seed torch anew for every test; set AAAC_TEST_SEED to repeat a failure."""
    value = int(os.environ.get("AAAC_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    request.node.add_report_section("setup", "seed", f"AAAC_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def exact():
    """The CPU kernel in fp32, for tests with the tolerance of fp32."""
    with aaac_ao.cpu_mode("exact"):
        yield


@pytest.fixture(params=BOTH, ids=lambda kind: kind[0])
def kind(request):
    """A (format, group_size) of each format."""
    return request.param


@pytest.fixture
def tiny_llama():
    """A function that makes small random Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(hidden: int = 128, layers: int = 2, vocab: int = 97, tied: bool = False) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=hidden + 44,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval()

    return make
