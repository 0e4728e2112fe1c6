"""The log of a training run, without a network: scalars, epochs, picture and settings."""
import itertools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import epochs

from faces.files import progress_bar
from faces.images import read_image
from faces.training.log import EVERY, TrainingLog

BATCH, STEPS, EPOCH = 4, 60, 30


def train(folder, start, steps, lfw=None, rank=0):
    """Log steps start + 1 to start + steps; the loss of step i is i, and `lfw` is the LFW accuracy after each epoch."""
    run = SimpleNamespace(rank=rank, device=torch.device("cpu"), world_size=1)
    with TrainingLog(run, folder, BATCH, STEPS, EPOCH, start, {"lr": None, "seed": 3}) as log:
        for step in range(start + 1, start + steps + 1):
            predicted, label = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 2])
            centers = torch.eye(3, 512)
            log.record(torch.tensor(float(step)), predicted, label, centers[predicted] * step, centers)
            log.end_step(learning_rate=0.1)
            if step % EPOCH == 0:
                log.end_epoch(**({"lfw": lfw} if lfw else {}))


def scalars(folder):
    """Return {name: [(step, value), ...]} of the scalars in a folder's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_resumed_run_logs_every_step_once(tmp_path):
    train(tmp_path, 0, 45, lfw=0.9)
    time.sleep(1 - time.time() % 1)    # TensorBoard sorts its files by name, which starts with the second
    train(tmp_path, 30, 30, lfw=0.95)
    logged = [(epoch["step"], epoch["loss"], epoch["lfw"]) for epoch in epochs(tmp_path)]
    assert logged == [(30, 15.5, 0.9), (60, 45.5, 0.95)]

    logged = scalars(tmp_path)
    assert [step for step, _ in logged["loss"]] == [EVERY, 30, 50, 60]          # no step is logged twice
    assert {"train_accuracy", "learning_rate", "images_per_second", "lfw"} < logged.keys()
    assert [value for _, value in logged["target_cosine"]] == pytest.approx([0.5] * 4)
    # The norm is the step's own; it is not averaged over the steps since the last reading.
    assert logged["embedding_norm"] == [(20, 20), (30, 30), (50, 50), (60, 60)]

    picture = read_image(tmp_path / "training.png")
    assert picture.shape[0] > 400 and (picture != 255).any()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["settings"] == {"lr": None, "seed": 3} and settings["from_step"] == 30
    assert settings["versions"]["torch"] == str(torch.__version__)
    assert not list(tmp_path.glob(".*.partial"))


def test_only_rank_0_writes(tmp_path):
    train(tmp_path, 0, 30, rank=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("terminal, updates", [(False, 300 // 30), (True, 300)])
def test_progress_in_a_file_is_updated_every_30_seconds(monkeypatch, capsys, terminal, updates):
    clock = itertools.count()
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))    # a second later at each look
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(progress_bar(range(300), "aligning")) == list(range(300))
    shown = capsys.readouterr().err.split("\r")
    assert updates <= len(shown) <= updates + 4 and "aligning: 100%" in shown[-1]
