"""kernels.c and the training layers built on it, compared with PyTorch's layers in float64."""
import copy
import os

import pytest
import torch
from torch import nn

from cosFace.net import faceNet
from faces.cpu import kernels
from faces.cpu.inference import for_inference
from faces.cpu.training import FastPReLU, StridedConv2d, for_training
from faces.cpu.winograd import FusedWinogradConv2d, WinogradConv2d

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
    (nn.Conv2d(32, 24, 3, 2, 1), StridedConv2d, (9, 32, 11, 8)),
    (nn.Conv2d(32, 24, (2, 3), (3, 2), (0, 2)), StridedConv2d, (9, 32, 11, 8)),
    (nn.PReLU(48), FastPReLU, (5, 48, 9, 7)), (nn.PReLU(48, -0.7), FastPReLU, (5, 48, 9, 7))])
def test_layers_and_their_gradients_are_accurate(plain, fast_class, size, order):
    plain = copy.deepcopy(plain).to(memory_format=order)
    fast = copy.deepcopy(plain)
    fast.__class__ = fast_class
    x = torch.randn(size).contiguous(memory_format=order)
    x[0, :, 0] = 0      # the kernel of PReLU must treat 0 as PyTorch does
    assert max(errors(fast, plain, x).values()) < 5e-6


@needs_compiler
def test_for_training_keeps_parameters_outputs_and_gradients():
    torch.manual_seed(0)
    plain = faceNet().eval().requires_grad_()      # in training mode, batch normalization cancels the biases before it
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)     # some are zero in a new network, which disables residual units
        elif isinstance(module, nn.PReLU):
            nn.init.ones_(module.weight)                # with a kink at 0, rounding could change a gradient
    fast = for_training(copy.deepcopy(plain).to(memory_format=torch.channels_last))
    replaced = [sum(isinstance(module, kind) for module in fast.modules())
                for kind in (WinogradConv2d, StridedConv2d, FastPReLU)]
    assert replaced == [16, 3, 20] and fast.state_dict().keys() == plain.state_dict().keys()
    assert max(errors(fast, plain, torch.randn(6, 3, 112, 96)).values()) < 5e-5


def test_without_a_compiler_results_are_the_same_and_no_training_layer_is_replaced(monkeypatch):
    torch.manual_seed(0)
    conv, prelu, x = nn.Conv2d(128, 64, 3, padding=1), nn.PReLU(64), torch.randn(3, 128, 9, 11)
    expected = FusedWinogradConv2d(conv, prelu)(x)
    monkeypatch.setattr(kernels, "available", lambda: False)
    torch.testing.assert_close(FusedWinogradConv2d(conv, prelu)(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, WinogradConv2d) for module in for_training(faceNet()).modules())


def test_the_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FACES_CPU_KERNELS", "0")
    assert not kernels.available()
    for net in (for_training(faceNet()), for_inference(faceNet().eval())):
        assert {type(module) for module in net.modules()} == {type(module) for module in faceNet().modules()}


@pytest.fixture
def recompile(tmp_path):
    """Make kernels.py look for its library again, in this test and after it."""
    if os.statvfs(tmp_path).f_flag & os.ST_NOEXEC:
        pytest.skip("no library can be loaded from the temporary folder")
    kernels._library.cache_clear()
    yield
    kernels._library.cache_clear()


@needs_compiler
def test_kernels_are_available_in_a_read_only_clone(monkeypatch, tmp_path, recompile):
    (tmp_path / "file").touch()     # a folder can't be created below a file, not even by root
    monkeypatch.setattr(kernels, "LIBRARY_FOLDER", tmp_path / "file/kernels")
    assert kernels.available()
    torch.testing.assert_close(kernels.prelu_gradients(*2 * [torch.ones(1, 16, 1, 1)], torch.ones(16))[0].sum(),
                               torch.tensor(16.0))


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "planted", "open folder"])
def test_a_library_that_is_not_whole_or_may_be_another_users_is_not_loaded(damage, monkeypatch, tmp_path, recompile):
    folder = tmp_path / "kernels"
    monkeypatch.setattr(kernels, "LIBRARY_FOLDER", folder)
    assert kernels.available()
    library, = folder.glob("*.so")
    library.unlink()    # this process has it mapped into memory
    library.write_bytes(b"\x7fELF, but not a library")
    if damage == "planted":
        library.chmod(0o777)
    if damage == "open folder":
        folder.chmod(0o777)
    kernels._library.cache_clear()
    assert kernels.available()
    rewritten = len(library.read_bytes()) > 1000
    assert rewritten == (damage != "open folder")    # there, the library is compiled into a folder of its own


@pytest.mark.skipif(not kernels.is_x86(), reason="nothing is compiled")
@pytest.mark.parametrize("compiler, problem", [("no-such-compiler", "there is no C compiler"),
                                               ("false", "the C compiler 'false' can't compile kernels.c")])
def test_an_unusable_compiler_is_one_sentence(compiler, problem, monkeypatch, tmp_path, recompile, capsys):
    monkeypatch.setattr(kernels, "LIBRARY_FOLDER", tmp_path)
    monkeypatch.setenv("CC", compiler)
    assert not kernels.available() and not kernels.available() and not list(tmp_path.iterdir())
    error = capsys.readouterr().err
    assert error.startswith(problem) and error.count("\n") == 1


@needs_compiler
@pytest.mark.parametrize("target", ["-march=x86-64", "-mavx"])
def test_kernels_are_accurate_on_processors_with_narrow_vectors(target, monkeypatch, tmp_path, recompile):
    monkeypatch.setattr(kernels, "LIBRARY_FOLDER", tmp_path)
    if target == "-mavx" and b"avx" not in kernels._instruction_sets().split():
        pytest.skip("this processor has no AVX")
    monkeypatch.setattr(kernels, "FLAGS", tuple(target if flag == "-march=native" else flag for flag in kernels.FLAGS))
    torch.manual_seed(0)
    for plain, fast_class in ((nn.Conv2d(16, 32, 3, padding=1, bias=False), WinogradConv2d), (nn.PReLU(16), FastPReLU)):
        fast = copy.deepcopy(plain)
        fast.__class__ = fast_class
        assert max(errors(fast, plain, torch.randn(3, 16, 9, 7)).values()) < 5e-6
    assert len(list(tmp_path.glob("*.so"))) == 1   # the library was compiled for this test, once
