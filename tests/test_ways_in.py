"The same stage, four ways in: wrong names and types are refused, each leaves a complete run directory."

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from codetune.runner import StageFailed, run_pipeline, run_stage

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "from dataclasses import dataclass\nfrom codetune.config import configure\nfrom codetune.runs import Run"
)
PARAMETERS = """# parameters: papermill -p NAME VALUE, or codetune run -p NAME VALUE
experiment_name: str = 'demo'  # folder
seed: int = 1  # seed
lr: float = 1e-5  # rate
source_path: str = ''  # a file"""
DATACLASS = """@dataclass(frozen=True)
class Demo:
    experiment_name:str='demo'
    seed:int=1
    lr:float=1e-5
    source_path:str=''"""
START = """cfg = configure(Demo, globals())
given = {'source':cfg.source_path} if cfg.source_path else {}
run = Run.start('99_demo', cfg, dataset='d', algorithm='demo', inputs=given)"""
WORK = "if cfg.lr>1: raise RuntimeError('lr too high')\n(run.dir/'out.txt').write_text(str(cfg.lr))"
FINISH = "_ = run.finish(dict(lr=cfg.lr, outputs=dict(text=str(run.dir/'out.txt'))))"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    "A stage notebook small enough to run in two seconds, and an empty runs folder."
    monkeypatch.setenv("CODETUNE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("IN_TEST", raising=False)
    path = tmp_path / "99_demo.ipynb"
    cells = [new_code_cell(s) for s in (IMPORTS, PARAMETERS, DATACLASS, START, WORK, FINISH)]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")),
        ),
        path,
    )
    return path


def manifests(tmp_path):
    return [json.loads(p.read_text()) for p in sorted(tmp_path.rglob("manifest.json"))]


def test_papermill_takes_text_for_numbers_and_finishes(stage, tmp_path):
    papermill.execute_notebook(stage, tmp_path / "out.ipynb", dict(lr="5e-7"), progress_bar=False)
    (m,) = manifests(tmp_path)
    assert m["status"] == "complete" and m["parameters"]["lr"] == 5e-7


@pytest.mark.parametrize(
    "bad, message",
    [(dict(lrr=1), "did you mean lr?"), (dict(seed="many"), "seed='many'"), (dict(seed=True), "not int")],
)
def test_papermill_refuses(stage, tmp_path, bad, message):
    with pytest.raises(PapermillExecutionError, match=message.replace("?", r"\?")):
        papermill.execute_notebook(stage, tmp_path / "out.ipynb", bad, progress_bar=False)
    assert not manifests(tmp_path), "a refused run leaves no run directory"


def lab(path, source):
    "What JupyterLab does: the user's edited parameters cell, then Run All in one kernel."
    nb = nbformat.read(path, 4)
    nb.cells[1].source = source
    NotebookClient(
        nb, timeout=120, kernel_name="python3", resources=dict(metadata=dict(path=str(path.parent)))
    ).execute()


def test_lab_edit_counts(stage, tmp_path):
    lab(stage, PARAMETERS.replace("1e-5", "3e-4"))
    assert manifests(tmp_path)[0]["parameters"]["lr"] == 3e-4


@pytest.mark.parametrize(
    "old, new, message",
    [("lr: float", "lrr: float", "did you mean lr"), ("seed: int = 1 ", "seed: int = 'x' ", "seed='x'")],
)
def test_lab_refuses(stage, old, new, message):
    with pytest.raises(CellExecutionError, match=message):
        lab(stage, PARAMETERS.replace(old, new))


def test_runner_refuses_before_a_kernel_starts(stage, tmp_path):
    with pytest.raises(ValueError, match="did you mean lr"):
        run_stage(str(stage), dict(lrr="1"))
    assert not (tmp_path / "runs").exists()


