"""The programs under benchmarks/, small: that what they compare is the same, and what they count rather than time."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import margin_softmax, mtcnn_equivariance, training_step


def test_a_margin_needs_no_memory_that_a_linear_layer_does_not():
    args = SimpleNamespace(identities=3000, batch_size=512)
    steps = margin_softmax.make_steps(args, torch.device("cpu"))
    x = (7 * torch.randn(512, 512)).requires_grad_()
    assert margin_softmax.check_same(steps, x) < 1e-5
    matrix = 4 * 512 * 3000
    peak = {name: margin_softmax.peak_bytes(step, x, weight) / matrix for name, (step, weight) in steps.items()}
    assert peak["plain"] > 1.9                                       # log-softmax and gradient at least: it does count
    assert peak["CosFace"] < peak["plain"] + 0.5 and peak["SphereFace"] < peak["plain"] + 0.5


@pytest.mark.parametrize("method", ["cosFace", "sphereFace"])
def test_a_step_is_the_textbooks(method, casia, tmp_path, capsys):
    """The program compares the losses of three steps and fails where they differ. In float32: a batch of four in bf16
    would differ by more than that on a machine where bf16 is what `auto` picks."""
    args = ["--casia", str(casia), "--cache", str(tmp_path), "--device", "cpu", "--method", method, "--batch-size", "4",
            "--steps", "3", "--precision", "float32"]
    assert not training_step.main(args) and "ratio" in capsys.readouterr().out


def test_landmarks_that_move_as_they_should_have_no_equivariance_error():
    """A detector that finds what is painted: each point a color, all of them a face."""
    def detect(images):
        for image in images:
            yield np.zeros((1, 4)), np.array([[np.argwhere(image[..., 0] == k + 1).mean(0)[::-1] for k in range(5)]])
    photo = np.zeros((120, 100, 3), np.uint8)
    for k, (x, y) in enumerate([(40, 50), (60, 50), (50, 60), (42, 70), (58, 70)]):
        photo[y - 1:y + 2, x - 1:x + 2] = k + 1
    up, right = np.array(((1, 0, 0), (0, 1, -5.0))), np.array(((1, 0, 4.0), (0, 1, 0)))
    copies = [(np.roll(photo, -5, 0), up), (np.roll(photo, 4, 1), right), (np.roll(photo, 4, 1), up)]
    np.testing.assert_allclose(mtcnn_equivariance.errors(detect, [photo], [copies]), [[0, 0, 41 ** 0.5 / 20]])
