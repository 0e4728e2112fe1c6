"""RecordIO: sets written here according to the format are read, and damaged files are one-sentence errors."""
import os
import struct

import cv2
import numpy as np
import pytest
from conftest import draw_face, write_image

from faces.align import align
from faces.data.cache import load_casia
from faces.data.recordio import Records
from faces.files import InputError

MAGIC = struct.pack("<I", 0xCED7230A)
PEOPLE, PHOTOS = 3, 4


def frame(data):
    """Return the record of some data, split wherever the magic number is at a multiple of 4, as dmlc's writer does."""
    parts = [b""]
    for word in (data[i:i + 4] for i in range(0, len(data), 4)):
        if word == MAGIC:
            parts.append(b"")
        else:
            parts[-1] += word
    kinds = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(MAGIC + struct.pack("<I", kind << 29 | len(part)) + part + b"\0" * (-len(part) % 4)
                    for kind, part in zip(kinds, parts))


def pack(label, image=b"", key=0):
    """Return the data of a record; `label` is one number or a tuple of several."""
    if isinstance(label, tuple):
        return struct.pack(f"<IfQQ{len(label)}f", len(label), 0, key, 0, *label) + image
    return struct.pack("<IfQQ", 0, label, key, 0) + image


def write_set(root, records, name="train"):
    """Write (key, data) pairs as train.rec and train.idx; return {key: offset}."""
    root.mkdir(exist_ok=True)
    content, offsets = b"", {}
    for key, data in records:
        offsets[key] = len(content)
        content += frame(data)
    (root / f"{name}.rec").write_bytes(content)
    (root / f"{name}.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in offsets.items()))
    return offsets


def insightface(images):
    """Return (key, data) pairs of (label, image bytes) as InsightFace has them: contents, images, identities."""
    first = 1 + len(images)
    identities = [(first + person, pack((1.0, 2.0))) for person in range(PEOPLE)]
    return [(0, pack((float(first), float(first + PEOPLE)))),
            *((key, pack((float(label), 0.0) if key % 2 else float(label), image, key))
              for key, (label, image) in enumerate(images, 1)), *identities]


def face(person, photo):
    return np.pad(align(*draw_face(person, photo)), ((0, 0), (8, 8), (0, 0)))       # 112x112


@pytest.fixture(scope="module")
def images():
    return [(person, cv2.imencode(".png", face(person, photo)[..., ::-1])[1].tobytes())
            for person in range(PEOPLE) for photo in range(PHOTOS)]


def test_recordio_gives_the_same_faces_as_folders(images, tmp_path, monkeypatch):
    write_set(tmp_path / "set", insightface(images))
    for i, (person, _) in enumerate(images):
        write_image(tmp_path / f"aligned/{person:07d}/{i % PHOTOS}.png", face(person, i % PHOTOS))
    folders = load_casia(tmp_path / "aligned", cache=tmp_path / "cache")
    monkeypatch.delattr(os, "pread", raising=False)                                 # as on Windows
    records = load_casia(tmp_path / "set", cache=tmp_path / "cache")    # several threads read the same file
    assert np.array_equal(records.images, folders.images) and np.array_equal(records.labels, folders.labels)
    assert records.classes == PEOPLE and len(records) == PEOPLE * PHOTOS


@pytest.mark.parametrize("image", [b"", MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"efgh" + MAGIC + b"i",
                                   b"a" + MAGIC + b"bcd" + MAGIC])    # only the second one is at a multiple of 4
@pytest.mark.parametrize("label", [1.0, (1.0, 7.0)])
def test_data_may_contain_the_magic_number(tmp_path, image, label):
    # There is neither a table of contents nor an order of the keys.
    write_set(tmp_path / "set", [(4, pack(0.0, b"first")), (1, pack(label, image)), (0, pack(2.0, b"last"))])
    records = Records(tmp_path / "set")
    assert [records.open(name) for name in records.names()] == [b"first", image, b"last"]
    assert records.labels.tolist() == [0, 1, 2]


def write_dcface(root, images, paths, header=lambda row: 0.0):
    """Write a set as DCFace's, with labels in list.txt; return the folder."""
    write_set(root, [(key, pack(header(key), image)) for key, image in enumerate(images)], "file")
    (root / "done_list.txt").write_text("".join(f"image\t{path}\n" for path in paths))    # is not read
    (root / "list.txt").write_text("".join(f"{key}\t{path}\n" for key, path in enumerate(paths)))
    return root


@pytest.mark.parametrize("header", [lambda row: 0.0, float])
def test_labels_in_a_list_replace_those_in_the_records(images, tmp_path, header):
    images = [images[i] for i in np.random.default_rng(0).permutation(len(images))]
    paths = [f"{person + 9}/{i}.jpg" for i, (person, _) in enumerate(images)]
    root = write_dcface(tmp_path / "record", [image for _, image in images], paths, header)
    faces, people = load_casia(root, cache=tmp_path / "cache"), np.array([person for person, _ in images])
    assert np.array_equal(faces.labels[:, None] == faces.labels, people[:, None] == people)
    assert f"labels are from {root / 'list.txt'}; the records name" in str(faces)


def test_lists_that_do_not_name_people_are_ignored(images, tmp_path):
    people = [float(person) for person, _ in images]
    for name, paths in (("same", [f"x{person}/0.jpg" for person in people]), ("one", ["x/0.jpg"] * len(people)),
                        ("part", [f"{i}/0.jpg" for i in range(9)]), ("none", ["0.jpg"] * len(people))):
        source = Records(write_dcface(tmp_path / name, [b""] * len(people), paths, people.__getitem__))
        assert source.labels.tolist() == people and source.notes == ()
    with pytest.raises(InputError, match="list.txt does not list all images of .*file.rec; copy the set again"):
        Records(write_dcface(tmp_path / "cut", [b""] * 3, ["0/0.jpg", "1/0.jpg"]))


def patch(position, content):
    """Return a change: overwrite train.rec with `content` from byte `position` of record 3 on."""
    return lambda rec, idx, at: (rec[:at + position] + content + rec[at + position + len(content):], idx)


@pytest.mark.parametrize("change, message", [
    (patch(0, bytes(4)), "train.rec.*record 3 has an invalid header"),
    (patch(4, struct.pack("<I", 1 << 28)), "record 3 extends past the end"),
    (patch(8, b"\xff" * 4), "3@.*too short for its labels"),
    (patch(32, struct.pack("<f", 0.5)), "record 3 has a label that is not a whole number"),
    (lambda rec, idx, _: (b"", idx), "train.rec is damaged .*extends past"),
    (lambda rec, idx, _: (rec, b""), "train.idx is damaged or not a RecordIO index"),
    (lambda rec, idx, _: (rec, idx + b"3\t8\n"), "lists a record twice"),
    (lambda rec, idx, _: (rec, idx.replace(b"\n3\t", b"\n99\t")), "keys 1 to 12 are images, but train.idx lists 11")])
def test_damaged_sets_are_one_sentence_errors(change, message, images, tmp_path):
    root = tmp_path / "set"
    offsets, files = write_set(root, insightface(images)), (root / "train.rec", root / "train.idx")
    for file, content in zip(files, change(*(file.read_bytes() for file in files), offsets[3])):
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        load_casia(root, cache=tmp_path / "cache")
    assert str(root) in str(raised.value) and "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*/faces.u8"))
