"""Export a trained network for deployment; the result is checked against the original before it is written.

    python tools/export.py --model FILE --net faceNet --format onnx --output face.onnx

The exported network takes float32 (N, 3, 112, 96), any N, RGB, (x - 127.5) / 128, and returns the embeddings, float32
(N, 512), not normalized. Its metadata say how to prepare the input; they are in metadata_props of ONNX, in the header
of safetensors, and in the extra file metadata.json of TorchScript.
"""
import argparse
import contextlib
import copy
import io
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np
import safetensors.torch
import torch

from cosFace.net import NETS
from faces.align import HEIGHT, TEMPLATE, WIDTH, crop_aligned
from faces.device import to_input
from faces.files import InputError, atomic_write, command, folder
from faces.images import UnreadableImage, list_images, read_image
from faces.verification.weights import add_options as add_model_options
from faces.verification.weights import load_weights

TOLERANCE = 1e-4     # largest difference of embedding values, relative to the largest value if that is over 1
MADE, READ = 8, 256  # number of synthetic faces to check on, and maximum number of faces from --check-faces


def export(net, format, faces, about):
    """Export a network and check the result.

    Args:
        net: module on the CPU, float (N, 3, 112, 96) to (N, 512); it is set to eval mode.
        format: one of FORMATS.
        faces: uint8 (N, 112, 96, 3), N >= 2, RGB; the check uses them as one batch and two of them one by one.
        about: dict of strings, the metadata.

    Returns:
        (bytes of the file, largest difference between embedding values, largest embedding value).

    Raises:
        InputError: a package is missing, or the result differs by more than TOLERANCE.
    """
    write, open_exported = FORMATS[format]
    net.eval()
    with torch.inference_mode():
        batches = [to_input(torch.from_numpy(part)).contiguous() for part in (faces, faces[:1], faces[1:2])]
        expected = [net(batch).numpy() for batch in batches]
        data = write(net, batches[0][:2], about)
        run = open_exported(data, net)
        found = [run(batch) for batch in batches]
    difference = max(float(abs(a - b).max()) for a, b in zip(found, expected))
    largest = float(abs(expected[0]).max())
    if not difference <= TOLERANCE * max(1, largest):  # written so that NaN fails too
        raise InputError(f"the exported network differs from the original by {difference:.2g} in embeddings of up to "
                         f"{largest:.2g}; nothing was written; try another --format.")
    return data, difference, largest


