"""Tests of the tools that compare two photos, export a network, and draw a t-SNE plot."""
import json
import sys

import cv2
import numpy as np
import pytest
import safetensors
import skimage.data
import torch
from conftest import write_image
from sklearn.metrics.pairwise import cosine_distances

from cosFace.net import NETS
from faces.align import TEMPLATE, similarity_transform
from faces.files import InputError
from faces.images import read_image
from faces.landmarks import read_landmarks, write_landmarks
from faces.training import checkpoint
from faces.verification.metrics import best_threshold
from faces.verification.weights import fingerprint, load_net, load_weights
from mtcnn.detector import Detector
from tools import compare, export, tsne


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a checkpoint of an untrained network with perturbed batch normalization, biases and PReLU slopes."""
    torch.manual_seed(0)
    net = NETS["faceNet"]()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        net.train()(torch.randn(4, 3, 112, 96))
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    checkpoint.save(path, {"method": "CosFace", "net": "faceNet", "weights": net.state_dict()})
    return path


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with a portrait, a brighter mirrored copy, a picture of two faces, and one without a face."""
    root = tmp_path_factory.mktemp("photos")
    face = skimage.data.astronaut()[:200, 100:360]
    write_image(root / "face.png", face)
    write_image(root / "brighter.png", cv2.convertScaleAbs(face[:, ::-1], alpha=1, beta=25))
    write_image(root / "two.png", np.hstack((face, cv2.copyMakeBorder(cv2.resize(face, (195, 150)), 0, 50, 0, 0, 0))))
    write_image(root / "coffee.png", skimage.data.coffee()[:260, :260])
    return root


def call(tool, *args):
    """Run a tool's main() in this process; return its exit status, 0 if main() returns None."""
    try:
        return tool.main(list(map(str, args))) or 0
    except SystemExit as exit:
        return exit.code


def write_scores(path, similarity, same, **settings):
    """Write a scores.tsv and the results.json with these settings beside it; return the path of the former."""
    lines = [f"a.jpg\tb.jpg\t{int(s)}\t0\t{x:.6f}" for x, s in zip(similarity, same)]
    path.write_text("\n".join(["left\tright\tsame\tfold\tsimilarity", *lines, ""]))
    path.with_name("results.json").write_text(json.dumps({"settings": settings}))
    return path


@pytest.fixture
def scores(tmp_path):
    """Write scores of 300 genuine and 200 impostor pairs with many ties; return (path, similarities, same)."""
    random = np.random.default_rng(3)
    same = random.permutation(np.arange(500) < 300)
    similarity = np.round(random.normal(np.where(same, 0.5, 0.2), 0.15).clip(-1, 1), 2)
    return write_scores(tmp_path / "scores.tsv", similarity, same, model="a/checkpoint.pt", mirror="concatenate",
                        subtract_mean=False), similarity, same


# ---- compare.py

