"""Tests of the sphere CNN: its layers, shapes and initialization, and that both methods have the same code."""
import inspect

import pytest
import torch
from conftest import ROOT

import cosFace.net
import sphereFace.net


@pytest.mark.parametrize("name, units", [("sphere20a", (1, 2, 4, 1)), ("sphere36a", (2, 4, 8, 2)),
                                         ("sphere64a", (3, 8, 16, 3)), ("faceNet", (1, 2, 4, 1))])
def test_the_number_of_parameters_is_that_of_the_papers_table(name, units):
    net, parameters, norms = cosFace.net.NETS[name](), 512 * (512 * 7 * 6 + 1), 512    # of fc5 and its normalization
    for before, channels, count in zip((3, 64, 128, 256), (64, 128, 256, 512), units):
        # A strided convolution with bias, two convolutions per residual unit, and PReLU after each of them
        parameters += 9 * before * channels + channels + count * 18 * channels**2 + (2 * count + 1) * channels
        norms += (2 * count + 1) * channels
    assert sum(map(torch.numel, net.parameters())) == parameters + (2 * norms if name == "faceNet" else 0)
    embedding = net(torch.randn(2, 3, 112, 96))
    embedding.sum().backward()
    assert embedding.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    constant = [key for key, parameter in net.named_parameters() if not parameter.requires_grad]
    assert constant == (["conv1_1.bias", "conv2_1.bias", "conv3_1.bias", "conv4_1.bias"] if name == "faceNet" else [])


def test_residual_units_start_near_the_identity():
    net = cosFace.net.sphere20a()
    assert net.conv3_5.bias is None and net.conv3_5.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not net.conv3_1.bias.any() and not net.fc5.bias.any()
    assert net.conv3_1.weight.abs().max().item() == pytest.approx((6 / (9 * (128 + 256))) ** 0.5, rel=0.01)    # Xavier
    net = cosFace.net.faceNet()
    assert net.conv3_5.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)    # He
    with torch.no_grad():
        x = net._layer("1_1", torch.randn(2, 3, 112, 96))
        assert torch.equal(x + net._layer("1_3", net._layer("1_2", x)), x)
    assert not any(net.get_submodule(f"conv{name}bn").weight.any() for name in ("1_3", "2_3", "2_5", "3_9", "4_3"))
    assert all((net.get_submodule(f"conv{name}bn").weight == 1).all() for name in ("1_1", "1_2", "3_8", "4_1"))


def test_both_methods_have_the_same_cnn():
    assert inspect.getsource(cosFace.net.SphereNet) == inspect.getsource(sphereFace.net.SphereNet)
    assert (cosFace.net.CHANNELS, cosFace.net.UNITS) == (sphereFace.net.CHANNELS, sphereFace.net.UNITS)
    one, two = ({name: net.keywords for name, net in module.NETS.items()} for module in (cosFace.net, sphereFace.net))
    assert one == two


def test_the_scripts_differ_only_in_the_margin():
    """`diff -ru sphereFace cosFace` should show how the papers differ and nothing else."""
    for name, max_lines in (("casia_train.py", 20), ("lfw_eval.py", 0)):
        sphereface = (ROOT / "sphereFace" / name).read_text()
        sphereface = sphereface.replace("SphereFace", "CosFace").replace("sphereFace", "cosFace")
        cosface = (ROOT / "cosFace" / name).read_text()
        assert max(text.count("\n") for text in (sphereface, cosface)) <= 180
        sphereface, cosface = ({" ".join(line.split()) for line in text.splitlines()} for text in (sphereface, cosface))
        different = sphereface - cosface
        assert len(different) <= max_lines, f"sphereFace/{name} differs from cosFace/{name} in: {different}"
