"Every guide, followed literally: its commands in order, in an empty project, and what the page promises."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "nbs" / "guides"


def blocks(name):
    "The bash and python blocks of a guide, in order."
    text = (GUIDES / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    "A folder with `codetune` and `python` as a user of the project's environment has them."
    folder = tmp_path_factory.mktemp("bin")
    (folder / "codetune").write_text(f'#!/bin/sh\nexec {sys.executable} -m codetune.cli "$@"\n')
    (folder / "codetune").chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return folder


@pytest.fixture
def project(tmp_path, command):
    "A clone without runs: the reader's starting point."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("_*"))
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CODETUNE_RUNS")}
    env |= dict(
        PATH=f"{command}:{env['PATH']}",
        PYTHONPATH=str(ROOT),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        CODETUNE_CACHE=env.get("CODETUNE_CACHE", str(ROOT / ".cache" / "codetune")),
        WANDB_MODE="disabled",
    )
    return tmp_path, env


def follow(name, project):
    "Run every block; the output of each, or a failure that shows the block and what it said."
    folder, env = project
    said = []
    for kind, code in blocks(name):
        run = ["bash", "-e", "-o", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (
            f"{name}:\n{code}\n--- said:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        )
        said.append(done.stdout + done.stderr)
    return folder, said


def test_bring_your_own_data(project):
    folder, said = follow("bring_your_own_data", project)
    assert len((folder / "my_processed/sft_train.jsonl").read_text().splitlines()) == 4
    assert "faq.jsonl:3" in (folder / "my_processed/sft_train.rejects.jsonl").read_text()
    assert (folder / "my_adapter/adapter/adapter_model.safetensors").exists()
    assert list((folder / "my_merged").glob("*.safetensors")) and "coder>" in said[-1]


def test_troubleshooting(project):
    _, said = follow("troubleshooting", project)
    assert "input_ids" in said[-1] and "--tokenize" in said[-1]


@pytest.mark.long
def test_bring_your_own_tasks(project):
    folder, said = follow("bring_your_own_tasks", project)
    assert "complete" in said[-1] and list((folder / "runs/my_tasks").rglob("metrics.jsonl"))


@pytest.mark.long
def test_add_an_agent(project):
    folder, said = follow("add_an_agent", project)
    assert (
        "3" in said[2] and "2" in said[2] and len(list((folder / "runs/my_team").rglob("summary.json"))) == 2
    )


def test_change_the_reward_in_python(project):
    "The Python of the page; its training command is part of the long tests."
    folder, env = project
    for kind, code in blocks("change_the_reward"):
        if kind == "python":
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=200
            )
            assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_change_the_reward(project):
    folder, _ = follow("change_the_reward", project)
    assert list((folder / "runs/my_reward").rglob("summary.json"))


def test_every_guide_is_followed_by_a_test():
    tested = {n.removeprefix("test_") for n in globals() if n.startswith("test_")}
    assert {p.stem for p in GUIDES.glob("*.md")} <= tested


def test_every_problem_of_the_users_has_a_section():
    text = (GUIDES / "troubleshooting.md").read_text(encoding="utf-8").lower()
    heads = " ".join(re.findall(r"^## (.*)", text, re.M))
    for word in (
        "out of memory",
        "unstable",
        "weak",
        "no space left",
        "bitsandbytes",
        "target_modules",
        "input_ids",
    ):
        assert word in heads
