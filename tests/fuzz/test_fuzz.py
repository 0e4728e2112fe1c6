"""Damaged and hostile files: readers return, or raise one sentence. tests/fuzz/run.py goes on where this ends."""
import sys

import pytest
from conftest import script


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_damaged_files_are_read_or_refused():
    done = script("tests/fuzz/run.py", "--seconds", 0)
    assert done.returncode == 0, done.stdout
