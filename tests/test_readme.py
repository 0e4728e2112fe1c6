"""The README and docs tell people to type, open and run only what exists and works."""
import contextlib
import functools
import io
import re
import runpy
import sys

import pytest
from conftest import ROOT, write_model

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """Return the indented blocks of a page, with lines that end in a backslash joined."""
    return "\n".join(re.findall(r"^ {4}.*", page.read_text(encoding="utf-8"), re.M)).replace("\\\n", " ")


def commands(page):
    """Yield (script, its options) for each command in an indented block."""
    for line in blocks(page).splitlines():
        command = re.match(r" *(?:python|torchrun(?: --[a-z-]+ \S+)*) (\S+\.py)\b([^#]*)", line)
        if command:
            yield command[1], re.findall(r"--[a-z][a-z-]*", command[2])


@functools.cache
def options_of(script):
    """Return the options that a script's --help names; it runs in this process, which has imported torch."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output, \
            pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", sys.path.copy())
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit.value.code in (0, None)
    return set(re.findall(r"--[a-z][a-z-]*", output.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_from_the_root_and_have_the_options_they_use(page):
    """A block can be pasted: its commands are relative to the root of the clone, whatever ran before."""
    assert "cd " not in re.sub(r"git clone.*", "", blocks(page))
    for script, used in commands(page):
        assert (ROOT / script).is_file(), script
        if script != "images/draw.py":
            assert not set(used) - options_of(script), script


def test_the_readme_shows_the_main_commands():
    assert [script for script, _ in commands(ROOT / "README.md")][:6] == [
        "mtcnn/casia_landmark.py", "mtcnn/lfw_landmark.py", "cosFace/casia_train.py", "sphereFace/casia_train.py",
        "cosFace/lfw_eval.py", "sphereFace/lfw_eval.py"]


def test_the_readmes_python_example_runs(photos, tmp_path, monkeypatch, capsys):
    example = re.search(r"^ {4}from tools.embedder .*\n(?: {4}.*\n)*", (ROOT / "README.md").read_text("utf-8"), re.M)[0]
    write_model(tmp_path / "demo/model/checkpoint.pt")
    (tmp_path / "a.jpg").symlink_to(photos / "face.png")
    (tmp_path / "b.jpg").symlink_to(photos / "brighter.png")
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"^ {4}", "", example, flags=re.M), {})
    assert -1 <= float(capsys.readouterr().out) <= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    local = r"\]\((?!http|\.\./\.\./actions)([^)#]*)#?([^)]*)\)"    # GitHub's own pages are in ../../actions
    for target, anchor in re.findall(local, page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
