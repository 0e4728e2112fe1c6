"""lfw_eval.py on a small set: its protocols, options and outputs; view 1 of LFW; contact sheets; several models."""
import json
import re
import shutil

import numpy as np
import pytest
from conftest import draw_face, run_lfw_eval, script, write_image, write_model, write_people

from faces.files import InputError
from faces.images import read_image
from faces.verification.metrics import best_threshold
from faces.verification.pairs import Pairs, read_pairs
from faces.verification.report import error_sheet, folder_names
from faces.verification.weights import model_titles

PEOPLE, PHOTOS = 6, 3
GENUINE = [f"P{p}\t{i}\t{j}" for p in range(PEOPLE) for i, j in ((1, 2), (1, 3))]
IMPOSTOR = [f"P{p}\t1\tP{(p + d) % PEOPLE}\t{d}" for p in range(PEOPLE) for d in (1, 2)]
LFWACC = re.compile(r"LFWACC=(\d\.\d{4}) std=(\d\.\d{4}) thd=(-?\d\.\d{4})")


@pytest.fixture(scope="module")
def lfw(tmp_path_factory):
    """Return a folder of aligned faces, three each of six people, with the pairs files of both views."""
    root = tmp_path_factory.mktemp("lfw")
    write_people(root, range(PEOPLE), PHOTOS, size=112)
    lines = [line for k in range(3) for line in GENUINE[4 * k:4 * k + 4] + IMPOSTOR[4 * k:4 * k + 4]]
    (root / "pairs.txt").write_text("\n".join(["3\t4", *lines]))
    (root / "pairsDevTrain.txt").write_text("\n".join(["8", *GENUINE[:8], *IMPOSTOR[:8]]))
    (root / "pairsDevTest.txt").write_text("\n".join(["4", *GENUINE[8:], *IMPOSTOR[8:]]))
    return root


def scores_of(folder):
    """Return the names, float (P, 3) same, fold and similarity, and the header of scores.tsv."""
    header, *rows = [line.split("\t") for line in (folder / "scores.tsv").read_text().splitlines()]
    assert header == ["left", "right", "same", "fold", "similarity"]
    return np.array([row[2:] for row in rows], float).T


def test_view_1_is_selected_with_the_option_or_by_file_name(lfw):
    assert read_pairs(lfw).folds.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for pairs in (read_pairs(lfw, view=1), read_pairs(lfw, lfw / "pairsDevTest.txt"),
                  read_pairs(lfw, lfw / "pairsDevTrain.txt")):
        assert pairs.folds.tolist() == [-1] * 16 + [0] * 8
        assert pairs.same.tolist() == [True] * 8 + [False] * 8 + [True] * 4 + [False] * 4
        assert [pairs.paths[i] for i in pairs.judged().pairs[0]] == ["P4/P4_0001.png", "P4/P4_0002.png"]
        assert [len(field) for field in pairs.judged()[1:4]] == [8, 8, 8]


def test_view_1_is_the_default_without_pairs_txt_and_its_errors_are_one_sentence(lfw, tmp_path):
    shutil.copytree(lfw, tmp_path, dirs_exist_ok=True)
    (tmp_path / "pairs.txt").unlink()
    assert read_pairs(tmp_path).folds[0] == -1
    with pytest.raises(InputError, match="no pairs.txt"):
        read_pairs(tmp_path, view=2)
    for text, message in (("", "it is empty"), ("4\nP0\t1\t2", "declares 1 x 8 = 8 pairs but contains 1"),
                          ("1\nP0\t1\tP1\t1\nP1\t1\tP2\t1", "0 genuine pairs and 2 impostor pairs")):
        (tmp_path / "pairsDevTest.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_pairs(tmp_path)
    (tmp_path / "pairsDevTest.txt").unlink()
    with pytest.raises(InputError, match="no pairsDevTest.txt"):
        read_pairs(tmp_path)


# matplotlib warns about characters that become boxes; old versions of it use what other packages have deprecated
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_contact_sheets_take_names_in_any_script(tmp_path):
    names = ["王伟/王伟_0001.jpg", "Jos\udce9/Jos\udce9_0001.jpg", "محمد/محمد_0001.jpg", f"P/{'long $x' * 9}.jpg"] * 15
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (60, 112, 96, 3), dtype=np.uint8)
    for file, count in (("large.png", 40), ("small.png", 2)):
        pairs = Pairs(names, rng.integers(0, 60, (count, 2)), np.arange(count) % 2 == 0, np.zeros(count), np.arange(60),
                      None)
        error_sheet(tmp_path / file, faces, pairs, rng.random(count), rng.random(count) < 0.5)
    large, small = read_image(tmp_path / "large.png"), read_image(tmp_path / "small.png")
    assert large.shape[1] == small.shape[1] and large.shape[0] > small.shape[0] and large.std() > 20


@pytest.mark.parametrize("folder, options", [("cosFace", ("--no-subtract-mean",)),
                                             ("sphereFace", ("--subtract-mean", "--flip", "none"))])
