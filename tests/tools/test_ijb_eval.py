"""ijb_eval.py on a small set in the layout of InsightFace's release, with every figure computed naively."""
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, draw_face, write_image
from sklearn.metrics import roc_curve

from cosFace.net import NETS
from faces.align import align
from faces.images import read_image
from faces.verification.embed import embed
from faces.verification.ijb import FARS, FPIRS, RANKS, form_templates, identify, read_ijb, verify_pairs
from faces.verification.weights import load_net
from tools import ijb_eval


def write_set(root, prefix, subjects=20):
    """Write a set: for each subject a template in one of two galleries, and one to three probes, in random order."""
    rng, meta, images = np.random.default_rng(4), root / "meta" / prefix, []
    ids = iter(rng.permutation(900).tolist())
    owner = {next(ids): (subject, i) for subject in range(subjects) for i in range(rng.integers(2, 5))}
    for template, (subject, _) in owner.items():
        media = rng.choice(999, 3, replace=False)[:rng.integers(1, 4)]
        images += [(template, subject, rng.choice(media)) for _ in range(rng.integers(1, 6))]
    images = [images[i] for i in rng.permutation(len(images))]    # a template's images need not be neighbors
    members, landmarks, rows = "", "", {template: "" for template in owner}
    for i, (template, subject, medium) in enumerate(images, 1):
        image, points = draw_face(subject, i)
        write_image(root / f"loose_crop/{i}.jpg", image)
        members += f"{i}.jpg {template} {medium}\n"
        landmarks += f"{i}.jpg {' '.join(f'{v:.3f}' for v in points.ravel())} {rng.uniform(0.1, 1):.3f}\n"
        rows[template] += f"{template},{subject + 7000},img/{i}.png,{i},1,2,30,40\n"
    probes = [template for template in rng.permutation(list(owner)).tolist() if owner[template][1]]
    galleries = [[t for t, (subject, i) in owner.items() if i == 0 and subject % 2 == k] for k in (0, 1)]
    pairs = [(a, b, int(owner[a][0] == owner[b][0])) for a, b in itertools.product(sum(galleries, []), probes)]
    meta.parent.mkdir()
    letter = "G" if prefix == "ijbc" else "S"
    for name, text in (("face_tid_mid.txt", members), ("name_5pts_score.txt", landmarks),
                       ("template_pair_label.txt", "".join(f"{a} {b} {same}\n" for a, b, same in pairs))):
        meta.with_name(f"{prefix}_{name}").write_text(text)
    for name, templates in ((f"gallery_{letter}1", galleries[0]), (f"gallery_{letter}2", galleries[1]),
                            ("probe_mixed", probes)):
        text = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT\n"
        meta.with_name(f"{prefix}_1N_{name}.csv").write_text(text + "".join(rows[t] for t in templates))
    return root


@pytest.fixture(scope="module")
def ijbc(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("IJBC"), "ijbc")


def naive(root, prefix, embeddings, unit, detector):
    """Compute all figures of results.json, without thresholds, one image, pair and probe at a time."""
    def read(name):
        return [line.split() for line in (root / "meta" / f"{prefix}_{name}").read_text().splitlines()]

    def people(name):
        return {template: subject for row, in read(f"1N_{name}.csv")[1:] for template, subject, *_ in [row.split(",")]}

    letter, media = "G" if prefix == "ijbc" else "S", {}
    for (_, template, medium), row, e in zip(read("face_tid_mid.txt"), read("name_5pts_score.txt"), embeddings):
        e = e.astype(float) / (np.linalg.norm(e.astype(float)) if unit else 1) * (float(row[-1]) if detector else 1)
        media.setdefault(template, {}).setdefault(medium, []).append(e)
    sums = {template: sum(np.mean(es, axis=0) for es in of.values()) for template, of in media.items()}
    unit_sums = {template: total / np.linalg.norm(total) for template, total in sums.items()}
    scores, same = zip(*[(float(unit_sums[a] @ unit_sums[b]), label == "1")
                         for a, b, label in read("template_pair_label.txt")])
    impostors, genuine = ([s for s, g in zip(scores, same) if g == kind] for kind in (False, True))
    (fpr, tpr, _), tar = roc_curve(same, scores), []
    for rate in FARS:
        threshold = min(t for t in [-2, *impostors] if sum(s > t for s in impostors) <= rate * len(impostors))
        nearest = min(zip(abs(fpr - rate), -tpr))    # as InsightFace: the highest TAR at the nearest FAR
        tar += [np.mean([s > threshold for s in genuine]), -nearest[1]]

    def found(gallery):
        result = []    # (similarity to the mate or None, its rank or 0, similarities to others) of each probe
        for probe, subject in people("probe_mixed").items():
            by = {owner: float(unit_sums[probe] @ unit_sums[template]) for template, owner in gallery.items()}
            mate = by.pop(subject, None)
            result.append((mate, mate is not None and 1 + sum(s >= mate for s in by.values()), list(by.values())))
        return result

    galleries = people(f"gallery_{letter}1"), people(f"gallery_{letter}2")
    merged, separate = found(galleries[0] | galleries[1]), [found(gallery) for gallery in galleries]
    others = sorted(sum((others for _, _, others in merged), []), reverse=True)
    insightface = [np.mean([rank <= k for _, rank, _ in merged]) for k in RANKS] + [
        np.mean([mate > others[math.ceil(len(merged) * rate) - 1] for mate, _, _ in merged]) for rate in FPIRS]
    nist = []
    for result in separate:
        mated, tops = [r for r in result if r[1]], [max(others) for _, rank, others in result if not rank]
        nist.append([np.mean([rank <= k for _, rank, _ in mated]) for k in RANKS])
        for rate in FPIRS:
            threshold = min(t for t in tops if sum(top > t for top in tops) <= rate * len(tops))
            nist[-1].append(np.mean([rank == 1 and mate > threshold for mate, rank, _ in mated]))
    return tar, insightface, np.mean(nist, axis=0)


