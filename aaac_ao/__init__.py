"""4-bit weights with two activation-aware codebooks per layer (AAAC), as a torchao extension.

Importing this package registers the config and its handler with torchao, the ops with torch, and the weight class with
both for loading. It initialises no device; kernels and other libraries are imported when they are first used.
"""

import logging as _logging


class _StartUpChatter:
    """Silences torchao, while it is imported here, about CUDA extensions that nothing in this package uses."""

    _loggers = tuple(_logging.getLogger(name) for name in ("torchao", "torch.utils._pytree"))

    def __enter__(self):
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(_logging.ERROR)

    def __exit__(self, *_):
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


with _StartUpChatter():
    from aaac_ao import tensor_ops, transform  # noqa: F401  (imported for what they register)
    from aaac_ao.calibrate import calibrate_, collect_statistics
    from aaac_ao.calibrate_checkpoint import calibrate_checkpoint
    from aaac_ao.config import AAACConfig, aaac_config
    from aaac_ao.encode import Statistics
    from aaac_ao.integrations import torchao as _torchao
    from aaac_ao.ops import cpu_mode
    from aaac_ao.statistics import merge_statistics
    from aaac_ao.tensor import AAACTensor
    from aaac_ao.warming import warmup

_torchao.register()

__version__ = "0.1.0"
__all__ = [
    "AAACConfig",
    "AAACTensor",
    "Statistics",
    "aaac_config",
    "calibrate_",
    "calibrate_checkpoint",
    "collect_statistics",
    "cpu_mode",
    "merge_statistics",
    "warmup",
]
