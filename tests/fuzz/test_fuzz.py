"""Damaged and hostile files: readers return, or raise one sentence. tests/fuzz/run.py goes on where these end."""
import random
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import PEAK, ROOT, draw_face, needs_proc, write_image
from targets import ALLOWED, LOADED, TARGETS, TOKENS, attempt, landmark_list, record_set, state_files

from faces.data.cache import _read_failed, _read_journal, build
from faces.data.casia import read_casia
from faces.data.recordio import MAX_PARTS, Records
from faces.data.sources import Zip
from faces.files import InputError, command, read_json
from faces.landmarks import read_landmarks
from faces.text import printable
from faces.training import checkpoint
from faces.training.log import _read_epochs
from faces.verification.binset import read_bin
from faces.verification.pairs import read_pairs
from faces.verification.threshold import load_threshold
from faces.verification.weights import announce, load_net
from mtcnn.journal import Journal
from tools.compare import read_scores
from tools.embed import Parts
from tools.tsne import read_points

EXAMPLES = 12
STATE = {    # file: how it is read
    "cache.json": lambda folder: _read_failed(folder, 4), "journal.jsonl": _read_journal,
    "m.threshold.json": lambda folder: load_threshold(folder / "m", LOADED), "results.json": read_scores,
    "scores.tsv": read_scores, "tsne.tsv": lambda folder: read_points(folder / "tsne.tsv"),
    "epochs.jsonl": lambda folder: _read_epochs(folder / "epochs.jsonl"),
    ".faces.npz.parts/settings.json": lambda folder: Parts(folder / "faces.npz", {"photos": "x"}, 4, 4),
    ".list.txt.partial": lambda folder: Journal(folder / "list.txt", {"images": 1}, 3)}
NUMBERS = [f'{{"faces": 4, "failed": [[{number}, "x"]]}}' for number in ("4", "-1", "1.0", "NaN", "1e999", "true")]


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_or_refused(target, tmp_path):
    for number in range(EXAMPLES):
        (tmp_path / str(number)).mkdir()
        read, may_refuse = attempt(target, number, tmp_path / str(number))
        try:
            read()
        except ALLOWED as error:
            assert may_refuse and "\n" not in str(error)


