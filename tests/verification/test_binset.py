"""InsightFace's .bin sets can be read, whatever wrote them; other files are refused, and none of their code runs."""
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from conftest import PickledCall, encoded_pairs

from faces.files import InputError
from faces.images import read_image
from faces.verification import binset
from faces.verification.binset import read_bin
from faces.verification.lfw import load_lfw

PEOPLE = 12
SAME = [True, False] * PEOPLE   # 24 pairs, which can't be divided into ten equal folds


@pytest.fixture(scope="module")
def images():
    return encoded_pairs(PEOPLE)


def python2_pickle(images, same):
    """Return the pickle as Python 2 writes it: images as Python 2 strings, booleans as NEWTRUE and NEWFALSE."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image + b"q\x01" for image in images)
    return b"\x80\x02](" + strings + b"eq\x02](" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e\x86q\x03."


def python2_array_pickle(images, same):
    """Return the pickle as Python 2 writes it if images are numpy arrays; the first one defines the dtype of all."""
    dtype = b"cnumpy\ndtype\nq\x07(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x09"
    arrays = b""
    for image in images:
        arrays += (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
                   + struct.pack("<H", len(image)) + b"\x85" + (b"h\x09" if arrays else dtype) + b"\x89T"
                   + struct.pack("<i", len(image)) + image + b"tb")
    return b"\x80\x02](" + arrays + b"e](" + b"".join(b"I01\n" if s else b"I00\n" for s in same) + b"e\x86."


def write_bin(tmp_path, data):
    path = tmp_path / "lfw.bin"
    path.write_bytes(data)
    return path


def assert_holds(tmp_path, data, images):
    pairs, read = read_bin(write_bin(tmp_path, data))
    assert [read.open(pairs.paths[i]) for i in pairs.pairs.ravel()] == images and pairs.same.tolist() == SAME


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol_and_type_of_list_can_be_read(tmp_path, images, protocol):
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    for encoded, same in ((images, SAME), (arrays, tuple(SAME)), ([array.copy() for array in arrays], np.array(SAME)),
                          (images, [np.bool_(s) for s in SAME]), (images, np.array(SAME, ">i8"))):
        assert_holds(tmp_path, pickle.dumps((encoded, same), protocol), images)


def test_files_written_by_python_2_can_be_read(tmp_path, images):
    for data in (python2_pickle(images, SAME), python2_array_pickle(images, SAME)):
        assert_holds(tmp_path, data, images)
        # Python's own unpickler reads the same, so the synthetic files are valid.
        assert bytes(pickle.loads(data, encoding="bytes")[0][5]) == images[5]


def test_pairs_folds_and_identities_of_a_set(tmp_path, images):
    path = write_bin(tmp_path, python2_pickle(images, SAME))
    pairs, read = read_bin(path)
    assert len(read.encoded) == len(set(images)) == 2 * PEOPLE and pairs.names is None
    assert all(images[int(name.removeprefix("lfw.bin#"))] == image for name, image in read.encoded.items())
    for kind in (0, 1):    # every fold has both
        assert pairs.folds[kind::2].tolist() == [0, 0, 1, 1, *range(2, 10)]
    people = np.array([[p, (p + i) % PEOPLE] for p in range(PEOPLE) for i in (0, 1)])
    identities = pairs.identities[pairs.pairs]
    assert len({(a, b) for a, b in zip(people.ravel(), identities.ravel())}) == PEOPLE == len(np.unique(identities))
    loaded = load_lfw(path)
    assert loaded.faces.shape == (2 * PEOPLE, 112, 96, 3) and "lfw.bin" in loaded.landmarks
    np.testing.assert_array_equal(loaded.faces[loaded.pairs.pairs[7, 1]], read_image(images[15])[:, 8:-8])


@pytest.mark.parametrize("protocol", (0, 2, 5))
def test_no_code_in_a_file_is_run(tmp_path, protocol):
    marker = tmp_path / "run"
    touch = PickledCall(os.system, f"touch {marker}")
    for image in (touch, PickledCall(eval, f"open({str(marker)!r}, 'w')"), PickledCall(np.load, str(marker)),
                  np.array([touch], object)):
        with pytest.raises(InputError, match="lfw.bin is damaged or not a"):
            read_bin(write_bin(tmp_path, pickle.dumps(([image] * 20, SAME[:10]), protocol)))
    assert not marker.exists()
    pickle.loads(pickle.dumps(touch))
    assert marker.exists()  # Python's own unpickler runs the code, so the file was dangerous


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
U1 = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R(K\x03X\x01\x00\x00\x00|tb"


@pytest.mark.parametrize("data", [
    b"", b"no pickle", b"\x80\x04.", b"\x80\x04]", b"\x80\x04a.", b"h\x00.", b"]]R.", b"]]b.",
    b"(ios\nsystem\n.", b"(cos\nsystem\no.", b"cos\nsystem\n)\x81.", b"Pid\n.", b"\x82\x01.", b"}.", b"\x8f.",
    b"cbuiltins\ngetattr\n.", b"\x8c\x02os\x8c\x06system\x93.", b"cnumpy\nndarray\n)\x81.",
    # These declare more bytes, or a larger memo, than they contain.
    b"B\xff\xff\xff\xff.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
    b"\x80\x02]r\xff\xff\xff\x7f.",
    # A tuple in a tuple, 100,000 deep: hashing it would crash Python.
    b"\x8f()" + b"\x85" * 100_000 + b"\x90.", b"})" + b"\x85" * 100_000 + b"Ns.",
], ids=range(24))
def test_damaged_and_hostile_files_are_refused(tmp_path, data):
    with pytest.raises(InputError, match="lfw.bin is damaged or not a verification set"):
        read_bin(write_bin(tmp_path, data))


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path, monkeypatch):
    text = b"X" + struct.pack("<i", 100_000) + b"a" * 100_000 + b"q\x00"
    encode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    array = RECONSTRUCT + b"(K\x01J" + struct.pack("<i", 100_000) + b"\x85" + U1 + b"\x89" + encode + b"tb"
    for image in (encode, array):    # 200 KB that unfold to 100 MB
        path = write_bin(tmp_path, b"(]" + text + b"0(" + image * 1000 + b"e](" + b"\x88\x89" * 250 + b"et.")
        tracemalloc.start()
        pairs, _ = read_bin(path)
        assert len(pairs.paths) == 1 and tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()
    monkeypatch.setattr(binset, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(InputError, match="more than plain data"):
        read_bin(write_bin(tmp_path, b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b"."))
    monkeypatch.setattr(binset, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="lfw.bin: over"):
        read_bin(write_bin(tmp_path, b"]" * 101))


@pytest.mark.parametrize("value, message", [
    ([1, 2, 3], "unpack"), ((b"ab" * 10, SAME[:10]), "not the bytes"), (([b""], [True, False]), "1 image for 2 pairs"),
    (([b"x"] * 18, SAME[:9]), "9 pairs, 5 of them genuine"), (([b"x"] * 48, [True] * 24), "24 of them genuine"),
    (([b"x"] * 48, [2] * 24), "neither true nor false"), (([None] * 48, SAME), "not the bytes of image files"),
])
def test_pickles_with_other_contents_are_refused(tmp_path, value, message):
    with pytest.raises(InputError, match=message):
        read_bin(write_bin(tmp_path, pickle.dumps(value)))


def test_images_that_cannot_be_read_are_named(tmp_path, images):
    with pytest.raises(InputError, match="1 of 24 images in .*lfw.bin#1: not an image"):
        load_lfw(write_bin(tmp_path, pickle.dumps(([images[0], b"no image", *images[2:]], SAME))))
    with pytest.raises(InputError, match="leave out --pairs"):
        load_lfw(write_bin(tmp_path, b""), file="pairs.txt")
