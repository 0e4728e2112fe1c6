"""Our checkpoints and public ones reproduce the embeddings of the network they came from, or fail in one sentence."""
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
    """Return a network like the released sphere20a, which takes BGR and has a bias in every convolution."""
    torch.manual_seed(0)
    net = sphere20a().eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.randn(module.out_channels) * 0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    return net


@pytest.fixture(scope="module")
def images():
    """Return two random network inputs, float (2, 3, 112, 96)."""
    return torch.rand(2, 3, 112, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def embed(net, images):
    with torch.inference_mode():
        return net.eval()(images)


def assert_embeds(net, images, expected):
    torch.testing.assert_close(embed(net, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [
    lambda state: {**state, "fc6.weight": torch.zeros(512, 10)},
    lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    lambda state: {"model": state, "epoch": 3},
], ids=["with the training head", "nested, DataParallel", "nested"])
def test_released_weights_embed_rgb_as_they_embedded_bgr(released, images, tmp_path, wrap):
    torch.save(wrap(released.state_dict()), tmp_path / "net.pth")
    net = sphere20a()
    assert load_weights(net, tmp_path / "net.pth")["channels"] == "bgr"
    assert_embeds(net, images, embed(released, images.flip(1)))


def test_the_channel_order_can_be_specified(released, images, tmp_path):
    torch.save(released.state_dict(), tmp_path / "net.pth")
    net = sphere20a()
    load_weights(net, tmp_path / "net.pth", channels="rgb")
    assert_embeds(net, images, embed(released, images))


def test_the_checkpoint_format_of_2017_can_be_loaded(released, images, tmp_path):
    torch.save(released.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    net = sphere20a()
    load_weights(net, tmp_path / "net.pth")
    assert_embeds(net, images, embed(released, images.flip(1)))


def test_our_own_and_public_checkpoints_of_the_batch_normalized_variant(images, tmp_path):
    torch.manual_seed(2)
    trained = faceNet()
    for module in trained.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    expected = embed(trained, images)
    checkpoint.save(tmp_path / "ours.pt", {"method": "CosFace", "net": "faceNet", "weights": trained.state_dict(),
                                           "head": {"weight": torch.zeros(7, 512)}})
    net = faceNet()
    assert load_weights(net, tmp_path / "ours.pt") == {"format": checkpoint.FORMAT, "method": "CosFace",
                                                       "channels": "rgb"}
    assert_embeds(net, images, expected)
    public = {name: value for name, value in trained.state_dict().items() if not name.endswith("num_batches_tracked")}
    public["conv1_1.weight"] = public["conv1_1.weight"].flip(1)
    torch.save(public, tmp_path / "public.pth")
    net = faceNet()
    load_weights(net, tmp_path / "public.pth")
    assert_embeds(net, images, expected)


class CreatesFolder:
    """An object whose pickle creates a folder when it is unpickled, standing in for malicious code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def small_state_dict(net, **changes):
    """Return a state dict of zeros with the network's shapes, which takes almost no space on disk.

    Args:
        net: constructor of the network.
        changes: tensors to replace or add, by name; None removes a tensor.
    """
    state = {name: torch.zeros(()).expand(value.shape) for name, value in net().state_dict().items()}
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def net():
    return sphere20a()


@pytest.mark.parametrize("content, message", [
    (lambda: small_state_dict(faceNet), "contains the weights of faceNet, not of sphere20a; pass --net faceNet"),
    (lambda: small_state_dict(sphere20a, **{"fc5.weight": torch.zeros(256, 4)}), "fc5.weight is 256x4, not 512x21504"),
    (lambda: small_state_dict(sphere20a, **{"conv3_4.weight": None}), "conv3_4.weight is missing"),
    (lambda: small_state_dict(sphere20a, **{"conv5_1.weight": torch.zeros(1)}), "conv5_1.weight is unknown"),
    (lambda: small_state_dict(sphere20a, **{"conv1_2.bias": torch.zeros(3)}), "conv1_2.bias is 3, not 64"),
    (lambda: {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "do not fit sphere20a"),
    (lambda: {"epoch": 3}, "contains no weights"),
    (lambda: torch.zeros(3), "contains no weights"),
    (lambda: nn.Linear(2, 2), "loaded safely"),
])
def test_unsuitable_files_are_one_sentence_errors(net, tmp_path, content, message):
    torch.save(content(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=message) as error:
        load_weights(net, tmp_path / "net.pth")
    assert str(tmp_path / "net.pth") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickles_are_rejected_without_running_them(net, tmp_path, zipped, protocol):
    torch.save({"state_dict": CreatesFolder(tmp_path / "created")}, tmp_path / "net.pth", pickle_protocol=protocol,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="loaded safely"):
        load_weights(net, tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes(pickle.dumps(CreatesFolder(tmp_path / "created"), protocol))
    with pytest.raises(InputError, match="loaded safely"):
        load_weights(net, tmp_path / "net.pth")
    assert not (tmp_path / "created").exists()


def test_unreadable_files_are_one_sentence_errors(net, tmp_path):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not weights\n")
    torch.save(torch.zeros(100_000), tmp_path / "complete.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "complete.pt").read_bytes()[:100_000])
    with open(tmp_path / "huge.pt", "wb") as file:
        file.truncate(checkpoint.MAX_BYTES + 1)  # the file is sparse, so it takes no space on disk
    for name, message in {"missing.pt": "No such file", ".": "Is a directory", "empty.pt": "safely",
                          "text.pt": "safely", "truncated.pt": "safely", "huge.pt": "GB"}.items():
        with pytest.raises(InputError, match=message):
            load_weights(net, tmp_path / name)
