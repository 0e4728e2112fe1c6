"""Convert the weights in the PyPI package facenet-pytorch to mtcnn.safetensors, the file in this folder.

    pip download --no-deps facenet-pytorch==2.6.0
    python mtcnn/weights/convert.py facenet_pytorch-2.6.0-py3-none-any.whl

The values are unchanged, bit for bit; only the names become those of nets.py.
"""
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from faces.signals import end_quietly

end_quietly(__name__)
import torch
from safetensors.torch import save

from faces.files import InputError, atomic_write, command, script_parser
from mtcnn.nets import WEIGHTS, Nets, ONet, PNet, RNet

HEADS = {"1": "face", "2": "box", "3": "points"}


def read_source(path, name):
    """Return the bytes of facenet_pytorch/data/NAME from the wheel or the unpacked package."""
    member = f"facenet_pytorch/data/{name}"
    try:
        if path.is_dir():
            return (path / member).read_bytes()
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"can't read {member} in {path} ({error}); pass the wheel of facenet-pytorch 2.6.0.") from None


def rename(key):
    """Turn a parameter's name in the package, such as `dense6_2.bias`, into ours, such as `box.bias`."""
    layer, kind = key.split(".")
    if "_" in layer:
        return f"{HEADS[layer[-1]]}.{kind}"
    return f"body.{key}"


def move_dense(state):
    """Rename the dense layer of R-Net and O-Net and its PReLU, which are a module of their own in nets.py."""
    number = next((match[1] for key in state if (match := re.match(r"body\.dense(\d)", key))), None)
    renamed = {f"body.dense{number}.": "dense.0.", f"body.prelu{number}.": "dense.1."}
    return {next((key.replace(old, new) for old, new in renamed.items() if key.startswith(old)), key): value
            for key, value in state.items()}


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("package", type=Path, help="wheel of facenet-pytorch 2.6.0, or the unpacked folder")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    args = parser.parse_args(argv)
    tensors = {}
    for name, net in zip(Nets._fields, (PNet(), RNet(), ONet())):
        data = read_source(args.package, f"{name}.pt")
        print(hashlib.sha256(data).hexdigest(), f"{name}.pt")
        state = torch.load(io.BytesIO(data), weights_only=True)
        state = move_dense({rename(key): value for key, value in state.items()})
        net.load_state_dict(state, strict=True)  # checks names and shapes
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in state.items()})
    data = save(tensors)
    with atomic_write(args.output) as file:
        file.write(data)
    print(hashlib.sha256(data).hexdigest(), args.output.name)


if __name__ == "__main__":
    main()
