"""torchao's own test suites for tensor subclasses, run on `AAACTensor`.

The suites for several GPUs and for MoE weights are left out; what torchao checks only on an accelerator is repeated
here on the CPU.
"""

from __future__ import annotations

import pytest
import tensor_oracle  # noqa: F401  (one thread)
import torch
from torchao.quantization import quantize_

from aaac_ao import AAACConfig, AAACTensor

pytest.importorskip("expecttest", reason="torchao.testing needs expecttest")
u = pytest.importorskip("torchao.testing.utils")

#: 4 bits on random weights give about 20.5 dB (int4, groups of 128) and 21 dB.
MIN_SQNR = 18
INT4, NVFP4 = {"config": AAACConfig(iterations=3)}, {"config": AAACConfig(format="nvfp4", iterations=3)}


class _AAAC:
    TENSOR_SUBCLASS = AAACTensor
    FACTORY_FN = staticmethod(AAACTensor.from_hp)
    LINEAR_MIN_SQNR = MIN_SQNR

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="it calls .cuda(); test_device_moves does the rest")
    def test_device1_to_device2_device1_cpu_device2_cpu(self):
        super().test_device1_to_device2_device1_cpu_device2_cpu()

    def test_device_moves(self):
        weight = self.FACTORY_FN(torch.randn(4, 128, dtype=torch.bfloat16), **self.kwargs)
        for move in (lambda t: t.to(device="cpu"), lambda t: t.to("cpu"), lambda t: t.cpu()):
            moved = move(weight)
            assert isinstance(moved, AAACTensor)
            assert torch.equal(moved.dequantize(), weight.dequantize())


class TestBasicInt4(_AAAC, u.TorchAOBasicTestCase):
    """torchao's basic tests, format "int4"."""

    kwargs = INT4


class TestBasicNvfp4(_AAAC, u.TorchAOBasicTestCase):
    """torchao's basic tests, format "nvfp4"."""

    kwargs = NVFP4


class TestCompileInt4(u.TorchAOCompileTestCase):
    """torchao's tests of torch.compile, format "int4"."""

    TENSOR_SUBCLASS, FACTORY_FN, LINEAR_MIN_SQNR = AAACTensor, staticmethod(AAACTensor.from_hp), MIN_SQNR
    kwargs = INT4

    def setUp(self):
        super().setUp()
        torch._dynamo.reset()


class TestCompileNvfp4(TestCompileInt4):
    """torchao's tests of torch.compile, format "nvfp4"."""

    kwargs = NVFP4


class TestIntegration(u.TorchAOIntegrationTestCase):
    """What vLLM does with weights; the helpers that assert an accelerator are followed step by step on the CPU."""

    FORMATS = (("int4", {"iterations": 3}), ("nvfp4", {"format": "nvfp4", "iterations": 3}))

    def test_chunk(self):
        for name, fields in self.FORMATS:
            for dim in (0, 1):
                with self.subTest(format=name, dim=dim):
                    weight = AAACTensor.from_hp(torch.randn(64, 256), AAACConfig(**fields))
                    self._test_chunk_similar_to_vllm_llama4(weight, dim)

    def test_slice_and_copy(self):
        """`_test_slice_and_copy_similar_to_vllm`: the two weights are a shuffled copy of each other.

        torchao copies parts of a weight into one with other codebooks; that is refused here (see `test_tensor`), as the
        rows that stay would change their meaning.
        """
        for name, fields in self.FORMATS:
            with self.subTest(format=name):
                layer = torch.nn.Linear(256, 256, dtype=torch.bfloat16)
                quantize_(layer, AAACConfig(**fields))
                loaded = layer.weight.detach().clone()
                loaded.qdata.copy_(loaded.qdata.flip(0) ^ 1)
                loaded.scale.copy_(loaded.scale.flip(0))
                for start in (0, 128):
                    part = layer.weight.data.narrow(0, start, 128)
                    source = loaded.narrow(0, start, 128)
                    assert not torch.equal(part.qdata[0], source.qdata[0])
                    part.copy_(source)
                    assert torch.equal(part.qdata, source.qdata)
                    assert torch.equal(part.scale.float(), source.scale.float())
                assert layer.weight.equal(loaded)

    def test_narrow(self):
        """`_test_narrow_similar_to_vllm`."""
        for name, fields in self.FORMATS:
            with self.subTest(format=name):
                layer = torch.nn.Linear(256, 64, dtype=torch.bfloat16)
                quantize_(layer, AAACConfig(**fields))
                new = layer.weight.narrow(1, 0, 256)
                for attribute in new.tensor_data_names:
                    assert getattr(layer.weight, attribute).shape == getattr(new, attribute).shape
                assert new.equal(layer.weight)

    def test_3d_weights_are_refused(self):
        """`_test_quantize_3d_param_similar_to_vllm`: not supported yet, and said so."""
        layer = torch.nn.Linear(64, 64)
        layer.weight = torch.nn.Parameter(torch.randn(3, 64, 64))
        with pytest.raises(ValueError, match=r"2-D|dimension"):
            quantize_(layer, AAACConfig(group_size=32))
        assert layer.weight.shape == (3, 64, 64)
