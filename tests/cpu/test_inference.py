"""The copy of a network that embeds: folded, Winograd on a CPU, equal to the network."""
import copy
import platform

import numpy as np
import pytest
import torch
from torch import nn

import cosFace.net
from faces.cpu import kernels
from faces.cpu.winograd import Winograd, winograd_matrices
from faces.verification.embed import fold_batch_norm, optimized_copy


def trained(name):
    """A network whose batch normalizations and PReLUs do something."""
    torch.manual_seed(0)
    net = cosFace.net.NETS[name]()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
            for value in (module.bias, module.running_mean):
                nn.init.normal_(value, std=0.3)
    return net


@pytest.mark.parametrize("name", cosFace.net.NETS)
def test_copy_embeds_as_the_network_does_and_leaves_it_alone(name):
    net = trained(name)
    net.conv3_2.bias = nn.Parameter(torch.randn(256))  # public checkpoints have some
    before, x = copy.deepcopy(net.state_dict()), torch.randn(3, 3, 112, 96)
    fast = optimized_copy(net, "cpu")
    assert net.training and isinstance(net.conv2_2, nn.Conv2d)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not fast.training and not any("BatchNorm" in type(module).__name__ for module in fast.modules())
    with torch.inference_mode():
        exact = copy.deepcopy(net).double().eval()(x.double())
        assert (fast(x) - exact).norm() < 5e-6 * exact.norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Winograd is for x86")
def test_winograd_where_it_pays(monkeypatch):
    net = trained("faceNet")

    def kinds():
        return [sum(isinstance(module, Winograd) for module in optimized_copy(net, "cpu", *options).children())
                for options in ((), (torch.bfloat16,), (torch.float32, 2))]
    if kernels.available():
        assert kinds() == [16, 0, 0]    # all but the strides
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert kinds() == [14, 0, 0]        # nor the first stage


@pytest.mark.parametrize("size", [(28, 24), (7, 6), (14, 12), (1, 1), (5, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_winograd_rounds_like_the_direct_sum(size, bias):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(128, 136, 3, padding=1, bias=bias), torch.randn(3, 128, *size)
    with torch.inference_mode():
        exact = copy.deepcopy(conv).double()(x.double())
        errors = [(layer(x) - exact).norm() / exact.norm() for layer in (Winograd(conv), conv)]
    assert errors[0] < 2e-6 and errors[0] < 10 * errors[1]


def test_winograd_matrices_correlate():
    random = np.random.default_rng(0)
    pixels, kernel = random.normal(size=5), random.normal(size=3)
    to_products, to_kernel, to_outputs = winograd_matrices((0, 1, -2, 0.5))
    np.testing.assert_allclose(to_outputs @ (to_kernel @ kernel * (to_products @ pixels)), np.correlate(pixels, kernel))


def test_other_networks_are_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4)).eval()
    fold_batch_norm(net)
    assert [type(module) for module in net] == [nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]