def damages(data):
    """Yield damaged versions of a state file."""
    yield from (data[:size] for size in (0, 1, len(data) // 2, len(data) - 2))
    yield from (data[:9] + token + data[9:] for token in TOKENS)
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"NaN", b"[]", b"null", b"\0" * 100,
                b"\xff\xfe\0\xd8")


@pytest.mark.parametrize("name", STATE)
def test_damaged_state_is_started_anew_or_refused(name, tmp_path):
    def write():
        for other, content in state_files(random).items():
            (tmp_path / other).parent.mkdir(exist_ok=True)
            (tmp_path / other).write_bytes(content)

    write()
    path = tmp_path / name
    whole = path.read_bytes()
    STATE[name](tmp_path)
    for content in damages(whole):
        write()
        path.write_bytes(content)
        try:
            STATE[name](tmp_path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", STATE)
def test_a_folder_or_a_huge_file_in_the_place_of_state_is_refused(name, tmp_path):
    for other, content in state_files(random).items():
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(content)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    if "parts" in name:
        STATE[name](tmp_path)    # removes the folder of the parts, and starts anew
        (tmp_path / name).unlink()
    else:
        with pytest.raises(InputError, match=name):
            STATE[name](tmp_path)
        (tmp_path / name).rmdir()
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**31)    # the file is sparse, so it takes no space on disk
    if name.endswith("partial") or "parts" in name:
        STATE[name](tmp_path)
    else:
        with pytest.raises(InputError, match=name):
            STATE[name](tmp_path)


@pytest.mark.parametrize("content", NUMBERS)
def test_failures_that_are_no_rows_of_the_list_are_refused(content, tmp_path):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(InputError, match="cache.json is damaged; delete it"):
        _read_failed(tmp_path, 4)
    assert read_json(tmp_path / "missing.json", "") is None


@needs_proc
def test_lists_are_read_line_by_line(tmp_path):
    """A line without end, and zeros after a valid beginning, are refused before they fill the memory."""
    valid = landmark_list(random)["list.txt"]
    program = (PEAK + "import sys; from pathlib import Path; from faces.landmarks import read_landmarks; "
               "from faces.files import InputError\n"
               "before = peak()\n"
               "try: read_landmarks(Path(sys.argv[1]), True)\n"
               "except InputError as error: assert 'not a text file' in str(error)\n"
               "else: assert False\n"
               "assert peak() < before + 10**8")
    for start in (b"", valid, "\ufeff".encode("utf-16-le") + valid.decode().encode("utf-16-le")):
        with open(tmp_path / "list.txt", "wb") as file:
            file.write(start)
            file.truncate(2**31)
        done = subprocess.run([sys.executable, "-c", program, tmp_path / "list.txt"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
    (tmp_path / "list.txt").write_text("x" * 10**6)
    with pytest.raises(InputError, match="not a text file"):
        read_landmarks(tmp_path / "list.txt", True)


def test_names_may_have_what_only_python_takes_for_the_end_of_a_line(tmp_path):
    line = landmark_list(random)["list.txt"].decode().splitlines()[0].replace("p0/0", "a\x85b\u2028c\x1c")
    (tmp_path / "list.txt").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert read_landmarks(tmp_path / "list.txt", True).paths == ["a\x85b\u2028c\x1c.jpg"]


def test_quotes_in_names_do_not_swallow_pairs(tmp_path):
    (tmp_path / "scores.tsv").write_text('left\tright\tsame\tfold\tsimilarity\n"a\tb\t1\t0\t0.9\n"a\tc\t0\t0\t0.1\n')
    assert read_scores(tmp_path).same.tolist() == [True, False]


def test_points_whose_panels_differ_are_refused(tmp_path):
    table = state_files(random)["tsne.tsv"].decode()
    (tmp_path / "tsne.tsv").write_text(table.replace("a\t2", "a\t1"))
    with pytest.raises(InputError, match="not a whole table"):
        read_points(tmp_path / "tsne.tsv")


def test_a_zip_whose_list_of_files_would_fill_the_memory_is_refused(tmp_path):
    size = 2**31
    with open(tmp_path / "faces.zip", "wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<IHHHHIIH", 0x06054b50, 0, 0, 1, 1, size, 0, 0))    # end of the central directory
    with pytest.raises(InputError, match="has a list of files over 64 MiB"):
        Zip(tmp_path / "faces.zip")


def test_a_record_of_very_many_parts_is_refused(tmp_path):
    parts = [struct.pack("<II", 0xCED7230A, kind << 29) for kind in (1, *[2] * MAX_PARTS, 3)]
    for name, content in {**record_set(random), "train.rec": b"".join(parts), "train.idx": b"1\t0\n"}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="record 1 has over 1,000 parts"):
        Records(tmp_path)


def test_a_set_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "set.bin", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(InputError, match="over 300 MB"):
        read_bin(tmp_path / "set.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_very_many_instructions_is_refused(zipped, tmp_path, monkeypatch):
    monkeypatch.setattr("faces.training.checkpoint.MAX_READS", 1000)
    torch.save([[]] * 10, tmp_path / "small.pt", _use_new_zipfile_serialization=zipped)
    assert checkpoint.load_tensors(tmp_path / "small.pt") == [[]] * 10
    torch.save([[] for _ in range(3000)], tmp_path / "large.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="can be loaded safely"):
        checkpoint.load_tensors(tmp_path / "large.pt")


def test_escape_codes_in_files_do_not_reach_the_terminal(tmp_path, capsys):
    assert printable("a\x1b[2J\n\x9b\u202e\udce9é漢") == "a\\x1b[2J\\n\\x9b\\u202e\\udce9é漢"
    evil, numbers = "\x1b[2J\u202e", "\t1" * 10
    write_image(tmp_path / "faces/a/1.png", draw_face(0, 0)[0])
    (tmp_path / "list.txt").write_text(f"{evil}.jpg\t0{numbers}\n" * 2)
    (tmp_path / "pairs.txt").write_text(f"2\t1\n{evil}\t1\t2\n{evil}\t1\tB\t1\nA\t1\t2\nA\t1\tB\t1\n")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"set/{evil}/{i % 2}/{i}.jpg", b"no image")
    checkpoint.save(tmp_path / "net.pt", {"method": evil, "weights": {f"{evil}.layer1.0.weight": torch.zeros(1)}})

    @command
    def read(what):
        if what == "zip":
            print(*read_casia(tmp_path / "set.zip").notes)
            build(read_casia(tmp_path / "set.zip"), tmp_path)
        elif what == "net":
            announce(tmp_path / "net.pt", {"format": "", "net": "", "layout": "", "channels": "", "source": evil,
                                           "others": [evil], "ignored": [evil]})
            load_net(tmp_path / "net.pt", {})
        elif what == "list":
            read_landmarks(tmp_path / "list.txt", True)
        else:
            read_pairs(tmp_path / "faces", tmp_path / "pairs.txt")

    for what in ("list", "pairs", "zip", "net"):
        with pytest.raises(SystemExit):
            read(what)
        printed = "".join(capsys.readouterr())
        assert not set(printed) & {"\x1b", "\u202e"} and "\\x1b[2J" in printed, what
