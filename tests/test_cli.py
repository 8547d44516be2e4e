"Both guides' command lines, with only the script's name replaced, and the command's manners."

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from codetune.cli import DIRECT, TOOLS, main, parse_direct
from codetune.config import configure, load_recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["run", "pipeline", *DIRECT, *TOOLS])
def test_every_command_explains_itself(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as e:
        code = e.code
    assert code in (0, None) and len(capsys.readouterr().out.splitlines()) > 3


def test_unknown_command_and_flag_are_refused_with_the_nearest(capsys):
    assert main(["sfft"]) == 2 and "did you mean sft?" in capsys.readouterr().err
    assert main(["sft", "--max_lenn", "12"]) == 2 and "did you mean max_len?" in capsys.readouterr().err
    assert main(["sft", "--lr", "fast"]) == 2 and "lr='fast'" in capsys.readouterr().err
    assert main(["merge", "somewhere"]) == 2 and "flags only" in capsys.readouterr().err


GUIDE_1 = """--algorithm_name APPO --experiment_name qwen_coding_duo --seed 42 --cuda --n_rollout_threads 8
 --num_env_steps 1000000 --model_name_or_path Qwen/Qwen2.5-Coder-1.5B-Instruct --n_agents 2
 --profile_path qwen_coding_duo --train_dataset_path data/bigcodebench_marft.json
 --test_dataset_path data/bigcodebench_test_marft.json --lr 5e-7 --critic_lr 5e-4
 --ppo_epoch 5 --num_mini_batch 4 --use_eval --eval_interval 10 --save_interval 50 --use_wandb
 --wandb_project qwen-coding-marft --wandb_entity someone --reward_type binary"""
TUNING = [
    "--gradient_cp_steps 2 --num_mini_batch 2",
    "--use_linear_lr_decay",
    "--kl_threshold 5e-4",
    "--use_clipped_value_loss",
    "--lr 1e-7 --critic_lr 1e-4",
    "--reward_type continuous",
    "--episode_length 100",
    "--load_in_4bit true --bf16 true",
    "--context_window 2048 --max_new_tokens 512",
    "--load_path runs/x/checkpoints/steps_0050",
    "--warmup_steps 3 --agent_iteration_interval 100",
]


def test_guide_1_training_command_verbatim():
    from codetune.appo import APPOConfig

    given = parse_direct("appo", shlex.split(GUIDE_1))
    assert given["cuda"] == given["use_eval"] == given["use_wandb"] == "true"
    given["cuda"] = "none"  # here is no GPU, and True without one is an error
    cfg = configure(APPOConfig, overrides=given)
    assert (cfg.lr, cfg.critic_lr, cfg.num_env_steps, cfg.n_agents, cfg.save_interval, cfg.use_eval) == (
        5e-7,
        5e-4,
        1_000_000,
        2,
        50,
        True,
    )


@pytest.mark.parametrize("more", TUNING)
def test_guide_1_tuning_flags(more):
    from codetune.appo import APPOConfig

    given = parse_direct("appo", shlex.split(f"{GUIDE_1} {more}".replace("--cuda ", "")))
    cfg = configure(APPOConfig, overrides=given)
    for name in (w[2:] for w in more.split() if w.startswith("--")):
        assert getattr(cfg, name) not in (None, False)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            "--method qlora d.jsonl out exp1 --model_name_or_path m",
            dict(
                method="qlora",
                data_path="d.jsonl",
                output_dir="out",
                experiment_name="exp1",
                model_name_or_path="m",
            ),
        ),
        ("--method qlora", dict(method="qlora")),
        (
            "--method lora d.jsonl Qwen/Qwen3-Coder-30B-A3B-Instruct out",
            dict(
                method="lora",
                data_path="d.jsonl",
                model_name_or_path="Qwen/Qwen3-Coder-30B-A3B-Instruct",
                output_dir="out",
            ),
        ),
        (
            "--method full d.jsonl M out --lr 1e-5",
            dict(method="full", data_path="d.jsonl", model_name_or_path="M", output_dir="out", lr="1e-5"),
        ),
    ],
)
def test_guide_2_positional_forms(words, expected):
    assert parse_direct("sft", words.split()) == expected


def test_guide_2_script_knows_its_model():
    "The script that names no model trains the one it was written for; a recipe's method orders the words."
    given = parse_direct("sft", "--method qlora d.jsonl out exp1".split())
    words = dict(data_path="d.jsonl", output_dir="out", experiment_name="exp1")
    assert given == load_recipe("qwen3_30b_qlora") | words
    given = parse_direct("sft", "-f qwen3_30b_lora d.jsonl m out".split())
    assert (given["data_path"], given["model_name_or_path"], given["output_dir"]) == ("d.jsonl", "m", "out")


def test_guide_2_environment(monkeypatch):
    from codetune.sft import SFTConfig

    for name, value in dict(WANDB_PROJECT="p", WANDB_ENTITY="e", BATCH_SIZE="1", GRAD_ACCU="32").items():
        monkeypatch.setenv(name, value)
    cfg = configure(SFTConfig, overrides=parse_direct("sft", ["-f", "qwen3_30b_qlora"]))
    assert (
        cfg.wandb_project,
        cfg.wandb_entity,
        cfg.per_device_train_batch_size,
        cfg.gradient_accumulation_steps,
    ) == ("p", "e", 1, 32)
    assert (
        configure(
            SFTConfig, overrides=parse_direct("sft", ["--gradient_accumulation_steps", "4"])
        ).gradient_accumulation_steps
        == 4
    )


def test_guide_2_merge_flags():
    given = parse_direct(
        "merge",
        "--base_model_path Qwen/Qwen3-Coder-30B-A3B-Instruct --adapter_path a --output_path o".split(),
    )
    assert given == dict(
        base_model_path="Qwen/Qwen3-Coder-30B-A3B-Instruct", adapter_path="a", output_path="o"
    )


def command(args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "codetune.cli", *shlex.split(args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", **env),
    )


@pytest.mark.parametrize(
    "args",
    [
        "convert-bigcodebench --input bigcode/bigcodebench --output data/bigcodebench_marft.json "
        "--max_samples 1000 --dataset_type regular --split train",
        "convert ./raw --tokenize",
    ],
)
def test_hub_commands_say_what_to_do_when_offline(args, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"input": "q", "output": "a"}\n')
    done = command(args, tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == (1 if args.startswith("convert ") else 2) and "Traceback" not in done.stderr
    assert (
        ("-m embedded" in done.stderr)
        if args.startswith("convert ")
        else ("--input" in done.stderr or "mini" in done.stderr)
    )
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("sft_train*"))


def test_guide_1_convert_from_a_local_file(tmp_path):
    import json
    from codetune.config import asset

    rows = [json.loads(line) for line in asset("tasks", "mini.jsonl").read_text().splitlines()]
    (tmp_path / "bigcodebench.json").write_text(json.dumps(rows))
    done = command(
        f"convert-bigcodebench --input {tmp_path}/bigcodebench.json --output {tmp_path}/out.json "
        "--max_samples 10 --split train",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())) == 10
