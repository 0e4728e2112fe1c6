"""The log of a training run: scalars, picture and settings, tested without a network."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from faces.figures import training_picture
from faces.images import read_image
from faces.training import log as log_module
from faces.training.log import EVERY, TrainingLog, geometry
from faces.training.recipe import Recipe
from faces.training.sharded_head import WholeHead
from sphereFace.net import SphereFace

RECIPE = Recipe(batch_size=4, steps_per_epoch=30, steps=60, base_lr=0.1, warmup=0, schedule="step")


def test_geometry_equals_the_matrix_of_all_cosines():
    torch.manual_seed(0)
    embedding, weight, labels = 5 * torch.randn(7, 512), torch.randn(50, 512), torch.randint(50, (7,))
    cosines = torch.nn.functional.cosine_similarity(embedding.double()[:, None], weight.double(), dim=2)   # (7, 50)
    own = torch.nn.functional.one_hot(labels, 50).bool()
    got = geometry(embedding.requires_grad_(), labels, weight.requires_grad_())
    assert not any(value.requires_grad for value in got.values())
    assert got["target_cosine"].item() == pytest.approx(cosines[own].mean().item(), abs=1e-6)
    assert got["nontarget_cosine"].item() == pytest.approx(cosines[~own].mean().item(), abs=1e-6)
    assert got["embedding_norm"].item() == pytest.approx(embedding.double().norm(dim=1).mean().item(), rel=1e-6)
    impostor = cosines[:, labels][labels[:, None] != labels]
    for name, of in (("genuine", cosines[own]), ("impostor", impostor)):
        assert got[name].tolist() == np.histogram(of.numpy(), 100, (-1, 1))[0].tolist()
    zero = geometry(torch.zeros(2, 512), labels[:2], weight)
    assert zero["target_cosine"] == 0 and zero["embedding_norm"] == 0


def train(folder, start, steps, lfw=None):
    """Log steps without a net: the loss of step i (from 1) is i."""
    run = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), world_size=1, bf16=False)
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
    """{name: [(step, value)]} of TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_resumed_run_leaves_a_single_record(tmp_path):
    train(tmp_path, 0, 45, lfw=0.9)
    assert json.loads((tmp_path / "settings.json").read_text())["from_step"] == 0
    train(tmp_path, 30, 30, lfw=0.95)
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["lfw"]) for line in epochs] == [(30, 15.5, 0.9), (60, 45.5, 0.95)]

    read = scalars(tmp_path)
    assert [step for step, _ in read["loss"]] == [EVERY, 30, 50, 60]           # nothing of the steps that were redone
    assert {"accuracy", "learning_rate", "images_per_second", "lfw"} < read.keys()
    for name, value in (("target_cosine", 0.5), ("nontarget_cosine", 0.25)):   # 2 of 4 on their own, 2 of 8 on others'
        assert [v for _, v in read[name]] == pytest.approx([value] * 4)
    assert read["embedding_norm"] == [(20, 20), (30, 30), (50, 50), (60, 60)]  # of the step itself, not a mean

    picture = read_image(tmp_path / "training.png")
    assert picture.shape[0] > 400 and (picture != 255).any()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["settings"] == {"lr": None, "seed": 3} and settings["from_step"] == 30
    assert settings["recipe"]["steps"] == 60 and settings["versions"]["torch"] == str(torch.__version__)
    assert not list(tmp_path.glob(".*"))                                       # nothing half written


def test_only_the_main_process_writes(tmp_path):
    run, head = SimpleNamespace(is_main_process=False, device=torch.device("cpu")), WholeHead(SphereFace(3))
    with TrainingLog(run, tmp_path, RECIPE, 0, {}) as log:
        for _ in range(30):
            log.record(torch.tensor(1.0), torch.zeros(4), torch.ones(4, 512), torch.zeros(4).long(), head)
            log.end_step()
        log.end_epoch()
    assert not list(tmp_path.iterdir())


def test_picture_with_and_without_lfw(tmp_path):
    images, loss = np.arange(1, 5) * 1e6, np.array([9.0, 5, 3, 2])
    training_picture(tmp_path / "without.png", images, loss, np.full(4, np.nan))
    training_picture(tmp_path / "with.png", images, loss, np.array([np.nan, 0.9, np.nan, 0.97]))
    without, with_lfw = (read_image(tmp_path / f"{name}.png") for name in ("without", "with"))
    orange = (np.abs(with_lfw.astype(int) - (0xd5, 0x5e, 0x00)).max(2) < 10).sum()
    assert orange > 500 and not (np.abs(without.astype(int) - (0xd5, 0x5e, 0x00)).max(2) < 10).any()


def test_revision(tmp_path, monkeypatch):
    if (ROOT / ".git").exists():
        assert log_module._revision() is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", log_module._revision())
    assert log_module._revision(tmp_path) is None                              # a folder that is not a clone
    (tmp_path / ".git").mkdir()
    assert log_module._revision(tmp_path) is None                              # nor an intact one
    monkeypatch.setenv("PATH", "")
    assert log_module._revision(tmp_path) is None                                      # no git at all
