"""Read a .caffemodel, such as SphereFace's release (wy1iu/sphereface), without Caffe.

The file is a NetParameter, as Caffe's caffe.proto defines it, in the wire format of Protocol Buffers: a message is a
sequence of fields, and a field is a key (8 times its number, plus the kind of its value) and a value. This parser takes
about twice as much memory as the file, whatever is in it; the objects of a general one can take far more.
"""
import numpy as np
import torch

from faces.files import read_bytes

MAX_BYTES = 2 << 30    # of a message of Protocol Buffers
MAX_TENSORS = 10_000
# The numbers of the fields that matter. Before Caffe had PReLU, the layers of a net were field 2.
LAYER = 100            # of NetParameter
NAME, BLOBS = 1, 7     # of LayerParameter
DATA, SHAPE = 5, 7     # of BlobProto
DIM = 1                # of BlobShape


def read_caffemodel(file) -> dict[str, torch.Tensor]:
    """Return the parameters in a .caffemodel as a state dict of float32 tensors.

    The first blob of a layer is its weight, the second its bias: conv1_1.weight, conv1_1.bias, relu1_1.weight (the
    slopes of PReLU), ..., fc5.weight (512, 21504), fc5.bias, fc6.weight. Axes have the same order as in PyTorch.

    Raises:
        OSError: the file can't be read, or is too large.
        ValueError, TypeError: it is damaged.
    """
    tensors = {}
    for number, layer in _fields(memoryview(read_bytes(file, MAX_BYTES))):
        if number == LAYER:
            name, blobs = "", []
            for field, value in _fields(layer):
                if field == NAME:
                    name = str(value, "utf-8")
                elif field == BLOBS and len(blobs) < 2:
                    blobs.append(_tensor(value))
            tensors.update(zip((f"{name}.weight", f"{name}.bias"), blobs))
            if len(tensors) > MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS:,} tensors")
    return tensors


def _tensor(blob):
    values, shape = b"", []
    for number, value in _fields(blob):
        if number == DATA:
            values = value
        elif number == SHAPE:
            shape = [size for field, sizes in _fields(value) if field == DIM for size in _integers(sizes[:80])]
    return torch.from_numpy(np.frombuffer(values, "<f4").astype(np.float32).reshape(shape))


def _fields(message):
    """Yield (number, value) of each field; text, arrays and messages are memoryviews, all other values are integers."""
    start = 0
    while start < len(message):
        key, start = _integer(message, start)
        kind = key & 7
        if kind not in (0, 1, 2, 5):
            raise ValueError("it has a field of an unknown kind")
        value, end = _integer(message, start) if kind in (0, 2) else (None, start + (8 if kind == 1 else 4))
        start = end + value if kind == 2 else end
        if start > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, message[end:start] if kind == 2 else value


def _integers(data):
    start = 0
    while start < len(data):
        value, start = _integer(data, start)
        yield value


def _integer(data, start):
    """Return the integer at a position, 7 bits a byte, lowest first, the last with high bit 0; and where it ends."""
    value = 0
    for i, byte in enumerate(data[start:start + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, start + i + 1
    raise ValueError("it ends too early")
