"""RecordIO: sets written here according to the format are read, and damaged files are one-sentence errors."""
import struct
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from conftest import draw_face, write_image

from faces.align import align
from faces.data.cache import load_casia
from faces.data.recordio import Records
from faces.files import InputError
from faces.images import UnreadableImage

MAGIC = struct.pack("<I", 0xCED7230A)
PEOPLE, PHOTOS = 3, 4


def frame(data):
    """Return the record of some data, split wherever the magic number is at a multiple of 4, as dmlc's writer does."""
    words = [data[i:i + 4] for i in range(0, len(data), 4)]
    parts = [b""]
    for word in words:
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


def write_set(root, records, classes=PEOPLE):
    """Write (key, data) pairs as train.rec, train.idx and property; return {key: offset}."""
    root.mkdir(exist_ok=True)
    content, offsets = b"", {}
    for key, data in records:
        offsets[key] = len(content)
        content += frame(data)
    (root / "train.rec").write_bytes(content)
    (root / "train.idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in offsets.items()))
    (root / "property").write_text(f"{classes},112,112\n")
    return offsets


def insightface(images):
    """Return (key, data) pairs as InsightFace arranges them: table of contents, images from key 1, identities.

    Args:
        images: list of (label, image bytes), sorted by label.
    """
    labels = [label for label, _ in images]
    first = 1 + len(images)
    identities = [(first + person, pack((float(1 + labels.index(person)), float(1 + labels.index(person) + PHOTOS))))
                  for person in range(PEOPLE)]
    return [(0, pack((float(first), float(first + PEOPLE)))),
            *((key, pack((float(label), 0.0) if key % 2 else float(label), image, key))
              for key, (label, image) in enumerate(images, 1)), *identities]


def face(person, photo):
    return np.pad(align(*draw_face(person, photo)), ((0, 0), (8, 8), (0, 0)))       # 112x112


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def images():
    return [(person, png(face(person, photo))) for person in range(PEOPLE) for photo in range(PHOTOS)]


@pytest.fixture
def root(tmp_path, images):
    write_set(tmp_path / "faces_webface_112x112", insightface(images))
    return tmp_path / "faces_webface_112x112"


def test_recordio_gives_the_same_faces_as_folders(root, images, tmp_path):
    for i, (person, _) in enumerate(images):
        write_image(tmp_path / f"aligned/{person:07d}/{i % PHOTOS}.png", face(person, i % PHOTOS))
    records, folders = (load_casia(path, cache=tmp_path / "cache") for path in (root, tmp_path / "aligned"))
    assert np.array_equal(records.images, folders.images) and np.array_equal(records.labels, folders.labels)
    assert records.classes == PEOPLE and len(records) == PEOPLE * PHOTOS
    assert np.array_equal(records.images[5], align(*draw_face(1, 1)))


@pytest.mark.parametrize("image", [
    b"", b"x", b"abcd", MAGIC, MAGIC * 3, b"abcd" + MAGIC, MAGIC + b"abc", b"abcd" + MAGIC + b"efgh" + MAGIC + b"i",
    b"a" + MAGIC + b"bcd" + MAGIC])                        # only the second one is at a multiple of 4
@pytest.mark.parametrize("label", [1.0, (1.0, 7.0)])
def test_data_may_contain_the_magic_number(tmp_path, image, label):
    write_set(tmp_path / "set", [(0, pack(0.0, b"first")), (1, pack(label, image)), (2, pack(2.0, b"last"))])
    records = Records(tmp_path / "set")
    assert [records.open(name) for name in records.names()] == [b"first", image, b"last"]
    assert records.labels.tolist() == [0, 1, 2]


def test_a_set_without_table_of_contents_or_property_in_any_key_order(tmp_path):
    write_set(tmp_path / "set", [(key, pack(float(key % 3), b"image %d" % key)) for key in (4, 0, 5, 2, 1, 3)])
    (tmp_path / "set/property").unlink()
    records = Records(tmp_path / "set")
    assert records.keys.tolist() == [4, 0, 5, 2, 1, 3] and records.labels.tolist() == [1, 0, 2, 2, 1, 0]
    assert records.open(records.names()[2]) == b"image 5"


def test_threads_can_read_at_the_same_time(root, images):
    records = Records(root)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(records.open, records.names() * 20))
    assert read == [image for _, image in images] * 20


