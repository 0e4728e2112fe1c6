"""The programs under benchmarks/, small: that what they compare is the same, and what they count rather than time."""
from types import SimpleNamespace

import torch

from benchmarks import margin_softmax


def test_a_margin_needs_no_memory_that_a_linear_layer_does_not():
    args = SimpleNamespace(identities=3000, batch_size=512)
    steps = margin_softmax.make_steps(args, torch.device("cpu"))
    x = (7 * torch.randn(512, 512)).requires_grad_()
    assert margin_softmax.check_same(steps, x) < 1e-5
    matrix = 4 * 512 * 3000
    peak = {name: margin_softmax.peak_bytes(step, x, weight) / matrix for name, (step, weight) in steps.items()}
    assert peak["plain"] > 1.9                                       # log-softmax and gradient at least: it does count
    assert peak["CosFace"] < peak["plain"] + 0.5 and peak["SphereFace"] < peak["plain"] + 0.5
