"""Saving quantised transformers models, and loading them back with every silent failure made loud.

The files are ordinary transformers checkpoints: `from_pretrained` reads them wherever `aaac_ao` was imported before.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from aaac_ao.config import AAACConfig
from aaac_ao.observer import ObserverTensor
from aaac_ao.tensor import AAACTensor


def attach_hf_quantizer(model: nn.Module, config: AAACConfig) -> None:
    """Give a quantised transformers model what `save_pretrained` needs to write it.

    Args:
        model: a transformers model with `AAACTensor` weights.
        config: the settings it was quantised with.

    Raises:
        ValueError: the model has no quantised weight, one that is still observed, or one of another format.
    """
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linears.items():
        weight = module.weight
        if isinstance(weight, ObserverTensor):
            raise ValueError(f"{name} is still being observed: quantise with step='convert' first")
        if isinstance(weight, AAACTensor) and (weight.format, weight.group_size) != (config.format, config.group_size):
            raise ValueError(f"{name} holds {weight}, which is not what {config} describes")
    plain = [name for name, module in linears.items() if not isinstance(module.weight, AAACTensor)]
    if len(plain) == len(linears):
        raise ValueError("the model has no AAACTensor weight: quantise it first")
    quantization_config = TorchAoConfig(
        quant_type=dataclasses.replace(config, step="prepare_for_loading"), modules_to_not_convert=plain or None
    )
    model.config.quantization_config = quantization_config
    model.hf_quantizer = TorchAoHfQuantizer(quantization_config, pre_quantized=True)


def save_quantized(model: nn.Module, config: AAACConfig, directory: str | Path, tokenizer: Any = None) -> None:
    """Write a quantised transformers model, and its tokenizer if given, to `directory`.

    Raises:
        ValueError: the model has no quantised weight.
    """
    attach_hf_quantizer(model, config)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def write_config(model: nn.Module, config: AAACConfig, directory: str | Path, tokenizer: Any = None) -> None:
    """Write all files of a checkpoint but its weights, as `save_quantized` would, the config last.

    Args:
        model: quantised; its values are not looked at and may be on the meta device.
        config: the settings it was quantised with.
        directory: an existing directory.
        tokenizer: is written too if given.
    """
    attach_hf_quantizer(model, config)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    model.config.save_pretrained(directory)


def empty_model(directory: str | Path, dtype: torch.dtype | None) -> nn.Module:
    """The causal language model of a local checkpoint with its parameters on the meta device, in evaluation mode.

    Buffers that the checkpoint does not hold, as rotary frequencies, have their values.

    Args:
        directory: a local checkpoint.
        dtype: of the parameters where the checkpoint's config names none.

    Raises:
        ValueError: a config that cannot be read, a model that is quantised already, or one that keeps some parameters
            in fp32 whatever its dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    try:
        config = AutoConfig.from_pretrained(directory)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantised already")
        # as accelerate's empty-weights loading does it, through a public hook of torch
        handle = register_module_parameter_registration_hook(on_meta)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype if config.dtype is None else config.dtype)
        finally:
            handle.remove()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {directory}: {error}") from error
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or [])}
    kept |= {*(getattr(model, "_keep_in_fp32_modules", None) or [])} if model.dtype == torch.float16 else set()
    if kept:
        raise ValueError(f"{type(model).__name__} keeps {', '.join(sorted(kept))} in fp32: load it and use calibrate_")
    if (Path(directory) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def load_model(name_or_path: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a causal language model, quantised or not, and make sure that every weight came from the checkpoint.

    Args:
        name_or_path: a local directory or a hub name.
        dtype: dtype of the weights, or the one they present if they are quantised; default: the checkpoint's.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file that is truncated or not a checkpoint, or weights that are missing, left over or of wrong
            shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = Path(name_or_path)
    if path.is_absolute() and not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory with a model")
    try:
        _check_complete(path)
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype="auto" if dtype is None else dtype, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot load {name_or_path}: {error}") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{name_or_path} does not fit its model, some weights would be random: {wrong}")
    _allow_saving_again(model)
    return model.eval()


def _check_complete(directory: Path) -> None:
    """Raise a ValueError that names the quantised weights of which a part is not in the files of a local checkpoint."""
    from safetensors import safe_open

    keys, parts = set(), {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            keys.update(opened.keys())
            metadata = opened.metadata() or {}
        for name in json.loads(metadata.get("tensor_names", "[]")):
            described = json.loads(metadata[name])
            if described["_type"] == AAACTensor.__name__:
                module, parameter = name.rsplit(".", 1)
                parts.update({f"{module}._{parameter}_{part}": name for part in described["_tensor_data_names"]})
    missing = sorted({name for key, name in parts.items() if key not in keys})
    if missing:
        raise ValueError(f"parts of these weights are missing: {', '.join(missing)}")


def _allow_saving_again(model: nn.Module) -> None:
    """Drop the note that weights were read through torchao: transformers cannot reverse that step, nor need it."""
    conversions = getattr(model, "_weight_conversions", None) or []
    plain = [c for c in conversions if "TorchAoDeserialize" not in {type(o).__name__ for o in _operations(c)}]
    if len(plain) < len(conversions):
        model._weight_conversions = plain


def _operations(conversion: Any) -> list:
    return getattr(conversion, "operations", None) or []
