"""4-bit weights with two activation-aware codebooks per layer (AAAC), as a torchao extension.

Importing this package registers the config and its handler with torchao, the ops with torch, and the weight class with
both for loading. It initialises no device; kernels and other libraries are imported when they are first used.
"""

from aaac_ao import tensor_ops, transform  # noqa: F401  (imported for what they register)
from aaac_ao.config import AAACConfig, aaac_config
from aaac_ao.encode import Statistics
from aaac_ao.integrations import torchao as _torchao
from aaac_ao.tensor import AAACTensor

_torchao.register()

__version__ = "0.1.0"
__all__ = ["AAACConfig", "AAACTensor", "Statistics", "aaac_config"]
