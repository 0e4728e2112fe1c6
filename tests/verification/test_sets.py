"""lfw_eval.py on several sets in one run: the same faces in different layouts, RFW's groups, and models by sets."""
import csv
import itertools
import json
import lzma
import pickle
import re

import cv2
import numpy as np
import pytest
from conftest import run_lfw_eval, write_image, write_people

from faces.files import InputError
from faces.images import read_image
from faces.verification.lfw import find_sets, load_sets
from faces.verification.pairs import read_pairs

PEOPLE, PHOTOS = 7, 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Return a folder with the same faces and pairs as LFW's layout, as a list, and as .bin files, one compressed."""
    root = tmp_path_factory.mktemp("sets")
    write_people(root / "images", range(PEOPLE), PHOTOS, "m.{0}/m.{0}_{1:04d}.png", 112)    # dots, as VGGFace has
    lines = []
    for person in range(PEOPLE):
        other = (person + 1) % PEOPLE
        lines += [f"m.{person}\t{i}\t{j}" for i, j in itertools.combinations(range(1, PHOTOS + 1), 2)]
        lines += [f"m.{person}\t{i}\tm.{other}\t{i}" for i in range(1, PHOTOS + 1)]
    (root / "pairs.txt").write_text("\n".join(lines))
    pairs = read_pairs(root / "images")
    names = [[pairs.paths[i] for i in pair] for pair in pairs.pairs]
    (root / "list.txt").write_text("".join(f"{a} {b} {int(s)}\n" for (a, b), s in zip(names, pairs.same)))
    images = [cv2.imencode(".png", read_image(root / "images" / name)[..., ::-1])[1].tobytes()
              for pair in names for name in pair]
    (root / "bins").mkdir()
    data = pickle.dumps((images, pairs.same.tolist()), 2)
    (root / "bins/agedb_30.bin").write_bytes(data)
    (root / "bins/cfp_fp.bin.xz").write_bytes(lzma.compress(data))
    return root


def test_the_same_faces_give_the_same_figures_in_every_layout(sets, models, tmp_path, capsys):
    status, out, err = run_lfw_eval(
        capsys, "--model", models[0], "--model", models[1], "--flip", "none", "--aligned", "--resamples", 200,
        "--lfw", sets / "images", sets / "bins/cfp_fp.bin.xz", "--pairs", sets / "list.txt", "--output", tmp_path)
    assert status == 0 and "LFWACC" not in out, err
    stored = json.loads((tmp_path / "results.json").read_text())
    results = {(result["title"], result["set"]): result for result in stored["results"]}
    names = ["images", "cfp_fp"]
    assert list(results) == [(title, name) for name in names for title in "ab"]
    for (title, name), result in results.items():
        same = results[title, "images"]
        assert (result["accuracy"], result["counts"]) == (same["accuracy"], same["counts"])
        assert result["auc"] == pytest.approx(same["auc"], abs=1e-6)
        assert result == json.loads((tmp_path / name / title / "results.json").read_text())
    for title, row in zip("ab", stored["means"]):
        assert row["accuracy"] == pytest.approx(np.mean([results[title, name]["accuracy"] for name in names]))
        assert row["interval_95"][0] <= row["accuracy"] <= row["interval_95"][1]
    for row, name in zip(stored["comparison"], [*names, "mean"], strict=True):
        expected = [mean["accuracy"] if name == "mean" else results[mean["title"], name]["accuracy"]
                    for mean in stored["means"]]
        assert row["set"] == name and row["difference"] == pytest.approx(expected[1] - expected[0])
        assert f"b minus a, {name}: accuracy {row['difference']:+.4f}, 95 % interval " in out
    with open(tmp_path / "table.csv", newline="") as file:
        heading, *rows = csv.reader(file)
    assert heading == ["model", "network", *names, "mean"]
    assert rows[1] == ["b", "faceNet", *(f"{100 * results['b', name]['accuracy']:.2f}" for name in names),
                       f"{100 * stored['means'][1]['accuracy']:.2f}"]


