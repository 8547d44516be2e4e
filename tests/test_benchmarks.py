"The benchmarks run by hand; that they still find what they import is checked here."
import ast, importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "benchmarks").rglob("*.py"))


def imported(tree):
    "(module, name) of everything that a script takes from codetune, wherever in it."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "codetune":
            yield from ((node.module, a.name) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.split(".")[0] == "codetune")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_benchmark_finds_what_it_imports(path):
    for module, name in imported(ast.parse(path.read_text())):
        found = importlib.import_module(module)
        if name is None or hasattr(found, name): continue
        importlib.import_module(f"{module}.{name}")      # a submodule, or an error that names it
