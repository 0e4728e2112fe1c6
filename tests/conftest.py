"""Fixtures and helper functions shared by the tests: synthetic faces with landmarks, and ways to run the scripts."""
import contextlib
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

# Two processes that both use all cores mostly wait for each other. This has to be set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, cores // 2))))

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from tiny_train import TinyNet

import sphereFace.net
from cosFace.net import NETS, faceNet
from faces.align import TEMPLATE
from faces.files import CHECKPOINT
from faces.landmarks import write_landmarks
from faces.verification import evaluate

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ("--standalone", "--local-addr", "127.0.0.1")    # the name of a machine may have no address
# Landmarks of the face in skimage.data.astronaut(), read off by eye.
ASTRONAUT = np.array([(203.8, 101.6), (246.8, 104.6), (224.5, 130.3), (200.8, 139.0), (244.4, 141.7)])


@pytest.fixture(scope="session", autouse=True)
def signals_are_not_ignored():
    """As under nohup, or in the background of a shell script; the scripts that tests run would ignore them as well."""
    for number in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def script(name, *args, from_root=False):
    """Run a script in its own folder, or with `from_root` in the root of the clone; return the CompletedProcess."""
    path = ROOT / name
    command, folder = (name, ROOT) if from_root else (path.name, path.parent)
    return subprocess.run([sys.executable, command, *map(str, args)], cwd=folder, text=True, capture_output=True,
                          env={"OMP_NUM_THREADS": "2", **os.environ}, timeout=900)


def options(casia, folder, name="run"):
    """Return options of casia_train.py for a run of 12 steps on the CPU, with the cache and the run in a folder."""
    return ["--casia", casia, "--cache", folder / "cache", "--output", folder / name,
            *"--batch-size 8 --epochs 2 --checkpoint-minutes 0 --device cpu --precision float32".split()]


def free_port():
    """Return a TCP port that no process listens on."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def torchrun(name, *args, launcher=LOCAL, processes=2, **environment):
    """Start a script in processes that split each batch; return the Popen, whose stdout holds both streams."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", processes, ROOT / name]
    return subprocess.Popen(list(map(str, (*command, *args))), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def checkpoint(folder):
    """Return the checkpoint of a run."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def saved_step(folder):
    """Return the step of a run's checkpoint, 0 if there is none."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True, mmap=True)["step"] if path.exists() else 0


def epochs(folder):
    """Return what a run has logged after each epoch, a list of dicts."""
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def perturb(net):
    """Add noise to the vectors of a new network: batch normalization, biases and PReLU. Otherwise, its residual units
    are the identity."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def tensors(value, name=""):
    """Return a dict of all tensors in a nested checkpoint, keyed by their path in it, such as ".weights.fc5.bias"."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: tensor for k, v in items for key, tensor in tensors(v, f"{name}.{k}").items()}


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch before every test, so that a test draws the same weights and data each time."""
    torch.manual_seed(0)


def run_main(capsys, main, *args, **options):
    """Run a main() in this process, which saves the seconds of importing torch: (exit status, stdout, stderr)."""
    try:
        status = main(*args, **options) or 0
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


@pytest.fixture
def call(capsys):
    """Return a function that runs main() of a module in this process: (exit status, stdout, stderr)."""
    return lambda module, *args: run_main(capsys, module.main, list(map(str, args)))


@pytest.fixture
def refusal(call):
    """Return a function that runs main() of a module, which must end with one sentence, and returns this."""
    def run(module, *args):
        status, _, err = call(module, *args)
        assert status == 2 and "Traceback" not in err, err
        return err.replace("\r", "\n").strip().splitlines()[-1]
    return run


@pytest.fixture
def main(call):
    """Return a function that runs a method's casia_train.py: (exit status, stdout, stderr)."""
    return lambda method, *args: call(importlib.import_module(f"{method}.casia_train"), *args)


@pytest.fixture
def tiny(monkeypatch):
    """Replace faceNet by TinyNet."""
    for nets in (NETS, sphereFace.net.NETS):
        monkeypatch.setitem(nets, "faceNet", TinyNet)


def run_lfw_eval(capsys, *options):
    """Run main() of cosFace/lfw_eval.py on the CPU in this process; see run_main()."""
    return run_main(capsys, evaluate.main, NETS, "CosFace", argv=["--device", "cpu", *map(str, options)])


def write_model(file, seed=0, nan=False, **entries):
    """Write a checkpoint of an untrained faceNet, whose embeddings are not finite if `nan`; return its path."""
    torch.manual_seed(seed)
    net = faceNet()
    perturb(net)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 112, 96))
        net.fc5.bias[0] += np.nan if nan else 0
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"format": CHECKPOINT, "method": "CosFace", "net": "faceNet", "weights": net.state_dict(), **entries}
    torch.save(state, file)
    return file


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return the checkpoints of two untrained networks, 90 MB each."""
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / name / "checkpoint.pt", seed) for seed, name in enumerate("ab")]


@pytest.fixture(scope="session")
def model(models):
    """Return the checkpoint of an untrained faceNet."""
    return models[0]


class PickledCall:
    """An object whose pickle calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@contextlib.contextmanager