def test_each_set_has_its_own_list_even_if_two_have_the_same_images(sets, tmp_path):
    (tmp_path / "short.txt").write_text("\n".join((sets / "list.txt").read_text().splitlines()[:20]))
    found = find_sets([sets / "images", sets / "bins", sets / "images"])
    loaded = load_sets(found, [sets / "pairs.txt", tmp_path / "short.txt"], aligned=True)
    assert [len(lfw.pairs.same) for lfw in loaded] == [42, 42, 42, 20]


def test_people_in_two_sets_are_drawn_for_both(sets, models, tmp_path, capsys):
    run_lfw_eval(capsys, "--model", models[0], "--flip", "none", "--aligned", "--lfw", sets / "images", sets / "images",
                 "--output", tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["means"][0]["interval_95"] == pytest.approx(stored["results"][0]["interval_95"])


def test_groups_of_rfw(sets, models, tmp_path, capsys):
    """RFW's layout: data/GROUP/NAME/NAME_0001.jpg and txts/GROUP/GROUP_pairs.txt without a header."""
    for shift, group in enumerate(("African", "Asian", "Indian")):
        lines = (sets / "pairs.txt").read_text().splitlines()
        for name in (sets / "images").rglob("*.png"):
            image = np.roll(read_image(name), 9 * shift, 1) // (1 + shift)
            write_image(tmp_path / "data" / group / name.relative_to(sets / "images"), image)
        (tmp_path / "txts" / group).mkdir(parents=True)
        (tmp_path / f"txts/{group}/{group}_pairs.txt").write_text("\n".join(lines))
    status, out, _ = run_lfw_eval(capsys, "--model", models[0], "--flip", "none", "--aligned", "--group", "--lfw",
                                  *sorted((tmp_path / "data").iterdir()), "--output", tmp_path / "out")
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert status == 0 and [result["counts"]["pairs"] for result in stored["results"]] == [len(lines)] * 3
    accuracies = [result["accuracy"] for result in stored["results"]]
    row, = stored["means"]
    assert row["std_ddof_1"] == pytest.approx(np.sqrt(sum((a - np.mean(accuracies)) ** 2 for a in accuracies) / 2))
    assert row["error_ratio"] == pytest.approx((1 - min(accuracies)) / (1 - max(accuracies)))
    overlapping = [[b["set"], a["set"]] for a, b in itertools.combinations(stored["results"], 2)
                   if max(a["interval_95"][0], b["interval_95"][0]) <= min(a["interval_95"][1], b["interval_95"][1])]
    assert sorted(row["overlapping"]) == sorted(overlapping) != []
    assert f"deviation {row['std_ddof_1']:.4f} (ddof=1), largest / smallest error {row['error_ratio']:.2f}" in out
    assert "overlap, so their order may be due to chance" in out


def test_a_folder_of_images_is_one_set_whatever_else_it_holds(sets, tmp_path):
    names = [file.name for file in find_sets([sets / "bins", sets / "images"])]
    assert names == ["cfp_fp.bin.xz", "agedb_30.bin", "images"]
    (tmp_path / "pairs.txt").touch()
    (tmp_path / "weights.bin").touch()
    assert find_sets([tmp_path]) == [tmp_path]


def test_a_compressed_set_that_ends_early_is_refused(sets, tmp_path):
    data = (sets / "bins/cfp_fp.bin.xz").read_bytes()
    (tmp_path / "lfw.bin.xz").write_bytes(data[:len(data) // 2])
    with pytest.raises(InputError, match=r"lfw.bin.xz is damaged or not .*ends early"):
        list(load_sets([tmp_path / "lfw.bin.xz"]))


@pytest.mark.parametrize("options, message", [
    (("--lfw", "bins", "missing"), "missing does not exist"),
    (("--lfw", "images", "--group"), "--group compares two sets or more"),
    (("--lfw", "bins", "--save-threshold"), "--save-threshold takes a single set"),
    (("--lfw", "bins", "images", "--pairs", "list.txt", "list.txt"), "2 lists of pairs for 1 set of images")])
def test_mistakes_are_one_sentence_errors(sets, models, capsys, monkeypatch, options, message):
    monkeypatch.chdir(sets)
    status, _, err = run_lfw_eval(capsys, "--model", models[0], "--aligned", *options)
    assert status == 2 and re.search(rf"\S+: .*{message}", err) and "Traceback" not in err
