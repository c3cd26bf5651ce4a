"""`AAACConfig`: defaults, everything it rejects, and its way through torchao's JSON."""

import itertools
import json

import pytest
import torch
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

from aaac_ao import AAACConfig, aaac_config

FORMATS = [("int4", 128), ("int4", 64), ("int4", 32), ("nvfp4", 16)]
CODEBOOKS = ["learned", "int4", "fp4", "nf4", "bof4", "bof4-s", "if4"]
STEPS = [None, "prepare", "convert", "prepare_for_loading"]


def test_defaults():
    config = AAACConfig()
    assert vars(config) == {
        "format": "int4",
        "group_size": 128,
        "codebooks": "learned",
        "rounding": "auto",
        "scale_search": True,
        "iterations": 20,
        "step": None,
        "version": 1,
    }
    assert config.scale_format.scale_dtype == torch.bfloat16


def test_nvfp4_has_groups_of_16():
    config = AAACConfig(format="nvfp4")
    assert config.group_size == 16
    assert config.scale_format.scale_dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "int8"),
        ("format", None),
        ("format", 4),
        ("format", ["int4"]),
        ("codebooks", "fp8"),
        ("codebooks", None),
        ("codebooks", 2),
        ("rounding", "floor"),
        ("rounding", None),
        ("step", "observe"),
        ("step", True),
        ("step", 0),
        ("step", "prepare_for_smoothquant_smoothing_factor"),
        ("group_size", 16),
        ("group_size", 0),
        ("group_size", -32),
        ("group_size", 256),
        ("iterations", 0),
        ("iterations", -1),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        AAACConfig(**{field: value})
    assert str(getattr(value, "value", value)) in str(error.value)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nvfp4_rejects_other_group_sizes(group_size):
    with pytest.raises(ValueError, match=f"group_size {group_size}.*'nvfp4'.*16"):
        AAACConfig(format="nvfp4", group_size=group_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 32.0),
        ("group_size", "32"),
        ("group_size", True),
        ("iterations", 20.0),
        ("iterations", None),
        ("iterations", True),
        ("scale_search", 1),
        ("scale_search", "yes"),
        ("scale_search", None),
    ],
)
def test_values_of_the_wrong_type_are_named(field, value):
    with pytest.raises(TypeError, match=field) as error:
        AAACConfig(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("step", [s for s in QuantizationStep if s.value in STEPS])
def test_steps_of_torchao_become_plain_strings(step):
    config = AAACConfig(step=step)
    assert type(config.step) is str
    assert config == AAACConfig(step=step.value)


def test_aaac_config_is_the_constructor():
    assert aaac_config() == AAACConfig()
    kwargs = {"format": "nvfp4", "codebooks": "if4", "scale_search": False, "iterations": 3, "step": "prepare"}
    assert aaac_config(**kwargs) == AAACConfig(**kwargs)


def test_aaac_config_names_unknown_and_known_fields():
    with pytest.raises(TypeError, match="groupsize, wbits") as error:
        aaac_config(wbits=4, groupsize=128, step=None)
    assert all(field in str(error.value) for field in vars(AAACConfig()))


def test_every_combination_survives_json():
    choices = itertools.product(FORMATS, CODEBOOKS, [True, False], [1, 20, 33], STEPS)
    for (fmt, group_size), codebooks, scale_search, iterations, step in choices:
        config = AAACConfig(
            format=fmt,
            group_size=group_size,
            codebooks=codebooks,
            scale_search=scale_search,
            iterations=iterations,
            step=step,
        )
        read = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
        assert type(read) is AAACConfig
        assert read == config
        assert vars(read) == vars(config)


def test_the_dictionary_holds_every_choice():
    """Defaults that depend on others are stored resolved: a reader needs no rule."""
    stored = config_to_dict(AAACConfig(format="nvfp4"))
    assert stored["_type"] == "AAACConfig"
    assert stored["_data"]["group_size"] == 16
    assert set(stored["_data"]) == set(vars(AAACConfig())) - {"version"}


@pytest.mark.parametrize(
    "change",
    [{"format": "nvfp4"}, {"group_size": 32}, {"codebooks": "nf4"}, {"scale_search": False}, {"iterations": 19}]
    + [{"step": step} for step in STEPS[1:]],
    ids=str,
)
def test_equality_sees_every_field(change):
    assert AAACConfig(**change) != AAACConfig()
    assert AAACConfig(**change) == AAACConfig(**change)


@pytest.mark.parametrize(("version", "error"), [("1", TypeError), (2, ValueError), (0, ValueError)])
def test_foreign_versions_are_refused(version, error):
    with pytest.raises(error, match="version"):
        AAACConfig(version=version)
