"""LMDB: sets that lmdb and msgpack write as Vec2Face's are read, and damaged files are one-sentence errors."""
import pickle
import struct

import cv2
import lmdb
import msgpack
import numpy as np
import pytest
from conftest import draw_face

from faces.align import align
from faces.data import cache as cache_module
from faces.data.cache import load_casia
from faces.data.sources import open_source
from faces.files import InputError


def write_lmdb(path, values, first_key=b"0"):
    """Write values as imagelist2lmdb.py does: with keys in decimal, and keys with __ at the end; in 3 transactions."""
    keys = [first_key, *(str(i).encode() for i in range(1, len(values)))]
    items = [*zip(keys, values), (b"__keys__", msgpack.dumps(keys)), (b"__len__", msgpack.dumps(len(keys)))]
    with lmdb.open(str(path), subdir=path.suffix != ".lmdb", map_size=1 << 26, sync=False) as database:
        for rows in np.array_split(range(len(items)), 3):
            with database.begin(write=True) as transaction:
                transaction.cursor().putmulti([items[row] for row in rows])
    return path


@pytest.mark.parametrize("name, label, damaged", [("set.lmdb", 0, 0), ("folder", 126, 0), ("set.lmdb", 70_000, 1)])
def test_lmdb(tmp_path, name, label, damaged, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_FAILED", 0.1)
    faces = [align(*draw_face(i // 5, i % 5)) for i in range(15)]
    images = [cv2.imencode(".png", np.pad(face, ((0, 0), (8, 8), (0, 0)))[..., ::-1])[1].tobytes() for face in faces]
    images[0] = images[0][:-2000] if damaged else images[0]
    values = [msgpack.dumps((image, label + i // 5)) for i, image in enumerate(images)]
    loaded = load_casia(write_lmdb(tmp_path / name, values), cache=tmp_path / "cache")
    assert np.array_equal(loaded.images[loaded.rows], faces[damaged:])
    assert loaded.labels.tolist() == [i // 5 for i in range(damaged, 15)]
    assert ("1 unusable image left out" in str(loaded)) == damaged


def test_lmdb_of_many_pages_with_values_of_all_lengths(tmp_path):
    random = np.random.default_rng(0)
    lengths = (0, 1, 127, 128, 255, 256, 2000, 2030, 4080, 65_535, 65_536, 300_000, *[40] * 20_000)    # three levels
    data = [random.bytes(length) for length in lengths]
    source = open_source(write_lmdb(tmp_path / "set.lmdb", [msgpack.dumps((data[i], i)) for i in range(len(data))]))
    assert source.labels.tolist() == list(range(len(data)))
    assert [source.open(name) for name in source.names()] == data


def loop(data):    # the first child of the root is the root itself
    root = max(struct.unpack_from("<Q", data, meta + 128)[0] for meta in (0, 4096))
    position = root * 4096 + struct.unpack_from("<H", data, root * 4096 + 16)[0]
    return data[:position] + struct.pack("<Q", root)[:6] + data[position + 6:]


@pytest.mark.parametrize("value, key, damage", [
    (msgpack.dumps((b"image", 0)), b"0", lambda data: data[:len(data) // 2]),
    (msgpack.dumps((b"image" * 1000, 0)), b"0", lambda data: data[:8192].ljust(len(data), b"\0")),
    (msgpack.dumps((b"image", 0)), b"0", loop), (pickle.dumps((b"image", 0)), b"0", bytes),
    (msgpack.dumps((b"image", 0)) + b"1", b"0", bytes), (b"image", b"image-000000001", bytes)])
def test_other_and_damaged_lmdbs_are_one_sentence_errors(value, key, damage, tmp_path):
    path = write_lmdb(tmp_path / "set.lmdb", [value] * 500, key)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="set.lmdb is damaged or not a Vec2Face LMDB"):
        load_casia(path, cache=tmp_path / "cache")
