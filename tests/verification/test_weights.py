"""Our checkpoints and public ones reproduce the embeddings of the network they came from, or fail in one sentence."""
import argparse
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import PickledCall, perturb
from torch import nn

from cosFace.net import NETS, faceNet, sphere20a, sphere36a, sphere64a
from faces.files import CHECKPOINT, InputError
from faces.verification.weights import announce, fingerprint, initial_net, load_net


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


def renamed(state, rename):
    return {rename(name): value for name, value in state.items()}


@pytest.mark.parametrize("wrap, source", [
    (lambda state: {**state, "fc6.weight": torch.zeros(512, 10)}, ""),
    (lambda state: {"state_dict": renamed(state, "module.{}".format)}, "state_dict"),
    (lambda state: {"model": renamed(state, "module._orig_mod.{}".format), "epoch": 3}, "model"),
    (lambda state: renamed(state, "_orig_mod.module.{}".format), ""),
    (lambda state: renamed(state, lambda name: name.replace("conv2_1.", "conv2_1._orig_mod.")), ""),
    (lambda state: {**renamed(state, "backbone.{}".format), "weight": torch.zeros(10, 512)}, "backbone"),
    (lambda state: {"ema": {"module": state}, "model": {n: v + 1 for n, v in state.items()}}, "ema.module"),
    (lambda state: {**renamed(state, "net.{}".format), **{f"ema.{n}": v for n, v in state.items()}}, "ema"),
    (lambda state: {"params": state, "best": np.float64(0.9), "history": np.arange(3.0),
                    "args": argparse.Namespace(output=Path("runs"), rates=np.ones(2))}, "params"),
], ids=["with the training head", "DataParallel, nested", "compiled, then DataParallel", "DataParallel, then compiled",
        "one compiled layer", "in a module with a margin", "averaged and not, nested", "averaged and not, by prefix",
        "beside numpy values and options"])
def test_released_weights_embed_rgb_as_they_embedded_bgr(released, images, tmp_path, wrap, source):
    torch.save(wrap({name: value.clone() for name, value in released.state_dict().items()}), tmp_path / "net.pth")
    net, loaded = load_net(tmp_path / "net.pth", NETS)
    assert (loaded["net"], loaded["channels"], loaded["source"]) == ("sphere20a", "bgr", source)
    assert_embeds(net, images, embed(released, images.flip(1)))


def in_mugglewangs_layout(state, stages=(1, 2, 4, 1)):
    """Return the state dict of a network with the names that MuggleWang/CosFace_pytorch gives its layers."""
    names = {"fc5": "fc"}
    for stage, units in enumerate(stages, 1):
        names |= {f"conv{stage}_1": f"layer{stage}.0", f"relu{stage}_1": f"layer{stage}.1"}
        for unit in range(units):
            for i in (1, 2):
                names[f"conv{stage}_{2 * unit + i + 1}"] = f"layer{stage}.{unit + 2}.conv{i}"
                names[f"relu{stage}_{2 * unit + i + 1}"] = f"layer{stage}.{unit + 2}.prelu{i}"
    return renamed(state, lambda name: f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}")


@pytest.mark.parametrize("type", [torch.float32, torch.bfloat16])
def test_mugglewangs_weights_take_rgb_and_another_normalization(images, tmp_path, capsys, type):
    state = {name: value.to(type) for name, value in sphere20a().state_dict().items()}
    theirs = sphere20a()
    theirs.load_state_dict(state)
    torch.save({**in_mugglewangs_layout(state), "head.weight": torch.zeros(10, 512)}, tmp_path / "net.pth")
    net, loaded = load_net(tmp_path / "net.pth", NETS)
    assert net.conv1_1.weight.dtype == torch.float32
    expected = embed(theirs, images * (128 / 127.5))
    assert (embed(net, images) - expected).abs().max() < 1e-5 * expected.abs().max()
    announce("net.pth", loaded)
    assert capsys.readouterr().err == ("net.pth: sphere20a in the layout layer1.0 ... fc, as in MuggleWang/"
                                       "CosFace_pytorch; channel order RGB; left out: head.weight\n")


