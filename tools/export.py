"""Export a trained network for deployment, and check the result against the original before writing it.

    python tools/export.py --model FILE --net faceNet --format onnx --output face.onnx
    python tools/export.py --model FILE --format hub --output FOLDER --results DIR    a folder for a model hub

The exported network takes float32 (N, 3, 112, 96), any N, RGB, (x - 127.5) / 128, and returns the embeddings, float32
(N, 512), not normalized. Metadata in the file describe how to prepare the input; they are stored in metadata_props for
ONNX, in the header for safetensors, and in the extra file metadata.json for TorchScript. A hub's folder is a --model.
"""
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
from faces.align import HEIGHT, TEMPLATE, WIDTH
from faces.device import to_input
from faces.files import InputError, atomic_write, check_writable, command, path, script_parser
from faces.verification.weights import add_model_options, announce, load_net, model_file
from tools import hub

TOLERANCE = 1e-4      # accepted difference between embedding values, relative to the largest value if that exceeds 1


def export(net: torch.nn.Module, format: str, metadata: dict) -> tuple[bytes, float, float]:
    """Export a network on the CPU, float (N, 3, 112, 96) to (N, 512), in one of FORMATS, with strings as metadata.
    Return the file, and from a check with smooth images, the largest difference between embedding values, and the
    largest value. Raises InputError if the difference exceeds TOLERANCE."""
    net.eval()
    spots = np.random.default_rng(0).integers(0, 256, (8, 7, 6, 3), np.uint8)
    faces = np.stack([cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for image in spots])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")    # PyTorch has deprecated both exporters, but deployments still need them
        batches = [to_input(torch.from_numpy(part)).contiguous() for part in (faces, faces[:1], faces[1:2])]
        expected = [net(batch).numpy() for batch in batches]
        data, run = FORMATS[format](net, batches[0][:2], metadata)
        actual = [run(batch) for batch in batches]
    difference = max(float(abs(a - b).max()) for a, b in zip(actual, expected))
    largest = float(abs(expected[0]).max())
    if not difference <= TOLERANCE * max(1, largest):    # NaN fails too
        raise InputError(f"the exported network differs from the original by {difference:.2g} (largest embedding "
                         f"value: {largest:.2g}), so nothing was written; try another --format.")
    return data, difference, largest


# Each of these returns the bytes of the file, and the network in them as a function of float (N, 3, 112, 96).

def to_onnx(net, example, metadata):
    """Make an ONNX model with input "face", output "embedding" and folded batch normalization."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"--format onnx needs the package {error.name}, which is not installed; run "
                         "`pip install onnx onnxruntime`.") from None
    buffer = io.BytesIO()
    torch.onnx.export(net, (example,), buffer, input_names=["face"], output_names=["embedding"],
                      dynamic_axes={"face": {0: "N"}, "embedding": {0: "N"}},
                      dynamo=False)  # the newer exporter would need another package
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda batch: session.run(["embedding"], {"face": batch.numpy()})[0]


def to_torchscript(net, example, metadata):
    """Make a TorchScript module that has the metadata as its extra file metadata.json."""
    buffer = io.BytesIO()
    traced = torch.jit.trace(net, example, check_trace=False)  # export() checks the result itself
    torch.jit.save(traced, buffer, _extra_files={"metadata.json": json.dumps(metadata, indent=2)})
    module = torch.jit.load(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue(), lambda batch: module(batch).numpy()


def to_safetensors(net, example, metadata):
    """Make a safetensors file that holds the state dict, and the metadata in its header."""
    data = safetensors.torch.save({name: value.contiguous() for name, value in net.state_dict().items()}, metadata)
    weights = safetensors.torch.load(data)
    return data, lambda batch: torch.func.functional_call(net, weights, batch, strict=True).numpy()


FORMATS = {"onnx": to_onnx, "torchscript": to_torchscript, "safetensors": to_safetensors, "hub": to_safetensors}


def make_config(loaded: dict) -> dict:
    """Return what describes how to use a network, given what load_net() says of it."""
    return {
        "net": loaded["net"], "method": loaded["method"] or "unknown", "height": HEIGHT, "width": WIDTH,
        "input": "float32 (N, 3, height, width), any N; (x - mean) / divisor of pixels x from 0 to 255",
        "colour_order": "RGB", "mean": 127.5, "divisor": 128, "template": TEMPLATE.tolist(),
        "alignment": "least-squares similarity transform, never a reflection, that maps the five landmarks (image-left "
                     "eye, image-right eye, nose, image-left and image-right corner of the mouth; x, y; pixel centers "
                     "have integer coordinates) onto template; bilinear interpolation, black outside the image",
        "embedding_size": 512,
        "embedding": "float32 (N, 512), not normalized; compare with cosine similarity, preferably after "
                     "concatenating the embeddings of the face and its flipped image"}


@command
def main(argv=None):
    parser = script_parser(__doc__)
    add_model_options(parser, NETS)
    parser.add_argument("--format", choices=tuple(FORMATS), required=True,
                        help="onnx for other runtimes (`pip install onnx onnxruntime`), torchscript, safetensors, hub")
    parser.add_argument("--output", type=path, required=True, metavar="FILE|DIR", help="file to write; hub: new folder")
    add = parser.add_argument_group("model card of --format hub").add_argument
    add("--results", type=path, metavar="DIR|FILE", help="what `lfw_eval.py --output` wrote for the model: its figures")
    add("--license", metavar="ID", help="license of the weights, as the hub names it; cc-by-nc-4.0 for example")
    add("--dataset", nargs="+", metavar="ID", help="training sets, as the hub names them")
    args = parser.parse_args(argv)
    if args.format != "hub" and (args.results or args.license or args.dataset):
        parser.error("--results, --license and --dataset are for --format hub")
    if args.format == "hub" and args.output.exists():
        parser.error(f"--output {args.output} already exists; delete it, or pass the name of a new folder")
    if args.output.exists() and args.output.samefile(model_file(args.model)):
        parser.error(f"--output {args.output} is the model itself; pass the name of another file")
    check_writable(args.output.parent)
    net, loaded = load_net(args.model, NETS, args.net, args.channels)
    announce(args.model, loaded)
    config = make_config(loaded)
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in config.items()}
    data, difference, largest = export(net, args.format, metadata)
    if args.format == "hub":
        hub.write_folder(args, loaded, data, config)
    else:
        with atomic_write(args.output) as file:
            file.write(data)
    print(f"{args.output}: {args.format}, {len(data) / 1e6:.1f} MB, including metadata\n"
          f"largest difference from the original on synthetic images: {difference:.1e} (largest value: {largest:.1f})")


if __name__ == "__main__":
    sys.exit(main())
