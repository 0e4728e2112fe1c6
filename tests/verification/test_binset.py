"""InsightFace's .bin sets can be read, whatever wrote them; other files are rejected, and none of their code runs."""
import os
import pickle
import struct

import cv2
import numpy as np
import pytest
from conftest import draw_face, run_lfw_eval

import cosFace.net
from faces.files import InputError
from faces.images import read_image
from faces.training import checkpoint
from faces.verification import binset
from faces.verification.binset import Refused, read_bin, unpickle
from faces.verification.lfw import load_lfw

PEOPLE = 12
SAME = [True, False] * PEOPLE   # 24 pairs, which can't be divided into ten equal folds


@pytest.fixture(scope="module")
def images():
    """Return the 48 encoded faces of 24 pairs: a genuine pair of each person, and an impostor pair with the next one.

    The first face of each person occurs in both.
    """
    faces = [[cv2.imencode(".png", draw_face(p, i, 112)[0])[1].tobytes() for i in (0, 1)] for p in range(PEOPLE)]
    pairs = [(faces[p][0], faces[(p + i) % PEOPLE][1 - i]) for p in range(PEOPLE) for i in (0, 1)]
    return [image for pair in pairs for image in pair]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    checkpoint.save(path, {"method": "CosFace", "weights": cosFace.net.faceNet().state_dict()})
    return path


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


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_and_type_of_list_can_be_read(images, protocol):
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    for encoded in (images, arrays, [array.copy() for array in arrays]):
        for same in (SAME, tuple(SAME), np.array(SAME), [np.bool_(s) for s in SAME], [int(s) for s in SAME]):
            read_images, read_same = unpickle(pickle.dumps((encoded, same), protocol))
            assert [bytes(image) for image in read_images] == images and list(read_same) == SAME
    big_endian = np.arange(6, dtype=">f4").reshape(2, 3, order="F")
    np.testing.assert_array_equal(unpickle(pickle.dumps(big_endian, protocol)), big_endian)


def test_files_written_by_python_2_can_be_read(images):
    strings, arrays = python2_pickle(images, SAME), python2_array_pickle(images, SAME)
    assert unpickle(strings) == (images, SAME)
    read_images, read_same = unpickle(arrays)
    assert [image.tobytes() for image in read_images] == images and read_same == SAME
    # Python's own unpickler reads the same, so the synthetic files are valid.
    assert pickle.loads(strings, encoding="bytes") == (images, SAME)
    assert pickle.loads(arrays, encoding="bytes")[0][5].tobytes() == images[5]


def test_pairs_folds_and_identities_of_a_set(tmp_path, images):
    pairs, distinct = read_bin(write_bin(tmp_path, python2_pickle(images, SAME)))
    assert len(distinct) == len(set(images)) == 2 * PEOPLE and not pairs.named
    assert [distinct[i] for i in pairs.pairs.ravel()] == images and pairs.same.tolist() == SAME
    assert all(images[int(path.removeprefix("lfw.bin#"))] == image for path, image in zip(pairs.paths, distinct))
    assert np.bincount(pairs.folds).tolist() == [3] * 4 + [2] * 6 and (np.diff(pairs.folds) >= 0).all()
    people = np.array([[p, (p + i) % PEOPLE] for p in range(PEOPLE) for i in (0, 1)])
    identities = pairs.identities[pairs.pairs]
    assert len({(a, b) for a, b in zip(people.ravel(), identities.ravel())}) == PEOPLE == len(np.unique(identities))


def test_faces_are_cropped_to_the_template(tmp_path, images):
    loaded = load_lfw(write_bin(tmp_path, pickle.dumps([images, SAME])))
    assert loaded.faces.shape == (2 * PEOPLE, 112, 96, 3) and "lfw.bin" in loaded.landmarks
    np.testing.assert_array_equal(loaded.faces[loaded.pairs.pairs[7, 1]], read_image(images[15])[:, 8:-8])


