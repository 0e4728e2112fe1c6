"""Damaged and hostile files: readers return, or raise one sentence. tests/fuzz/run.py goes on where this ends."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import TARGETS, run_round


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_or_refused(target, tmp_path):
    assert not run_round(target, range(20 if target == "weights" else 80), tmp_path)
