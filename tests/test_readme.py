"""What the README and its pages tell people to type, to open and to find is there."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHARED = {"casia_train.py": "faces/recipe.py", "lfw_eval.py": "faces/evaluate.py",      # where other options are
          "lfw_landmark.py": "mtcnn/landmark_lists.py", "casia_landmark.py": "mtcnn/landmark_lists.py",
          "compare.py": "faces/weights.py", "export.py": "faces/weights.py", "tsne.py": "faces/weights.py"}


def commands(page):
    """(folder or "*", script, its options) of each command in an indented block; a backslash joins lines."""
    folder = "*"
    block = "\n".join(re.findall(r"^ {4}.*", page.read_text(encoding="utf-8"), re.M)).replace("\\\n", " ")
    for command in re.split(r"\n|&&", block):
        command = command.partition("#")[0]
        if moved := re.search(r"cd (\S+)", command):
            folder = moved[1]
        elif script := re.search(r"(?:python|torchrun).* (\w+\.py)(.*)", command):
            yield folder, script[1], re.findall(r"--[a-z][a-z-]*", script[2])


def options(folder, script):
    """The options that a script knows, as its source names them."""
    files = [*ROOT.glob(f"{folder}/{script}"), *([ROOT / SHARED[script]] if script in SHARED else [])]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    known = re.findall(r"\"(--[a-z-]+)\"", text)
    return {*known, *(option.replace("--", "--no-", 1) for option in known)}


@pytest.mark.parametrize("page", ["README.md", "docs/accuracy.md", "docs/scale.md"])
def test_commands_have_options_that_exist(page):
    found = list(commands(ROOT / page))
    assert len(found) > 2 and all(any(ROOT.glob(f"{folder}/{script}")) for folder, script, _ in found)
    assert not [(script, option) for folder, script, used in found for option in used
                if option not in options(folder, script)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_tree_names_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("## References")[0]
    folders = ("faces", "mtcnn", "tools", "docs", "benchmarks", "sphereFace")
    files = {path.name for folder in folders for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".md")}
    assert not {name for name in files - {"__init__.py"} if name not in tree}