def test_another_set_in_the_same_folder_gets_another_cache(root, images, tmp_path):
    before = load_casia(root, cache=tmp_path / "cache")
    write_set(root, insightface([*images[1:PHOTOS], (0, png(face(7, 7))), *images[PHOTOS:]]))
    after = load_casia(root, cache=tmp_path / "cache")
    assert len(after) == len(before) and not np.array_equal(after.images, before.images)


def test_an_image_that_cannot_be_decoded_is_listed(root, images, tmp_path, monkeypatch):
    monkeypatch.setattr("faces.data.cache.MAX_FAILED", 0.1)
    offsets = write_set(root, insightface([*images[:3], (0, b"no image"), *images[4:]]))
    assert len(load_casia(root, cache=tmp_path / "cache")) == len(images) - 1
    failed, = (tmp_path / "cache").glob("*/failed.txt")
    assert failed.read_text() == f"4@{offsets[4]}\tnot an image\n"


def test_a_record_that_changes_after_the_check_is_unreadable(root):
    records = Records(root)
    (root / "train.rec").write_bytes(b"\0" * records.size)
    with pytest.raises(UnreadableImage, match="invalid header"):
        records.open(records.names()[0])
    (root / "train.rec").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="can't be read completely"):
        records.open(records.names()[0])


def test_lists_and_options_that_do_not_apply_are_refused(root, casia, tmp_path):
    for options, message in (({"landmarks": casia / "casia_landmark.txt"}, "leave out .*casia_landmark.txt"),
                             ({"label_list": tmp_path / "list.txt"}, "leave out .*list.txt"),
                             ({"drop_lfw_overlap": True}, "leave out --drop-lfw-overlap")):
        with pytest.raises(InputError, match=message):
            load_casia(root, cache=tmp_path / "cache", **options)


# Each of these functions returns a function that damages the set in a folder, given the offsets of its records.


def patch(position, content):
    """Overwrite train.rec with `content` from byte `position` of record 3 on."""
    def change(root, offsets):
        path = root / "train.rec"
        data = bytearray(path.read_bytes())
        data[offsets[3] + position:offsets[3] + position + len(content)] = content
        path.write_bytes(data)
    return change


def index(edit):
    """Replace the lines of train.idx with edit(lines)."""
    def change(root, offsets):
        path = root / "train.idx"
        path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    return change


def replace(replaced, data, classes=PEOPLE):
    """Replace the data of the record with this key."""
    def change(root, offsets):
        images = [(person, b"image") for person in range(PEOPLE) for _ in range(PHOTOS)]
        records = dict(insightface(images))
        records[replaced] = data
        write_set(root, list(records.items()), classes)
    return change


def property_is(text):
    """Replace the text of property."""
    return lambda root, _: (root / "property").write_text(text)


def parts(*parts):
    """Replace record 3 with the given parts, (kind, bytes), appended to train.rec."""
    def change(root, offsets):
        content = b"".join(MAGIC + struct.pack("<I", kind << 29 | len(part)) + part for kind, part in parts)
        start = len((root / "train.rec").read_bytes())
        with open(root / "train.rec", "ab") as file:
            file.write(content)
        index(lambda lines: [f"3\t{start}" if line.startswith("3\t") else line for line in lines])(root, offsets)
    return change


