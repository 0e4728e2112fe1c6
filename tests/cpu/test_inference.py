"""The optimized copy of a network for inference: folded batch normalization, Winograd convolutions, same embeddings."""
import copy
import platform

import pytest
import torch
from torch import nn

import cosFace.net
from faces.cpu import kernels
from faces.cpu.winograd import FusedWinogradConv2d
from faces.verification.embed import fold_batch_norm, optimized_copy


def random_net(name):
    """Return a network whose batch normalizations are far from the identity."""
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
def test_optimized_copy_gives_the_same_embeddings_and_leaves_the_network_unchanged(name):
    net = random_net(name)
    net.conv3_2.bias = nn.Parameter(torch.randn(256))  # some public checkpoints have a bias in every convolution
    before, x = copy.deepcopy(net.state_dict()), torch.randn(3, 3, 112, 96)
    fast = optimized_copy(net, "cpu")
    assert net.training and isinstance(net.conv2_2, nn.Conv2d)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not fast.training and not any("BatchNorm" in type(module).__name__ for module in fast.modules())
    with torch.inference_mode():
        exact = copy.deepcopy(net).double().eval()(x.double())
        assert (fast(x) - exact).norm() < 5e-6 * exact.norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="Winograd is used on x86 only")
def test_winograd_replaces_only_the_convolutions_it_speeds_up(monkeypatch):
    net = random_net("faceNet")

    def winograd_layers():  # in float32, in bfloat16, and in float32 for two images
        return [sum(isinstance(module, FusedWinogradConv2d)
                    for module in optimized_copy(net, "cpu", *options).children())
                for options in ((), (torch.bfloat16,), (torch.float32, 2))]
    if kernels.available():
        assert winograd_layers() == [16, 0, 0]    # strided convolutions stay
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert winograd_layers() == [14, 0, 0]        # convolutions of the first stage stay, too


@pytest.mark.parametrize("size, bias", [((28, 24), True), ((7, 6), False), ((1, 1), True), ((5, 9), False)])
def test_winograd_rounds_about_as_well_as_direct_convolution(size, bias):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(128, 136, 3, padding=1, bias=bias), torch.randn(3, 128, *size)
    with torch.inference_mode():
        exact = copy.deepcopy(conv).double()(x.double())
        error, direct = [(layer(x) - exact).norm() / exact.norm() for layer in (FusedWinogradConv2d(conv), conv)]
    assert error < 2e-6 and error < 10 * direct


def test_networks_with_other_layer_names_are_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4)).eval()
    fold_batch_norm(net)
    assert [type(module) for module in net] == [nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.BatchNorm1d]
