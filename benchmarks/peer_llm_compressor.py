"""llm-compressor's GPTQ (act-order): `python peer_llm_compressor.py JOB` in an environment with `llmcompressor`."""

from __future__ import annotations

import peer_job
import torch
from torch import nn


def quantise(model: nn.Module, job: peer_job.Job) -> None:
    """Symmetric int4 with llm-compressor's defaults: columns in the order of their activations, block after block."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": job.options["group_size"],
    }
    chosen = sorted(peer_job.linear_layers(model, job.options["group_size"]))
    recipe = GPTQModifier(config_groups={"group_0": {"targets": chosen, "weights": weights}}, actorder="static")
    rows = {"input_ids": job.ids.tolist(), "attention_mask": torch.ones_like(job.ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=job.ids.shape[1],
        num_calibration_samples=len(job.ids),
        shuffle_calibration_samples=False,
        batch_size=8,
    )


def outcome(model: nn.Module, job: peer_job.Job, state: None) -> peer_job.Outcome:
    """Scales are rounded to bf16, as they are stored in a bf16 model."""
    found = peer_job.Outcome()
    for name, layer in peer_job.linear_layers(model).items():
        scale = getattr(layer, "weight_scale", None)
        if scale is None:
            continue
        spread = scale.repeat_interleave(layer.in_features // scale.shape[1], dim=1)
        codes = (layer.weight / spread).round()
        found.weights[f"{name}.weight"] = codes * spread.bfloat16().float()
        found.stored_bytes[name] = layer.weight.numel() / 2 + 2 * scale.numel()
    return found


if __name__ == "__main__":
    peer_job.main(("llmcompressor", "transformers"), quantise, outcome)