def test_the_authors_64_layers_have_one_unit_less_than_the_papers(images, tmp_path, capsys):
    theirs = sphere64a()
    nn.init.zeros_(theirs.conv2_17.weight)    # so the eighth unit is the identity
    state = {name: value for name, value in theirs.state_dict().items() if "2_16" not in name and "2_17" not in name}
    torch.save(in_mugglewangs_layout(state, (3, 7, 16, 3)), tmp_path / "net.pth")
    (net, loaded), (_, again) = (load_net(tmp_path / "net.pth", NETS, channels="rgb") for _ in range(2))
    net.conv1_1.weight.data = theirs.conv1_1.weight    # theirs takes another normalization
    assert torch.equal(embed(net, images), embed(theirs, images)) and loaded["fingerprint"] == again["fingerprint"]
    announce("net.pth", loaded)
    assert capsys.readouterr().err.endswith("added: 1 residual unit, the identity\n")
    torch.save({name: value for name, value in state.items() if not re.search("4_[67]", name)}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="conv2_16.weight is missing"):
        load_net(tmp_path / "net.pth", NETS)


def test_a_deep_network_can_start_as_a_shallower_one(released, images, tmp_path, capsys):
    torch.save(released.state_dict(), tmp_path / "net.pth")
    net = initial_net(sphere36a, tmp_path / "net.pth")
    assert "sphere20a in the layout conv1_1" in (line := capsys.readouterr().err) and "added: 8 residual units" in line
    torch.testing.assert_close(embed(net, images), embed(released, images.flip(1)), rtol=1e-5, atol=1e-5)
    net(images).square().sum().backward()
    for layer in (net.conv1_5, net.conv2_9, net.conv3_17, net.conv4_5):
        assert layer.weight.grad.any()    # so the new units learn
    torch.save(small_state_dict(sphere36a), tmp_path / "deep.pth")
    for make, file, found in ((sphere20a, "deep.pth", "sphere36a"), (faceNet, "net.pth", "sphere20a")):
        with pytest.raises(InputError, match=f"contains the weights of {found}"):
            initial_net(make, tmp_path / file)


def test_safetensors_state_their_channel_order(released, images, tmp_path, capsys):
    state = {name: value.clone() for name, value in released.state_dict().items()}
    for stated, channels in (("RGB", "rgb"), ("BGR", "bgr"), (None, "bgr"), ("YUV", "bgr")):
        safetensors.torch.save_file(state, tmp_path / "net.safetensors", stated and {"colour_order": stated})
        net, loaded = load_net(tmp_path / "net.safetensors", NETS)
        assert loaded["channels"] == channels
        assert_embeds(net, images, embed(released, images if channels == "rgb" else images.flip(1)))
    safetensors.torch.save_file(state, tmp_path / "own", {"colour_order": "RGB", "net": "sphere20a"})    # as exported
    announce("own", load_net(tmp_path / "own", NETS)[1])
    assert capsys.readouterr().err == "own: sphere20a in the layout of this project; channel order RGB\n"


def test_the_fingerprint_tells_networks_apart_but_not_their_files(released, images, tmp_path):
    torch.save(released.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=False)    # as in 2017
    torch.save({"model": renamed(released.state_dict(), "module.{}".format)}, tmp_path / "nested.pth")
    (net, first), (_, second) = (load_net(tmp_path / name, NETS) for name in ("net.pth", "nested.pth"))
    assert_embeds(net, images, embed(released, images.flip(1)))
    assert first["fingerprint"] == second["fingerprint"] == fingerprint(net)
    with torch.no_grad():
        net.conv3_2.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(net) != first["fingerprint"]


