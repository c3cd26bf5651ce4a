"""auto-round (rounding tuned by gradients): `python peer_auto_round.py JOB` in an environment with `auto-round`."""

from __future__ import annotations

from typing import Any

import peer_job
import torch
from torch import nn


def quantise(model: nn.Module, job: peer_job.Job) -> nn.Module:
    """Symmetric int4 with auto-round's defaults: 200 steps per block on batches of 8 windows, in fp32."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.pad_token = None  # nothing is padded: separators between texts count like any token
    windows, tokens = job.ids.shape
    tuner = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme={"bits": 4, "group_size": job.options["group_size"], "sym": True, "data_type": "int"},
        dataset=list(job.ids.split(8)),
        iters=job.options["iters"],
        nsamples=windows,
        seqlen=tokens,
        batch_size=8,
        seed=job.seed,
        amp=False,  # bf16 is slower than fp32 on most CPUs, and less exact
        device_map="cpu",
    )
    return tuner.quantize()[0]


def outcome(model: nn.Module, job: peer_job.Job, state: Any) -> peer_job.Outcome:
    """Weights as auto-round left them; codes, and one fp16 scale per group."""
    found = peer_job.Outcome(notes=["its constant zero points are not counted"])
    for name, layer in peer_job.linear_layers(state).items():
        scale = getattr(layer, "scale", None)
        if isinstance(scale, torch.Tensor):
            found.weights[f"{name}.weight"] = layer.weight
            found.stored_bytes[name] = layer.weight.numel() / 2 + 2 * scale.numel()
    return found


if __name__ == "__main__":
    peer_job.main(("auto-round", "transformers"), quantise, outcome)
