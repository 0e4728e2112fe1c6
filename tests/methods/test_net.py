"""The 20-layer CNN: layers, shapes and initialization, and the same code in both methods."""
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import cosFace.net
import sphereFace.net

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["faceNet", "sphere20a"])
def test_twenty_layers_with_the_papers_shapes(name):
    net = cosFace.net.NETS[name]()
    convs = {key: tuple(m.weight.shape[:2]) for key, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs) == 20 and all(m.kernel_size == (3, 3) for m in net.modules() if isinstance(m, nn.Conv2d))
    assert [key for key, m in net.named_modules() if getattr(m, "stride", None) == (2, 2)] == [
        "conv1_1", "conv2_1", "conv3_1", "conv4_1"]
    assert convs["conv1_1"] == (64, 3) and convs["conv2_5"] == (128, 128)
    assert convs["conv3_1"] == (256, 128) and convs["conv3_9"] == (256, 256) and convs["conv4_3"] == (512, 512)
    assert net.fc5.weight.shape == (512, 512 * 7 * 6)
    assert sum(isinstance(m, nn.PReLU) and m.num_parameters > 1 for m in net.modules()) == 20
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    assert len(norms) == (21 if name == "faceNet" else 0)


@pytest.mark.parametrize("name", ["faceNet", "sphere20a"])
def test_embedding_of_a_batch(name):
    net = cosFace.net.NETS[name]().eval()
    x = torch.randn(2, 3, 112, 96)
    with torch.no_grad():
        both, first = net(x), net(x[:1])
    assert both.shape == (2, 512) and both.dtype == torch.float32
    torch.testing.assert_close(both[:1], first, atol=1e-4, rtol=1e-3)      # a face does not depend on its neighbors


def test_residual_units_start_near_the_identity():
    net = cosFace.net.sphere20a()
    assert net.conv3_5.bias is None and net.conv3_5.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not net.conv3_1.bias.any() and not net.fc5.bias.any()
    bound = (6 / (9 * (128 + 256))) ** 0.5                                 # Xavier's, fan in plus fan out
    assert bound * 0.99 < net.conv3_1.weight.abs().max().item() <= bound * (1 + 1e-6)       # rounded to float32
    net = cosFace.net.faceNet()
    assert net.conv3_5.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)      # He's
    with torch.no_grad():
        x = net._layer("1_1", torch.randn(2, 3, 112, 96))
        assert torch.equal(x + net._layer("1_3", net._layer("1_2", x)), x)
    assert not any(net.get_submodule(f"conv{name}bn").weight.any() for name in ("1_3", "2_3", "2_5", "3_9", "4_3"))
    assert all((net.get_submodule(f"conv{name}bn").weight == 1).all() for name in ("1_1", "1_2", "3_8", "4_1"))


def test_forward_equals_a_literal_computation():
    """Recompute the network with functional calls, in the order of table 2, from its own state dict."""
    net = sphereFace.net.sphere20a().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.02)
    w, f = net.state_dict(), nn.functional

    def layer(x, name, stride=1):
        y = f.conv2d(x, w[f"conv{name}.weight"], w.get(f"conv{name}.bias"), stride, 1)
        return f.prelu(y, w[f"relu{name}.weight"])

    x = start = torch.randn(1, 3, 112, 96)
    for stage, units in ((1, 1), (2, 2), (3, 4), (4, 1)):
        x = layer(x, f"{stage}_1", 2)
        for a in range(2, 2 * units + 2, 2):
            x = x + layer(layer(x, f"{stage}_{a}"), f"{stage}_{a + 1}")
    expected = x.reshape(1, -1) @ w["fc5.weight"].T + w["fc5.bias"]
    torch.testing.assert_close(net(start), expected, atol=1e-6, rtol=1e-4)


def test_both_methods_have_the_same_cnn():
    for name in ("SphereNet", "faceNet", "sphere20a"):
        assert inspect.getsource(getattr(cosFace.net, name)) == inspect.getsource(getattr(sphereFace.net, name))
    assert cosFace.net.STAGES == sphereFace.net.STAGES


def test_the_methods_share_all_but_the_margin():
    """`diff -ru sphereFace cosFace` is for reading what the papers differ in."""
    for name, most in (("casia_train.py", 18), ("lfw_eval.py", 0)):
        text = (ROOT / "sphereFace" / name).read_text()
        text = text.replace("SphereFace", "CosFace").replace("sphereFace", "cosFace")
        mine, other = ({" ".join(line.split()) for line in lines.splitlines()}
                       for lines in (text, (ROOT / "cosFace" / name).read_text()))
        assert len(mine - other) <= most, f"{name} differs in more than the margin: {mine - other}"
