"""tsne.py: the choice of images, the layout and its score, and the picture."""
import json

import numpy as np

from faces.data.casia import list_casia
from faces.images import read_image
from faces.landmarks import read_landmarks, write_landmarks
from tools import tsne


def test_chosen_images_are_of_one_identity_per_row():
    labels = np.array([0] * 9 + [1] * 4 + [2] * 5 + [3] * 7)[np.random.default_rng(0).permutation(25)]
    rows = tsne.choose_images(labels, 2, 5, seed=1)
    assert rows.shape == (2, 5) and len(np.unique(rows)) == 10
    assert np.ptp(labels[rows], axis=1).tolist() == [0, 0] and 1 not in labels[rows]


def test_two_models_are_drawn_on_the_same_images(casia, model, tmp_path, call):
    output, table = tmp_path / "tsne.png", tmp_path / "points.json"
    status, out, _ = call(tsne, "--model", model, "--model", model, "--title", "before", "--title", 'after "x"',
                          "--faces", casia, "--identities", 2, "--per-identity", 3, "--device", "cpu", "--output",
                          output, "--points", table)
    lines, drawn = out.splitlines(), json.loads(table.read_text())
    assert status == 0 and lines[0].replace("before", 'after "x"') == lines[1]
    assert "2 identities, 3 images each" in lines[0] and -1 <= float(lines[0].split()[1]) <= 1
    assert read_image(output).shape[1] > 1.8 * len(read_image(output))
    (_, before), (title, after) = drawn["panels"]
    assert title.startswith('after "x": silhouette') and before == after and np.shape(after) == (6, 2)
    assert drawn["labels"] == [0, 0, 0, 1, 1, 1] and len(set(drawn["names"])) == 2


def test_lfw_and_casia_are_read(casia, tmp_path):
    listed = read_landmarks(casia / "casia_landmark.txt", labeled=True)
    write_landmarks(tmp_path / "lfw.txt", zip(listed.paths, listed.points))
    lfw, train = tsne.list_lfw(casia, tmp_path / "lfw.txt"), list_casia(casia)
    assert lfw.paths == train.paths and np.array_equal(lfw.labels, train.labels)
    assert np.array_equal(lfw.points, train.points)


def test_invalid_options_are_refused(casia, model, refusal):
    for options, message in ((("--per-identity", 9), "only 0 of 6 people have 9 images or more"),
                             (("--title", "a", "--title", "b"), "--title once per --model"),
                             (("--output", "tsne.gif"), "must end in .png")):
        assert message in refusal(tsne, "--model", model, "--faces", casia, "--device", "cpu", *options)