def test_similarity_is_the_cosine_of_the_embeddings_of_both_crops(model, photos):
    net = NETS["faceNet"]()
    load_weights(net, model)
    detector = Detector(device="cpu")
    result = compare.compare(net, detector, photos / "face.png", photos / "brighter.png")
    assert result.face_counts == (1, 1) and result.crops.shape == (2, 112, 96, 3)
    image = read_image(photos / "face.png")
    matrix = similarity_transform(detector.detect(image).landmarks[0])
    assert np.array_equal(result.crops[0], cv2.warpAffine(image, matrix, (96, 112)))
    x = torch.tensor((result.crops.astype(np.float32) - 127.5) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        a, b = torch.cat((net.eval()(x), net(x.flip(3))), 1).double()
    assert result.similarity == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    assert result.similarity < 0.9999
    same = compare.compare(net, detector, photos / "face.png", photos / "face.png")
    assert same.similarity == pytest.approx(1, abs=1e-6)


def test_the_largest_face_is_used_and_the_number_of_faces_is_returned(photos):
    detector = Detector(device="cpu")
    only_face, count = compare.find_face(detector, photos / "face.png")
    largest_face, count_in_two = compare.find_face(detector, photos / "two.png")
    assert (count, count_in_two) == (1, 2)
    assert abs(only_face.astype(int) - largest_face).mean() < 8


def test_error_counts_equal_a_naive_count(scores):
    path, similarity, same = scores
    read = compare.read_scores(path)
    best = best_threshold(read.similarity, read.same)
    for threshold in (0.31, 0.3, -1, 1, best):  # some pairs have a similarity of exactly 0.3
        accepted = sum(x > threshold for x, s in zip(similarity, same) if not s)
        rejected = sum(x <= threshold for x, s in zip(similarity, same) if s)
        assert read.error_counts(threshold) == (accepted, 200, rejected, 300)
    errors = [sum(read.error_counts(t)[0::2]) for t in (best, *np.unique(similarity))]
    assert errors[0] == min(errors)


def test_the_command_prints_verdict_and_error_rates_and_draws_the_picture(model, photos, scores, tmp_path, capsys):
    path, similarity, same = scores
    pair = photos / "face.png", photos / "two.png"
    assert call(compare, *pair, "--model", model, "--scores", path, "--output", tmp_path / "out",
                "--device", "cpu") == 0
    out = capsys.readouterr().out
    threshold = best_threshold(similarity, same)
    accepted = int((similarity[~same] > threshold).sum())
    assert "same person: " in out and f"> threshold {threshold:.4f}" in out
    assert f"from {path} (a/checkpoint.pt):" in out
    assert f"{accepted / 200:8.3%}  {accepted} of 200 impostor pairs" in out
    assert "two.png: 2 faces" in out and "face.png: 2 faces" not in out
    assert read_image(tmp_path / "out" / "comparison.png").std() > 20


def test_the_command_runs_with_and_without_a_threshold(model, photos, capsys):
    pair = photos / "face.png", photos / "face.png", "--model", model, "--device", "cpu"
    assert call(compare, *pair, "--threshold", "1") == 0
    out = capsys.readouterr().out
    assert "different people: 1.0000 <= threshold 1.0000\nthe error rates at this threshold are unknown" in out
    assert call(compare, *pair) == 0
    assert "run lfw_eval.py with this model" in capsys.readouterr().out
    assert call(compare, *pair, "--threshold", "60") == 2


def test_a_photo_without_a_face_is_refused(model, photos, capsys):
    pair = photos / "face.png", photos / "coffee.png"
    assert call(compare, *pair, "--model", model, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "no face was found in" in error and "coffee.png" in error and "face.png" not in error


@pytest.mark.parametrize("text, settings, message", [
    ("left\tright\na.jpg\tb.jpg\n", {}, "is not a scores.tsv"),
    ("same\tsimilarity\n1\tx\n0\t0.1\n", {}, "is not a scores.tsv"),
    ("same\tsimilarity\n1\t0.3\n", {}, "genuine and impostor pairs"),
    ("same\tsimilarity\n1\t0.3\n0\t0.1\n", {"mirror": "none"}, "--mirror"),
    ("same\tsimilarity\n1\t0.3\n0\t0.1\n", {"subtract_mean": True}, "--subtract-mean"),
])
def test_unsuitable_scores_are_refused(tmp_path, text, settings, message):
    path = write_scores(tmp_path / "scores.tsv", [], [], **settings)
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        compare.read_scores(path)
    with pytest.raises(InputError, match="can't read"):
        compare.read_scores(tmp_path / "absent" / "scores.tsv")


# ---- export.py

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
def test_an_exported_network_computes_the_same_embeddings(format, net_name, model, public_model, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnx", reason="onnx is not installed")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    source, path = model if net_name == "faceNet" else public_model, tmp_path / f"exported.{format}"
    assert call(export, "--model", source, "--format", format, "--output", path) == 0
    assert "largest difference from the original on 8 faces" in capsys.readouterr().out
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


def test_nothing_is_written_unless_the_check_passes(model, tmp_path, monkeypatch, capsys):
    def write_changed_weights(net, example, metadata):
        state = safetensors.torch.load(export.write_safetensors(net, example, metadata))
        state["relu3_2.weight"] += 0.01
        return safetensors.torch.save(state, metadata)

    monkeypatch.setitem(export.FORMATS, "safetensors", (write_changed_weights, export.open_safetensors))
    status = call(export, "--model", model, "--format", "safetensors", "--output", tmp_path / "x")
    assert status == 2 and "differs from the original by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_onnx_package_is_reported(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert call(export, "--model", model, "--format", "onnx", "--output", tmp_path / "x") == 2
    assert "pip install onnx onnxruntime" in capsys.readouterr().err


def test_the_check_reads_aligned_faces_only(tmp_path):
    write_image(tmp_path / "a" / "1.png", np.full((112, 112, 3), 7, np.uint8))
    write_image(tmp_path / "b.png", np.full((112, 96, 3), 9, np.uint8))
    assert export.read_faces(tmp_path)[:, 0, 0, 0].tolist() == [7, 9]
    write_image(tmp_path / "c.png", np.zeros((250, 250, 3), np.uint8))
    with pytest.raises(InputError, match=r"c\.png"):
        export.read_faces(tmp_path)


# ---- tsne.py

def test_choice_of_images_depends_on_the_seed_and_skips_small_identities():
    labels = np.array([0] * 9 + [1] * 4 + [2] * 5 + [3] * 7)[np.random.default_rng(0).permutation(25)]
    rows = tsne.choose_images(labels, 2, 5, seed=1)
    assert rows.shape == (2, 5) and len(np.unique(rows)) == 10
    people = labels[rows]
    assert (people == people[:, :1]).all() and people[0, 0] != people[1, 0] and 1 not in people
    assert np.array_equal(rows, tsne.choose_images(labels, 2, 5, seed=1))
    assert any(not np.array_equal(rows, tsne.choose_images(labels, 2, 5, seed=s)) for s in range(2, 6))
    with pytest.raises(InputError, match="only 3 of 4 people have 5 images or more"):
        tsne.choose_images(labels, 4, 5, seed=0)


def test_silhouette_score_uses_the_cosine_distance_of_the_embeddings():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 4)
    embeddings = random.normal(size=(3, 8))[labels] + 0.4 * random.normal(size=(12, 8))
    embeddings *= random.uniform(1, 9, (12, 1))  # the norms must not matter
    points, silhouette = tsne.layout_and_silhouette(embeddings, labels, 0)
    distance, scores = cosine_distances(embeddings), []
    for i, label in enumerate(labels):
        own = distance[i, (labels == label) & (np.arange(12) != i)].mean()
        other = min(distance[i, labels == k].mean() for k in range(3) if k != label)
        scores.append((other - own) / max(own, other))
    assert silhouette == pytest.approx(np.mean(scores)) and points.shape == (12, 2)
    assert np.array_equal(points, tsne.layout_and_silhouette(embeddings, labels, 0)[0])
    with pytest.raises(InputError, match="not finite"):
        tsne.layout_and_silhouette(np.full((12, 8), np.nan), labels, 0)


def test_tsne_draws_two_models_on_the_same_images(casia, model, tmp_path, capsys):
    output = tmp_path / "tsne.png"
    assert call(tsne, "--model", model, "--model", model, "--title", "before", "--title", "after",
                "--faces", casia, "--identities", 2, "--per-identity", 3, "--device", "cpu", "--output", output,
                "--points", tmp_path / "points.tsv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].replace("before", "after") == lines[1] and "2 identities, 3 images each" in lines[0]
    assert -1 <= float(lines[0].split()[1]) <= 1
    height, width = read_image(output).shape[:2]
    assert width > 2 * height * 0.9
    (before, after), labels, names = tsne.read_points(tmp_path / "points.tsv")
    assert before[0].startswith("before: silhouette") and after[0].startswith("after: silhouette")
    assert before[1].shape == (6, 2) and np.array_equal(before[1], after[1])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and len(set(names)) == 2


def test_tsne_points_survive_writing_and_reading(tmp_path):
    panels = [("a: b", np.array([[1.25, -2], [3, 4]])), ('"c"', np.array([[0, 0.5], [7, 1e3]]))]
    tsne.write_points(tmp_path / "points.tsv", panels, [1, 0], ["one", "two words"])
    read, labels, names = tsne.read_points(tmp_path / "points.tsv")
    assert [title for title, _ in read] == ["a: b", '"c"'] and [names[i] for i in labels] == ["two words", "one"]
    assert all(np.array_equal(actual, expected) for (_, actual), (_, expected) in zip(read, panels))


def test_tsne_reads_lfw_casia_and_aligned_faces(casia, tmp_path):
    listed = read_landmarks(casia / "casia_landmark.txt", labeled=True)
    write_landmarks(tmp_path / "lfw.txt", zip(listed.paths, listed.points))
    lfw, train = tsne.list_lfw(casia, tmp_path / "lfw.txt"), tsne.list_faces(casia)
    assert np.array_equal(lfw.labels, train.labels)
    faces = tsne.read_faces(lfw, [0, 9])
    assert np.array_equal(faces, tsne.read_faces(train, [0, 9]))
    for i, face in enumerate(faces):
        write_image(tmp_path / "aligned" / f"person{i}" / "1.png", face)
    aligned = tsne.list_faces(tmp_path / "aligned")
    assert aligned.points is None and np.array_equal(tsne.read_faces(aligned, [0, 1]), faces)


@pytest.mark.parametrize("options, message", [
    (("--per-identity", 9), "only 0 of 6 people"),
    (("--identities", 1), "--identities 1"),
    (("--title", "a", "--title", "b"), "--title was given 2 times and --model 1 times"),
    (("--output", "tsne.gif"), "tsne.gif has an unsupported extension"),
])
def test_tsne_refuses_invalid_options(casia, model, capsys, options, message):
    assert call(tsne, "--model", model, "--faces", casia, "--device", "cpu", *options) == 2
    assert message in capsys.readouterr().err