DAMAGE = {
    "wrong magic": (patch(0, b"\0\0\0\0"), "record 3 has an invalid header"),
    "starts with a middle part": (patch(7, b"\x40"), "record 3 has an invalid header"),
    "unknown kind": (patch(7, b"\xe0"), "record 3 has an invalid header"),
    "longer than the file": (patch(4, struct.pack("<I", 1 << 28)), "record 3 extends past the end"),
    "too short": (patch(4, struct.pack("<I", 20)), "record 3 is too short"),
    "more labels than bytes": (patch(8, struct.pack("<I", 2**32 - 1)), "record 3 is too short"),
    "label with a fraction": (replace(3, pack(0.5, b"image")), "record 3 has a label that is not a whole number"),
    "negative label": (replace(3, pack(-1.0, b"image")), "record 3 has a label that is not a whole number"),
    "NaN as label": (replace(3, pack((float("nan"), 0.0), b"image")), "record 3 has a label that is not"),
    "infinite label": (replace(3, pack(float("inf"), b"image")), "record 3 has a label that is not a whole number"),
    "label too large to be exact": (replace(3, pack(2.0**24, b"image")), "record 3 has a label that is not"),
    "more people than in property": (replace(3, pack(3.0, b"image")), "has 4 people, but .*property gives 3 as"),
    "truncated file": (lambda root, _: (root / "train.rec").write_bytes((root / "train.rec").read_bytes()[:-200]),
                       "extends past the end|leaves room for a record"),
    "empty file": (lambda root, _: (root / "train.rec").write_bytes(b""), "larger than train.rec"),
    "no index": (lambda root, _: (root / "train.idx").unlink(), "can't read .*train.idx"),
    "empty index": (index(lambda _: [""]), "train.idx is not an index"),
    "index of words": (index(lambda lines: [*lines, "x\ty"]), "train.idx is not an index"),
    "index with fractions": (index(lambda lines: [*lines, "99\t4.5"]), "train.idx is not an index"),
    "index of three columns": (index(lambda lines: [f"{line}\t0" for line in lines]), "train.idx is not an index"),
    "index beyond 64 bits": (index(lambda lines: [*lines, f"99\t{10**20}"]), "train.idx is not an index"),
    "offset outside the file": (index(lambda lines: [*lines, f"99\t{10**12}"]), "offset 1000000000000 of record 99"),
    "negative offset": (index(lambda lines: [*lines, "99\t-4"]), "offset -4 of record 99"),
    "unaligned offset": (index(lambda lines: [*lines, "99\t2"]), "offset 2 of record 99"),
    "offset inside a record": (index(lambda lines: [*lines[:2], f"2\t{int(lines[2].split()[1]) + 4}", *lines[3:]]),
                               "record 2 has an invalid header"),
    "duplicate key": (index(lambda lines: [*lines[:-1], "3\t" + lines[-1].split("\t")[1]]), "lists a record twice"),
    "duplicate offset": (index(lambda lines: [*lines, "99\t" + lines[3].split("\t")[1]]), "lists a record twice"),
    "missing images": (index(lambda lines: [line for line in lines if not line.startswith("3\t")]),
                       "keys 1 to 12 are images, but train.idx lists 11 of these"),
    "table of contents that ends before it starts": (replace(0, pack((13.0, 5.0))), "record 0 says"),
    "table of contents with fractions": (replace(0, pack((12.5, 16.0))), "record 0 says"),
    "table of contents with NaN": (replace(0, pack((float("nan"), float("inf")))), "record 0 says"),
    "property of words": (property_is("many,112,112"), "property must be one line"),
    "property without size": (property_is("3"), "property must be one line"),
    "parts that never end": (parts((1, pack(0.0)), (2, b"abcd")), "record 3 extends past the end"),
    "first part twice": (parts((1, pack(0.0)), (1, b"abcd"), (3, b"")), "record 3 has an invalid header"),
    "unaligned part": (parts((1, pack(0.0)), (2, b"abcde"), (3, b"")), "record 3 has an invalid header"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sets_are_one_sentence_errors(case, root, images, tmp_path):
    change, message = DAMAGE[case]
    offsets = write_set(root, insightface(images))
    change(root, offsets)
    with pytest.raises(InputError, match=message) as raised:
        load_casia(root, cache=tmp_path / "cache")
    assert str(root) in str(raised.value) and "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").glob("*/cache.json"))


def test_a_record_larger_than_the_limit_is_refused(root, monkeypatch):
    monkeypatch.setattr("faces.data.recordio.MAX_BYTES", 1000)
    with pytest.raises(InputError, match="record 1 is over"):
        Records(root)
