"The main job at a small budget: raw files to a merged, evaluated model, then again with nothing to do."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = {
    "sft.max_steps": 3,
    "sft.max_len": 256,
    "num_env_steps": 8,
    "n_rollout_threads": 8,
    "appo.eval_tasks": 4,
    "appo.eval_samples": 2,
    "appo.max_new_tokens": 24,
    "marft_env.max_samples": 24,
    "n_boot": 500,
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    "Both runs' output and the summaries by stage."
    runs = tmp_path_factory.mktemp("runs")
    args = [
        sys.executable,
        "-m",
        "codetune.cli",
        "pipeline",
        "quickstart",
        "--resume",
        *(w for k, v in SMALL.items() for w in ("-p", k, str(v))),
    ]
    env = {**os.environ, "CODETUNE_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    env.pop("IN_TEST", None)
    first, second = (
        subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    return runs, first, second


def summaries(runs):
    return {
        json.loads(p.read_text())["stage"]: (p.parent, json.loads(p.read_text()))
        for p in runs.rglob("summary.json")
    }


def test_every_stage_ends_complete_beside_its_executed_notebook(quickstart):
    runs, _, _ = quickstart
    manifests = {
        json.loads(p.read_text())["stage"]: p
        for p in runs.rglob("manifest.json")
        if "stage" in json.loads(p.read_text())
    }
    assert len(manifests) == 8
    for stage, path in manifests.items():
        assert json.loads(path.read_text())["status"] == "complete", stage
        assert (path.parent / f"{stage}.ipynb").exists(), stage


def test_analysis_draws_the_curves_of_both_trainings(quickstart):
    runs, _, _ = quickstart
    folder = summaries(runs)["07_analysis"][0]
    names = "loss reward kl entropy clipfrac pass_rate differences".split()
    assert [n for n in names if not (folder / f"{n}.png").exists()] == []


def test_hand_over_is_by_path_and_hash(quickstart):
    runs, _, _ = quickstart
    done = summaries(runs)
    manifest = json.loads((done["03_sft"][0] / "manifest.json").read_text())
    assert done["01_chatml_tokenize"][1]["outputs"]["sft_train"] in [
        i["path"] for i in manifest["inputs"].values()
    ]
    appo = json.loads((done["05_appo"][0] / "manifest.json").read_text())
    assert (
        all(i["sha256"] for i in appo["inputs"].values())
        and appo["parameters"]["init_adapter_path"] == done["03_sft"][1]["outputs"]["adapter"]
    )


def test_rows_add_up(quickstart):
    totals = summaries(quickstart[0])["00_data_formats"][1]["totals"]
    assert (
        totals["records"]
        == totals["rows"] + totals["duplicates"] + totals["contaminated"] + totals["rejects"]
        and totals["rejects"] > 0
    )


def test_merged_model_loads_in_plain_transformers(quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = summaries(quickstart[0])["06_merge"][1]["outputs"].values()
    model, tok = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tok.apply_chat_template(
        [{"role": "user", "content": "Say hi."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    assert model(ids).logits.shape[-1] == model.config.vocab_size


def test_analysis_compares_base_sft_and_appo(quickstart):
    where, summary = summaries(quickstart[0])["07_analysis"]
    assert len(summary["pass_at_1"]) >= 3, summary["pass_at_1"]
    for rate in summary["pass_at_1"].values():
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    assert (where / "model_card.md").exists() and list(where.glob("*.png")) and list(where.glob("*.svg"))


def test_again_changes_nothing(quickstart):
    _, _, second = quickstart
    assert second.returncode == 0 and second.stdout.count("unchanged, kept from") == 8, second.stdout[-2000:]
