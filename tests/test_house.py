"""The structure of the code: imports go one way, files and functions stay short, importing has no side effects."""
import ast
import subprocess
import sys

from conftest import ROOT

# Each layer may import from itself and from those with smaller numbers.
LAYERS = {"faces.cpu": 1, "faces": 2, "faces.data": 3, "mtcnn": 4, "faces.training": 5, "faces.verification": 6,
          "cosFace": 7, "sphereFace": 7, "tools": 8, "benchmarks": 8, "images": 8}
# What one folder may never import from another, although the order of the layers would allow it.
FORBIDDEN = {"faces": ("mtcnn",), "faces.verification": ("faces.training",), "faces.training": ("faces.data",),
             "mtcnn": ("faces.training", "faces.verification"), "cosFace": ("sphereFace",), "sphereFace": ("cosFace",)}
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
         for folder in LAYERS if "." not in folder for path in sorted((ROOT / folder).rglob("*.py"))}


def layer(module):
    """Return the layer of a dotted module name, or 0 if it is not one of ours."""
    first, second = (module.split(".") + [""])[:2]
    return LAYERS.get(f"{first}.{second}", LAYERS.get(first, 0))


def imports(path):
    """Yield the dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
    for module, path in FILES.items():
        first, second = (module.split(".") + [""])[:2]
        forbidden = FORBIDDEN.get(first, ()) + FORBIDDEN.get(f"{first}.{second}", ())
        assert not [name for name in imports(path) if layer(name) > layer(module) or name.startswith(forbidden)], module
    assert layer("faces.verification.lfw") > layer("faces.data.cache") > layer("faces.device") > layer("faces.cpu.a")


def test_files_and_functions_are_short():
    long = []
    for path in [*FILES.values(), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 350:
            long.append(path)
        long += [(path, node.name) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
                 and node.end_lineno - node.lineno > 45 and path.name != "casia_train.py"]
    assert not long


def test_only_scripts_change_the_module_search_path():
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert ("sys.path" in text) == ('if __name__ == "__main__":' in text), module
        assert (path.parent / "__init__.py").exists(), module


def test_importing_has_no_side_effects(tmp_path):
    """Import every module in an empty folder: nothing is printed, written or parsed."""
    modules = [module for module in FILES if not module.endswith("__init__")]
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--no-such-option']\n"
    program += "".join(f"import {name}\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())
