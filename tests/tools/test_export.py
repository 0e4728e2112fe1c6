"""export.py: the exported network computes the same embeddings, or nothing is written."""
import json
import sys

import numpy as np
import pytest
import safetensors
import torch
from conftest import write_image

from cosFace.net import NETS
from faces.align import TEMPLATE
from faces.files import InputError
from faces.verification.weights import fingerprint, load_net
from tools import export

pytest_plugins = "helpers"


def open_exported(format, path, net):
    """Open an exported file the way a deployment would; return a function of a batch, and the metadata."""
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"face": x.numpy()})[0], session.get_modelmeta().custom_metadata_map
    if format == "torchscript":
        extra = {"metadata.json": ""}
        module = torch.jit.load(path, _extra_files=extra)
        return lambda x: module(x).detach().numpy(), json.loads(extra["metadata.json"])
    with safetensors.safe_open(path, "pt") as file:
        net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return lambda x: net.eval()(x).detach().numpy(), file.metadata()


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("format", export.FORMATS)
def test_an_exported_network_computes_the_same_embeddings(format, model, tmp_path, call):
    if format == "onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
    path = tmp_path / f"exported.{format}"
    status, out, _ = call(export, "--model", model, "--format", format, "--output", path)
    assert status == 0 and "largest difference from the original on 8 synthetic faces" in out
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    net, _ = load_net(model, NETS)
    run, metadata = open_exported(format, path, NETS["faceNet"]())
    pixels = torch.randint(0, 256, (3, 3, 112, 96), generator=torch.Generator().manual_seed(5))
    for batch in ((pixels - 127.5) / 128, (pixels[:1] - 127.5) / 128):  # the batch size must be dynamic
        with torch.no_grad():
            expected = net.eval()(batch).numpy()
        np.testing.assert_allclose(run(batch), expected, atol=1e-4 * max(1, abs(expected).max()), rtol=0)
    assert np.array_equal(json.loads(metadata["template"]), TEMPLATE)
    assert (metadata["net"], metadata["colour_order"], metadata["mean"], metadata["divisor"]) \
        == ("faceNet", "RGB", "127.5", "128")
    if format == "safetensors":
        reloaded, loaded = load_net(path, NETS)
        assert (loaded["net"], loaded["channels"]) == ("faceNet", "rgb") and fingerprint(reloaded) == fingerprint(net)
    else:
        with pytest.raises(InputError, match="is an export for other programs"):
            load_net(path, NETS)


def test_a_wrong_export_is_not_written(model, tmp_path, monkeypatch, call):
    def to_wrong(net, example, metadata):
        data, run = export.to_torchscript(net, example, metadata)
        return data, lambda batch: run(batch) + 0.01 * run(batch).max()
    monkeypatch.setitem(export.FORMATS, "torchscript", to_wrong)
    status, _, err = call(export, "--model", model, "--format", "torchscript", "--output", tmp_path / "x")
    assert status == 2 and "differs from the original by" in err and not list(tmp_path.iterdir())


def test_the_model_is_not_replaced_by_its_export(model, call):
    before = model.read_bytes()
    status, _, err = call(export, "--model", model, "--format", "torchscript", "--output", model)
    assert status == 2 and "is the model itself" in err and model.read_bytes() == before
    status, _, err = call(export, "--model", model, "--format", "safetensors", "--output", model.with_name("other.pt"))
    assert status == 2 and "has the extension of torchscript" in err and not model.with_name("other.pt").exists()


def test_a_missing_onnx_package_is_reported(model, tmp_path, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = call(export, "--model", model, "--format", "onnx", "--output", tmp_path / "x")
    assert status == 2 and "pip install onnx onnxruntime" in err


def test_the_check_also_uses_faces_of_a_folder(model, tmp_path, call):
    for name, size in (("a/1.png", (112, 112, 3)), ("b.png", (112, 96, 3)), ("c.png", (250, 250, 3))):
        write_image(tmp_path / "faces" / name, np.full(size, 9, np.uint8))
    status, out, _ = call(export, "--model", model, "--format", "safetensors", "--output", tmp_path / "x",
                          "--check-faces", tmp_path / "faces")
    assert status == 0 and "8 synthetic faces and 2 of --check-faces" in out
