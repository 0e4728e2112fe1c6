"""The pictures of the README are deterministic and equal the committed ones."""
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from images import draw

COMMITTED = Path(draw.__file__).parent


@pytest.mark.parametrize("name", ["margins", "detection", "verification", "tsne"])
def test_pictures_equal_the_committed_ones(name, tmp_path):
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        getattr(draw, name)(folder)
        drawn.append(folder / f"{name}.png")
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    now, committed = Image.open(drawn[0]), Image.open(COMMITTED / f"{name}.png")
    assert now.convert("RGBA").getextrema()[3] == (255, 255)                 # opaque: black on white on a dark page too
    if now.info["Software"] != committed.info["Software"]:
        pytest.skip(f"{name}.png is by {committed.info['Software']}, which sets text elsewhere than "
                    f"{matplotlib.__version__}")
    assert now.size == committed.size
    # An edge may round another way on another machine; a formula or a curve that changed is a hundred pixels and more.
    differ = np.abs(np.asarray(now, int) - np.asarray(committed, int)).max(2) > 64
    assert differ.sum() < 50, f"{differ.sum()} pixels differ; run images/draw.py"
