"""Tests on a pretended GPU: training, embedding and detection mix no devices, and ordinary steps do not wait for it."""
import numpy as np
import pretended_device
import pytest
import skimage.data
import torch
from conftest import checkpoint, options, tensors
from pretended_device import PretendedDevice

from cosFace.net import faceNet
from faces.cpu import kernels
from faces.training.distributed import Processes
from faces.verification.embed import embed
from mtcnn.detector import Detector

pytestmark = pytest.mark.skipif(not pretended_device.available(),
                                reason="there is a GPU, or this PyTorch can't pretend one")
RUNS = {"CosFace": ("cosFace", []), "SphereFace": ("sphereFace", []),
        "SphereFace-R": ("sphereFace", ["--loss", "sphereface-r"]),
        "sharded": ("cosFace", ["--shard-head"]), "sampled": ("cosFace", ["--sample-centers", "0.5"])}


@pytest.fixture(autouse=True)
def simplified(tiny, monkeypatch):
    """Train a small network, and let the CPU compute with PyTorch's own kernels, as the pretended device does."""
    monkeypatch.setattr(kernels, "available", lambda: False)


def assert_close(actual, expected):
    """Assert that the checkpoints in two runs' folders hold the same tensors up to rounding."""
    actual, expected = tensors(checkpoint(actual)), tensors(checkpoint(expected))
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_training_equals_the_cpu_and_ordinary_steps_do_not_wait(name, main, casia, tmp_path, monkeypatch):
    method, extra = RUNS[name]
    args = ["--epochs", "0.84", "--shift", "2", "--checkpoint-minutes", "100", *extra]
    assert main(method, *options(casia, tmp_path, "cpu"), *args)[0] == 0
    should_stop, waits = Processes.should_stop, []

    def note_waits(run):
        waits.append(log.waits.copy())
        log.waits.clear()
        return should_stop(run)
    monkeypatch.setattr(Processes, "should_stop", note_waits)
    with PretendedDevice() as log:
        assert main(method, *options(casia, tmp_path, "gpu"), *args, "--device", "gpu:0")[0] == 0
    # The first list is of all that comes before the first step, such as moving the network to the device.
    assert len(waits) == 5 and waits[0] and not any(waits[1:4])
    assert len(waits[4]) == 1 and "log.py" in waits[4][0][1]    # the last step reads the loss of all steps
    assert log.operators["aten.convolution_backward.default"] == 5 and not log.float64
    assert_close(tmp_path / "gpu", tmp_path / "cpu")


def test_a_run_moves_between_devices(main, casia, tmp_path):
    for name, device in (("cpu", "cpu"), ("moved", "gpu:0")):
        args = options(casia, tmp_path, name)
        with PretendedDevice():
            assert main("cosFace", *args, "--epochs", "0.84", "--device", device)[0] == 0
        assert main("cosFace", *args, "--resume")[0] == 0
    assert_close(tmp_path / "moved", tmp_path / "cpu")


def test_embeddings_equal_those_of_the_cpu():
    faces = np.random.default_rng(0).integers(0, 256, (6, 112, 96, 3), np.uint8)
    net = faceNet().eval()
    expected = embed(net, faces, torch.device("cpu"), progress=False)
    with PretendedDevice() as log:
        actual = embed(net, faces, torch.device("gpu:0"), batch_size=4, progress=False)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert len(log.operators) > 5 and not log.float64


def test_detection_equals_that_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)    # which a pretended device does not support
    monkeypatch.setattr(Detector, "cascade", torch.no_grad()(Detector.cascade.__wrapped__))
    photo = skimage.data.astronaut()
    expected = Detector(device="cpu").detect(photo)
    with PretendedDevice() as log:
        actual = Detector(device="gpu:0").detect(photo)
    assert len(actual.boxes) == len(expected.boxes) > 0 and not log.float64
    np.testing.assert_allclose(actual.landmarks, expected.landmarks, atol=1e-2)
