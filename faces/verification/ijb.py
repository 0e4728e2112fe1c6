"""IJB-B and IJB-C in the layout of InsightFace's release: read the lists, form templates, verify 1:1, identify 1:N."""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import InputError, existing_folder, reading
from faces.verification.metrics import auc, operating_point

PROTOCOLS, RANKS, FPIRS, FARS = ("1:1", "1:N"), (1, 5, 10), (1e-2, 1e-1), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ADVICE = "unpack the release again"
CHUNK = 500    # templates that are compared with all others at a time
KINDS = "images", "templates", "pairs", "genuine pairs", "gallery templates", "probe templates"
COMPLETE = {"ijbb": (227_630, 12_115, 8_010_270, 10_270, 1_845, 10_270),    # numbers of each of KINDS
            "ijbc": (469_375, 23_124, 15_658_489, 19_557, 3_531, 19_593)}


class People(NamedTuple):
    """A gallery, or all probes."""
    templates: np.ndarray    # int32 (K,)
    subjects: np.ndarray     # int64 (K,)


class Ijb(NamedTuple):
    """The lists of a set. A template is a person's images from one or more media, photos and videos; the T templates
    are numbered from 0 in the order of their ids."""
    prefix: str                # of the lists' names, "ijbb" or "ijbc"
    folder: Path               # of the images
    images: list[str]          # N names
    points: np.ndarray         # float64 (N, 5, 2), landmarks in pixels
    scores: np.ndarray         # float64 (N,), of the face detector
    templates: np.ndarray      # int64 (N,)
    media: np.ndarray          # int64 (N,)
    pairs: np.ndarray          # int32 (P, 2), templates; P = 0 without 1:1
    same: np.ndarray           # bool (P,), true for a genuine pair
    galleries: list[People]    # two, without a common subject; none without 1:N
    probes: People

    def counts(self) -> tuple[int, ...]:
        """Return the number of each of KINDS, 0 for what was not read."""
        return (len(self.images), int(self.templates.max()) + 1, len(self.pairs), int(self.same.sum()),
                sum(len(gallery.subjects) for gallery in self.galleries), len(self.probes.subjects))


def read_ijb(root, protocols=PROTOCOLS) -> tuple[Ijb, list[str]]:
    """Return the set in the folder `root`, as far as `protocols` need it, and a sentence on each that is left out.

    Raises InputError if no protocol is left, a list is malformed, or lists contradict each other.
    """
    meta = existing_folder(root, "loose_crop and meta") / "meta"
    prefix = next((prefix for prefix in COMPLETE if (meta / f"{prefix}_name_5pts_score.txt").is_file()), None)
    if prefix is None:
        raise InputError(f"{meta} has neither ijbb_name_5pts_score.txt nor ijbc_name_5pts_score.txt; pass the folder "
                         "IJBB or IJBC of InsightFace's release.")
    gallery = f"1N_gallery_{'S' if prefix == 'ijbb' else 'G'}"
    landmarks, members, *files = (meta / f"{prefix}_{name}" for name in (
        "name_5pts_score.txt", "face_tid_mid.txt", "template_pair_label.txt", f"{gallery}1.csv", f"{gallery}2.csv",
        "1N_probe_mixed.csv"))
    missing = {"1:1" if file == files[0] else "1:N": file for file in files if not file.is_file()}
    wanted = [name for name in protocols if name not in missing]
    notes = [f"{name} is left out, because there is no {missing[name]}" for name in protocols if name in missing]
    if not wanted:
        raise InputError(f"{'; '.join(notes)}; {ADVICE}.")
    (images, values), (same_images, ids) = _read_images(landmarks, float, 11), _read_images(members, int, 2)
    if images != same_images:
        raise InputError(f"{landmarks} and {members} do not list the same images in the same order; {ADVICE}.")
    known, templates = np.unique(ids[:, 0], return_inverse=True)
    none = np.empty(0, np.int64)
    pairs, same, galleries, probes = np.empty((0, 2), np.int32), none > 0, [], People(none, none)
    if "1:1" in wanted:
        pairs, same = _read_pairs(files[0], known)
    if "1:N" in wanted:
        *galleries, probes = [_read_people(file, known) for file in files[1:]]
        subjects = np.concatenate([gallery.subjects for gallery in galleries])
        if len(np.unique(subjects)) < len(subjects):
            raise InputError(f"the galleries in {meta} have two templates of one subject; {ADVICE}.")
        if not all(0 < np.isin(probes.subjects, gallery.subjects).mean() < 1 for gallery in galleries):
            raise InputError(f"a gallery in {meta} has no probes, or only its own; {ADVICE}, or pass --protocol 1:1.")
    return Ijb(prefix, meta.parent / "loose_crop", images, values[:, :10].reshape(-1, 5, 2), values[:, 10], templates,
               ids[:, 1], pairs, same, galleries, probes), notes


