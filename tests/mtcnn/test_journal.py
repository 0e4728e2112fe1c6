"""The journal of an unfinished landmark list: what makes it continue, and what it survives."""
import os

import pytest

from faces.files import InputError
from mtcnn.journal import Journal
from mtcnn.search import Find

SETTINGS = {"device": "cpu", "images": "1", "photos": "2", "select": "center", "min_face_size": 20}
FINDS = [Find(3, (9, 9), 0, [1.5] * 10), Find(0, (9, 9), -1, None)]


@pytest.fixture
def list_path(tmp_path):
    """Return the path of a list that has a journal with FINDS, of images 3 and 0."""
    Journal(tmp_path / "list.txt", SETTINGS, 5).add(FINDS)
    return tmp_path / "list.txt"


def test_an_incomplete_line_is_dropped(list_path, capsys):
    with open(list_path.with_name(".list.txt.partial"), "ab") as file:
        file.write(b'[2, [9, 9], 0, [1.0, ')
    journal = Journal(list_path, SETTINGS, 5)
    assert journal.missing() == [1, 2, 4]
    journal.add([Find(2, (9, 9), 1, [2.0] * 10)])
    assert [find.index for find in journal.finds()] == [0, 2, 3]
    assert [find.index for find in Journal(list_path, SETTINGS, 5).finds()] == [0, 2, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change, reason", [({"device": "cuda"}, "other settings (device)"),
                                            ({"min_face_size": 40, "select": "largest"}, "(min_face_size, select)"),
                                            ({"photos": "3"}, "the photos have changed"),
                                            ({"images": "3", "photos": "3"}, "the photos have changed")])
def test_a_journal_of_something_else_is_discarded_with_the_reason(list_path, capsys, change, reason):
    assert Journal(list_path, SETTINGS | change, 5).missing() == [0, 1, 2, 3, 4]
    out = capsys.readouterr().out
    assert out.startswith("starting over, because") and reason in out and out.count("\n") == 1
    assert Journal(list_path, SETTINGS | change, 5).missing() == [0, 1, 2, 3, 4] and capsys.readouterr().out == ""


@pytest.mark.parametrize("line", [b"\0" * 30, b"[1, [9, 9], 0, [1.0", b"{}", b"7", b"[5, [9, 9], -1, null]", b"\xff",
                                  b"[1, [9, 9], 0, null]", b"[1, [9, 9], 0, [NaN, 1, 1, 1, 1, 1, 1, 1, 1, 1]]",
                                  b"[1, [9, 9], 0, [1e308, 1, 1, 1, 1, 1, 1, 1, 1, 1]]",
                                  b"[1, [0, 9], -1, null]", b"[1, [9, 9], 0, [1, 2]]", b"[1, 9, -1, null]",
                                  b"[" * 100_000], ids=lambda line: line[:12].hex())
def test_damaged_lines_are_counted_and_ignored(list_path, capsys, line):
    path = list_path.with_name(".list.txt.partial")
    header, first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([header, first, line, second, b""]))
    journal = Journal(list_path, SETTINGS, 5)
    assert journal.missing() == [1, 2, 4] and [find.index for find in journal.finds()] == [0, 3]
    assert "ignoring 1 damaged line(s)" in capsys.readouterr().out


@pytest.mark.parametrize("header", [b"\0\0\n", b"7\n", b'{"select": \n', b"\n"])
def test_a_damaged_header_starts_over(list_path, capsys, header):
    path = list_path.with_name(".list.txt.partial")
    path.write_bytes(header + path.read_bytes().split(b"\n", 1)[1])
    assert len(Journal(list_path, SETTINGS, 5).missing()) == 5
    assert "the journal is damaged" in capsys.readouterr().out


def test_a_journal_that_changes_during_the_run_is_one_sentence(list_path):
    journal = Journal(list_path, SETTINGS, 5)
    os.truncate(journal.path, 0)
    with pytest.raises(InputError, match="another program has changed"):
        list(journal.finds())


def test_a_planted_link_or_pipe_is_refused(tmp_path):
    victim, journal = tmp_path / "victim", tmp_path / ".list.txt.partial"
    victim.write_text("precious")
    journal.symlink_to(victim)
    with pytest.raises(InputError, match="is a link or not a regular file; remove it"):
        Journal(tmp_path / "list.txt", SETTINGS, 5)
    assert victim.read_text() == "precious"
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(InputError, match="not a regular file; remove it"):
        Journal(tmp_path / "list.txt", SETTINGS, 5)
