"""The optimized copy of a network for inference: folded batch normalization, Winograd convolutions, same embeddings."""
import copy

import pytest
import torch
from torch import nn

import cosFace.net
from faces.cpu import kernels
from faces.cpu.winograd import FusedWinogradConv2d
from faces.verification.embed import optimized_copy


@pytest.mark.parametrize("name", cosFace.net.NETS)
def test_optimized_copy_gives_the_same_embeddings_and_leaves_the_network_unchanged(name):
    net = cosFace.net.NETS[name]()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):    # far from the identity
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.running_var, 0.2, 2)
            for value in (module.bias, module.running_mean):
                nn.init.normal_(value, std=0.3)
    net.conv3_2.bias = nn.Parameter(torch.randn(256))  # some public checkpoints have a bias in every convolution
    before, x = copy.deepcopy(net.state_dict()), torch.randn(3, 3, 112, 96)
    fast, in_bf16 = optimized_copy(net, "cpu"), optimized_copy(net, "cpu", torch.bfloat16)
    assert net.training and isinstance(net.conv2_2, nn.Conv2d) and isinstance(in_bf16.conv2_2, nn.Conv2d)
    assert isinstance(fast.conv3_2, FusedWinogradConv2d) == kernels.available()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not fast.training and not any("BatchNorm" in type(module).__name__ for module in fast.modules())
    with torch.inference_mode():
        exact = copy.deepcopy(net).double().eval()(x.double())
        assert (fast(x) - exact).norm() < 5e-6 * exact.norm()
