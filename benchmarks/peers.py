"""The methods of other packages, each run by its own package in an environment of its own, on the CPU.

An environment is `.venv-peers/NAME` with the packages of `benchmarks/environments/NAME.txt`; `make bench` builds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.methods import Method

ENVIRONMENTS = Path(__file__).resolve().parents[1] / ".venv-peers"

#: torchao's AWQ keeps and replays every input of every layer: 256 windows would need gigabytes and most of an hour.
AWQ_WINDOWS = 32

_KERNEL = "torchao's own code; only the product of MSLK's CUDA kernel is replaced by one on dequantised weights"
_HQQ = "torchao's own arithmetic; its tensor, which packs for CUDA only, is left out"
_AWQ = f"{_KERNEL}; calibrated on {AWQ_WINDOWS} of the windows at most, because it replays every input"
_GPTQ = f"{_KERNEL}; block by block as in torchao's example, past its assertion of a CUDA device"
_NVFP4 = "weights only, block by block as in torchao's example, past its assertion of a CUDA device"


def _torchao(name: str, setting: str, note: str, uses_data: bool, **options: Any) -> Method:
    # -O: GPTQ asserts that it runs on CUDA, and nothing in it needs that
    return Method(name, setting, "peer_torchao.py", options, uses_data, "light", ("-O",), note)


def _light(name: str, setting: str, script: str, **options: Any) -> Method:
    return Method(name, setting, script, options, False, "light")


#: int4 of torchao and hqq stores a zero point per group: more bits than the group size alone says.
PEERS: tuple[Method, ...] = (
    _torchao("torchao int4", "int4-g128", _KERNEL, False, method="int4", group_size=128),
    _torchao("torchao int4", "int4-g64", _KERNEL, False, method="int4", group_size=64),
    _torchao("torchao int4", "int4-g32", _KERNEL, False, method="int4", group_size=32),
    _torchao("torchao int4 HQQ", "int4-g64", _HQQ, False, method="int4-hqq", group_size=64),
    _torchao("torchao NVFP4", "nvfp4-g16", "", False, method="nvfp4"),
    _torchao("torchao AWQ", "int4-g64", _AWQ, True, method="awq", group_size=64, windows=AWQ_WINDOWS),
    _torchao("torchao GPTQ", "int4-g64", _GPTQ, True, method="gptq-int4", group_size=64),
    _torchao("torchao GPTQ", "int4-g32", _GPTQ, True, method="gptq-int4", group_size=32),
    _torchao("torchao GPTQ", "nvfp4-g16", _NVFP4, True, method="gptq-nvfp4"),
    _light("hqq", "int4-g64", "peer_hqq.py", group_size=64),
    _light("bitsandbytes NF4", "nf4-g64", "peer_bitsandbytes.py", group_size=64, double_quantisation=False),
    _light("bitsandbytes NF4, double", "nf4-g64", "peer_bitsandbytes.py", group_size=64, double_quantisation=True),
    Method(
        "auto-round",
        "int4-g32",
        "peer_auto_round.py",
        {"group_size": 32, "iters": 200},
        True,
        "auto-round",
        note="200 steps per block in fp32",
    ),
    Method(
        "llm-compressor GPTQ",
        "int4-g32",
        "peer_llm_compressor.py",
        {"group_size": 32},
        True,
        "llm-compressor",
        note="act-order (static), block by block",
    ),
)


def interpreter(environment: str) -> Path:
    """The Python of an environment.

    Raises:
        FileNotFoundError: it was not built.
    """
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"no environment .venv-peers/{environment}; `make peers` builds it")
    return python
