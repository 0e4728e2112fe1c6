"""A .caffemodel that Google's library for Protocol Buffers writes embeds as the same weights in a .pth file do."""
import sys

import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from torch import nn

from cosFace.net import NETS, sphere20a
from faces.files import InputError
from faces.verification.caffe import MAX_BYTES, MAX_LAYERS, read_caffemodel
from faces.verification.weights import announce, load_net

# From src/caffe/proto/caffe.proto in BVLC/caffe: (name, number, type; of a message, its name)
FIELDS = {"BlobShape": [("dim", 1, "INT64")],
          "BlobProto": [("shape", 7, "BlobShape"), ("data", 5, "FLOAT"), ("diff", 6, "FLOAT")],
          "LayerParameter": [("name", 1, "STRING"), ("loss_weight", 5, "FLOAT"), ("blobs", 7, "BlobProto"),
                             ("phase", 10, "INT32")],
          "NetParameter": [("name", 1, "STRING"), ("layer", 100, "LayerParameter")]}
PACKED = ("dim", "data", "diff")
REPEATED = (*PACKED, "loss_weight", "blobs", "layer")


@pytest.fixture(scope="module")
def net_parameter():
    """Return the class of Caffe's NetParameter."""
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe")
    for message, fields in FIELDS.items():
        message = file.message_type.add(name=message)
        for name, number, type in fields:
            field = message.field.add(name=name, number=number, label=3 if name in REPEATED else 1)
            if type in FIELDS:
                field.type, field.type_name = field.TYPE_MESSAGE, f".caffe.{type}"
            else:
                field.type, field.options.packed = getattr(field, f"TYPE_{type}"), name in PACKED
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


def caffemodel(net_parameter, state) -> bytes:
    """Return a snapshot of a network in training: with layers without blobs, other settings, and gradients, too."""
    message = net_parameter(name="SpherefaceNet-20")
    message.layer.add(name="data", phase=0, loss_weight=[1])
    for name in dict.fromkeys(name.rpartition(".")[0] for name in state):
        layer = message.layer.add(name=name)
        for tensor in (state[key] for key in (f"{name}.weight", f"{name}.bias") if key in state):
            blob = layer.blobs.add(data=tensor.flatten().tolist(), diff=[0.5, -1])
            blob.shape.dim.extend(tensor.shape)
    return message.SerializeToString()


def test_a_caffemodel_embeds_like_the_same_weights_of_the_port(net_parameter, tmp_path, capsys):
    torch.manual_seed(0)
    net = sphere20a()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_channels))    # Caffe has them, but does not train them
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    state = {**net.state_dict(), "fc6.weight": torch.randn(10, 512)}
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "sphereface_model.caffemodel").write_bytes(caffemodel(net_parameter, state))
    (port, _), (net, loaded) = (load_net(tmp_path / name, NETS) for name in ("net.pth", "sphereface_model.caffemodel"))
    images = torch.randn(2, 3, 112, 96)
    with torch.inference_mode():
        assert torch.equal(net(images), port(images))
    announce("net", loaded)
    assert capsys.readouterr().err == ("net: sphere20a in the layout conv1_1 ... fc5, as in clcarwin/"
                                       "sphereface_pytorch; channel order BGR; left out: fc6.weight\n")


def field(number, value: bytes) -> bytes:
    return bytes([number << 3 & 127 | 130, number >> 4, len(value)]) + value    # for numbers over 15


LAYER = b"\x0a\x07conv1_1\x3a\x0b" + b"\x3a\x03\x0a\x01\x01" + b"\x2a\x04\0\0\x80\x3f"    # one blob, the number 1.0


def test_damaged_files_are_one_sentence(net_parameter, tmp_path):
    file = tmp_path / "net.caffemodel"
    file.write_bytes(field(100, LAYER))
    assert read_caffemodel(file) == {"conv1_1.weight": torch.ones(1)}
    complete = caffemodel(net_parameter, {"conv1_1.weight": torch.zeros(64, 3, 3, 3)})
    for content, message in (
            *((damaged, "damaged or not a file of weights") for damaged in (
                complete[:-1], complete[:1000], complete[:30], b"\xff" * 11, b"not a model\n",
                field(100, LAYER[:-1]), field(100, LAYER[:9] + b"\x3a\x0a" + LAYER[11:-1]))),
            (b"", "contains no weights"),
            (complete, "last layer of the network in .* is missing"),
            (field(100, LAYER.replace(b"\x0a\x01\x01", b"\x0a\x01\x02")), "damaged .*reshape"),
            (field(100, LAYER.replace(b"\x0a\x07conv1_1", b"\x08\x83\xff\xff\xff\x7f\x10\1")), "no weights"),
            (field(100, LAYER.replace(b"conv", b"\xff\xff\xff\xff")), "damaged .*utf-8"),
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
