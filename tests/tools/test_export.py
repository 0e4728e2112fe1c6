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
from faces.verification.weights import fingerprint, load_net, load_weights
from tools import export

pytest_plugins = "helpers"


@pytest.fixture(scope="module")
def public_model(tmp_path_factory):
    """Return a file like the released sphere20a: a bare BGR state dict with residual convolution biases and a head."""
    torch.manual_seed(1)
    state = NETS["sphere20a"]().state_dict()
    biases = {name: 0.1 * torch.randn(len(value)) for weight, value in state.items() if weight.endswith(".weight")
              and weight.startswith("conv") and (name := weight.replace(".weight", ".bias")) not in state}
    path = tmp_path_factory.mktemp("public") / "sphere20a.pth"
    torch.save({**state, **biases, "fc6.weight": torch.zeros(512, 10574)}, path)
    return path


def run_exported(format, path, net_name, biases):
    """Open an exported file the way a deployment would.

    Args:
        biases: names of the biases of the residual convolutions, which sphere20a() lacks.

    Returns:
        (function from a float32 (N, 3, 112, 96) tensor to an array (N, 512), dict of metadata).
    """
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"face": x.numpy()})[0], session.get_modelmeta().custom_metadata_map
    if format == "torchscript":
        extra = {"metadata.json": ""}
        module = torch.jit.load(path, _extra_files=extra)
        return lambda x: module(x).detach().numpy(), json.loads(extra["metadata.json"])
    net = NETS[net_name]()
    with safetensors.safe_open(path, "pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    for name in biases:
        net.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(torch.zeros_like(state[name]))
    net.load_state_dict(state)
    return lambda x: net.eval()(x).detach().numpy(), metadata


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("format, net_name", [("safetensors", "sphere20a"), ("torchscript", "faceNet"),
                                              ("onnx", "faceNet")])
def test_an_exported_network_computes_the_same_embeddings(format, net_name, model, public_model, tmp_path, call):
    if format == "onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
    source, path = model if net_name == "faceNet" else public_model, tmp_path / f"exported.{format}"
    status, out, _ = call(export, "--model", source, "--format", format, "--output", path)
    assert status == 0 and "largest difference from the original on 8 faces" in out
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    net = NETS[net_name]()
    load_weights(net, source)
    biases = net.state_dict().keys() - NETS[net_name]().state_dict().keys()
    assert bool(biases) == (net_name == "sphere20a")
    run, metadata = run_exported(format, path, net_name, biases)
    pixels = torch.randint(0, 256, (3, 3, 112, 96), generator=torch.Generator().manual_seed(5))
    for batch in ((pixels - 127.5) / 128, (pixels[:1] - 127.5) / 128):  # the batch size must be dynamic
        with torch.no_grad():
            expected = net.eval()(batch).numpy()
        np.testing.assert_allclose(run(batch), expected, atol=1e-4 * max(1, abs(expected).max()), rtol=0)
    assert np.array_equal(json.loads(metadata["template"]), TEMPLATE)
    assert (metadata["net"], metadata["colour_order"], metadata["mean"], metadata["divisor"]) \
        == (net_name, "RGB", "127.5", "128")
    if format == "safetensors":
        reloaded, loaded = load_net(path, NETS)
        assert (loaded["net"], loaded["channels"]) == (net_name, "rgb") and fingerprint(reloaded) == fingerprint(net)
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


def test_the_check_reads_aligned_faces_only(tmp_path):
    write_image(tmp_path / "a" / "1.png", np.full((112, 112, 3), 7, np.uint8))
    write_image(tmp_path / "b.png", np.full((112, 96, 3), 9, np.uint8))
    assert export.read_faces(tmp_path)[:, 0, 0, 0].tolist() == [7, 9]
    write_image(tmp_path / "c.png", np.zeros((250, 250, 3), np.uint8))
    with pytest.raises(InputError, match=r"c\.png"):
        export.read_faces(tmp_path)
