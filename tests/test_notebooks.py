"What every stage notebook owes its readers, whoever wrote it."

import ast
import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from codetune.runner import STAGES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / ".ci"))
from refresh import code_hash  # noqa: E402

FIRST = "# parameters: papermill -p NAME VALUE, or codetune run -p NAME VALUE"
stages = pytest.mark.parametrize("stage", STAGES)


def notebook(stage):
    return nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", 4)


def parameters(nb):
    cells = [c.source for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1, "exactly one cell is tagged parameters"
    return cells[0]


@stages
def test_parameters_cell_is_one_that_papermill_and_we_understand(stage):
    lines = parameters(notebook(stage)).splitlines()
    assert lines[0] == FIRST
    for line in lines[1:]:
        if line.strip() and not line.startswith("#"):
            assert line.count("=") == 1, f"a second = hides this from --help-notebook: {line}"
    for node in ast.parse("\n".join(lines)).body:
        assert isinstance(node, ast.AnnAssign), "name: type = value"
        ast.literal_eval(node.value)


@stages
def test_parameters_cell_agrees_with_the_dataclass(stage):
    module, cls, _ = STAGES[stage]
    fields = {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(getattr(importlib.import_module(module), cls))
    }
    cell = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(parameters(notebook(stage))).body}
    same = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in cell.items()} == same


@stages
def test_papermill_lists_every_parameter(stage):
    module, cls, _ = STAGES[stage]
    fields = [f.name for f in dataclasses.fields(getattr(importlib.import_module(module), cls))]
    assert list(papermill.inspect_notebook(str(ROOT / "nbs" / f"{stage}.ipynb"))) == fields, (
        "an annotation such as int|None hides a parameter from --help-notebook"
    )


@stages
def test_committed_outputs_belong_to_the_code(stage):
    nb = notebook(stage)
    record = json.loads((ROOT / ".ci" / "outputs.json").read_text())
    assert any(c.get("outputs") for c in nb.cells), "no outputs: run make refresh"
    assert record[stage] == code_hash(nb), "the outputs are older than the code: run make refresh"


@stages
def test_committed_outputs_are_small_and_clean(stage):
    path = ROOT / "nbs" / f"{stage}.ipynb"
    assert path.stat().st_size <= 300_000
    for cell in notebook(stage).cells:
        for out in cell.get("outputs", []):
            assert out.output_type != "error", out
            text = json.dumps({k: v for k, v in out.items() if k != "data"}) + json.dumps(
                {k: v for k, v in out.get("data", {}).items() if k.startswith("text/")}
            )
            assert not re.search(r"/(root|home|tmp|work)/", text), text[:300]
            assert "it/s]" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_no_main_guard_and_no_export_inside_a_notebook(path):
    if ".ipynb_checkpoints" in path.parts or "_proc" in path.parts:
        return
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        guards = [
            n
            for n in ast.parse(cell.source).body
            if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test)
        ]
        assert not guards or path.stem == "cli"
        assert not re.search(r"^\s*(nbdev\.)?nbdev_export\(", cell.source, re.M)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_import_cells_hold_imports_only(path):
    "`nbdev_docs` executes exported cells and cells with an import only: a test would miss its variables."
    imports = (ast.Import, ast.ImportFrom)
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or re.search(r"^#\|\s*export", cell.source, re.M):
            continue
        tree = ast.parse(cell.source)
        if any(isinstance(n, imports) for n in ast.walk(tree)):
            assert all(isinstance(n, imports) for n in tree.body), (
                f"move the import to the import cell:\n{cell.source}"
            )
