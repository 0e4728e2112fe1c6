"""The programs in benchmarks/ on small inputs: what they compare agrees, and what they measure is right."""
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_proc

from benchmarks import load, margin_softmax, mtcnn_equivariance, run, throughput, training_step


def test_a_margin_needs_little_more_memory_than_a_linear_layer():
    args = SimpleNamespace(identities=3000, batch_size=512)
    steps = margin_softmax.make_steps(args, torch.device("cpu"))
    x = (7 * torch.randn(512, 512)).requires_grad_()
    assert margin_softmax.check_same(steps, x) < 1e-5
    matrix = 4 * 512 * 3000
    peak = {name: margin_softmax.peak_bytes(step, x, weight) / matrix for name, (step, weight) in steps.items()}
    assert peak["linear layer"] > 1.9      # it holds at least the log-softmax and its gradient, so memory is counted
    assert max(peak["CosFace"], peak["SphereFace"]) < peak["linear layer"] + 0.5


@pytest.mark.parametrize("method", ["cosFace", "sphereFace"])
def test_training_step_agrees_with_the_reference(method, casia, tmp_path, capsys):
    """The program itself compares the losses of three steps and fails if they differ.

    It runs in float32 because the losses of so small a batch would differ by more than the tolerance in bf16, which
    `auto` picks on some machines.
    """
    args = ["--casia", str(casia), "--cache", str(tmp_path), "--device", "cpu", "--method", method, "--batch-size", "4",
            "--steps", "3", "--precision", "float32"]
    assert not training_step.main(args) and "ratio" in capsys.readouterr().out


def test_throughput_runs_every_kind_of_step(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "WARM_UP", 1)
    for method, net in (("cosFace", "faceNet"), ("sphereFace", "sphere20a")):
        assert not throughput.main(["--method", method, "--net", net, "--batch-size", "2", "--steps", "1",
                                    "--device", "cpu"])
        out = capsys.readouterr().out
        assert f"{method}, {net}, 10,572 identities, batches of 2" in out and "with the loader" in out


def test_equivariance_error_is_zero_if_the_landmarks_move_with_the_face():
    """The photo has five squares of different colors as its landmarks; the detector finds their centers exactly."""
    def detect(images):
        for image in images:
            yield np.zeros((1, 4)), np.array([[np.argwhere(image[..., 0] == k + 1).mean(0)[::-1] for k in range(5)]])
    photo = np.zeros((120, 100, 3), np.uint8)
    for k, (x, y) in enumerate([(40, 50), (60, 50), (50, 60), (42, 70), (58, 70)]):
        photo[y - 1:y + 2, x - 1:x + 2] = k + 1
    up, right = np.array(((1, 0, 0), (0, 1, -5.0))), np.array(((1, 0, 4.0), (0, 1, 0)))
    copies = [(np.roll(photo, -5, 0), up), (np.roll(photo, 4, 1), right), (np.roll(photo, 4, 1), up)]
    # The third copy moved right, but is said to have moved up: landmarks are off by (4, 5), and the eyes are 20 apart.
    np.testing.assert_allclose(mtcnn_equivariance.errors(detect, [photo], [copies]), [[0, 0, 41 ** 0.5 / 20]])


@needs_proc
def test_load_counts_what_a_process_and_its_children_hold():
    child = "hold = b'x' * 50_000_000; print('ready', flush=True); input()"
    parent = ("import subprocess, sys; hold = b'x' * 80_000_000; files = [open(sys.executable) for _ in range(30)]\n"
              f"subprocess.run([sys.executable, '-c', {child!r}])")
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        sample = load.measure(process.pid, 0)
        process.communicate(b"\n")
    assert sample.processes == sample.threads == 2 and 36 <= sample.files < 50
    assert 76 <= sample.first < 120 and 47 <= sample.largest < 80 and sample.total == sample.first + sample.largest
    samples = [sample._replace(total=total) for total in (5, 100, 300, 400)]
    assert "second and last quarter of the run: 100 and 400 MB" in load.summary(samples)


@needs_proc
def test_load_passes_on_the_exit_status(tmp_path):
    (tmp_path / "script.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert load.main([str(tmp_path / "script.py"), "3"]) == 3


def test_make_benchmarks_runs_every_program_and_says_which(monkeypatch, capsys):
    statuses = iter([0, 2, 0, 0])
    monkeypatch.setattr(run.commands, "run", lambda words: next(statuses))
    assert run.main([]) == 1
    lines = capsys.readouterr().out.split("\n")
    outcomes = {re.search(r"/(\w+)\.py", line)[1]: line.split(": ")[1] for line in lines if ".py" in line}
    assert outcomes.keys() == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"run", "load", "__init__"}
    assert outcomes["margin_softmax"].startswith("ran in") and outcomes["loader"] == "failed with exit status 2"
    assert outcomes["aligned_cache"] == "skipped, because it needs CASIA=DIR"
    assert outcomes["mtcnn"] == "skipped, because it needs LFW=DIR"


def test_an_interrupted_benchmark_is_the_last(monkeypatch, capsys):
    monkeypatch.setattr(run.commands, "run", lambda words: 130)
    assert run.main([]) == 1 and capsys.readouterr().out.count(".py") == 1
