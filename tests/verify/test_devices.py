"""The device that an artifact is verified on."""

import pytest

from exporter.errors import BadRequest
from exporter.verify import VerifyOptions, verify


def test_the_name_of_a_device_may_have_capitals(artifacts):
    report = verify(artifacts["onnxruntime", "fp32"], VerifyOptions(samples=2, device="CPU"))
    assert report.environment["session"]["device"] == "cpu"


def test_a_device_that_the_runtime_does_not_take_is_refused(artifacts):
    with pytest.raises(BadRequest, match=r"--device gpu: .*custom_fp32.onnx is for onnxruntime, which takes cpu, cuda"):
        verify(artifacts["onnxruntime", "fp32"], VerifyOptions(samples=4, device="gpu"))
    with pytest.raises(BadRequest, match=r"--device cpu: .*custom_fp16.plan is for tensorrt, which takes cuda"):
        verify(artifacts["tensorrt", "fp16"], VerifyOptions(samples=4, device="cpu"))
