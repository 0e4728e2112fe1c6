"""Tests of the log of a training run, without a network: scalars, picture, settings and git revision."""
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from faces.plots import training_picture
from faces.images import read_image
from faces.training import log as log_module
from faces.training.log import EVERY, TrainingLog, geometry
from faces.training.recipe import Recipe
from faces.training.sharded_head import WholeHead
from sphereFace.net import SphereFace

RECIPE = Recipe(batch_size=4, steps_per_epoch=30, steps=60, base_lr=0.1, warmup=0, schedule="step")


def test_geometry_equals_statistics_of_all_cosines():
    torch.manual_seed(0)
    embedding, weight, labels = 5 * torch.randn(7, 512), torch.randn(50, 512), torch.randint(50, (7,))
    cosines = torch.nn.functional.cosine_similarity(embedding.double()[:, None], weight.double(), dim=2)   # (7, 50)
    is_target = torch.nn.functional.one_hot(labels, 50).bool()
    actual = geometry(embedding.requires_grad_(), labels, weight.requires_grad_())
    assert not any(value.requires_grad for value in actual.values())
    assert actual["target_cosine"].item() == pytest.approx(cosines[is_target].mean().item(), abs=1e-6)
    assert actual["nontarget_cosine"].item() == pytest.approx(cosines[~is_target].mean().item(), abs=1e-6)
    assert actual["embedding_norm"].item() == pytest.approx(embedding.double().norm(dim=1).mean().item(), rel=1e-6)
    impostor = cosines[:, labels][labels[:, None] != labels]
    for name, values in (("genuine", cosines[is_target]), ("impostor", impostor)):
        assert actual[name].tolist() == np.histogram(values.numpy(), 100, (-1, 1))[0].tolist()
    zero = geometry(torch.zeros(2, 512), labels[:2], weight)
    assert zero["target_cosine"] == 0 and zero["embedding_norm"] == 0


def train(folder, start, steps, lfw=None):
    """Log steps start + 1 to start + steps; the loss of step i is i, and `lfw` is the LFW accuracy after each epoch."""
    run = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), world_size=1, devices="CPU",
                          precision="float32", on_main=lambda function: function())
    head = WholeHead(SphereFace(3))
    head.module.weight.data = torch.eye(3, 512)
    with TrainingLog(run, folder, RECIPE, start, {"lr": None, "seed": 3}) as log:
        for step in range(start + 1, start + steps + 1):
            label = torch.tensor([0, 1, 2, 0])
            log.record(torch.tensor(float(step)), label, torch.eye(3, 512)[[0, 1, 1, 2]] * step, label, head)
            log.end_step(learning_rate=0.1)
            if step % RECIPE.steps_per_epoch == 0:
                log.end_epoch(**({"lfw": lfw} if lfw else {}))


def scalars(folder):
    """Return {name: [(step, value), ...]} of the scalars in a folder's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_resumed_run_logs_every_step_once(tmp_path):
    train(tmp_path, 0, 45, lfw=0.9)
    assert json.loads((tmp_path / "settings.json").read_text())["from_step"] == 0
    time.sleep(1 - time.time() % 1)    # TensorBoard sorts its files by name, which starts with the second
    train(tmp_path, 30, 30, lfw=0.95)
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["lfw"]) for line in epochs] == [(30, 15.5, 0.9), (60, 45.5, 0.95)]

    logged = scalars(tmp_path)
    assert [step for step, _ in logged["loss"]] == [EVERY, 30, 50, 60]          # no step is logged twice
    assert {"train_accuracy", "learning_rate", "images_per_second", "lfw"} < logged.keys()
    # train() puts 2 of 4 embeddings on their own class center and 2 on another one, so the cosine is 1 for 2 of the 4
    # targets and for 2 of the 8 others.
    for name, expected in (("target_cosine", 0.5), ("nontarget_cosine", 0.25)):
        assert [value for _, value in logged[name]] == pytest.approx([expected] * 4)
    # The norm is that of the step itself; it is not averaged over the steps since the last reading.
    assert logged["embedding_norm"] == [(20, 20), (30, 30), (50, 50), (60, 60)]

    picture = read_image(tmp_path / "training.png")
    assert picture.shape[0] > 400 and (picture != 255).any()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["settings"] == {"lr": None, "seed": 3} and settings["from_step"] == 30
    assert settings["recipe"]["steps"] == 60 and settings["versions"]["torch"] == str(torch.__version__)
    assert not list(tmp_path.glob(".*.partial"))                                       # no temporary file must remain


def test_only_the_main_process_writes(tmp_path):
    run = SimpleNamespace(is_main_process=False, device=torch.device("cpu"), world_size=1,
                          on_main=lambda function: None)
    head = WholeHead(SphereFace(3))
    with TrainingLog(run, tmp_path, RECIPE, 0, {}) as log:
        for _ in range(30):
            log.record(torch.tensor(1.0), torch.zeros(4), torch.ones(4, 512), torch.zeros(4).long(), head)
            log.end_step()
        log.end_epoch()
    assert not list(tmp_path.iterdir())


def test_the_picture_shows_lfw_accuracy_only_if_it_was_measured(tmp_path):
    images, loss = np.arange(1, 5) * 1e6, np.array([9.0, 5, 3, 2])
    training_picture(tmp_path / "without.png", images, loss, np.full(4, np.nan))
    training_picture(tmp_path / "with.png", images, loss, np.array([np.nan, 0.9, np.nan, 0.97]))
    without, with_lfw = (read_image(tmp_path / f"{name}.png") for name in ("without", "with"))
    orange_pixels, none = ((np.abs(picture.astype(int) - (0xd5, 0x5e, 0x00)).max(2) < 10).sum()
                           for picture in (with_lfw, without))
    assert orange_pixels > 500 and none == 0


def test_revision_is_none_outside_an_intact_clone(tmp_path, monkeypatch):
    if (ROOT / ".git").exists():
        assert log_module._revision() is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", log_module._revision())
    assert log_module._revision(tmp_path) is None                              # the folder is not a clone
    (tmp_path / ".git").mkdir()
    assert log_module._revision(tmp_path) is None                              # the clone is damaged
    monkeypatch.setenv("PATH", "")
    assert log_module._revision(tmp_path) is None                              # git is not installed
