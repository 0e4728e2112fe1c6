"""kernels.c and the training layers built on it, compared with PyTorch's layers in float64."""
import copy
import os

import pytest
import torch
from torch import nn

from cosFace.net import faceNet
from faces.cpu import kernels
from faces.cpu.layers import FastPReLU, for_inference, for_training
from faces.cpu.winograd import WinogradConv2d

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="needs x86 and a C compiler")


def run(layer, x, seed=1):
    """Return the output of a layer and all gradients, by name."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def errors(layer, plain, x):
    """Return the relative error of the output and of each gradient, compared with `plain` in float64."""
    expected = run(copy.deepcopy(plain).double(), x.double())
    actual = run(layer, x)
    assert all(value.dtype == torch.float32 and value.shape == expected[name].shape for name, value in actual.items())
    return {name: ((value - expected[name]).norm() / expected[name].norm()).item() for name, value in actual.items()}


@needs_compiler
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("plain, fast_class, size", [
    (nn.Conv2d(64, 48, 3, padding=1, bias=False), WinogradConv2d, (3, 64, 56, 48)),
    (nn.Conv2d(64, 48, 3, padding=1), WinogradConv2d, (70, 64, 7, 6)),
    (nn.Conv2d(64, 48, 3, padding=1, bias=False), WinogradConv2d, (2, 64, 1, 5)),
    (nn.PReLU(48), FastPReLU, (5, 48, 9, 7)), (nn.PReLU(48, -0.7), FastPReLU, (5, 48, 9, 7))])
def test_layers_and_their_gradients_are_accurate(plain, fast_class, size, order):
    plain = copy.deepcopy(plain).to(memory_format=order)
    fast = copy.deepcopy(plain)
    fast.__class__ = fast_class
    x = torch.randn(size).contiguous(memory_format=order)
    x[0, :, 0] = 0      # the kernel of PReLU must treat 0 as PyTorch does
    assert max(errors(fast, plain, x).values()) < 5e-6


def kinds(net):
    return {type(module) for module in net.modules()}


def test_without_the_kernels_no_layer_is_replaced(monkeypatch):
    assert kernels.available() == (kinds(for_training(faceNet())) >= {WinogradConv2d, FastPReLU})
    monkeypatch.setenv("FACES_CPU_KERNELS", "0")
    assert not kernels.available()
    assert kinds(for_training(faceNet())) == kinds(for_inference(faceNet().eval())) == kinds(faceNet())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder that kernels.py now compiles its library into."""
    if os.statvfs(tmp_path).f_flag & os.ST_NOEXEC:
        pytest.skip("no library can be loaded from the temporary folder")
    monkeypatch.setattr(kernels, "LIBRARY_FOLDER", tmp_path / "kernels")
    kernels._library.cache_clear()
    yield tmp_path / "kernels"
    kernels._library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("compiler, problem", [("no-such-compiler", "there is no C compiler"),
                                               ("false", "the C compiler 'false' can't compile kernels.c")])
def test_an_unusable_compiler_is_one_sentence(compiler, problem, monkeypatch, folder, capsys):
    monkeypatch.setenv("CC", compiler)
    assert not kernels.available() and not kernels.available()
    error = capsys.readouterr().err
    assert error.startswith(problem) and error.count("\n") == 1


@needs_compiler
@pytest.mark.parametrize("target", ["-march=x86-64", "-mavx"])
def test_kernels_are_accurate_on_processors_with_narrow_vectors_and_in_a_read_only_clone(target, monkeypatch, folder):
    if target == "-mavx" and b"avx" not in kernels._instruction_sets().split():
        pytest.skip("this processor has no AVX")
    folder.touch()    # a library can't be written below a file, not even by root
    monkeypatch.setattr(kernels, "FLAGS", tuple(target if flag == "-march=native" else flag for flag in kernels.FLAGS))
    for plain, fast_class in ((nn.Conv2d(16, 32, 3, padding=1, bias=False), WinogradConv2d), (nn.PReLU(16), FastPReLU)):
        fast = copy.deepcopy(plain)
        fast.__class__ = fast_class
        assert max(errors(fast, plain, torch.randn(3, 16, 9, 7)).values()) < 5e-6
