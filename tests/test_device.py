"""Devices: what is not there is one sentence, precision follows the GPU, threads follow the CPUs."""
import pytest
import torch

from faces import device
from faces.device import exact_float32, fast_dtype, memory_format, pick_device, pick_dtype
from faces.files import InputError


def test_missing_devices_and_precisions_are_one_sentence():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu99"):
        with pytest.raises(InputError, match=f"--device {name} is not available here .*; pass --device cpu or another"):
            pick_device(name)
    with pytest.raises(InputError, match="fp16 needs loss scaling, which mps can't do"):
        pick_dtype("fp16", torch.device("mps"))


def test_the_precision_is_that_of_the_chosen_gpu(monkeypatch):
    """PyTorch's own is_bf16_supported() looks at the current GPU, by default the first one."""
    gpus = [torch.device(f"cuda:{index}") for index in range(4)]
    names = ["NVIDIA A100-SXM4-40GB", "Tesla V100-SXM2-16GB", "NVIDIA GeForce GTX 1660 Ti", "NVIDIA GeForce GTX 1080"]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", dict(zip(gpus, names)).get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", dict(zip(gpus, [(8, 0), (7, 0), (7, 5), (6, 1)])).get)
    assert [fast_dtype(gpu) for gpu in gpus] == [torch.bfloat16, torch.float16, torch.float32, torch.float32]
    assert [memory_format(gpu) for gpu in gpus] == [torch.channels_last] * 3 + [torch.contiguous_format]


def test_no_more_threads_than_cpus(monkeypatch):
    monkeypatch.setattr(device, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", threads := [].append)
    device.tune_cpu(torch.device("cuda"))
    assert threads.__self__ == [1]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older settings")
@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_float32_is_exact_inside_the_context_alone(setting):
    """The settings of a program that uses the detector or the embedder stay as they were."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, setting
    try:
        with exact_float32("cuda:0"):
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == setting
    finally:
        convolutions.fp32_precision = before