def _read_images(file, kind, count):
    """Return the N names in a list, and the `count` numbers behind each, (N, count)."""
    with reading(file, "list of images", ADVICE):
        rows = np.loadtxt(file, [("name", "U64"), ("numbers", kind, count)], comments=None, encoding="utf-8", ndmin=1)
        if not len(rows) or not np.isfinite(rows["numbers"]).all():
            raise ValueError("it is empty, or a number is not finite")
        return rows["name"].tolist(), rows["numbers"].copy()


def _read_pairs(file, known):
    """Return the pairs in a list, int32 (P, 2), and which are genuine, bool (P,)."""
    with reading(file, "list of template pairs", ADVICE):
        rows = np.loadtxt(file, np.int32, comments=None, ndmin=2)    # 15 million in seconds
        if rows.shape[1] != 3 or np.unique(rows[:, 2]).tolist() != [0, 1]:
            raise ValueError("a row must be two templates and 0 or 1, and both must occur")
        return _number(rows[:, :2], known), rows[:, 2] == 1


def _read_people(file, known):
    """Return the People in a list that has a row for each of their images."""
    with reading(file, "list of templates and subjects", ADVICE), open(file, encoding="utf-8-sig") as lines:
        if not lines.readline().startswith("TEMPLATE_ID,SUBJECT_ID,"):
            raise ValueError("its columns do not start with TEMPLATE_ID,SUBJECT_ID")
        ids = np.unique(np.loadtxt(lines, np.int64, None, ",", usecols=(0, 1), ndmin=2), axis=0)
        if len(np.unique(ids[:, 0])) < len(ids):
            raise ValueError("a template has two subjects")
        return People(_number(ids[:, 0], known), ids[:, 1])


def _number(ids, known):
    """Return the templates with these ids as numbers, int32; ValueError if one has no images."""
    numbers = np.searchsorted(known, ids).astype(np.int32).clip(max=len(known) - 1)
    if (unknown := ids[known[numbers] != ids]).size:
        raise ValueError(f"template {unknown[0]} has no images")
    return numbers


