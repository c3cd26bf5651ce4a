"""bitsandbytes NF4 (data-free): `python peer_bitsandbytes.py JOB` in an environment with `bitsandbytes`."""

from __future__ import annotations

import peer_job
from torch import nn


def quantise(model: nn.Module, job: peer_job.Job) -> None:
    """Replace the linear layers by Linear4bit, whose weight is quantised when it moves to its device."""
    import bitsandbytes as bnb

    for name, layer in peer_job.linear_layers(model).items():
        quantised = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            compress_statistics=job.options["double_quantisation"],
        )
        quantised.weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            blocksize=job.options["group_size"],
            quant_type="nf4",
            compress_statistics=job.options["double_quantisation"],
        )
        quantised.bias = layer.bias
        model.set_submodule(name, quantised.to("cpu"))


def outcome(model: nn.Module, job: peer_job.Job, state: None) -> peer_job.Outcome:
    """Codes and absmax as stored; the shared 16-entry table counts nothing."""
    import bitsandbytes as bnb

    found = peer_job.Outcome()
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            state = layer.weight.quant_state
            found.weights[f"{name}.weight"] = bnb.functional.dequantize_4bit(layer.weight.data, state)
            stored = [layer.weight.data, state.absmax]
            if state.nested:
                stored += [state.state2.absmax, state.offset]
            found.stored_bytes[name] = peer_job.bytes_of(*stored)
    return found


if __name__ == "__main__":
    peer_job.main(("bitsandbytes",), quantise, outcome)