class PickledCall:
    """An object whose pickle calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", (0, 2, 4, 5))
@pytest.mark.parametrize("name", ("os.system", "eval", "numpy.load", "object array"))
def test_no_code_in_a_file_is_run(tmp_path, name, protocol):
    marker = tmp_path / "run"
    malicious = {"os.system": PickledCall(os.system, f"touch {marker}"),
                 "eval": PickledCall(eval, f"open({str(marker)!r}, 'w')"),
                 "numpy.load": PickledCall(np.load, str(marker))}
    malicious["object array"] = np.array([malicious["os.system"]], object)
    data = pickle.dumps(([malicious[name]], [True]), protocol)
    with pytest.raises(InputError, match="is refused as an InsightFace .bin set: it (asks for|has an array of)"):
        read_bin(write_bin(tmp_path, data))
    assert not marker.exists()
    if name == "os.system":
        pickle.loads(data)
        assert marker.exists()  # Python's own unpickler runs the code, so the file was dangerous


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"


@pytest.mark.parametrize("data", [
    b"", b"no pickle", b"\x80\x04.", b"\x80\x04]", b"\x80\x04a.", b"\x80\x04(.", b"h\x00.", b"\x86.", b"]]R.", b"]]b.",
    b"(ios\nsystem\n.", b"(cos\nsystem\no.", b"cos\nsystem\n)\x81.", b"Pid\n.", b"\x82\x01.", b"}.", b"\x8f.",
    b"cbuiltins\ngetattr\n.", b"\x8c\x02os\x8c\x06system\x93.", b"]]\x93.", b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",
    b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", b"cnumpy\ndtype\n]\x85R.",
    b"c_codecs\nencode\nX\x00\x00\x00\x00X\x03\x00\x00\x00hex\x86R.",
    # These declare more bytes, or more array elements, than they contain.
    b"B\xff\xff\xff\xff.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    RECONSTRUCT + b"(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89C\x01xtb.",
    # This contains the instruction POP, which plain data never needs.
    b"X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"q\x000" + b"h\x00." * 3])
def test_damaged_files_and_unneeded_instructions_are_refused(data):
    with pytest.raises(Refused):
        unpickle(data)


def test_decompression_bombs_are_refused(monkeypatch):
    text = b"X" + struct.pack("<i", 100_000) + b"a" * 100_000 + b"q\x00"
    encode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    with pytest.raises(Refused, match="many times its size"):
        unpickle(b"(" + text + encode * 1000 + b"t.")               # 150 KB that decode to 100 MB
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"
    fill = b"(K\x01J" + struct.pack("<i", 100_000) + b"\x85" + dtype + b"\x89h\x00tb"
    one = b"B" + struct.pack("<i", 100_000) + b"a" * 100_000 + b"q\x00"
    assert len(unpickle(b"(" + one + array + fill + b"t.")) == 2
    with pytest.raises(Refused, match="many times its size"):
        unpickle(b"(" + one + (array + fill) * 10 + b"t.")           # the same bytes in ten arrays
    # Each list contains the previous list twice, so traversing the last one would visit 2**59 items.
    billion_laughs = b"]q\x00" + b"".join(b"]q" + bytes([i]) + b"h" + bytes([i - 1]) + b"ah" + bytes([i - 1]) + b"a"
                                          for i in range(1, 60))
    with pytest.raises(Refused):
        unpickle(billion_laughs + b"cnumpy\ndtype\nh\x3b\x85R.")
    nested = b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b"."
    assert len(unpickle(nested)) == 1
    assert unpickle(b"\x80\x02]r\xff\xff\xff\x7f.") == []           # an entry at index 2**31 - 1 of the memo
    monkeypatch.setattr(binset, "MAX_READS", 1000)
    with pytest.raises(Refused, match="too many instructions"):
        unpickle(nested)


@pytest.mark.parametrize("value, message", [
    ([1, 2, 3], "two lists"), ((b"ab", [True]), "two lists"), (([b""], [True, False]), "1 image for 2 pairs"),
    (([b"x"] * 18, SAME[:9]), "9 pairs, 5 of them genuine"), (([b"x"] * 48, [True] * 24), "24 of them genuine"),
    (([b"x"] * 48, [2] * 24), "neither true nor false"), (([None] * 48, SAME), "image 0 is not the bytes"),
    (([np.zeros((112, 112, 3), np.uint8)] * 48, SAME), "image 0 is not the bytes"),
])
def test_pickles_with_other_contents_are_refused(tmp_path, value, message):
    with pytest.raises(InputError, match=message):
        read_bin(write_bin(tmp_path, pickle.dumps(value)))


def test_the_command_reports_mistakes_in_one_sentence(tmp_path, images, capsys, model):
    def run(*options):
        status, _, err = run_lfw_eval(capsys, "--model", model, *options)
        return status, err
    valid = write_bin(tmp_path, pickle.dumps((images, SAME)))
    for options, message in (((valid, "--pairs", valid), "leave out --pairs"),
                             ((valid, "--protocol", "identification"), "does not name the people on its images")):
        status, err = run("--lfw", *options)
        assert status == 2 and message in err and "Traceback" not in err
    photo = cv2.imencode(".png", np.zeros((50, 40, 3), np.uint8))[1].tobytes()
    invalid = write_bin(tmp_path, pickle.dumps(([photo, b"no image", *images[2:]], SAME)))
    status, err = run("--lfw", invalid)
    assert status == 2 and "2 of 25 images" in err and "lfw.bin#1: not an image" in err