def check(figures, expected):
    assert [point[key] for point in figures["1:1"]["tar"] for key in ("tar", "nearest")] == pytest.approx(expected[0])
    for name, values in zip(("InsightFace", "NIST"), expected[1:]):
        found = figures["1:N"][name]
        assert [*found["rank"].values(), *found["tpir"].values()] == pytest.approx(values), name


def test_the_command_as_typed(model, tmp_path):
    root = write_set(tmp_path / "IJBC", "ijbc", subjects=4)
    command = [sys.executable, "tools/ijb_eval.py", "--model", model, "--ijb", root, "--output", tmp_path / "out"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures, (rows,) = json.loads((tmp_path / "out/results.json").read_text()), (tmp_path / "out").glob("*.rows")
    found, _ = read_ijb(root)
    embeddings = np.fromfile(rows, np.float32).reshape(len(found.images), -1)
    check(figures, naive(root, "ijbc", embeddings, unit=False, detector=True))
    net, _ = load_net(model, NETS)
    crops = [align(read_image(root / "loose_crop" / found.images[i]), found.points[i]) for i in range(8)]
    np.testing.assert_allclose(embeddings[:8], embed(net, np.stack(crops), "cpu", flip="sum"), atol=1e-4)
    assert f"not the complete IJB-C: {len(embeddings)} of 469,375 images" in done.stderr
    tpir = [figures["1:N"][name]["tpir"]["0.1"] for name in ("InsightFace", "NIST")]
    for line in (f"TAR@FAR=1e-2        {figures['1:1']['tar'][4]['tar']:.4f} at", "norms keep, detector score True",
                 f"TPIR@FPIR=0.1       {tpir[0]:<13.4f}{tpir[1]:.4f}"):
        assert line in done.stdout


@pytest.mark.parametrize("unit, detector", [(False, False), (False, True), (True, False), (True, True)])
def test_every_figure_is_the_naive_one(ijbc, unit, detector):
    found, _ = read_ijb(ijbc)
    rng = np.random.default_rng(unit + 2 * detector)
    subjects = {t: s for people in (found.probes, *found.galleries) for t, s in zip(*people)}
    centers = {subject: rng.normal(size=16) for subject in subjects.values()}
    embeddings = np.stack([(centers[subjects[t]] + 1.4 * rng.normal(size=16)) * rng.uniform(0.1, 9)
                           for t in found.templates]).astype(np.float32)
    templates = form_templates(embeddings, found, unit, detector)
    expected = naive(ijbc, "ijbc", embeddings, unit, detector)
    check({"1:1": verify_pairs(templates, found.pairs, found.same),
           "1:N": identify(templates, found.probes, found.galleries)}, expected)
    assert len({*expected[0]}) > 2 and all(len({*figures}) > 3 for figures in expected[1:])


def quick_embed(net, faces, *_, **__):
    return faces.reshape(len(faces), -1)[:, :512 * 63:63].astype(np.float32) - 100 + net / 1000


@pytest.fixture
def run(model, call, monkeypatch):
    """Return a function that runs ijb_eval.py with pixels for embeddings, 32 images at a time; see call()."""
    monkeypatch.setattr(ijb_eval, "PART", 32)
    monkeypatch.setattr(ijb_eval, "embed", quick_embed)
    monkeypatch.setattr(ijb_eval, "optimized_copy", lambda *args: args[-1])    # its rounding depends on `images`
    return lambda *options, run=call: run(ijb_eval, "--model", model, "--device", "cpu", *options)


def test_a_killed_run_continues_and_other_templates_embed_nothing(run, tmp_path, monkeypatch):
    root, calls = write_set(tmp_path / "IJBB", "ijbb"), []

    def stop_in_the_third_part(net, faces, *args, **options):
        calls.append(len(faces))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quick_embed(net, faces)
    assert run("--ijb", root, "--output", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(ijb_eval, "embed", stop_in_the_third_part)
    assert run("--ijb", root, "--output", tmp_path / "out")[0] == 130
    rows, = (tmp_path / "out").glob(".ijbb.*.rows")
    with open(rows, "ab") as file:    # as if it had been killed while it wrote
        file.write(bytes(5000))
    status, out, _ = run("--ijb", root, "--output", tmp_path / "out")
    assert status == 0 and "IJB-B" in out and len(calls) == 1 + -(-(sum(calls) - 32) // 32)
    assert (tmp_path / "whole" / rows.name).read_bytes() == rows.read_bytes()
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out"))
    assert one["1:1"] == two["1:1"] and one["1:N"] == two["1:N"]
    embeddings, embedded = np.fromfile(rows, np.float32).reshape(-1, 512), len(calls)
    assert run("--ijb", root, "--output", tmp_path / "out", "--image-norms", "unit", "--no-detector-score")[0] == 0
    figures = json.loads((tmp_path / "out/results.json").read_text())
    check(figures, naive(root, "ijbb", embeddings, unit=True, detector=False))
    assert len(calls) == embedded and figures["1:1"] != one["1:1"]
    write_image(root / "loose_crop/1.jpg", draw_face(0, 0)[0])
    assert run("--ijb", root, "--output", tmp_path / "out")[0] == 0 and len(calls) == 2 * embedded - 1


def test_a_protocol_whose_lists_are_missing_is_left_out(run, refusal, tmp_path):
    root = write_set(tmp_path / "IJBC", "ijbc")
    assert run("--ijb", root, "--output", tmp_path / "out", "--protocol", "1:N")[0] == 0
    (root / "meta/ijbc_1N_gallery_G2.csv").unlink()
    status, out, err = run("--ijb", root, "--output", tmp_path / "out")
    assert status == 0 and "1:N is left out, because there is no" in err and "TPIR" not in out and "AUC" in out
    only = run("--ijb", root, "--output", tmp_path / "out", "--protocol", "1:N", run=refusal)
    assert "1:N is left out, because there is no" in only
    for name, damage, message in (("3.jpg", lambda file: file.write_bytes(b"no image"), "3.jpg: not an image"),
                                  ("2.jpg", Path.unlink, "2.jpg: no such file")):
        damage(root / "loose_crop" / name)
        assert re.search(f"{message}.*must be complete", run("--ijb", root, "--output", tmp_path / "out", run=refusal))


@pytest.mark.parametrize("name, old, new, message", [
    ("face_tid_mid.txt", "\n5.jpg ", "\n5.jpg x", "not a list of images"),
    ("face_tid_mid.txt", "\n5.jpg ", "\n55.jpg ", "do not list the same images"),
    ("template_pair_label.txt", " 1\n", " 2\n", "two templates and 0 or 1"),
    ("template_pair_label.txt", "\n", "\n901 902 0\n", "template 901 has no images"),
    ("1N_probe_mixed.csv", "SUBJECT", "PERSON", "do not start with TEMPLATE_ID,SUBJECT_ID"),
    ("1N_gallery_G1.csv", ",7002,", ",7001,", "two templates of one subject")])
def test_malformed_lists_are_one_sentence(ijbc, run, refusal, tmp_path, name, old, new, message):
    (tmp_path / "meta").mkdir()
    for file in (ijbc / "meta").iterdir():
        text = file.read_text()
        (tmp_path / "meta" / file.name).write_text(text.replace(old, new) if file.name.endswith(name) else text)
    assert message in run("--ijb", tmp_path, "--output", tmp_path / "out", run=refusal)
