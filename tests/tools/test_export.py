"""export.py: the exported network computes the same embeddings, or nothing is written."""
import json
import sys

import numpy as np
import pytest
import safetensors
import torch

from cosFace.net import NETS
from faces.align import TEMPLATE
from faces.files import InputError
from faces.verification.weights import fingerprint, load_net
from tools import export


def open_exported(format, path):
    """Open an exported file the way a deployment would; return a function of a batch, and the metadata."""
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"face": x.numpy()})[0], session.get_modelmeta().custom_metadata_map
    if format == "torchscript":
        extra = {"metadata.json": ""}
        module = torch.jit.load(path, _extra_files=extra)
        return lambda x: module(x).detach().numpy(), json.loads(extra["metadata.json"])
    with safetensors.safe_open(path, "pt") as file:
        net = NETS["faceNet"]().eval()
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return lambda x: net(x).detach().numpy(), file.metadata()


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("format", ("onnx", "torchscript", "safetensors"))
def test_an_exported_network_computes_the_same_embeddings(format, model, tmp_path, call):
    if format == "onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
    path = tmp_path / f"exported.{format}"
    assert call(export, "--model", model, "--format", format, "--output", path)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (net, _), (run, metadata) = load_net(model, NETS), open_exported(format, path)
    pixels = torch.randint(0, 256, (3, 3, 112, 96), generator=torch.Generator().manual_seed(5))
    for batch in ((pixels - 127.5) / 128, (pixels[:1] - 127.5) / 128):  # the batch size must be dynamic
        with torch.no_grad():
            expected = net.eval()(batch).numpy()
        np.testing.assert_allclose(run(batch), expected, atol=1e-4 * max(1, abs(expected).max()), rtol=0)
    assert np.array_equal(json.loads(metadata["template"]), TEMPLATE)
    assert [metadata[key] for key in ("net", "colour_order", "mean", "divisor")] == ["faceNet", "RGB", "127.5", "128"]
    if format == "safetensors":
        reloaded, loaded = load_net(path, NETS)
        assert (loaded["net"], loaded["channels"]) == ("faceNet", "rgb") and fingerprint(reloaded) == fingerprint(net)
    else:
        with pytest.raises(InputError, match="is an export for other programs"):
            load_net(path, NETS)


def test_what_is_wrong_is_not_written(model, tmp_path, monkeypatch, refusal):
    def to_wrong(net, example, metadata):
        data, run = export.to_torchscript(net, example, metadata)
        return data, lambda batch: run(batch) + 0.01 * run(batch).max()
    before = model.read_bytes()
    monkeypatch.setitem(export.FORMATS, "torchscript", to_wrong)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for format, output, message in (("torchscript", tmp_path / "x", "differs from the original by"),
                                    ("torchscript", model, "is the model itself"),
                                    ("onnx", tmp_path / "x", "pip install onnx onnxruntime")):
        assert message in refusal(export, "--model", model, "--format", format, "--output", output)
        assert not list(tmp_path.iterdir()) and model.read_bytes() == before