def form_templates(embeddings: np.ndarray, ijb: Ijb, unit: bool = False, detector: bool = True) -> np.ndarray:
    """Return the templates, float64 (T, D), of unit length: each is the sum over its media of their mean embeddings.

    Args:
        embeddings: float (N, D), not normalized; may be a memory map, of which little is in memory at a time.
        unit: scale each embedding to unit length first.
        detector: weight each embedding with the score of the face detector.
    """
    media = np.unique(ijb.media, return_inverse=True)[1]
    _, medium, sizes = np.unique(ijb.templates * (media.max() + 1) + media, return_inverse=True, return_counts=True)
    weights = (ijb.scores if detector else 1) / sizes[medium]
    order = np.argsort(ijb.templates, kind="stable")
    starts = np.append(np.flatnonzero(np.diff(ijb.templates[order], prepend=-1)), len(order))
    parts = []
    for some in np.array_split(np.arange(len(starts) - 1), len(starts) // 256 + 1):
        rows = order[starts[some[0]]:starts[some[-1] + 1]]
        part = embeddings[rows].astype(np.float64)
        with np.errstate(all="ignore"):    # what is not finite is found below
            weight = weights[rows] / (np.linalg.norm(part, axis=1) if unit else 1)
            total = np.add.reduceat(part * weight[:, None], starts[some] - starts[some[0]])
            parts.append(total / np.linalg.norm(total, axis=1, keepdims=True))
    if bad := int((~np.isfinite(templates := np.concatenate(parts)).all(1)).sum()):
        raise InputError(f"{bad:,} templates are zero or not finite; pass another --model.")
    return templates


def verify_pairs(templates: np.ndarray, pairs: np.ndarray, same: np.ndarray) -> dict:
    """Verify P pairs, int (P, 2), of templates, float64 (T, D) of unit length; `same`, bool (P,), has both kinds.

    Returns "auc"; and "tar", a list with the OperatingPoint at each of FARS, as a dict, and in it "nearest": the TAR
    that InsightFace prints, of the point of scikit-learn's ROC curve whose FAR is nearest, whether lower or higher.
    """
    scores, order = np.empty(len(pairs)), np.argsort(pairs[:, 0], kind="stable")
    edges = np.searchsorted(pairs[order, 0], np.arange(0, len(templates) + CHUNK, CHUNK))
    for first, *edge in zip(range(0, len(templates), CHUNK), edges, edges[1:]):    # faster than pair by pair
        if len(rows := order[slice(*edge)]):
            left, right = pairs[rows].T
            scores[rows] = (templates[first:first + CHUNK] @ templates.T)[left - first, right]
    from sklearn.metrics import roc_curve  # slow to import
    far, tar, _ = roc_curve(same, scores)
    fars, tars = far[::-1], tar[::-1]    # the highest TAR comes first
    return {"auc": auc(far, tar), "tar": [
        operating_point(scores, same, rate)._asdict() | {"nearest": float(tars[np.argmin(abs(fars - rate))])}
        for rate in FARS]}


def search(templates: np.ndarray, probes: People, gallery: People, count: int) -> tuple[np.ndarray, ...]:
    """Compare Q probes with a gallery; `templates`: float64 (T, D), of unit length.

    Returns bool (Q,), which probes have a mate, a template of their subject; the mates' similarities, float64 (Q,), and
    ranks, int (Q,), in which ties count against them; the highest similarity of each probe to another subject, float64
    (Q,), and the `count` highest of all probes to other subjects, float64 (count,), descending.
    """
    order = np.argsort(gallery.subjects)
    column = order[np.searchsorted(gallery.subjects[order], probes.subjects).clip(max=len(order) - 1)]
    mated = gallery.subjects[column] == probes.subjects
    enrolled, found, top = templates[gallery.templates].T, [], np.empty(0)
    for rows in np.array_split(np.arange(len(mated)), 1 + len(mated) // CHUNK):
        scores, own = templates[probes.templates[rows]] @ enrolled, (np.arange(len(rows)), column[rows])
        mate = scores[own]
        rank = (scores >= mate[:, None]).sum(1)
        scores[own] = np.where(mated[rows], -np.inf, mate)
        found.append((mate, rank, scores.max(1)))
        top = np.append(top, scores)
        top = np.partition(top, -count)[-count:] if len(top) > count else top
    return mated, *map(np.concatenate, zip(*found)), np.sort(top)[::-1]


def identify(templates: np.ndarray, probes: People, galleries: list[People]) -> dict:
    """Identify Q probes in two galleries in two ways; `templates`: float64 (T, D), of unit length.

    InsightFace's ijb_1n.py, and OpenSphere, merge the galleries, so that all probes of a complete set have a mate. The
    threshold at an FPIR is the score number ceil(Q FPIR) among those of all probes with other subjects, and a mate
    above it counts at any rank. In NIST's FRVT 1:N (NISTIR 8271, ISO/IEC 19795-1), the threshold is the lowest at which
    at most that share of the probes without a mate find anybody, and a mate must have rank 1, too.

    Returns dicts "InsightFace" and "NIST" of "rank", the share of probes with a mate that find it within each of RANKS;
    "tpir" and "threshold" at each of FPIRS. NIST's are means; the figures of each gallery are in "galleries".
    """
    allowed, results = [math.ceil(len(probes.subjects) * rate) for rate in FPIRS], []
    for gallery in (both := People(*map(np.concatenate, zip(*galleries))), *galleries):
        mated, mate, rank, best, top = search(templates, probes, gallery, max(allowed))
        if gallery is both:
            thresholds = [float(top[number - 1]) for number in allowed]
            tpirs = [float((mate[mated] > threshold).mean()) for threshold in thresholds]
        else:
            scores = np.where(mated, np.where(rank == 1, mate, -np.inf), best)
            tpirs, thresholds = zip(*[operating_point(scores, mated, rate)[1:3] for rate in FPIRS])
        results.append({"rank": {k: float((rank[mated] <= k).mean()) for k in RANKS}, "tpir": dict(zip(FPIRS, tpirs)),
                        "threshold": dict(zip(FPIRS, thresholds))})
    merged, *separate = results
    means = {part: {key: float(np.mean([result[part][key] for result in separate])) for key in merged[part]}
             for part in ("rank", "tpir")}
    return {"InsightFace": merged, "NIST": {**means, "galleries": separate}}