def test_the_command_works_in_its_own_folder(lfw, models, tmp_path, folder, options):
    process = script(f"{folder}/lfw_eval.py", "--model", models[0], "--net", "faceNet", "--lfw", lfw, "--device", "cpu",
                     "--aligned", "--output", tmp_path, *options)
    assert process.returncode == 0, process.stderr
    accuracy, std, threshold = map(float, LFWACC.match(process.stdout).groups())
    results = json.loads((tmp_path / "results.json").read_text())
    assert [round(results[name], 4) for name in ("accuracy", "std", "threshold")] == [accuracy, std, threshold]
    assert results["method"] == "CosFace"  # comes from the checkpoint, whichever of the two commands reads it
    assert results["settings"]["flip"] == ("none" if "none" in options else "concatenate")
    assert results["settings"]["subtract_mean"] == ("--subtract-mean" in options)
    assert results["counts"] == {"pairs": 24, "genuine": 12, "images": 18}
    same, fold, similarity = scores_of(tmp_path)
    # With --subtract-mean, thresholds are chosen on similarities that are not in scores.tsv.
    if "--subtract-mean" not in options:
        thresholds = [best_threshold(similarity[fold != k], same[fold != k]) for k in range(3)]
        assert results["accuracy"] == np.mean((similarity > np.take(thresholds, fold.astype(int))) == same)
    for row in ("AUC", "EER", "TAR@FAR=1e-3", "24 (12 genuine, 12 impostor)"):
        assert row in process.stdout


def test_two_models_with_every_protocol(lfw, models, tmp_path, capsys):
    status, out, err = run_lfw_eval(capsys, "--model", models[0], "--model", models[1], "--title", "a/b", "--title",
                                    "a/b", "--lfw", lfw, "--aligned", "--flip", "none", "--protocol", "folds", "tar",
                                    "identification", "--far", 1e-3, 0.25, "--resamples", 200, "--output", tmp_path)
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())
    for i, result in enumerate(results["results"]):
        folder = tmp_path / f"{i + 1}-a-b"    # equal titles get a number
        assert json.loads((folder / "results.json").read_text()) == result
        assert result["settings"]["model"] == str(models[i]) and f"LFWACC={result['accuracy']:.4f} std=" in out
        low, high = result["interval_95"]
        assert low <= result["accuracy"] <= high and f"95 % interval       {low:.4f} to {high:.4f} (200" in out
        assert [(point["far"], point["resolved"]) for point in result["tar"]] == [(1e-3, False), (0.25, True)]
        identification = result["identification"]
        assert identification["gallery"] == PEOPLE
        assert identification["rank_1"] == pytest.approx(identification["cmc"][0], abs=1e-6)
        for picture in ("roc.png", "cmc.png", "histogram.png", "errors.png"):
            assert read_image(folder / picture).std() > 5
    assert out.count("too few to resolve this rate, which needs 1,000") == 2
    assert len(re.findall(r"^(TAR@FAR=1e-3|TAR@FAR=2.5e-1|rank 1 |rank 5 |gallery) ", out, re.M)) == 10
    comparison, = results["comparison"]
    first, second = (result["accuracy"] for result in results["results"])
    assert comparison["difference"] == pytest.approx(second - first)
    assert f"2: a/b minus 1: a/b, {lfw.name}: accuracy {comparison['difference']:+.4f}, 95 % interval " in out
    low, high = comparison["interval_95"]
    assert low <= comparison["difference"] <= high
    assert (tmp_path / "roc.png").exists() and (tmp_path / "cmc.png").exists()


def test_titles_name_the_folders_of_several_models(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "two/checkpoint.pt").touch()
    assert model_titles([tmp_path / "one/checkpoint.pt", tmp_path / "two", "b.pth"]) == ["one", "two", "b"]
    assert folder_names(["../a b", "../a b", "?"]) == ["a-b", "a-b-2", "model-3"]
    assert len(set(folder_names(["a", "a-3", "A"]))) == 3


def test_identification_takes_all_images_of_people_with_two_or_more(lfw, models, tmp_path, capsys):
    shutil.copytree(lfw, tmp_path / "lfw")
    for name in ("P1/P1_0009.png", "New/a.png", "New/b.png", "Once/a.png", "a.png"):    # in no pair
        write_image(tmp_path / "lfw" / name, draw_face(9, 9, 112)[0])
    status, out, _ = run_lfw_eval(capsys, "--model", models[0], "--lfw", tmp_path / "lfw", "--aligned",
                                  "--protocol", "identification", "--flip", "none")
    assert status == 0 and f"images              {PEOPLE * PHOTOS + 3}," in out and "LFWACC" not in out
    assert re.search("rank 1 .*rank 5 .*gallery +7 people, one image each; 14 probes", out, re.S)


def test_a_single_protocol_on_view_1(lfw, models, capsys):
    status, out, _ = run_lfw_eval(capsys, "--model", models[0], "--lfw", lfw, "--aligned", "--view", 1,
                                  "--protocol", "tar", "--flip", "sum", "--precision", "bf16")
    assert status == 0 and "LFWACC" not in out and "TAR@FAR=1e-2" in out and "8 (4 genuine, 4 impostor)" in out


@pytest.mark.parametrize("options, message", [
    (("--title", "a", "--title", "b"), "--title was given 2 times for 1 model"),
    (("--far", "0", "--protocol", "tar"), "must be greater than 0"),
    (("--protocol", "roc"), "invalid choice"), (("--view", "1", "--pairs", "pairs.txt"), "does not belong to view 1"),
    (("--net", "sphere20a"), "pass --net faceNet"), (("--device", "cuda:99"), "--device cuda:99"),
    (("--output", __file__), "can't write"), (("--model", "missing.pt"), "missing.pt: No such file"),
    (("--model", __file__), "is damaged or not a file of tensors"), (("--model", "nan.pt"), "are not finite"),
    (("--save-threshold", "--flip", "none"), "leave out --flip")])
def test_mistakes_are_one_sentence_errors(lfw, model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    if "nan.pt" in options:
        write_model(tmp_path / "nan.pt", nan=True)
    args = options if "--model" in options else ("--model", model, *options)
    status, _, err = run_lfw_eval(capsys, "--lfw", lfw, "--aligned", *args)
    assert status == 2 and re.search(rf"\S+: .*{message}", err) and "Traceback" not in err