def test_runner_keeps_the_executed_notebook_and_the_error(stage, tmp_path):
    done = run_stage(str(stage), dict(lr="1e-3"), quiet=True)
    assert Path(done["notebook"]).parent == Path(done["run_dir"])
    with pytest.raises(StageFailed, match="RuntimeError: lr too high"):
        run_stage(str(stage), dict(lr="2"), quiet=True)
    assert [m["status"] for m in manifests(tmp_path)] == ["complete", "failed"]
    assert len(list((tmp_path / "runs").rglob("99_demo.ipynb"))) == 2


def test_papermill_to_a_pipe_leaves_a_complete_run(stage, tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m papermill {stage} -p lr 5e-7 </dev/null | cat",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert json.loads(done.stdout)["nbformat"] == 4
    (m,) = manifests(tmp_path)
    assert m["status"] == "complete" and m["parameters"]["lr"] == 5e-7


def test_killed_run_is_interrupted_and_nothing_is_overwritten(stage, tmp_path):
    from codetune.records import find_runs

    code = """import os,signal
from codetune.runs import Run
Run.start('99_demo', {}, dataset='d', algorithm='demo')
os.kill(os.getpid(), signal.SIGKILL)"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert [r["status"] for r in find_runs()] == ["interrupted"] * 2
    assert [Path(r["dir"]).name for r in find_runs()] == ["run_1", "run_2"]


@pytest.fixture
def pipeline(stage, tmp_path):
    second = tmp_path / "98_next.ipynb"
    second.write_text(stage.read_text())
    spec = tmp_path / "two.yaml"
    spec.write_text(
        f"name: two\nstages:\n- {{id: first, notebook: {stage}}}\n"
        f"- {{id: next, notebook: {second}, params: {{source_path: '${{first.outputs.text}}'}}}}\n"
    )
    return str(spec)


def test_pipeline_hands_paths_on_and_resumes(pipeline, tmp_path, capsys):
    done = run_pipeline(pipeline, {"seed": "2", "next.lr": "1e-4"}, quiet=True)
    assert done["first"]["lr"] == 1e-5 and done["next"]["lr"] == 1e-4
    (first, second) = sorted(manifests(tmp_path), key=lambda m: m["started"])
    assert (
        first["seed"] == second["seed"] == 2
        and second["inputs"]["source"]["path"] == done["first"]["outputs"]["text"]
    )
    again = run_pipeline(pipeline, {"seed": "2", "next.lr": "1e-4"}, resume=True, quiet=True)
    assert again == done and capsys.readouterr().out.count("unchanged, kept from") == 2
    Path(done["first"]["outputs"]["text"]).write_text("edited")
    third = run_pipeline(pipeline, {"seed": "2", "next.lr": "1e-4"}, resume=True, quiet=True)
    assert third["first"] == done["first"] and third["next"]["run_dir"] != done["next"]["run_dir"]


def test_pipeline_refuses_what_no_stage_takes(pipeline):
    with pytest.raises(ValueError, match="did you mean seed"):
        run_pipeline(pipeline, {"sed": "2"})
    with pytest.raises(ValueError, match="did you mean next"):
        run_pipeline(pipeline, {"nxt.lr": "2"})


def test_environment_stands_between_flag_and_recipe(tmp_path, monkeypatch):
    from codetune.runner import find_stage, merge_parameters

    path = find_stage("03_sft")
    monkeypatch.setenv("BATCH_SIZE", "3")
    assert (
        "per_device_train_batch_size"
        not in merge_parameters(path, {}, dict(per_device_train_batch_size=8))[0]
    )
    assert (
        merge_parameters(path, dict(per_device_train_batch_size=2), dict(per_device_train_batch_size=8))[0][
            "per_device_train_batch_size"
        ]
        == 2
    )


def test_help_is_quick_and_light():
    code = """import sys
from codetune.cli import main
main(['--help'])
print('HEAVY', sorted({'torch','transformers','datasets','matplotlib','papermill'} & set(sys.modules)))"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        timeout=60,
    ).stdout
    assert "show-mask" in out and out.rstrip().endswith("HEAVY []")
