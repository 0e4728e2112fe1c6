"""kernels.c and what trains by it, against PyTorch's own layers in float64."""
import copy

import pytest
import torch
from torch import nn

from cosFace.net import faceNet
from faces.cpu import kernels
from faces.cpu.training import FastPReLU, StridedConv2d, for_training
from faces.cpu.winograd import Winograd, WinogradConv2d

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="needs a C compiler, on x86")


def run(layer, x, seed=1):
    """Output and all gradients of a layer."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def errors(layer, plain, x):
    """Relative errors of a layer against a plain one in float64."""
    expected = run(copy.deepcopy(plain).double(), x.double())
    found = run(layer, x)
    assert all(value.dtype == torch.float32 and value.shape == expected[name].shape for name, value in found.items())
    return {name: ((value - expected[name]).norm() / expected[name].norm()).item() for name, value in found.items()}


@needs_compiler
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("count, size", [(3, (56, 48)), (70, (7, 6)), (2, (1, 5)), (1, (14, 12))])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_and_its_gradients(count, size, bias, order):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 48, 3, padding=1, bias=bias).to(memory_format=order)
    fast = copy.deepcopy(plain)
    fast.__class__ = WinogradConv2d
    assert max(errors(fast, plain, torch.randn(count, 64, *size).contiguous(memory_format=order)).values()) < 5e-6


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel, stride, padding", [(3, 2, 1), ((2, 3), (3, 2), (0, 2))])
def test_strided_convolution_and_its_gradients(kernel, stride, padding, order):
    torch.manual_seed(0)
    plain = nn.Conv2d(32, 24, kernel, stride, padding).to(memory_format=order)
    fast = copy.deepcopy(plain)
    fast.__class__ = StridedConv2d
    assert max(errors(fast, plain, torch.randn(9, 32, 11, 8).contiguous(memory_format=order)).values()) < 5e-6


@needs_compiler
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_prelu_and_its_gradients(order):
    torch.manual_seed(0)
    plain = nn.PReLU(48)
    nn.init.uniform_(plain.weight, -1, 1)
    fast = copy.deepcopy(plain)
    fast.__class__ = FastPReLU
    x = torch.randn(5, 48, 9, 7).contiguous(memory_format=order)
    x[0, :, 0] = 0
    assert max(errors(fast, plain, x).values()) < 1e-6


@needs_compiler
def test_a_network_for_training_is_the_network():
    """The same parameters under the same names, and the same gradients."""
    torch.manual_seed(0)
    plain = faceNet().eval()                             # in training, biases before a normalization have no gradient
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)      # residual units that do something
        elif isinstance(module, nn.PReLU):
            nn.init.ones_(module.weight)                 # no kink, at which rounding would turn a gradient
    fast = for_training(copy.deepcopy(plain).to(memory_format=torch.channels_last))
    kinds = [sum(isinstance(module, kind) for module in fast.modules())
             for kind in (WinogradConv2d, StridedConv2d, FastPReLU)]
    assert kinds == [16, 3, 20] and fast.state_dict().keys() == plain.state_dict().keys()
    assert max(errors(fast, plain, torch.randn(6, 3, 112, 96)).values()) < 5e-5


def test_without_a_compiler_it_is_the_same_sooner_or_later(monkeypatch):
    torch.manual_seed(0)
    conv, prelu, x = nn.Conv2d(128, 64, 3, padding=1), nn.PReLU(64), torch.randn(3, 128, 9, 11)
    found = Winograd(conv, prelu)(x)
    monkeypatch.setattr(kernels, "available", lambda: False)
    torch.testing.assert_close(Winograd(conv, prelu)(x), found, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, WinogradConv2d) for module in for_training(faceNet()).modules())


@pytest.fixture
def forgetful():
    kernels._library.cache_clear()
    yield
    kernels._library.cache_clear()


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path, forgetful):
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setenv("CC", "false")
    assert not kernels.available() and not list(tmp_path.iterdir())


@needs_compiler
def test_a_clone_that_is_read_only(monkeypatch, tmp_path, forgetful):
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernels, "FOLDER", tmp_path / "file/kernels")
    assert kernels.available()
    torch.testing.assert_close(kernels.prelu_gradients(*2 * [torch.ones(1, 16, 1, 1)], torch.ones(16))[0].sum(),
                               torch.tensor(16.0))


@needs_compiler
@pytest.mark.parametrize("narrow", ["-march=x86-64", "-mavx"])
def test_processors_with_narrow_vectors(narrow, monkeypatch, tmp_path, forgetful):
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(kernels, "FLAGS", tuple(narrow if flag == "-march=native" else flag for flag in kernels.FLAGS))
    torch.manual_seed(0)
    for plain, kind in ((nn.Conv2d(16, 32, 3, padding=1, bias=False), WinogradConv2d), (nn.PReLU(16), FastPReLU)):
        fast = copy.deepcopy(plain)
        fast.__class__ = kind
        assert max(errors(fast, plain, torch.randn(3, 16, 9, 7)).values()) < 5e-6
    assert len(list(tmp_path.iterdir())) == 1