def test_our_own_and_public_checkpoints_of_the_batch_normalized_variant(images, tmp_path):
    torch.manual_seed(2)
    trained = faceNet()
    perturb(trained)
    embed(trained.train(), images)
    expected = embed(trained, images)
    torch.save({"format": CHECKPOINT, "method": "CosFace", "net": "faceNet", "weights": trained.state_dict(),
                "head": {"weight": torch.zeros(7, 512)}}, tmp_path / "checkpoint.pt")
    public = {name: value for name, value in trained.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save({**public, "conv1_1.weight": public["conv1_1.weight"].flip(1)}, tmp_path / "public.pth")
    for file, *description in ((tmp_path, CHECKPOINT, "CosFace", "rgb"),
                               (tmp_path / "public.pth", "state dict", None, "bgr")):
        net, loaded = load_net(file, NETS)
        assert [loaded[key] for key in ("format", "method", "channels")] == description
        assert_embeds(net, images, expected)


def small_state_dict(net, **changes):
    """Return a state dict of zeros with the network's shapes, which takes almost no space on disk. `changes` are
    tensors to replace or add, by name; None removes a tensor."""
    state = {name: torch.zeros(()).expand(value.shape) for name, value in net().state_dict().items()}
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize("content, message", [
    (lambda: small_state_dict(faceNet), "contains the weights of faceNet, not of sphere20a; pass --net faceNet"),
    (lambda: small_state_dict(sphere20a, **{"fc5.weight": torch.zeros(256, 4)}), "fc5.weight is 256x4, not 512x21504"),
    (lambda: small_state_dict(sphere20a, **{"conv3_4.weight": None}), "conv3_4.weight is missing"),
    (lambda: small_state_dict(sphere20a, **{"conv1_2.bias": torch.zeros(3)}), "conv1_2.bias is 3, not 64"),
    (lambda: {"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "sphere CNN .its first tensor is layer1.0.conv1"),
    (lambda: in_mugglewangs_layout(small_state_dict(sphere20a)) | {"layer1.3.conv1.weight": torch.zeros(1)},
     "layer1.3.conv1.weight is 1, not missing"),
    (lambda: small_state_dict(sphere20a, **{"conv1_2.weight": torch.zeros(64, 64, 3, 3).to_sparse()}), "ordinary"),
    (lambda: small_state_dict(sphere20a, **{"conv1_2.weight": torch.zeros(64, 64, 3, 3, dtype=torch.int8)}), "int8"),
    (lambda: small_state_dict(sphere20a, **{"conv1_2.weight": torch.nested.nested_tensor(
        [torch.zeros(64, 3, 3)] * 64)}), "ordinary tensors"),
    (lambda: {f"a{i}.conv1_1.weight": torch.zeros(()) for i in range(3000)}, "last layer of the network"),
    (lambda: torch.zeros(3), "contains no weights"),
    (lambda: nn.Linear(2, 2), "loaded safely"),
])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_unsuitable_files_are_one_sentence_errors(tmp_path, content, message):
    torch.save(content(), tmp_path / "net.pth")
    with pytest.raises(InputError, match=message) as error:
        load_net(tmp_path / "net.pth", NETS, "sphere20a")
    assert str(tmp_path / "net.pth") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_unreadable_and_malicious_files_are_one_sentence_errors(tmp_path):
    code = PickledCall(os.mkdir, str(tmp_path / "created"))
    torch.save({"state_dict": code}, tmp_path / "zipped.pt")
    torch.save({"state_dict": code}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickled.pt").write_bytes(pickle.dumps(code))
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("not weights\n")
    torch.save(torch.zeros(100_000), tmp_path / "complete.pt")
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "complete.pt").read_bytes()[:100_000])
    (tmp_path / "net.safetensors").write_bytes(b"\x40" + bytes(7) + b"{" + bytes(99))
    (tmp_path / "net.onnx").touch()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    for name, message in {"missing.pt": "No such file", ".": "holds no checkpoint.pt",
                          "net.safetensors": "deserializing header",
                          **dict.fromkeys(("net.onnx", "script.pt"), "export for other programs"),
                          **dict.fromkeys(("zipped.pt", "legacy.pt", "pickled.pt", "empty.pt", "text.pt",
                                           "truncated.pt"), "loaded safely")}.items():
        with pytest.raises(InputError, match=message):
            load_net(tmp_path / name, NETS, "sphere20a")
    assert not (tmp_path / "created").exists()


def test_networks_are_made_in_float32_on_the_cpu_whatever_the_defaults_are(tmp_path):
    torch.save(small_state_dict(sphere20a), tmp_path / "net.pth")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            net, _ = load_net(tmp_path / "net.pth", NETS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(value.dtype, value.device.type) for value in net.parameters()} == {(torch.float32, "cpu")}
