"What a notebook cannot show about fine-tuning and merging: several processes, kills, memory."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file, save_file

from codetune.config import configure, load_recipe
from codetune.fixtures import tiny_model
from codetune.memory import estimate_memory
from codetune.qlora_load import settings_of
from codetune.sft import SFTConfig, train_sft

ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
ENV.pop("IN_TEST", None)

@pytest.fixture
def data(tmp_path):
    "Thirty-two random rows for the tiny model."
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 300, (int(n),), generator=rng).tolist() for n in torch.randint(8, 33, (32,), generator=rng)]
    path = tmp_path/"rows.jsonl"
    path.write_text("".join(json.dumps(dict(input_ids=x, label=[-100]*4 + x[4:])) + "\n" for x in rows))
    return path

def sft(data, out, *flags):
    "The command that trains the tiny model in fp32."
    return ["-m", "codetune.cli", "sft", "--data_path", str(data), "--model_name_or_path", str(tiny_model("qwen2")), "--method", "lora",
            "--dtype", "fp32", "--lr", "1e-2", "--max_len", "32", "--packing", "false", "--val_fraction", "0", "--output_dir", str(out), *flags]

def run(*command, **kw):
    done = subprocess.run([sys.executable, *command], env=ENV | {"CODETUNE_RUNS": kw["runs"]}, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout

def losses(runs):
    "The training losses of the only run below `runs`."
    metrics, = Path(runs).rglob("metrics.jsonl")
    return [r["loss/train"] for r in map(json.loads, metrics.read_text().splitlines()) if "loss/train" in r]

@pytest.mark.long
def test_two_processes_train_like_one(data, tmp_path):
    "Two gloo processes with two rows each make the same steps as one with four, and write one adapter."
    runs = lambda n: str(tmp_path/f"runs{n}")
    recipe = dict(zip(*[(w.removeprefix("--") for w in sft(data, tmp_path/"two")[3:])]*2))
    recipe |= dict(max_steps=5, warmup_ratio=0, per_device_train_batch_size=2)
    (tmp_path/"two.yaml").write_text(yaml.safe_dump(recipe))
    run("-m", "codetune.cli", "sft", "-f", str(tmp_path/"two.yaml"), "--output_dir", str(tmp_path/"one"), "--gradient_accumulation_steps", "2", runs=runs(1))
    run("-m", "accelerate.commands.launch", "--config_file", "codetune/assets/accelerate/ddp_cpu.yaml", "-m", "codetune.cli", "sft", "-f", str(tmp_path/"two.yaml"), runs=runs(2))
    one, two = losses(runs(1)), losses(runs(2))
    assert len(one) == 5 and one[4] != one[0]
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    a, b = (load_file(tmp_path/n/"adapter"/"adapter_model.safetensors") for n in ("one", "two"))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)