def file_size_limit(size):
    """Simulate a full disk: writing beyond `size` bytes in any file of this process raises OSError."""
    import resource  # Python ignores SIGXFSZ, so that the write fails

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def draw_face(person, photo, size=150):
    """Return a synthetic face, uint8 (size, size, 3), and its landmarks, float (5, 2). The person determines the colors
    and the sizes of the features; person and photo determine the pose, the position and the background."""
    person_rng, photo_rng = np.random.default_rng((1, person)), np.random.default_rng((2, person, photo))
    skin, feature = person_rng.integers(60, 255, 3), person_rng.integers(0, 200, 3)
    angle, scale = np.deg2rad(photo_rng.uniform(-15, 15)), photo_rng.uniform(0.8, 1.1)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - TEMPLATE.mean(0)) @ rotation.T + size / 2 + photo_rng.uniform(-8, 8, 2)
    image = photo_rng.integers(0, 60, (size, size, 3), np.uint8)
    cv2.circle(image, tuple(map(int, points.mean(0))), int(45 * scale), skin.tolist(), -1)
    for point, radius in zip(points, person_rng.integers(3, 8, 5)):
        cv2.circle(image, tuple(map(int, point)), int(radius), feature.tolist(), -1)
    return image, points


def write_image(path, image):
    """Write an RGB image, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def write_people(root, people, photos, path="P{0}/P{0}_{1:04d}.png", size=150):
    """Write synthetic photos of people, whose names are given; return the rows of their landmark list, with labels."""
    rows = []
    for (label, name), photo in itertools.product(enumerate(people), range(1, photos + 1)):
        image, points = draw_face(label, photo, size)
        rows.append((path.format(name, photo), label, points))
        write_image(root / rows[-1][0], image)
    return rows


def write_lfw(root, size=150):
    """Write a set in LFW's layout, two photos each of two people and 4 pairs; return the rows of its landmark list."""
    rows = write_people(root, range(2), 2, size=size)
    (root / "pairs.txt").write_text("2 1\nP0 1 2\nP0 1 P1 1\nP1 1 2\nP0 2 P1 2\n")
    return [(name, points) for name, _, points in rows]


def encoded_pairs(people):
    """Return the faces of a .bin set, 112x112, as PNG files, 4 per person: a genuine pair, and an impostor pair with
    the next person. The first face of each person occurs in both."""
    faces = [[cv2.imencode(".png", draw_face(p, i, 112)[0])[1].tobytes() for i in (0, 1)] for p in range(people)]
    return [face for p in range(people) for face in (*faces[p], faces[p][0], faces[(p + 1) % people][0])]


@pytest.fixture(scope="session")
def casia(tmp_path_factory):
    """Return the folder of a miniature CASIA-WebFace: 6 people, 8 photos each, and casia_landmark.txt. It is shared."""
    root = tmp_path_factory.mktemp("casia")
    write_landmarks(root / "casia_landmark.txt", write_people(root, range(45, 51), 8, "{0:07d}/{1:03d}.jpg"))
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Return a folder of a portrait, a brighter flipped copy, a picture of two faces, and one without a face."""
    root, face = tmp_path_factory.mktemp("photos"), skimage.data.astronaut()[:200, 100:360]
    write_image(root / "face.png", face)
    write_image(root / "brighter.png", cv2.convertScaleAbs(face[:, ::-1], alpha=1, beta=25))
    write_image(root / "two.png", np.hstack((face, cv2.copyMakeBorder(cv2.resize(face, (195, 150)), 0, 50, 0, 0, 0))))
    write_image(root / "coffee.png", skimage.data.coffee()[:260, :260])
    return root
