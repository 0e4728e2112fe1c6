"""Read a .caffemodel, such as SphereFace's release (wy1iu/sphereface), without Caffe, with the protobuf package."""
import numpy as np
import torch

from faces.files import InputError, read_bytes

MAX_BYTES = 500 * 10**6    # sphere64a with its training head has 220 million
MAX_LAYERS = 10_000
# The fields that matter, from src/caffe/proto/caffe.proto in BVLC/caffe. Inner messages are bytes here, parsed one by
# one: a tree of them can take far more memory than the file, and without protoc, it crashes protobuf 4.22 to 4.24.
PROTO = """
    name: "caffe.proto"
    message_type { name: "NetParameter"
                   field { name: "layer" number: 100 type: TYPE_BYTES label: LABEL_REPEATED } }
    message_type { name: "LayerParameter"
                   field { name: "name" number: 1 type: TYPE_BYTES label: LABEL_OPTIONAL }
                   field { name: "blobs" number: 7 type: TYPE_BYTES label: LABEL_REPEATED } }
    message_type { name: "BlobProto"
                   field { name: "data" number: 5 type: TYPE_BYTES label: LABEL_OPTIONAL }
                   field { name: "shape" number: 7 type: TYPE_BYTES label: LABEL_OPTIONAL } }
    message_type { name: "BlobShape"
                   field { name: "dim" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }"""


def read_caffemodel(file) -> dict[str, torch.Tensor]:
    """Return the parameters in a .caffemodel as a state dict of float32 tensors.

    The first blob of a layer is its weight, the second its bias: conv1_1.weight, conv1_1.bias, relu1_1.weight (the
    slopes of PReLU), ..., fc5.weight (512, 21504), fc5.bias, fc6.weight. Axes have the same order as in PyTorch. Raises
    InputError without protobuf, and for a damaged file any error of a parser, for reading().
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, text_format
        from google.protobuf.message_factory import GetMessageClass
    except ImportError:
        raise InputError(f"{file} needs protobuf 4.22 or newer; run `pip install protobuf --upgrade`.") from None
    description = text_format.Parse(PROTO, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(description.SerializeToString())
    net, layer, blob, shape = (GetMessageClass(pool.FindMessageTypeByName(message.name)).FromString
                               for message in description.message_type)
    layers, tensors = net(read_bytes(file, MAX_BYTES)).layer, {}
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"more than {MAX_LAYERS:,} layers")
    for parsed in map(layer, layers):
        for kind, values in zip(("weight", "bias"), map(blob, parsed.blobs)):
            array = np.frombuffer(values.data, "<f4").astype(np.float32)
            array = array.reshape(shape(values.shape).dim[:65])    # NumPy refuses more than 64
            tensors[f"{parsed.name.decode()}.{kind}"] = torch.from_numpy(array)
    return tensors
