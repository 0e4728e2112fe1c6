"""Tests of the sphere CNN: its layers, shapes and initialization, and that both methods have the same code."""
import inspect

import pytest
import torch
from conftest import ROOT

import cosFace.net
import sphereFace.net


@pytest.mark.parametrize("name, parameters", [
    # Strided convolutions: 9 (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 960 biases = 1,550,976; fc5: 512 * 21,505 =
    # 11,010,560. A residual unit: 18 * 64^2 = 73,728; 294,912; 1,179,648; 4,718,592. Slopes: one per output channel.
    ("sphere20a", 22_666_944),    # 1, 2, 4 and 1 units: 10,100,736; 3, 5, 9 and 3 layers: 4,672 slopes
    ("sphere36a", 32_771_392),    # 2, 4, 8 and 2 units: 20,201,472; 5, 9, 17 and 5 layers: 8,384 slopes
    ("sphere64a", 48_186_816),    # 3, 8, 16 and 3 units: 35,610,624; 7, 17, 33 and 7 layers: 14,656 slopes
    ("faceNet", 22_677_312),      # sphere20a, and 2 (4,672 + 512) for batch normalization
])
def test_the_number_of_parameters_is_that_of_the_papers_table(name, parameters):
    net = cosFace.net.NETS[name]()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
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
