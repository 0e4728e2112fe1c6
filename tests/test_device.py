"""Devices: what is not there is one sentence, and the detection of bf16 can be overridden."""
import pytest
import torch

from faces.device import exact_float32, fast_dtype, pick_device, prefers_bf16
from faces.files import InputError


def test_missing_devices_are_one_sentence():
    assert pick_device("cpu") == torch.device("cpu")
    for name, problem in (("cuda:99", "is not available here"), ("gpu99", "is not a device; choose auto, cpu, cuda")):
        with pytest.raises(InputError, match=f"--device {name} {problem}"):
            pick_device(name)


@pytest.mark.parametrize("value, expected", [("0", False), ("1", True)])
def test_bf16_detection_can_be_overridden(value, expected, monkeypatch):
    monkeypatch.setenv("FACES_BF16", value)
    assert prefers_bf16(torch.device("cpu")) is expected


def test_the_precision_is_that_of_the_chosen_gpu(monkeypatch):
    """PyTorch's own is_bf16_supported() looks at the current GPU, by default the first one."""
    capability = {torch.device("cuda:0"): (8, 0), torch.device("cuda:1"): (7, 0), torch.device("cuda:2"): (6, 1)}
    monkeypatch.delenv("FACES_BF16", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    assert [fast_dtype(device) for device in capability] == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older settings")
@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_float32_is_exact_inside_the_context_alone(setting):
    """The settings of a program that uses the detector or the embedder stay as they were, whichever of the two APIs
    of PyTorch it uses."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, setting
    try:
        with exact_float32("cuda:0"):
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == setting
        with exact_float32("cpu"):
            assert convolutions.fp32_precision == setting
    finally:
        convolutions.fp32_precision = before