@pytest.mark.long
def test_killed_training_goes_on(data, tmp_path):
    "SIGKILL in the middle leaves only whole checkpoints; resuming ends with the weights of an undisturbed run."
    flags = ("--max_steps", "40", "--save_steps", "2", "--keep_checkpoints", "3", "--lora_dropout", "0.1")
    run(*sft(data, tmp_path/"calm", *flags), runs=str(tmp_path/"r1"))
    out = tmp_path/"killed"
    victim = subprocess.Popen([sys.executable, *sft(data, out, *flags)], env=ENV | {"CODETUNE_RUNS": str(tmp_path/"r2")}, cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(3000):
        if len(list(out.glob("checkpoints/steps_*"))) >= 2: break
        time.sleep(.05)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = sorted(out.glob("checkpoints/steps_*"))
    assert len(left) >= 2 and not (out/"adapter").exists()
    for c in left: assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= {f.name for f in c.iterdir()}
    said = run(*sft(data, out, *flags, "--resume"), runs=str(tmp_path/"r3"))
    assert f"resuming from {left[-1].name}" in said
    a, b = (load_file(tmp_path/n/"adapter"/"adapter_model.safetensors") for n in ("calm", "killed"))
    for k in a: assert torch.equal(a[k], b[k]), k

# recipe: the shipped configuration of its model, a tiny model of its kind, GB of the GPU that its first lines name
RECIPES = dict(qwen25_coder_sft_qlora=("qwen2.5-1.5b", "qwen2", 8), qwen25_coder_sft_lora=("qwen2.5-1.5b", "qwen2", 16),
               qwen25_coder_sft_full=("qwen2.5-1.5b", "qwen2", 40), qwen3_30b_qlora=("qwen3-30b-a3b", "qwen3_moe", 24),
               qwen3_30b_qlora_18gb=("qwen3-30b-a3b", "qwen3_moe", 18), qwen3_30b_lora=("qwen3-30b-a3b", "qwen3_moe", 80),
               qwen3_30b_full=("qwen3-30b-a3b", "qwen3_moe", None))

@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_a_tiny_model_of_their_kind(name, data, tmp_path, monkeypatch):
    "Every value of a recipe but model, data and length, in a run; the users' environment variables change what they did."
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    model, kind, _ = RECIPES[name]
    given = load_recipe(name)
    small = dict(data_path=str(data), model_name_or_path=str(tiny_model(kind)), max_len=64, max_steps=2, local_cache=False, use_wandb=False)
    cfg = configure(SFTConfig, overrides={k: v for k,v in given.items() if k != "wandb_project"} | small)
    assert cfg.wandb_project == "mine" and {k: getattr(cfg, k) for k in given if k not in ("wandb_project", *small)} == {
        k: v for k,v in given.items() if k not in ("wandb_project", *small)}
    quiet = SimpleNamespace(out=tmp_path, checkpoints=tmp_path/"checkpoints", is_main=True, log=lambda row, step: None)
    done = train_sft(cfg, quiet)
    assert done["steps"] == 2 and list(done["outputs"]) == ["model" if cfg.method == "full" else "adapter"]

@pytest.mark.parametrize("name", [n for n,(*_,gpu) in RECIPES.items() if gpu])
def test_recipes_fit_the_gpu_that_they_name(name):
    "By the estimator, with 1.2 GB left for CUDA itself where the recipe does not count it."
    model, _, gpu = RECIPES[name]
    assert f"{gpu} GB" in (ROOT/"nbs"/"recipes"/f"{name}.yaml").read_text().split("experiment_name")[0]
    cfg = configure(SFTConfig, overrides=load_recipe(name))
    keys = ("max_len", "optim", "logit_chunk", "gradient_checkpointing", "head_4bit")
    guess = estimate_memory(model, cfg.method, lora=settings_of(cfg), batch=cfg.per_device_train_batch_size, device="cuda",
                            dtype="mixed" if cfg.load_dtype == "fp32" else "bf16", **{k: getattr(cfg, k) for k in keys})
    assert guess["total"]/1e9 < (gpu if gpu == 18 else gpu - 1.2), guess

@pytest.mark.parametrize("name, expected", [
    ("ddp", dict(num_processes=2, multi_gpu=True, mixed_precision="bf16")), ("ddp_cpu", dict(num_processes=2, use_cpu=True)),
    ("fsdp2", dict(use_fsdp=True, fsdp_version=2, fsdp_auto_wrap_policy="TRANSFORMER_BASED_WRAP", mixed_precision="bf16")),
    ("zero3_offload", dict(use_deepspeed=True, zero_stage=3, offload_optimizer_device="cpu", offload_param_device="cpu"))])
def test_accelerate_takes_every_configuration(name, expected):
    "As `accelerate launch` itself reads and checks it."
    file = ROOT/"codetune/assets/accelerate"/f"{name}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "codetune.cli", "sft"])
    args, *_ = _validate_launch_command(args)
    assert {k: getattr(args, k) for k in expected} == expected

def test_used_output_dir_is_refused(data, tmp_path):
    "A folder with files in it is neither mixed nor replaced unasked."
    (tmp_path/"out").mkdir()
    (tmp_path/"out"/"mine.txt").write_text("mine")
    done = subprocess.run([sys.executable, *sft(data, tmp_path/"out")], env=ENV | {"CODETUNE_RUNS": str(tmp_path/"r")}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "resume" in done.stderr and "overwrite" in done.stderr
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["mine.txt"]

BIG = """
import resource, sys, torch
from pathlib import Path
from codetune import merge
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge.merge_adapter(*map(Path, sys.argv[1:4]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""

@pytest.fixture
def big(tmp_path):
    "A 490 MiB bf16 checkpoint of two shards and an adapter on all of its layers."
    base, adapter = tmp_path/"base", tmp_path/"adapter"
    base.mkdir(), adapter.mkdir()
    wide, index, lora = 1024, {}, {}
    for shard in range(2):
        tensors = {f"model.layers.{shard*60+i}.mlp.up_proj.weight": torch.randn(2048, wide).bfloat16() for i in range(60)}
        tensors |= {"lm_head.weight": torch.randn(16000, wide).bfloat16()} if shard else {}
        save_file(tensors, base/f"model-{shard}.safetensors", metadata=dict(format="pt"))
        index |= dict.fromkeys(tensors, f"model-{shard}.safetensors")
        for n in tensors:
            if "up_proj" in n:
                lora[f"base_model.model.{n.removesuffix('.weight')}.lora_A.weight"] = torch.randn(4, wide)
                lora[f"base_model.model.{n.removesuffix('.weight')}.lora_B.weight"] = torch.randn(2048, 4)
    (base/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (base/"config.json").write_text("{}")
    save_file(lora, adapter/"adapter_model.safetensors")
    (adapter/"adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["up_proj"])))
    return base, adapter

def test_merge_memory(big, tmp_path):
    "The peak above the libraries is the largest tensor, the adapter and little more; every other byte is copied."
    base, adapter = big
    grown = float(run("-c", BIG, str(base), str(adapter), str(tmp_path/"merged"), runs=str(tmp_path/"r")))
    largest, held = 16000*1024*2/2**20, (adapter/"adapter_model.safetensors").stat().st_size/2**20
    assert grown <= largest + held + 200, f"{grown:.0f} MiB"
    old, new = (load_file(p/"model-1.safetensors") for p in (base, tmp_path/"merged"))
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"])
    assert not torch.equal(old["model.layers.60.mlp.up_proj.weight"], new["model.layers.60.mlp.up_proj.weight"])

def test_killed_merge_leaves_no_model(big, tmp_path):
    "Nothing stands under the final name until all of it does."
    final = tmp_path/"merged"
    victim = subprocess.Popen([sys.executable, "-c", BIG, *map(str, big), str(final)], env=ENV, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if any(p.stat().st_size > 0 for p in tmp_path.glob(".merged.*/model-0.safetensors")): break
        assert victim.poll() is None and not final.exists()
        time.sleep(.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not final.exists()
