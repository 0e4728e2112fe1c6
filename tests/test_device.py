"""Devices: what is not there is one sentence, and the detection of bf16 can be overridden."""
import pytest
import torch

from faces.device import has_bf16, pick_device
from faces.files import InputError


def test_missing_devices_are_one_sentence():
    assert pick_device("cpu") == torch.device("cpu")
    for name, problem in (("cuda:99", "is not available here"), ("gpu99", "is not a device; choose auto, cpu, cuda")):
        with pytest.raises(InputError, match=f"--device {name} {problem}"):
            pick_device(name)


@pytest.mark.parametrize("value, expected", [("0", False), ("1", True)])
def test_bf16_detection_can_be_overridden(value, expected, monkeypatch):
    monkeypatch.setenv("FACES_BF16", value)
    assert has_bf16(torch.device("cpu")) is expected
