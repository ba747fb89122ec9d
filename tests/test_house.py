"""The rules of the house that no linter holds."""

import ast
import fnmatch
import re

import pytest

from exporter import discover
from exporter.errors import ExporterError
from tests.conftest import ROOT

SOURCES = sorted((ROOT / "exporter").rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE
    assert [node.name for node in functions(path) if length(node) > MAX_FUNCTION] == []


def test_nine_functions_in_ten_are_within_30_lines():
    lengths = sorted(length(node) for path in SOURCES for node in functions(path))
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(len(lengths) * 0.9)] <= 30


def test_below_cli_nobody_prints():
    printing = re.compile(r"\b(print|click\.echo|sys\.std(out|err)\.write)\(")
    below = [path for path in SOURCES if "cli" not in path.parts]
    assert [path.name for path in below if printing.search(path.read_text())] == []


def test_a_vendor_is_named_in_its_backend_only():
    """A runtime is imported in its own file or folder."""
    vendors = re.compile(r"^\s*(import|from) (onnxruntime|openvino|tensorrt)\b", re.M)
    importing = [path.relative_to(ROOT / "exporter/backends") for path in SOURCES if vendors.search(path.read_text())]
    assert {path.parts[0].removesuffix(".py") for path in importing} <= {"onnxruntime", "openvino"}


def test_a_runtime_is_named_in_its_backend_only():
    """Elsewhere its name may stand in comments and docstrings, and where it is derived from its records."""
    names = re.compile("onnxruntime|openvino|tensorrt", re.I)
    code = {path: ast.parse(path.read_text()) for path in SOURCES if "backends" not in path.parts}
    for tree in code.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    naming = {path.relative_to(ROOT / "exporter").as_posix() for path in code if names.search(ast.unparse(code[path]))}
    assert naming <= {"artifact/sidecar.py"}, "it has the commands that wrote old sidecars"
    assert len(code) > 60


def test_discovery_offers_the_nearest_name_and_swallows_nothing(tmp_path, monkeypatch):
    with pytest.raises(ExporterError, match="did you mean 'parity'"):
        discover.load("exporter.verify.checks", "parrity", "CHECK")
    (tmp_path / "broken_pack").mkdir()
    (tmp_path / "broken_pack" / "__init__.py").write_text("")
    (tmp_path / "broken_pack" / "bad.py").write_text("import nothing_of_the_kind")
    monkeypatch.syspath_prepend(tmp_path)
    assert discover.names("broken_pack") == ["bad"]
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        discover.load("broken_pack", "bad", "CHECK")


def test_every_verb_has_help_with_an_example(run):
    from exporter.cli import groups

    for verb in [name for names in groups().values() for name in names]:
        result = run(verb, "--help")
        assert result.code == 0
        assert f"convnext-export {verb}" in result.out.partition("Options:")[0], f"{verb} --help has no example"


def test_no_path_of_this_machine_is_in_the_product():
    tracked = [
        path for folder in ("exporter", "benchmarks", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    for path in [*tracked, *ROOT.glob("*.md"), ROOT / "Makefile"]:
        if "__pycache__" not in path.parts:
            text = path.read_text(errors="ignore")
            assert not re.search(r"(?<![\w.])/(root|work|home)/", text), path
    assert len(tracked) > 150


def test_a_build_looks_nothing_up_below_resolve():
    """Targets and runtimes come from the job; `problems` is what `resolve` checks."""
    lookups = re.compile(r"\bbackends\.(runtime|target|runtime_of)\(")
    below = [
        path for path in SOURCES if "build" in path.parent.parts and path.name not in ("resolve.py", "problems.py")
    ]
    below = [path for path in below if "cli" not in path.parts]
    assert len(below) >= 7
    assert [path.name for path in below if lookups.search(path.read_text())] == []


def test_every_folder_of_tests_is_collected(pytestconfig):
    ignored = pytestconfig.getini("norecursedirs")
    folders = {parent for path in (ROOT / "tests").rglob("test_*.py") for parent in path.relative_to(ROOT).parents}
    names = {folder.name for folder in folders} - {""}
    assert "build" in names
    assert [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in ignored)] == []


def test_tests_that_need_a_gpu_lie_where_make_gpu_looks():
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    assert {path.parent.name for path in marked if path.name != "test_house.py"} == {"backends"}
