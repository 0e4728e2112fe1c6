"""LFW: pairs files, alignment, and lfw_eval.py on a tiny synthetic set."""
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
import zipfile

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT, run_lfw_eval

import cosFace.net
from faces import landmarks
from faces.align import TEMPLATE, align, similarity_transform
from faces.files import CHECKPOINT, InputError
from faces.images import read_image
from faces.landmarks import photos_digest, write_landmarks
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_faces, load_lfw
from faces.verification.metrics import best_threshold
from faces.verification.pairs import Pairs, open_images, read_pairs
from faces.verification.report import error_sheet
from faces.verification.weights import load_weights
from mtcnn.landmark_lists import find_landmarks

PAIRS = ["2\t2", "Ann\t1\t2", "Bob\t1\t3", "Ann\t1\tBob\t1", "Ann\t2\tEve\t1",
         "Bob\t2\t3", "Eve\t1\t2", "Bob\t2\tEve\t2", "Eve\t1\tAnn\t1", ""]
LFWACC = re.compile(r"LFWACC=(\d\.\d{4}) std=(\d\.\d{4}) thd=(-?\d\.\d{4})")


def write_image(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[:, :, ::-1])


@pytest.fixture
def lfw(tmp_path):
    """Return a folder of pairs.txt and blurred noise images, three each of three people; landmarks.txt is beside it."""
    rng = np.random.default_rng(0)
    rows = []
    for name in ("Ann", "Bob", "Eve"):
        for i in (1, 2, 3):
            path = f"{name}/{name}_{i:04d}.jpg"
            noise = rng.integers(0, 256, (160, 150, 3), dtype=np.uint8)
            write_image(tmp_path / "lfw" / path, cv2.GaussianBlur(noise, None, 4) * 2)
            rows.append((path, TEMPLATE * 0.9 + (20, 25) + rng.normal(size=2)))
    (tmp_path / "lfw" / "pairs.txt").write_text("\n".join(PAIRS))
    write_landmarks(tmp_path / "landmarks.txt", rows)
    return tmp_path / "lfw"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the checkpoint of an untrained network whose batch statistics come from one forward pass."""
    torch.manual_seed(0)
    net = cosFace.net.faceNet().train()
    with torch.no_grad():
        net(torch.randn(4, 3, 112, 96))
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    torch.save({"format": CHECKPOINT, "method": "CosFace", "net": "faceNet", "weights": net.state_dict(),
                "head": {"weight": torch.zeros(2, 512)}}, path)
    return path


def test_pairs_keep_the_order_of_the_file(lfw):
    pairs = read_pairs(lfw)
    assert pairs.paths == [f"{name}_{i:04d}.jpg" for name in ("Ann/Ann", "Bob/Bob", "Eve/Eve") for i in (1, 2, 3)
                           if (name, i) not in {("Ann/Ann", 3), ("Eve/Eve", 3)}]
    assert [[pairs.paths[i] for i in pair] for pair in pairs.pairs[:3]] == [
        ["Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg"], ["Bob/Bob_0001.jpg", "Bob/Bob_0003.jpg"],
        ["Ann/Ann_0001.jpg", "Bob/Bob_0001.jpg"]]
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.folds.tolist() == [0] * 4 + [1] * 4


def test_pairs_txt_may_be_beside_the_folder_with_a_short_header_and_images_may_be_png(lfw):
    (lfw / "pairs.txt").unlink()
    (lfw.parent / "pairs.txt").write_text("\n".join(["2", *PAIRS[1:]]).replace("\t", " "))
    write_image(lfw / "Ann" / "Ann_0001.png", read_image(lfw / "Ann" / "Ann_0001.jpg"))
    assert read_pairs(lfw).paths[0] == "Ann/Ann_0001.jpg"
    (lfw / "Ann" / "Ann_0001.jpg").unlink()
    pairs = read_pairs(lfw)
    assert pairs.paths[0] == "Ann/Ann_0001.png" and pairs.folds.tolist() == [0] * 4 + [1] * 4


def test_pairs_in_other_formats_give_the_same_pairs(lfw, tmp_path):
    expected = read_pairs(lfw)
    paths = [[expected.paths[i] for i in pair] for pair in expected.pairs]
    same = expected.same.astype(int)
    lists = {
        "three.txt": [f"{a} {b} {s}" for (a, b), s in zip(paths, same)],
        "first.txt": [f"{s}\t{a}\t{b}" for (a, b), s in zip(paths, same)],
        "columns.csv": ["left,right,same", *(f"{a},{b},{s}" for (a, b), s in zip(paths, same))],
        "absolute.txt": [f"{lfw / a} {lfw / b} {s}" for (a, b), s in zip(paths, same)],
        "from_the_parent.txt": [f"lfw/{a} lfw/{b} {s}" for (a, b), s in zip(paths, same)],
        "per_image.txt": [f"{a.rpartition('/')[2]} {s and i + 1}\n{b.rpartition('/')[2]} {s and i + 1}"
                          for i, ((a, b), s) in enumerate(zip(paths, same))],
        "pairs.csv": ["name,imagenum1,imagenum2,", *(line.replace("\t", ",") + "," * (line.count("\t") == 2)
                                                     for line in PAIRS[1:-1])],
        "no_header.txt": PAIRS[1:]}
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines))
        pairs = read_pairs(lfw, tmp_path / name)
        assert [[pairs.paths[i] for i in pair] for pair in pairs.pairs] == paths, name
        assert (pairs.same == expected.same).all() and pairs.named and pairs.folds.tolist() == list(range(8)), name


def test_photos_in_one_folder_are_people_as_their_pairs_say(tmp_path):
    for name in "abcd":
        write_image(tmp_path / "photos" / f"{name}.png", np.zeros((112, 96, 3), np.uint8))
    (tmp_path / "list.txt").write_text("photos/a.png photos/b.png 1\nphotos/a.png photos/c.png 0\n"
                                       "photos/c.png photos/d.png 1\nphotos/b.png photos/d.png 0\n")
    pairs = read_pairs(tmp_path, tmp_path / "list.txt")
    assert not pairs.named and pairs.identities.tolist() == [0, 0, 1, 1] and pairs.folds.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pairs_are", ["outermost", "inside"])
def test_lfw_as_kaggle_has_it(lfw, tmp_path, pairs_are):
    inner = tmp_path / "archive" / "lfw-deepfunneled" / "lfw-deepfunneled"
    inner.parent.mkdir(parents=True)
    lfw.rename(inner)
    (inner / "pairs.txt").rename((inner if pairs_are == "inside" else tmp_path / "archive") / "pairs.txt")
    for root in (tmp_path / "archive", inner.parent, inner):
        assert read_pairs(root).paths[0] == "Ann/Ann_0001.jpg"


@pytest.mark.parametrize("line, text, message", [
    (0, "ten\t300", "line 1: expected"),
    (0, "2\t0", "declares 2 x 0 = 0 pairs"),
    (0, "10\t300", "declares 10 x 600 = 6,000 pairs but contains 8"),
    (0, "3", "declares 1 x 6 = 6 pairs but contains 8"),
    (0, "1\t4", "1 fold"),
    (2, "Bob\t1", "line 3: expected"),
    (2, "Bob\t1\tthree", "line 3: expected"),
    (3, "Ann\t1\tBob\t-1", "line 4: expected"),
    (3, "Ann\t1\tBob\t0", r"lacks 1 of the 8 images named in .* \(Bob/Bob_0000\)"),
    (3, "Ann\t1\tAnn\t2", "line 4: the impostor pair names the same person twice"),
    (4, "Ann\t2\tZoe\t1", r"lacks 1 of the 8 images named in .* \(Zoe/Zoe_0001\)"),
    (4, "Ann\t2\t../Bob\t1", "lacks 1 of the 8 images"),
])
def test_malformed_pairs_files_are_one_sentence_errors(lfw, line, text, message):
    lines = PAIRS.copy()
    lines[line] = text
    (lfw / "pairs.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        read_pairs(lfw)


def test_each_face_is_aligned_with_its_own_landmarks(lfw):
    loaded = load_lfw(lfw, landmarks=lfw.parent / "landmarks.txt")
    assert loaded.faces.shape == (7, 112, 96, 3)
    fields = (lfw.parent / "landmarks.txt").read_text().splitlines()[4].split("\t")
    assert fields[0] == loaded.pairs.paths[3] == "Bob/Bob_0002.jpg"
    points = np.array(fields[1:], np.float32).reshape(5, 2)
    np.testing.assert_array_equal(loaded.faces[3], align(read_image(lfw / fields[0]), points))


def test_the_list_that_lfw_landmark_wrote_is_used_by_default(lfw, tmp_path, monkeypatch):
    monkeypatch.setattr(landmarks, "CACHE", tmp_path / "cache")
    listed, rows = landmarks.default_list(lfw, "lfw_landmark.txt"), landmarks.read_landmarks(
        tmp_path / "landmarks.txt", labeled=False)
    write_landmarks(listed, zip(rows.paths, rows.points), photos_digest(open_images(lfw)))
    assert load_lfw(lfw).landmarks == str(listed)
    (lfw / "Ann" / "Ann_0001.jpg").write_bytes((lfw / "Ann" / "Ann_0002.jpg").read_bytes())    # another edition
    with pytest.raises(InputError, match="no landmark list"):
        load_lfw(lfw)


def test_landmarks_are_detected_if_there_is_no_list(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(landmarks, "CACHE", tmp_path / "cache")
    photo = skimage.data.astronaut()[:250, 100:350]
    pupils = np.array([[104, 101], [147, 103]])  # measured by eye
    for name, shift in (("Ann", 0), ("Bob", 10)):
        for i in (1, 2):
            write_image(tmp_path / "lfw" / name / f"{name}_{i:04d}.jpg", np.roll(photo, shift, 1))
    (tmp_path / "pairs.txt").write_text("2 1\nAnn 1 2\nAnn 1 Bob 1\nBob 1 2\nAnn 2 Bob 2\n")
    loaded = load_lfw(tmp_path / "lfw", find_landmarks=find_landmarks)
    err = capsys.readouterr().err
    assert "detecting landmarks in 4 images now" in err and "no face in 0 of 4 images" in loaded.landmarks
    assert abs(loaded.faces[0].astype(int) - loaded.faces[2]).mean() < 12  # alignment undoes the shift
    expected = cv2.warpAffine(photo, similarity_transform(pupils, TEMPLATE[:2]), (96, 112))
    assert np.corrcoef(expected.ravel(), loaded.faces[0].ravel())[0, 1] > 0.8


def test_aligned_faces_need_no_landmarks(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    write_image(tmp_path / "a.png", image)
    write_image(tmp_path / "b.png", image[:, 8:-8])
    faces = load_faces(open_images(tmp_path), ["a.png", "b.png"])
    np.testing.assert_array_equal(faces, [image[:, 8:-8]] * 2)


@pytest.mark.parametrize("folder, flip, mean_option", [("cosFace", "concatenate", "--no-subtract-mean"),
                                                         ("sphereFace", "none", "--subtract-mean")])
def test_the_command_works_in_its_own_folder(lfw, model, folder, flip, mean_option):
    command = [sys.executable, "lfw_eval.py", "--model", model, "--net", "faceNet", "--lfw", lfw, "--device", "cpu",
               "--landmarks", lfw.parent / "landmarks.txt", "--output", lfw.parent / "out",
               "--flip", flip, mean_option]
    process = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    accuracy, std, threshold = map(float, LFWACC.match(process.stdout).groups())
    results = json.loads((lfw.parent / "out" / "results.json").read_text())
    assert [round(results[name], 4) for name in ("accuracy", "std", "threshold")] == [accuracy, std, threshold]
    assert results["method"] == "CosFace"  # comes from the checkpoint, whichever of the two commands reads it
    assert results["settings"]["flip"] == flip
    assert results["settings"]["subtract_mean"] == (mean_option == "--subtract-mean")
    assert results["counts"] == {"pairs": 8, "genuine": 4, "images": 7}
    header, *rows = [line.split("\t") for line in (lfw.parent / "out" / "scores.tsv").read_text().splitlines()]
    assert header == ["left", "right", "same", "fold", "similarity"] and len(rows) == 8
    same, fold, similarity = np.array([row[2:] for row in rows], float).T
    # With --subtract-mean, thresholds are chosen on similarities that are not in scores.tsv.
    if mean_option == "--no-subtract-mean":
        thresholds = [best_threshold(similarity[fold != k], same[fold != k]) for k in (0, 1)]
        assert accuracy == np.mean((similarity > np.take(thresholds, fold.astype(int))) == same)
    for picture in ("roc.png", "histogram.png"):
        assert read_image(lfw.parent / "out" / picture).std() > 5
    for row in ("AUC", "EER", "TAR@FAR=1e-3", "8 (4 genuine, 4 impostor)"):
        assert row in process.stdout


def test_options_change_the_similarities(lfw, model):
    data = load_lfw(lfw, landmarks=lfw.parent / "landmarks.txt")
    net = cosFace.net.faceNet()
    load_weights(net, model)
    options = {"default": {}, "sum": {"flip": "sum"}, "none": {"flip": "none"}, "mean": {"subtract_mean": True},
               "small batches": {"batch_size": 3}}
    scores = {name: evaluate(net, data, "cpu", progress=False, **arguments).similarities
              for name, arguments in options.items()}
    np.testing.assert_allclose(scores.pop("small batches"), scores["default"], atol=2e-6)
    different = list(scores.values())
    assert all(abs(a - b).max() > 1e-4 for i, a in enumerate(different) for b in different[:i])


def zip_folder(root, path, prefix=""):
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*"):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(root).as_posix())


@pytest.mark.parametrize("pairs_are", ["in the folder of the zip", "at the top of the zip", "beside the zip"])
def test_a_zip_is_read_without_unpacking_it(lfw, tmp_path, pairs_are):
    expected = load_lfw(lfw, landmarks=tmp_path / "landmarks.txt")
    text = (lfw / "pairs.txt").read_bytes()
    if pairs_are != "in the folder of the zip":
        (lfw / "pairs.txt").unlink()
    zip_folder(lfw, tmp_path / "zipped.zip", "lfw/")
    if pairs_are == "at the top of the zip":
        with zipfile.ZipFile(tmp_path / "zipped.zip", "a") as archive:
            archive.writestr("pairs.txt", text)
    elif pairs_are == "beside the zip":
        (tmp_path / "pairs.txt").write_bytes(text)
    loaded = load_lfw(tmp_path / "zipped.zip", landmarks=tmp_path / "landmarks.txt")
    assert np.array_equal(loaded.faces, expected.faces) and loaded.pairs.paths == expected.pairs.paths
    with pytest.raises(InputError, match="no landmark list for .*zipped.zip; unpack it"):
        load_lfw(tmp_path / "zipped.zip", find_landmarks=find_landmarks)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_and_numbers_that_are_written_differently(lfw, tmp_path, encoding):
    """Decomposed letters on disk, composed ones in the lists, a byte-order mark, and images numbered from 0."""
    on_disk, in_lists = unicodedata.normalize("NFD", "José"), unicodedata.normalize("NFC", "José")
    (lfw / "Ann").rename(lfw / on_disk)
    for i in (1, 2, 3):
        (lfw / on_disk / f"Ann_{i:04d}.jpg").rename(lfw / on_disk / f"{on_disk}_{i - 1:04d}.jpg")
    pairs = ["2\t2", "Ann\t0\t1", "Bob\t1\t3", "Ann\t0\tBob\t1", "Ann\t1\tEve\t1", *PAIRS[5:8], "Eve\t1\tAnn\t0"]
    (lfw / "pairs.txt").write_text("\n".join(pairs).replace("Ann", in_lists), encoding=encoding)
    text = re.sub(r"Ann/Ann_000(\d)", lambda m: f"{in_lists}/{in_lists}_{int(m[1]) - 1:04d}",
                  (tmp_path / "landmarks.txt").read_text())
    (tmp_path / "landmarks.txt").write_text(text, encoding=encoding)
    loaded = load_lfw(lfw, landmarks=tmp_path / "landmarks.txt")
    assert len(loaded.faces) == 7 and f"{on_disk}/{on_disk}_0000.jpg" in loaded.pairs.paths


def test_landmarks_of_other_copies_of_the_images_are_refused(lfw, tmp_path):
    rows = [(f"{name}/{name}_{i:04d}.jpg", TEMPLATE * 0.4) for name in ("Ann", "Bob", "Eve") for i in range(1, 6)]
    for path, _ in rows:
        write_image(lfw / path, np.zeros((160, 150, 3), np.uint8))
    points = np.array([points for _, points in rows])
    with pytest.raises(InputError, match="the landmarks of .* are in the upper left part of the images"):
        load_faces(open_images(lfw), [path for path, _ in rows], points)


# matplotlib warns about characters that become boxes; old versions of it use what other packages have deprecated
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_names_in_any_script_are_drawn(tmp_path):
    names = ["王伟/王伟_0001.jpg", "Jos\udce9/Jos\udce9_0001.jpg", "محمد/محمد_0001.jpg", "José/José_0001.jpg"]
    pairs = Pairs(names, np.array([[0, 1], [2, 3]]), np.array([True, False]), np.zeros(2, int), np.arange(4))
    error_sheet(tmp_path / "sheet.png", np.zeros((4, 112, 96, 3), np.uint8), pairs, np.array([0.1, 0.9]),
                np.array([False, False]))
    assert read_image(tmp_path / "sheet.png").std() > 5


def make_mistake(lfw, model, mistake):
    """Make one mistake in the data or the command line; return the options that override the usual ones."""
    parent = lfw.parent
    if mistake == "unreadable image":
        (lfw / "Ann" / "Ann_0002.jpg").write_bytes(b"no image")
    elif mistake == "missing image":
        (lfw / "Ann" / "Ann_0002.jpg").unlink()
    elif mistake == "mirrored landmarks":
        mirrored = TEMPLATE * (-1, 1) + (100, 0)
        write_landmarks(parent / "landmarks.txt", [(path, mirrored) for path in read_pairs(lfw).paths])
    elif mistake == "list lacks an image":
        lines = (parent / "landmarks.txt").read_text().splitlines(keepends=True)
        (parent / "landmarks.txt").write_text("".join(lines[1:]))
    elif mistake == "nine numbers":
        (parent / "landmarks.txt").write_text("Ann/Ann_0001.jpg" + "\t1.5" * 9 + "\n")
    elif mistake == "no pairs":
        (lfw / "pairs.txt").unlink()
    elif mistake == "failed training":
        state = torch.load(model)
        state["weights"]["fc5.bias"][0] = float("nan")
        torch.save(state, parent / "failed.pt")
    return {"no folder": ("--lfw", parent / "missing"), "empty folder": ("--lfw", parent / "empty"),
            "no landmarks": ("--landmarks", parent / "missing.txt"), "not aligned": ("--aligned",),
            "no model": ("--model", parent / "missing.pt"), "not a checkpoint": ("--model", parent / "landmarks.txt"),
            "other network": ("--net", "sphere20a"), "no such device": ("--device", "cuda:99"),
            "failed training": ("--model", parent / "failed.pt"), "output is a file": ("--output", lfw / "pairs.txt")
            }.get(mistake, ())


@pytest.mark.parametrize("mistake, message", [
    ("no folder", "missing does not exist"),
    ("empty folder", "no pairs.txt in"),
    ("no pairs", "no pairs.txt in"),
    ("missing image", r"lacks 1 of the 7 images named in .* \(Ann/Ann_0002\)"),
    ("unreadable image", r"1 of 7 images in .* can't be used \(Ann/Ann_0002.jpg: not an image.*\)"),
    ("mirrored landmarks", "landmarks.txt is not a usable landmark list: .* as in mirrored images"),
    ("not aligned", "Ann/Ann_0001.jpg: an image of 160 rows and 150 columns is not an aligned face.*and 6 like it"),
    ("no landmarks", "missing.txt: No such file"),
    ("list lacks an image", r"lacks 1 of the 7 images that are needed \(Ann/Ann_0001.jpg\)"),
    ("nine numbers", "line 1: expected a path, ten"),
    ("no model", "missing.pt: No such file"),
    ("not a checkpoint", "landmarks.txt is damaged or not a file of tensors"),
    ("other network", "pass --net faceNet"),
    ("no such device", "--device cuda:99"),
    ("failed training", "embeddings are not finite"),
    ("output is a file", "can't write"),
])
def test_mistakes_are_one_sentence_errors(lfw, model, capsys, mistake, message):
    (lfw.parent / "empty").mkdir()
    status, _, err = run_lfw_eval(capsys, "--model", model, "--lfw", lfw, "--landmarks", lfw.parent / "landmarks.txt",
                                  *make_mistake(lfw, model, mistake))
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]  # no progress bars
    assert status == 2 and len(lines) == 1 and "Traceback" not in err
    assert re.match(rf"\S+: .*{message}", lines[0])


def test_names_with_dots_and_equal_numbers_are_impostors_in_lfws_format(tmp_path):
    (tmp_path / "pairs.txt").write_text("m.01 1 m.02 1\nm.01 1 2\nm.02 1 m.01 2\nm.02 1 2\n")
    for name, i in itertools.product(("m.01", "m.02"), (1, 2)):
        write_image(tmp_path / name / f"{name}_{i:04d}.png", np.zeros((112, 96, 3), np.uint8))
    assert read_pairs(tmp_path).same.tolist() == [False, True, False, True]
