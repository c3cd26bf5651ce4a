"""Makes torchao's own serialisation know the classes of this package.

torchao has no public registration for tensor subclasses of other packages: its containers are extended in place, which
other modules that hold the same objects then see.
"""

from __future__ import annotations

from torchao.core.config import ALLOWED_AO_MODULES
from torchao.prototype.safetensors import safetensors_utils

from aaac_ao.tensor import AAACTensor


def register() -> None:
    """Let configs (`config_from_dict`) and weights (safetensors) of this package be read back by torchao."""
    ALLOWED_AO_MODULES.add("aaac_ao")
    safetensors_utils.ALLOWED_CLASSES["AAACTensor"] = AAACTensor
    if "AAACTensor" not in safetensors_utils.ALLOWED_TENSORS_SUBCLASSES:
        safetensors_utils.ALLOWED_TENSORS_SUBCLASSES.append("AAACTensor")
