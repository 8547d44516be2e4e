"""Each stage in JupyterLab, in a real browser: open, Run All, save, and look at what the live kernel did.

Such a test fools itself easily, so: outputs are stripped from the copy first, the kernel of this very notebook
must become idle, every code cell must carry a fresh execution count, no dialog may be open, an error output fails.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import browser, needs_chromium

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
FIRST = "07_analysis"  # the one that `make test` runs: seconds, no model

pytestmark = [pytest.mark.browser, needs_chromium]

STATE = """name => {
  const panels = [...window.jupyterapp.shell.widgets('main')];
  const panel = panels.find(w => w.context && w.context.path.endsWith(name));
  if (!panel) return null;
  const cells = [...panel.context.model.cells].map(c => ({type: c.type, source: c.sharedModel.getSource(),
    count: c.executionCount ?? null, outputs: c.outputs ? c.outputs.toJSON() : []}));
  return {status: panel.sessionContext.session?.kernel?.status ?? 'none',
          pending: panel.sessionContext.isReady === false,
          dirty: panel.context.model.dirty, cells};
}"""


def stripped(source, target):
    "A copy without outputs and counts: what is seen later was made live."
    nb = json.loads(source.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    target.write_text(json.dumps(nb), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab over a copy of the project's notebooks, with a HOME of its own."
    home = tmp_path_factory.mktemp("home")
    work = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", work)
    shutil.copytree(ROOT / "nbs", work / "nbs", ignore=shutil.ignore_patterns("_*"))
    for stage in STAGES:
        stripped(stage, work / "nbs" / stage.name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(8)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IN_TEST", "CODETUNE_RUNS"))}
    env |= dict(
        HOME=str(home),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        IPYTHONDIR=str(home / "ipython"),
        CODETUNE_CACHE=os.environ.get("CODETUNE_CACHE", str(ROOT / ".cache" / "codetune")),
    )
    args = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={work}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--ServerApp.port_retries=0",
    ]
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(args, cwd=work, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        time.sleep(0.5)
        if server.poll() is not None:
            pytest.fail(f"JupyterLab ended: {(home / 'lab.log').read_text()[-2000:]}")
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
    yield dict(address=address, token=token, work=work)
    server.terminate()
    server.wait(20)


def run_all(page, lab, name, limit_s):
    "Open a notebook, restart its kernel and run every cell; returns the live state once the kernel rests."
    page.goto(f"{lab['address']}/lab/workspaces/auto-{name}/tree/nbs/{name}.ipynb?token={lab['token']}&reset")
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.started", timeout=60_000)
    page.wait_for_function(
        f"name => (({STATE})(name) || {{}}).status === 'idle'", arg=f"{name}.ipynb", timeout=90_000
    )
    before = page.evaluate(STATE, f"{name}.ipynb")
    assert all(c["count"] is None and not c["outputs"] for c in before["cells"]), (
        "the copy still holds outputs"
    )
    page.evaluate(
        "() => { window.done = null; window.jupyterapp.commands.execute('notebook:run-all-cells')"
        ".then(() => window.done = 'ok', e => window.done = String(e)); }"
    )
    end = time.time() + limit_s
    while time.time() < end:
        page.wait_for_timeout(500)
        dialog = page.locator(".jp-Dialog")
        assert dialog.count() == 0, f"a dialog is open: {dialog.first.inner_text()}"
        state = page.evaluate(STATE, f"{name}.ipynb")
        failed = [o for c in state["cells"] for o in c["outputs"] if o["output_type"] == "error"]
        if failed:
            return state
        if page.evaluate("() => window.done") and state["status"] == "idle":
            break
    else:
        pytest.fail(f"{name} was still {state['status']} after {limit_s} s")
    page.wait_for_timeout(500)
    state = page.evaluate(STATE, f"{name}.ipynb")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function(f"name => !({STATE})(name).dirty", arg=f"{name}.ipynb", timeout=30_000)
    return state


def check(lab, name, state):
    "No error, every code cell counted once in order, and the saved file says the same."
    errors = [o for c in state["cells"] for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, f"{name}: {errors[0]['ename']}: {errors[0]['evalue'][:500]}"
    counts = [c["count"] for c in state["cells"] if c["type"] == "code" and c["source"].strip()]
    assert counts == list(range(1, len(counts) + 1)), f"{name}: execution counts {counts}"
    saved = json.loads((lab["work"] / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert [
        c["execution_count"]
        for c in saved["cells"]
        if c["cell_type"] == "code" and "".join(c["source"]).strip()
    ] == counts


@pytest.mark.parametrize(
    "name", [pytest.param(p.stem, marks=() if p.stem == FIRST else pytest.mark.long) for p in STAGES]
)
def test_run_all(lab, name):
    with browser() as chrome:
        page = chrome.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(60_000)
        state = run_all(page, lab, name, limit_s=300)
        check(lab, name, state)
    runs = list((lab["work"] / "runs").rglob("manifest.json"))
    mine = [m for m in map(lambda p: json.loads(p.read_text()), runs) if m["stage"] == name]
    assert mine and mine[-1]["status"] == "complete", (
        f"{name} left no complete run: {[m['status'] for m in mine]}"
    )


def test_a_failing_cell_is_noticed(lab):
    "The test itself, seen to fail: a notebook whose second cell raises."
    nb = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        "cells": [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
                "source": s,
            }
            for i, s in enumerate(["x = 1", "1/0", "x"])
        ],
    }
    (lab["work"] / "nbs" / "fails.ipynb").write_text(json.dumps(nb))
    with browser() as chrome:
        page = chrome.new_page()
        state = run_all(page, lab, "fails", limit_s=60)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check(lab, "fails", state)


def test_a_wrong_parameter_is_refused_in_jupyterlab(lab):
    "A misspelt name in the parameters cell stops the notebook with the nearest right one."
    path = lab["work"] / "nbs" / f"{FIRST}.ipynb"
    stripped(ROOT / "nbs" / path.name, path)
    nb = json.loads(path.read_text())
    cell = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]).replace("n_boot: int", "n_bot: int")
    (lab["work"] / "nbs" / "wrong.ipynb").write_text(json.dumps(nb))
    with browser() as chrome:
        page = chrome.new_page()
        state = run_all(page, lab, "wrong", limit_s=90)
    said = [o["evalue"] for c in state["cells"] for o in c["outputs"] if o["output_type"] == "error"]
    assert said and "n_bot" in said[0] and "n_boot" in said[0]
