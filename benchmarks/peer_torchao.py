"""torchao's own 4-bit methods: `python -O peer_torchao.py JOB` in an environment with `torchao` and `mslk-cuda`.

torchao's int4 and GPTQ are written for CUDA. On a CPU its own code runs unchanged, with three substitutions: the matrix
product of MSLK's kernel is done here on dequantised weights; `python -O` skips GPTQ's assertion that it is on CUDA; and
its element functions are not compiled. MSLK's quantiser itself is plain PyTorch (`MSLK_PYTHON_ONLY=1`).
"""

from __future__ import annotations

from typing import Any

import peer_job
import torch
from torch import nn

BATCH = 8


def quantise(model: nn.Module, job: peer_job.Job) -> None:
    """Quantise in place with the method that the options name."""
    methods = {
        "int4": _int4,
        "int4-hqq": _int4_hqq,
        "nvfp4": _nvfp4,
        "awq": _awq,
        "gptq-int4": _gptq,
        "gptq-nvfp4": _gptq,
    }
    _define_matrix_product()
    with torch.no_grad():
        methods[job.options["method"]](model, job)


def outcome(model: nn.Module, job: peer_job.Job, state: None) -> peer_job.Outcome:
    """Scales and zeros are rounded to bf16, as they are stored in a bf16 model."""
    found = peer_job.Outcome()
    for name, layer in peer_job.linear_layers(model).items():
        weight = layer.weight
        kind = type(weight).__name__
        if kind == "Int4Tensor":
            for key in ("scale", "zero_point"):
                setattr(weight, key, getattr(weight, key).bfloat16().float())
            dense = _dequantised(weight.qdata, weight.scale, weight.zero_point)
            stored = peer_job.bytes_of(weight.qdata) + 2 * (weight.scale.numel() + weight.zero_point.numel())
            if weight.act_pre_scale is not None:
                dense = dense * weight.act_pre_scale
                stored += 2 * weight.act_pre_scale.numel()
        elif kind == "NVFP4Tensor":
            dense = weight.dequantize(torch.float32)
            stored = peer_job.bytes_of(weight.qdata, weight.scale, weight.per_tensor_scale)
        elif hasattr(layer, "dense_from_hqq"):
            dense, stored = layer.dense_from_hqq
        else:
            continue
        found.weights[f"{name}.weight"] = dense
        found.stored_bytes[name] = stored
    return found


def _int4(model: nn.Module, job: peer_job.Job) -> None:
    from torchao.quantization import quantize_

    quantize_(model, _int4_config(job), _chosen(model, job))


def _int4_config(job: peer_job.Job) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(group_size=job.options["group_size"], set_inductor_config=False)


def _int4_hqq(model: nn.Module, job: peer_job.Job) -> None:
    """The arithmetic of int4_choose_qparams_algorithm="hqq", whose tensor packs for CUDA only."""
    from torchao.quantization import quant_primitives

    group_size = job.options["group_size"]
    for layer in peer_job.linear_layers(model, group_size).values():
        codes, scale, zero, _ = quant_primitives._choose_qparams_and_quantize_affine_hqq(
            layer.weight, nbits=4, group_size=group_size, axis=1, compute_dtype=torch.bfloat16, device="cpu"
        )
        dense = quant_primitives._dequantize_affine_tinygemm(
            codes, (1, group_size), scale.float(), zero.float(), torch.uint8, 0, 15
        )
        layer.dense_from_hqq = (dense, codes.numel() / 2 + peer_job.bytes_of(scale, zero))
        layer.weight.data.copy_(dense)


def _nvfp4(model: nn.Module, job: peer_job.Job) -> None:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, NVFP4WeightOnlyConfig(), _chosen(model, job))


def _awq(model: nn.Module, job: peer_job.Job) -> None:
    from torchao.prototype.awq import AWQConfig
    from torchao.quantization import quantize_

    chosen = _chosen(model, job)
    quantize_(model, AWQConfig(_int4_config(job), step="prepare"), chosen)
    for batch in job.ids[: job.options["windows"]].split(BATCH):
        model(batch)
    quantize_(model, AWQConfig(_int4_config(job), step="convert"), chosen)


def _gptq(model: nn.Module, job: peer_job.Job) -> None:
    """Block by block on the outputs of the quantised blocks before, as torchao's gptq_example does it."""
    from torchao.prototype.gptq import GPTQConfig
    from torchao.prototype.gptq import api as gptq_api
    from torchao.prototype.mx_formats.inference_workflow import NVFP4DynamicActivationNVFP4WeightConfig
    from torchao.quantization import quantize_

    if job.options["method"] == "gptq-int4":
        base = _int4_config(job)
    else:
        base = NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
        gptq_api._nvfp4_qdq_fn = gptq_api._nvfp4_with_precalculated_scales_qdq
        gptq_api._nvfp4_q_fn = gptq_api._nvfp4_with_precalculated_scales_q
    torch.cuda.synchronize = lambda *_: None
    chosen = _chosen(model, job)
    quantize_(model, GPTQConfig(step="observe", base_config=base), chosen)
    decoder = model.get_decoder()
    states = [decoder.embed_tokens(batch) for batch in job.ids.split(BATCH)]
    positions = torch.arange(job.ids.shape[1])[None]
    for block in decoder.layers:
        arguments = {"position_ids": positions, "position_embeddings": decoder.rotary_emb(states[0], positions)}
        for state in states:
            block(state, **arguments)
        observed = [m for m in block.modules() if type(getattr(m, "weight", None)).__name__ == "GPTQObserverTensor"]
        for layer in observed:
            quantize_(layer, GPTQConfig(step="convert", base_config=base))
        if job.options["method"] == "gptq-nvfp4":
            for layer in observed:  # a weight-only comparison: the activations stay as they are
                layer.weight.act_quant_kwargs = None
        states = [_first(block(state, **arguments)) for state in states]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _chosen(model: nn.Module, job: peer_job.Job) -> Any:
    """A filter for `quantize_`: the layers whose shapes torchao's formats can hold."""
    group_size = job.options.get("group_size")
    layers = peer_job.linear_layers(model, group_size or 16)
    names = {name for name, layer in layers.items() if group_size or layer.out_features % 16 == 0}
    return lambda module, name: name in names


def _dequantised(qdata: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Dense [N, K] of MSLK's layout: two signed codes per byte, low nibble first; scale and zero [K / group, N]."""
    low, high = (qdata << 4) >> 4, qdata >> 4  # int8: arithmetic shifts keep the sign
    codes = torch.stack([low, high], dim=-1).flatten(-2).float()
    group_size = codes.shape[1] // scale.shape[0]
    spread = [t.float().t().repeat_interleave(group_size, dim=1) for t in (scale, zero)]
    return codes * spread[0] + spread[1]


def _define_matrix_product() -> None:
    """`mslk::bf16i4bf16_rowwise` for the CPU."""
    library = torch.library.Library("mslk", "FRAGMENT")
    library.define("bf16i4bf16_rowwise(Tensor x, Tensor qdata, Tensor scale, Tensor zero) -> Tensor")
    library.impl("bf16i4bf16_rowwise", lambda x, *weight: x @ _dequantised(*weight).to(x.dtype).t(), "CPU")
    _define_matrix_product.library = library  # it works as long as this object lives


if __name__ == "__main__":
    peer_job.main(("torchao", "mslk-cuda"), quantise, outcome)
