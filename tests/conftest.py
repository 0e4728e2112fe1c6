"""Fixtures for tests: synthetic faces with landmarks, and functions that run the scripts."""
import contextlib
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from faces.align import TEMPLATE
from faces.landmarks import write_landmarks

ROOT = Path(__file__).resolve().parents[1]


def script(name, *args, from_root=False):
    """Run a script from its own folder, or from the root of the clone; returns the finished process."""
    path = ROOT / name
    command, folder = (name, ROOT) if from_root else (path.name, path.parent)
    return subprocess.run([sys.executable, command, *map(str, args)], cwd=folder, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=300)


TINY = ["--batch-size", "8", "--epochs", "2", "--checkpoint-every", "2", "--device", "cpu", "--precision", "float32"]


def options(casia, folder, name="run"):
    return ["--casia", casia, "--cache", folder / "cache", "--output", folder / name, *TINY]


def torchrun(method, *args):
    """Run casia_train.py in two processes that share the batch; returns the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "casia_train.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT / method, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=300)


def assert_same_model(one, two):
    """Compare the networks and heads of two runs' folders; returns both checkpoints."""
    import torch
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, two))
    for part in ("weights", "head"):
        for name, tensor in one[part].items():
            # Three steps move a bias by 3e-3. Rounding that puts a value on the other side of a PReLU's kink moves one
            # element by a hundredth of that; the tensor as a whole it leaves alone.
            apart = two[part][name].double() - tensor.double()
            assert apart.square().mean().sqrt() < 5e-6 and apart.abs().max() < 5e-5, name
    return one, two


def tensors(value, name=""):
    """All tensors of a nested checkpoint by name."""
    import torch
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: tensor for k, v in items for key, tensor in tensors(v, f"{name}.{k}").items()}


class Main:
    """Calls casia_train.py's main() in this process, which saves the seconds that importing torch takes."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, method, *args):
        try:
            status = importlib.import_module(f"{method}.casia_train").main(list(map(str, args)))
        except SystemExit as end:
            status = end.code
        return status, self.capsys.readouterr()


@pytest.fixture(autouse=True)
def seeded():
    """Weights and data that a test draws are the same each time."""
    import torch
    torch.manual_seed(0)


@pytest.fixture
def main(capsys):
    return Main(capsys)


def run_lfw_eval(capsys, *options):
    """Run cosFace/lfw_eval.py's main() in this process; returns (exit status, stdout, stderr)."""
    from cosFace.net import NETS
    from faces.verification.evaluate import main
    try:
        status = main(NETS, "CosFace", argv=["--device", "cpu", *map(str, options)]) or 0
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


@contextlib.contextmanager
def file_size_limit(size):
    """Let no file of this process grow beyond `size` bytes: writing more fails as it does on a full disk."""
    import resource
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def draw_face(person, photo, size=150):
    """A drawn face that a person keeps from photo to photo, somewhere in a picture: (uint8 RGB, float (5, 2))."""
    person, photo = np.random.default_rng((1, person)), np.random.default_rng((2, person, photo))
    skin, feature = person.integers(60, 255, 3), person.integers(0, 200, 3)
    angle, scale = np.deg2rad(photo.uniform(-15, 15)), photo.uniform(0.8, 1.1)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - TEMPLATE.mean(0)) @ turn.T + size / 2 + photo.uniform(-8, 8, 2)
    image = photo.integers(0, 60, (size, size, 3), np.uint8)
    cv2.circle(image, tuple(map(int, points.mean(0))), int(45 * scale), skin.tolist(), -1)
    for point, radius in zip(points, person.integers(3, 8, 5)):
        cv2.circle(image, tuple(map(int, point)), int(radius), feature.tolist(), -1)
    return image, points


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


@pytest.fixture(scope="session")
def casia(tmp_path_factory):
    """CASIA-WebFace in small: 6 people, 8 photos each, with casia_landmark.txt in the folder. Not to be changed."""
    root = tmp_path_factory.mktemp("casia")
    rows = []
    for person in range(6):
        for photo in range(8):
            image, points = draw_face(person, photo)
            name = f"{person + 45:07d}/{photo + 1:03d}.jpg"
            write_image(root / name, image)
            rows.append((name, person, points))
    write_landmarks(root / "casia_landmark.txt", rows)
    return root
