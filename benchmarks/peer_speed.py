"""Times of torchao's HQQ and GPTQ on one layer: `python -O peer_speed.py FOLDER REPEATS`.

Started by `benchmarks.encode_speed`. `python -O` skips GPTQ's assertion of a CUDA device; its element functions for
NVFP4 are not compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peer_job
import torch
from safetensors.torch import load_file


def main() -> None:
    """Write seconds.json: seconds, or the reason why there are none, by method."""
    from torchao.prototype.gptq import GPTQConfig
    from torchao.prototype.gptq import api as gptq_api
    from torchao.prototype.mx_formats.inference_workflow import NVFP4DynamicActivationNVFP4WeightConfig
    from torchao.quantization import Int4WeightOnlyConfig, quant_primitives

    folder, repeats = Path(sys.argv[1]), int(sys.argv[2])
    layer = load_file(folder / "layer.safetensors")
    weight, hessian = layer["weight"], layer["hessian"]
    start = slice(peer_job.WARM_UP)
    torch.cuda.synchronize = lambda *_: None
    gptq_api._nvfp4_qdq_fn = gptq_api._nvfp4_with_precalculated_scales_qdq
    gptq_api._nvfp4_q_fn = gptq_api._nvfp4_with_precalculated_scales_q

    def hqq(weight: torch.Tensor, _: torch.Tensor) -> None:
        quant_primitives._choose_qparams_and_quantize_affine_hqq(
            weight, nbits=4, group_size=64, axis=1, compute_dtype=torch.bfloat16, device="cpu"
        )

    def gptq(base: Any) -> Callable[[torch.Tensor, torch.Tensor], Any]:  # it writes into the weight and the Hessian
        return lambda w, h: gptq_api.gptq_quantize(h.clone(), w.clone(), GPTQConfig("convert", base))

    nvfp4 = NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)
    calls = {"torchao int4 HQQ": hqq, "torchao GPTQ nvfp4 g16": gptq(nvfp4)}
    for size in (64, 128):
        int4 = Int4WeightOnlyConfig(group_size=size, set_inductor_config=False)
        calls[f"torchao GPTQ int4 g{size}"] = gptq(int4)
    seconds: dict[str, float | str] = {}
    with torch.no_grad():
        for name, call in calls.items():
            try:
                call(weight[start, start].contiguous(), hessian[start, start].contiguous())
                seconds[name] = peer_job.median_seconds(partial(call, weight, hessian), repeats)
            except Exception as error:  # whatever a package raises becomes a row of the table
                seconds[name] = f"{type(error).__name__}: {error}"
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
