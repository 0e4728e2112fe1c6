"""export.py --format hub: the folder is the same model everywhere, and the hub's own library reads its card."""
import pytest
import safetensors.torch
import torch
from conftest import write_model

from cosFace.casia_train import parser
from cosFace.net import NETS
from faces.files import write_json
from faces.training.checkpoint import settings_of
from faces.verification.threshold import Threshold, load_threshold, save_threshold
from faces.verification.weights import initial_net, load_net
from tools import export

FIGURES = {"set": "my: set", "accuracy": 0.987654, "std": 0.01, "auc": 0.99, "interval_95": [0.9, 1],
           "counts": {"pairs": 6000}, "settings": {"flip": "sum", "weights": {"fingerprint": "of another model"}}}


def read_card(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("huggingface_hub").ModelCard.load(folder / "README.md")


def test_the_folder_is_the_same_model_with_its_threshold_and_a_card(tmp_path, call, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "hub"
    args = parser.parse_args("--casia /home/me/casia --batch-size 30 --no-flip --net faceNet --init /home/me/a".split())
    settings = settings_of(args, torch.float32)
    write_model(run / "checkpoint.pt", settings=settings, step=400, classes=30, versions={"torch": "2.6"})
    write_json(run / "settings.json", {"settings": settings, "from_step": 0, "devices": "2 x NVIDIA H100"})
    source, loaded = load_net(run, NETS)
    save_threshold(run, loaded["fingerprint"], Threshold(0.3, 1, 10, 2, 10, "20 pairs of /home/me/my: set"))
    own = {**FIGURES, "settings": {"flip": "sum", "weights": loaded}}
    write_json(tmp_path / "results.json", {"results": [FIGURES, own]})
    status, out, _ = call(export, "--model", run, "--format", "hub", "--output", folder, "--results", tmp_path,
                          "--license", "cc-by-nc-4.0", "--dataset", "me/faces", "no")
    assert status == 0 and "unknown" not in out
    (net, again), x = load_net(folder, NETS), torch.randn(2, 3, 112, 96)
    for other in (net, initial_net(NETS["faceNet"], folder)):
        assert torch.equal(other.eval()(x), source.eval()(x))
    assert all(again[key] == loaded[key] for key in ("fingerprint", "method", "net"))
    assert load_threshold(folder, again) == Threshold(0.3, 1, 10, 2, 10, "20 pairs of my: set")
    card = read_card(folder, monkeypatch)
    assert (card.data.license, card.data.datasets) == ("cc-by-nc-4.0", ["me/faces", "no"])
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results] == [
        ("accuracy", 0.98765, "my: set"), ("roc_auc", 0.99, "my: set")]
    assert ("casia_train.py --casia DIR --net faceNet --init FILE --batch-size 30 --no-flip --precision float32\n"
            in card.text) and "2 x NVIDIA H100" in card.text and "/home/me" not in card.text


def test_what_is_unknown_is_left_out(model, tmp_path, call, monkeypatch):
    out = call(export, "--model", model, "--format", "hub", "--output", tmp_path / "hub")[1]
    assert "unknown, so not in the folder: license, datasets, figures, threshold, training\n" in out
    assert read_card(tmp_path / "hub", monkeypatch).data.to_dict() == {
        "library_name": "pytorch", "pipeline_tag": "image-feature-extraction"}
    weights = tmp_path / "hub/model.safetensors"    # saved again without the header, it's still RGB
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights)
    assert load_net(tmp_path / "hub", NETS)[1]["fingerprint"] == load_net(model, NETS)[1]["fingerprint"]


def test_mistakes_write_nothing(model, tmp_path, refusal):
    write_json(tmp_path / "results.json", FIGURES)
    for output, message in ((tmp_path / "hub", "there are no figures of"), (model.parent, "already exists")):
        args = "--model", model, "--format", "hub", "--output", output, "--results", tmp_path
        assert message in refusal(export, *args)
        assert [file.name for file in (*tmp_path.iterdir(), *model.parent.iterdir())] == ["results.json", model.name]
