"""Our checkpoints and public ones give the embeddings of the network they came from, or one clear sentence."""
import os
import pickle

import pytest
import torch
from torch import nn

from cosFace.net import faceNet, sphere20a
from faces.files import InputError
from faces.training import checkpoint
from faces.verification.weights import load_weights


@pytest.fixture(scope="module")
def released():
    """A network as the released sphere20a: BGR, and a bias in every convolution."""
    torch.manual_seed(0)
    net = sphere20a().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.randn(module.out_channels) * 0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    return net


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 3, 112, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def outputs(net, image):
    with torch.inference_mode():
        return net.eval()(image)


def same_embedding(net, image, expected):
    return torch.allclose(outputs(net, image), expected, atol=1e-5)


@pytest.mark.parametrize("wrap", [
    lambda state: {**state, "fc6.weight": torch.zeros(512, 10)},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"model": state, "epoch": 3},
], ids=["with its head", "nested, DataParallel", "nested"])
def test_released_weights_give_the_same_embedding_as_with_bgr(released, image, tmp_path, wrap):
    torch.save(wrap(released.state_dict()), tmp_path / "net.pth")
    net = sphere20a()
    assert load_weights(net, tmp_path / "net.pth")["channels"] == "bgr"
    assert same_embedding(net, image, outputs(released, image.flip(1)))  # the same picture, read as RGB and as BGR


def test_channels_can_be_named(released, image, tmp_path):
    torch.save(released.state_dict(), tmp_path / "net.pth")
    net = sphere20a()
    load_weights(net, tmp_path / "net.pth", channels="rgb")
    assert same_embedding(net, image, outputs(released, image))


def test_the_file_format_of_2017_is_read(released, image, tmp_path):
    torch.save(released.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    net = sphere20a()
    load_weights(net, tmp_path / "net.pth")
    assert same_embedding(net, image, outputs(released, image.flip(1)))


def test_batch_normalized_variant_and_our_own_checkpoint(image, tmp_path):
    torch.manual_seed(2)
    trained = faceNet()
    for module in trained.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    expected = outputs(trained, image)
    checkpoint.save(tmp_path / "ours.pt", {"method": "CosFace", "net": "faceNet", "weights": trained.state_dict(),
                                           "head": {"weight": torch.zeros(7, 512)}})
    net = faceNet()
    assert load_weights(net, tmp_path / "ours.pt") == {"format": checkpoint.FORMAT, "method": "CosFace",
                                                       "channels": "rgb"}
    assert same_embedding(net, image, expected)
    old = {name: value for name, value in trained.state_dict().items() if not name.endswith("num_batches_tracked")}
    old["conv1_1.weight"] = old["conv1_1.weight"].flip(1)
    torch.save(old, tmp_path / "public.pth")
    net = faceNet()
    load_weights(net, tmp_path / "public.pth")
    assert same_embedding(net, image, expected)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hollow(net, **changes):
    """A state dict with the right shapes that takes no room on disk; None leaves a layer out."""
    state = {name: torch.zeros(()).expand(value.shape) for name, value in net().state_dict().items()}
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def blank():
    return sphere20a()


@pytest.mark.parametrize("content, sentence", [
    (lambda: hollow(faceNet), "contains the weights of faceNet, not of sphere20a; pass --net faceNet"),
    (lambda: hollow(sphere20a, **{"fc5.weight": torch.zeros(256, 4)}), "fc5.weight is 256x4, not 512x21504"),
    (lambda: hollow(sphere20a, **{"conv3_4.weight": None}), "conv3_4.weight is missing"),
    (lambda: hollow(sphere20a, **{"conv5_1.weight": torch.zeros(1)}), "conv5_1.weight is unknown"),
    (lambda: hollow(sphere20a, **{"conv1_2.bias": torch.zeros(3)}), "conv1_2.bias is 3, not 64"),
    (lambda: {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "another network than sphere20a"),
    (lambda: {"epoch": 3}, "contains no weights"),
    (lambda: torch.zeros(3), "contains no weights"),
    (lambda: nn.Linear(2, 2), "loaded safely"),
])
def test_other_files_are_refused_in_one_sentence(blank, tmp_path, content, sentence):
    torch.save(content(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=sentence) as error:
        load_weights(blank, tmp_path / "net.pth")
    assert str(tmp_path / "net.pth") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_nothing(blank, tmp_path, zipped, protocol):
    torch.save({"state_dict": Malicious(tmp_path / "owned")}, tmp_path / "net.pth", pickle_protocol=protocol,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="loaded safely"):
        load_weights(blank, tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "owned"), protocol))
    with pytest.raises(InputError, match="loaded safely"):
        load_weights(blank, tmp_path / "net.pth")
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_one_sentence(blank, tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not weights\n")
    torch.save(torch.zeros(100_000), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    with open(tmp_path / "vast.pt", "wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 1)  # a sparse file takes no room
    for name, sentence in {"absent.pt": "No such file", ".": "Is a directory", "empty.pt": "safely",
                           "text.pt": "safely", "cut.pt": "safely", "vast.pt": "GB"}.items():
        with pytest.raises(InputError, match=sentence):
            load_weights(blank, tmp_path / name)