def write_onnx(net, example, about):
    """Return the bytes of an ONNX model with input "face" and output "embedding", and batch normalization folded."""
    onnx = _optional("onnx")
    _optional("onnxruntime")  # checked first, because the result can't be verified without it
    buffer, names = io.BytesIO(), ["face", "embedding"]
    with _silent():
        torch.onnx.export(net, (example,), buffer, input_names=names[:1], output_names=names[1:], dynamo=False,
                          dynamic_axes={name: {0: "N"} for name in names})  # dynamo would need another package
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def open_onnx(data, net):
    """Return a function from float (N, 3, 112, 96) to float32 (N, 512), computed by ONNX Runtime."""
    onnxruntime = _optional("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["embedding"], {"face": batch.numpy()})[0]


def write_torchscript(net, example, about):
    """Return the bytes of a TorchScript module, with `about` as its extra file metadata.json."""
    buffer = io.BytesIO()
    with _silent():
        traced = torch.jit.trace(net, example, check_trace=False)  # export() checks the result on faces
        torch.jit.save(traced, buffer, _extra_files={"metadata.json": json.dumps(about, indent=2)})
    return buffer.getvalue()


def open_torchscript(data, net):
    """Return a function from float (N, 3, 112, 96) to float32 (N, 512), computed by the TorchScript module."""
    with _silent():
        module = torch.jit.load(io.BytesIO(data))
    return lambda batch: module(batch).numpy()


def write_safetensors(net, example, about):
    """Return the bytes of a safetensors file: the state dict, and `about` in its header."""
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    return safetensors.torch.save(state, about)


def open_safetensors(data, net):
    """Return a function from float (N, 3, 112, 96) to float32 (N, 512), computed with the file's weights."""
    other = copy.deepcopy(net)
    for value in other.state_dict().values():
        value.zero_()  # so that a tensor missing in the file changes the embeddings
    other.load_state_dict(safetensors.torch.load(data))
    return lambda batch: other(batch).numpy()


FORMATS = {"onnx": (write_onnx, open_onnx), "torchscript": (write_torchscript, open_torchscript),
           "safetensors": (write_safetensors, open_safetensors)}


def metadata(net_name, method):
    """Return what is needed to use the network, a dict of strings; "template" is a JSON list of five [x, y]."""
    return {
        "net": net_name, "method": method or "unknown", "height": str(HEIGHT), "width": str(WIDTH),
        "input": "float32 (N, 3, height, width), any N; (x - mean) / divisor of pixels x from 0 to 255",
        "colour_order": "RGB", "mean": "127.5", "divisor": "128", "template": json.dumps(TEMPLATE.tolist()),
        "alignment": "least-squares similarity transform, never a reflection, from the five landmarks (image-left eye, "
                     "image-right eye, nose, left and right corner of the mouth; x, y; a pixel's center is a whole "
                     "number) to template; bilinear, black outside",
        "embedding": "float32 (N, 512), not normalized; compare by cosine, best with the mirrored face's embedding "
                     "concatenated to the face's own"}


def made_faces(count):
    """Return synthetic images that vary in brightness, contrast and detail like faces: uint8 (N, 112, 96, 3)."""
    random = np.random.default_rng(0)
    faces = []
    for _ in range(count):
        coarse = random.normal(random.uniform(70, 180), random.uniform(20, 70), (7, 6, 3))
        image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        faces.append(np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8))
    return np.stack(faces)


def read_faces(root):
    """Read at most READ aligned faces, evenly spread over a folder: uint8 (N, 112, 96, 3).

    Raises:
        InputError: there are no images, or one is not an aligned face.
    """
    root = folder(root, "aligned faces")
    paths = list_images(root)
    if not paths:
        raise InputError(f"{root} contains no images; pass a folder of faces aligned to 112x96 or 112x112.")
    paths = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, READ).astype(int))]
    faces = []
    for path in paths:
        try:
            faces.append(crop_aligned(read_image(root / path)))
        except (UnreadableImage, ValueError) as error:
            raise InputError(f"can't check on {root / path}: {error}; pass a folder of aligned faces.") from None
    return np.stack(faces)


def _optional(name):
    try:
        return __import__(name)
    except ImportError:
        raise InputError(f"--format onnx needs the package {name}, which is not installed; run "
                         "`pip install onnx onnxruntime`.") from None


@contextlib.contextmanager
def _silent():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecated both exporters, but deployments still need them
        yield


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder; pass the name of a file.")
    faces = made_faces(MADE)
    if args.check_faces:
        faces = np.concatenate((faces, read_faces(args.check_faces)))
    net = NETS[args.net]()
    loaded = load_weights(net, args.model, args.channels)
    data, difference, largest = export(net, args.format, faces, metadata(args.net, loaded["method"]))
    with atomic_write(args.output) as file:
        file.write(data)
    print(f"{args.output}: {args.format}, {len(data) / 1e6:.1f} MB, metadata in it\nlargest difference from the "
          f"original on {len(faces)} faces ({MADE} synthetic, {len(faces) - MADE} read): {difference:.1e}, in "
          f"embeddings of up to {largest:.1f}")


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE",
                        help="checkpoint.pt of casia_train.py, or a public checkpoint of the same network")
    add_model_options(parser, NETS)
    parser.add_argument("--format", choices=tuple(FORMATS), required=True,
                        help="onnx for other runtimes (pip install onnx onnxruntime), torchscript for LibTorch, "
                             "safetensors for the weights only")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the exported file")
    parser.add_argument("--check-faces", type=Path, metavar="DIR",
                        help=f"folder of aligned faces, 112x96 or 112x112, to check on in addition to {MADE} synthetic "
                             f"images; at most {READ} are read")
    return parser


if __name__ == "__main__":
    sys.exit(main())
