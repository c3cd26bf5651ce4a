"""Random Llamas of known shapes, built layer by layer in the form in which they run: no dense original is ever held."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from aaac_ao import AAACTensor
from aaac_ao.demo.compare import MODEL_DIRECTORY
from benchmarks.shapes import bytes_of, parse_format, random_weight

#: Fields of LlamaConfig by model name.
SHAPES = {
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
DEMO = "demo"
#: Dense dtypes by the name of the form.
DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCHAO_INT4 = "torchao-int4"


def config_of(name: str):
    """The LlamaConfig of a name in `SHAPES`, or of the shipped demo model."""
    from transformers import AutoConfig, LlamaConfig

    if name == DEMO:
        return AutoConfig.from_pretrained(MODEL_DIRECTORY)
    return LlamaConfig(**SHAPES[name], max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def build(name: str, form: str, device: str, head: bool = False) -> nn.Module:
    """A random model whose linear layers are in a given form.

    Args:
        name: a key of `SHAPES`, or "demo".
        form: "fp32", "bf16", "torchao-int4", or a format such as "int4-128" or "nvfp4-16".
        device: "cpu" or "cuda".
        head: put the output head in this form too; a tied one is then stored a second time.

    Raises:
        ValueError: unknown form.
    """
    from transformers import LlamaForCausalLM

    config = config_of(name)
    dtype = torch.bfloat16 if device == "cuda" or form == "bf16" else torch.float32
    make = weight_maker(form, device, dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    embedding = model.get_input_embeddings()
    embedding.weight = frozen(random_dense(*embedding.weight.shape, device, dtype))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = frozen(make(*module.weight.shape))
        elif "RMSNorm" in type(module).__name__:
            module.weight = frozen(torch.ones(module.weight.shape, device=device, dtype=dtype))
    if head:
        model.lm_head.weight = frozen(make(*model.lm_head.weight.shape))
    elif config.tie_word_embeddings:
        model.lm_head.weight = embedding.weight
    else:
        model.lm_head.weight = frozen(random_dense(*model.lm_head.weight.shape, device, dtype))
    left = [name for name, part in [*model.named_parameters(), *model.named_buffers()] if part.is_meta]
    if left:
        raise ValueError(f"no weights were made for {', '.join(left)}")
    return model.eval()


def frozen(weight: torch.Tensor) -> nn.Parameter:
    """A parameter without gradient."""
    return nn.Parameter(weight, requires_grad=False)


def random_dense(n: int, k: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A random weight [n, k] of the size of a trained one; a block of random numbers repeats in it."""
    block = torch.empty(min(n * k, 2**20), device=device, dtype=dtype).normal_(std=0.02)
    weight = torch.empty(n, k, device=device, dtype=dtype)
    for part in weight.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    return weight


def weight_maker(form: str, device: str, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
    """What makes random weights [n, k] in a form."""
    if form in DENSE:
        return lambda n, k: random_dense(n, k, device, dtype)
    if form == TORCHAO_INT4:
        return lambda n, k: torchao_int4(n, k, device)
    fmt, group_size = parse_format(form)
    return lambda n, k: random_weight(n, k, fmt, group_size, device, dtype)


def torchao_int4(n: int, k: int, device: str) -> torch.Tensor:
    """A random weight in torchao's int4 for tinygemm, groups of 128."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    with torch.device("meta"):
        layer = nn.Linear(k, n, bias=False)
    layer.weight = frozen(random_dense(n, k, device, torch.bfloat16))
    quantize_(layer, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return layer.weight.data


def bytes_per_step(model: nn.Module) -> int:
    """Bytes of the weights that one decode step reads: those of all linear layers, the output head included."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(stored_bytes(weight.data) for weight in weights)


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight as stored; of a quantised one its codes and scales."""
    if isinstance(weight, AAACTensor):
        return bytes_of(weight.qdata, weight.scale)
    names = getattr(weight, "tensor_data_names", None)
    return bytes_of(*(getattr(weight, name) for name in names)) if names else bytes_of(weight)
