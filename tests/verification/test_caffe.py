"""A .caffemodel embeds as the same weights in a .pth file do."""
import sys

import pytest
import torch
from torch import nn

from cosFace.net import NETS, sphere20a
from faces.files import InputError
from faces.verification.caffe import MAX_BYTES, MAX_LAYERS, read_caffemodel
from faces.verification.weights import announce, load_net


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number, data):
    """Return a field of a message in the format of Protocol Buffers."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def caffemodel(state):
    """Return a snapshot of a network in training, with the fields of src/caffe/proto/caffe.proto in BVLC/caffe: a layer
    without blobs and another setting, then layers with blobs, which have a shape, data and gradients."""
    layers = [field(1, b"data") + b"\x50\0"]
    for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
        layer = field(1, name.encode())
        for tensor in (state[key].detach() for key in (f"{name}.weight", f"{name}.bias") if key in state):
            shape = field(7, field(1, b"".join(map(varint, tensor.shape))))
            layer += field(7, shape + field(5, tensor.numpy().tobytes()) + field(6, bytes(8)))
        layers.append(layer)
    return field(1, b"SpherefaceNet-20") + b"".join(field(100, layer) for layer in layers)


def test_a_caffemodel_embeds_like_the_same_weights_of_the_port(tmp_path, capsys):
    torch.manual_seed(0)
    net = sphere20a()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))    # Caffe has them, but does not train them
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    state = {**net.state_dict(), "fc6.weight": torch.randn(10, 512)}
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "sphereface_model.caffemodel").write_bytes(caffemodel(state))
    (port, _), (net, loaded) = (load_net(tmp_path / name, NETS) for name in ("net.pth", "sphereface_model.caffemodel"))
    images = torch.randn(2, 3, 112, 96)
    with torch.inference_mode():
        assert torch.equal(net(images), port(images))
    announce("net", loaded)
    assert capsys.readouterr().err == ("net: sphere20a in the layout conv1_1 ... fc5, as in clcarwin/"
                                       "sphereface_pytorch; channel order BGR; left out: fc6.weight\n")


LAYER = b"\x0a\x07conv1_1\x3a\x0b" + b"\x3a\x03\x0a\x01\x01" + b"\x2a\x04\0\0\x80\x3f"    # one blob, the number 1.0


def test_damaged_files_are_one_sentence(tmp_path):
    file = tmp_path / "net.caffemodel"
    file.write_bytes(field(100, LAYER))
    assert read_caffemodel(file) == {"conv1_1.weight": torch.ones(1)}
    complete = caffemodel({"conv1_1.weight": torch.zeros(64, 3, 3, 3)})
    for content, message in (
            *((damaged, "damaged or not a file of weights") for damaged in (
                complete[:-1], complete[:30], b"not a model\n", field(100, LAYER[:-1]))),
            (b"", "contains no weights"), (complete, "last layer of the network in .* is missing"),
            (field(100, LAYER.replace(b"\x0a\x01\x01", b"\x0a\x01\x02")), "damaged .*reshape"),
            (field(100, LAYER) * (MAX_LAYERS + 1), "more than 10,000 layers")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_net(file, NETS)
    with open(file, "wb") as sparse:
        sparse.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="over 500 MB"):
        load_net(file, NETS)


def test_without_protobuf_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    (tmp_path / "net.caffemodel").write_bytes(field(100, LAYER))
    with pytest.raises(InputError, match="net.caffemodel needs protobuf .*pip install protobuf"):
        load_net(tmp_path / "net.caffemodel", NETS)
