"""hqq (half-quadratic quantisation, data-free): `python peer_hqq.py JOB` in an environment with `hqq`."""

from __future__ import annotations

import peer_job
import torch
from torch import nn


def quantise(model: nn.Module, job: peer_job.Job) -> None:
    """Replace the linear layers by HQQLinear, on the CPU."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=job.options["group_size"], axis=1)
    for name, layer in peer_job.linear_layers(model).items():
        quantised = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        model.set_submodule(name, quantised)


def outcome(model: nn.Module, job: peer_job.Job, state: None) -> peer_job.Outcome:
    """Codes as packed; scale and zero in fp16, hqq's default."""
    from hqq.core.quantize import HQQLinear

    found = peer_job.Outcome()
    for name, layer in model.named_modules():
        if isinstance(layer, HQQLinear):
            for key in ("scale", "zero"):
                layer.meta[key] = layer.meta[key].half().float()
            found.weights[f"{name}.weight"] = layer.dequantize()
            zeros_and_scales = layer.meta["scale"].numel() + layer.meta["zero"].numel()
            found.stored_bytes[name] = peer_job.bytes_of(layer.W_q) + 2 * zeros_and_scales
    return found


if __name__ == "__main__":
    peer_job.main(("hqq",), quantise, outcome)
