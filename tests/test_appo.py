"""APPO end to end on a tiny random model: every parameter does what its comment says, recipes run, two processes agree."""
import dataclasses, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from codetune.appo import Ablation, APPOConfig, Session, build_env, build_tasks, build_team, train_appo, start_run
from codetune.config import configure, load_recipe
from codetune.fixtures import tiny_model
from codetune.records import read_metrics
from codetune.runs import set_seed
from codetune.sandbox import Pool

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(num_env_steps=16, n_rollout_threads=8, max_new_tokens=6, load_in_4bit=False, bf16=False, cuda=False, use_eval=False, lora_r=4,
            num_mini_batch=2, critic_epochs=1, kl_threshold=None, lr=1e-2, train_dataset_path="mini:easy")


@pytest.fixture(scope="module")
def pool():
    with Pool(n_slots=2) as p: yield p


@pytest.fixture(autouse=True)
def _places(monkeypatch, tmp_path):
    monkeypatch.setenv("CODETUNE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)


def config(**kw): return APPOConfig(**(TINY | dict(model_name_or_path=str(tiny_model("qwen2"))) | kw))


def played(pool, **kw):
    "Weights and metrics after the updates of a run whose rewards are random numbers, the same in every run."
    cfg = config(**kw)
    set_seed(cfg.seed)
    team = build_team(cfg)
    g = torch.Generator().manual_seed(7)
    s = Session(cfg, team, build_env(cfg, team, build_tasks(cfg)[0], pool), Ablation(pay=lambda r: torch.rand(r.shape, generator=g)))
    while s.update < cfg.n_updates: s.play()
    weights = [p.detach().clone() for ps in team.lora.values() for p in ps] + [p.detach().clone() for p in team.value_head.parameters()]
    log = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in s.log]
    return weights, log, s


@pytest.fixture(scope="module")
def plain(pool): return played(pool)


# the fixture's own run again, and every parameter that must change what is learnt
LEARNS = dict(seed=1, algorithm_name="TPPO", advantage="group", episode_length=2, samples_per_task=1, lr=2e-2, critic_lr=1e-2, ppo_epoch=2, critic_epochs=3,
              num_mini_batch=4, entropy_coef=.5, kl_coef=.5, kl_threshold=1e-9, gamma=.5, gae_lambda=.1, max_grad_norm=1e-3, huber_delta=1e-2,
              use_linear_lr_decay=True, warmup_steps=1, agent_iteration_interval=8, normalization_mode="token", max_new_tokens=5, temperature=1.3, top_k=5, top_p=.5,
              lora_r=2, lora_alpha=4., target_modules=["q_proj"], profile_path="qwen_coding_duo", train_dataset_path="mini", train_difficulty="loop", n_rollout_threads=4,
              num_env_steps=24, bf16=True, load_in_4bit=True)
WITH = dict(kl_threshold=dict(ppo_epoch=3), gamma=dict(horizon=2, episode_length=2), advantage=dict(n_rollout_threads=8),
            train_difficulty=dict(train_dataset_path="mini"), normalization_mode=dict(ppo_epoch=2))


def same(a, b): return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b))


def test_the_same_run_twice_is_the_same(pool, plain):
    again = played(pool)
    assert same(again[0], plain[0]) and str(again[1]) == str(plain[1])


@pytest.mark.parametrize("name", LEARNS)
def test_parameter_changes_the_weights(pool, plain, name):
    extra = WITH.get(name, {})
    without = played(pool, **extra) if extra else plain
    assert not same(played(pool, **extra, **{name: LEARNS[name]})[0], without[0])


@pytest.mark.parametrize("model", ["tiny", pytest.param("embedded", marks=pytest.mark.long)])
@pytest.mark.parametrize("base", [dict(), dict(bf16=True), dict(load_in_4bit=True), dict(load_in_4bit=True, bf16=True), dict(bf16=True, gradient_checkpointing=True)])
def test_ratio_is_one_before_the_first_step(pool, model, base):
    from codetune.rollout import collect, credit
    cfg = config(gradient_cp_steps=2, **base, **(dict(model_name_or_path="embedded", max_new_tokens=16) if model == "embedded" else {}))
    team = build_team(cfg)
    torch.manual_seed(0)
    for p in sum(team.lora.values(), []): torch.nn.init.normal_(p, std=.03)
    s = Session(cfg, team, build_env(cfg, team, build_tasks(cfg)[0], pool))
    ro = collect(team, s.env, 1, cfg.sampling, s.sampler)
    c = credit(team, ro)
    c.advantages, c.live = torch.randn_like(c.advantages), torch.ones(2).bool()
    for m in (0, 1):
        minis = s.learner.lay_out(m, ro, c)
        s.learner.remember(m, minis)
        with team.use(m):
            for mini in minis:                                     # no step is taken: all of them are a first minibatch
                verdict, metrics, kl = s.learner.minibatch(m, mini, None)
                assert (verdict, kl, metrics["policy/max_logratio"], metrics["policy/clipfrac"]) == ("ok", 0, 0, 0)
        with torch.no_grad(): assert all(torch.equal(s.learner.score(m, x)[0], x.old) for mini in minis for x in mini)


def state(s):
    "Everything that the next update depends on, as one nested value without clocks."
    found = s.state()
    found["where"]["log"] = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in found["where"]["log"]]
    return found


def equal(a, b, at=""):
    if isinstance(a, torch.Tensor): assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a: equal(a[k], b[k], f"{at}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b)): equal(x, y, f"{at}/{i}")
    else: assert a == b or a != a and b != b, (at, a, b)


def test_ten_updates_are_five_a_checkpoint_and_five(pool, tmp_path):
    import random
    import numpy as np
    def fresh():
        cfg = config(num_env_steps=40, n_rollout_threads=4, use_linear_lr_decay=True, samples_per_task=3)
        set_seed(cfg.seed)
        team = build_team(cfg)
        return Session(cfg, team, build_env(cfg, team, build_tasks(cfg)[0], pool), Ablation(pay=lambda r: torch.rand(r.shape) + random.random() + np.random.rand()))
    whole, first = fresh(), fresh()
    start = state(whole)
    set_seed(42)
    for _ in range(10): whole.play()
    set_seed(42)
    for _ in range(5): first.play()
    first.save(tmp_path / "steps_0005")
    second = fresh()
    torch.rand(3), random.random(), np.random.rand()
    second.resume(tmp_path)
    for _ in range(5): second.play()
    assert second.update == 10
    equal(state(second), state(whole))
    with pytest.raises(AssertionError): equal(start["team"], state(whole)["team"])    # something was learnt


@pytest.mark.parametrize("name,value", [("clip_param", .01), ("use_clipped_value_loss", False)])
def test_clips_bind_after_the_first_pass(pool, name, value):
    far = dict(ppo_epoch=4, lr=5e-2, critic_lr=5e-2, critic_epochs=6)
    assert not same(played(pool, **far)[0], played(pool, **far, **{name: value})[0])


def test_memory_parameters_change_memory_only(pool, plain):
    cp, ck = played(pool, gradient_cp_steps=2), played(pool, gradient_checkpointing=True)
    for weights, _, _ in (cp, ck):
        for a, b in zip(weights, plain[0]): torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    assert ck[2].team.checkpointing and not plain[2].team.checkpointing and cp[2].learner.s.gradient_cp_steps == 2


def test_what_reaches_the_environment(pool):
    cfg = config(reward_type="continuous", format_bonus=.3, reward_shares=[.25, .75], horizon=3, context_window=1024, exec_timeout_s=2., samples_per_task=3)
    env = build_env(cfg, build_team(cfg), build_tasks(cfg)[0], pool)
    got = dict(reward_type=env.reward_type, format_bonus=env.format_bonus, horizon=env.horizon, context_window=env.budgets[0]+env.limits[0],
               exec_timeout_s=env.exec_timeout_s, samples_per_task=env.samples_per_task, n_rollout_threads=env.n_rollout_threads, seed=env.seed)
    assert got == {k: getattr(cfg, k) for k in got} and env.shares.tolist() == [.25, .75]


@pytest.mark.parametrize("bad,said", [
    (dict(n_agents=3), "n_agents=3"), (dict(engine="sglang"), "transformers or vllm"), (dict(cuda=True), "no GPU"), (dict(profile_path="nobody"), "no profile file"),
    (dict(reward_type="dense"), "binary or continuous"), (dict(target_modules=["query"]), "match nothing"), (dict(init_adapter_path="/nowhere"), "nowhere"),
    (dict(tasks_python="/no/python"), "python"), (dict(context_window=40), "context_window"), (dict(top_p=0.), "top_p"), (dict(huber_delta=0.), "huber_delta"),
    (dict(format_bonus=1.), "format_bonus=1.0"), (dict(kl_threshold=0.), "kl_threshold=0.0"), (dict(lr=float("inf")), "lr=inf"), (dict(engine="vllm"), "not installed"),
    (dict(target_modules=["q_proj", "lm_head"]), "leave lm_head out"), (dict(advantage="group", n_rollout_threads=1), "within an update"),
    (dict(reward_shares=[1.]), "must be 2 numbers"), (dict(train_difficulty=["hard"]), "no such task")])
def test_refused(pool, bad, said):
    if "cuda" in bad and torch.cuda.is_available(): pytest.skip("there is a GPU")
    with pytest.raises((ValueError, OSError, RuntimeError), match=said):
        cfg = config(**bad)
        team = build_team(cfg)
        build_env(cfg, team, build_tasks(cfg)[0], Pool(python=cfg.tasks_python) if cfg.tasks_python else pool)


def test_records(tmp_path):
    cfg = config(num_env_steps=40, use_eval=True, eval_interval=2, eval_samples=2, eval_tasks=3, eval_temperature=0., eval_worth=True, save_interval=2, keep_checkpoints=1,
                 log_dialogues=2)
    run = start_run(cfg)
    with run: run.finish(train_appo(cfg, run))
    tags = {p.stem for p in run.out.glob("eval_*.jsonl")}
    assert tags == {"eval_start", "eval_0002", "eval_0004", "eval_final", "eval_heard_none", "eval_heard_other", "eval_heard_start",
                    "eval_0002_heard_none", "eval_0002_heard_other", "eval_0004_heard_none", "eval_0004_heard_other"}
    rows = [json.loads(l) for l in (run.out / "eval_start.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["messages"] == rows[1]["messages"]  # greedy: both samples of a task are the same
    assert {p.name for p in run.checkpoints.iterdir()} == {"steps_0005", "best"} - ({"best"} if not (run.checkpoints / "best").exists() else set())
    assert [json.loads(l)["update"] for l in (run.dir / "dialogues.jsonl").read_text().splitlines()] == [1, 1, 2, 2, 4, 4, 5, 5]
    summary = json.loads((run.dir / "summary.json").read_text())
    assert summary["eval/before"]["n_tasks"] == 3 and "worth/message_over_none" in summary
    log = read_metrics(run.dir)
    assert list((run.dir / "logs").glob("events*")) and len(log) == 5
    for r in (log[1], log[3]):                                    # what the message is worth, with its interval, while training goes on
        for kind in ("none", "other"): assert r[f"worth/message_over_{kind}_low"] <= r[f"worth/message_over_{kind}"] <= r[f"worth/message_over_{kind}_high"]
    assert [r["count/executions"] for r in log] == [8, 16, 24, 32, 40]
    assert all(a["count/tokens"] < b["count/tokens"] <= a["count/tokens"] + 8 * 2 * cfg.max_new_tokens for a, b in zip(log, log[1:]))


def sft_adapter(folder, **settings):
    "A trained adapter of some kind on the tiny model."
    from codetune.fixtures import tiny_adapter
    return str(tiny_adapter("qwen2", folder, **settings))


def test_sft_adapter_is_every_roles_start(tmp_path):
    team = build_team(config(init_adapter_path=sft_adapter(tmp_path / "sft", lora_dropout=.3)))
    x, y = [[5, 6, 7]], [[8, 9]]
    base = team.logprobs(None, x, y)[0]
    assert same([team.logprobs(0, x, y)[0]], [team.logprobs(1, x, y)[0]]) and same([team.logprobs("start", x, y)[0]], [team.logprobs(1, x, y)[0]])
    assert not torch.allclose(team.logprobs(0, x, y)[0], base)


@pytest.mark.parametrize("settings", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(lora_bias=True), dict(rank_pattern={"q_proj": 2})])
def test_an_sft_adapter_of_any_kind_says_what_peft_says(tmp_path, settings):
    from peft import PeftModel
    from codetune.qlora_load import load_base
    team = build_team(config(init_adapter_path=sft_adapter(tmp_path / "sft", **settings)))
    plain = PeftModel.from_pretrained(load_base(tiny_model("qwen2"), "none", "fp32", "cpu"), tmp_path / "sft").eval()
    with torch.no_grad(): want = plain(torch.tensor([[5, 6, 7, 8]])).logits[0, 2:].log_softmax(-1)[[0, 1], [8, 9]]
    for who in (0, "start"): torch.testing.assert_close(team.logprobs(who, [[5, 6, 7]], [[8, 9]])[0][0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings,said", [(dict(modules_to_save=["norm"]), "modules_to_save"), (dict(bias="lora_only"), "bias"),
                                           (dict(trainable_token_indices=[1, 2]), "trainable_token_indices")])
def test_an_sft_adapter_that_is_more_than_lora_is_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=f"{said} trains more"): build_team(config(init_adapter_path=sft_adapter(tmp_path / "sft", **settings)))


def finished(**kw):
    "A whole run: configuration, run and summary."
    cfg = config(**kw)
    run = start_run(cfg)
    with run: summary = train_appo(cfg, run); run.finish(summary)
    return cfg, run, summary


def test_the_bare_base_is_evaluated_below_an_sft_adapter(tmp_path):
    _, run, _ = finished(num_env_steps=8, init_adapter_path=sft_adapter(tmp_path / "sft"), use_eval=True, eval_base=True, eval_tasks=2)
    assert {p.name for p in run.out.glob("eval_*")} == {"eval_base.jsonl", "eval_start.jsonl", "eval_final.jsonl"}


def test_three_agents_each_have_their_worth(tmp_path):
    trio = [dict(role=r, prompt=f"You are {r}.", with_answer=r == "coder") for r in ("analyst", "critic", "coder")]
    (tmp_path / "trio.json").write_text(json.dumps(trio))
    _, run, summary = finished(profile_path=str(tmp_path / "trio.json"), n_agents=3, horizon=2, episode_length=2, num_env_steps=32, use_eval=True, eval_tasks=2, eval_worth=True)
    assert {"worth/analyst_over_none", "worth/critic_over_none", "worth/message_over_other"} <= set(summary)
    rows = [json.loads(l) for l in (run.out / "eval_heard_none_critic.jsonl").read_text().splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["analyst", "critic", "coder"]
    assert all(r["messages"][1]["text"] == "" and r["messages"][0]["text"] for r in rows)
    assert {p.name for p in (run.out / "final").iterdir() if p.is_dir()} == {"analyst", "critic", "coder"}


def test_one_agent_alone_is_a_baseline():
    _, run, summary = finished(profile_path="solo_coder", n_agents=1, use_eval=True, eval_tasks=2, eval_worth=True)
    assert summary["updates"] == 2 and not [k for k in summary if k.startswith("worth/")]


def test_resume_brings_the_best_along(pool):
    _, run, _ = finished(num_env_steps=8, save_interval=1)
    best = run.checkpoints / "best"
    shutil.copytree(run.checkpoints / "steps_0001", best)
    _, again, _ = finished(num_env_steps=16, load_path=str(run.dir))
    assert (again.checkpoints / "best" / "trainer_state.json").read_bytes() == (best / "trainer_state.json").read_bytes()
    (best / "trainer_state.json").write_text(json.dumps(dict(best=.9)))            # a later best is not this checkpoint's
    assert not (finished(num_env_steps=16, load_path=str(run.checkpoints / "steps_0001"))[1].checkpoints / "best").exists()


@pytest.mark.parametrize("other,said", [(dict(model_name_or_path="other"), "was trained on the base"), (dict(lora_alpha=4.), "has lora_alpha"),
                                        (dict(target_modules=["q_proj"]), "has target_modules"), (dict(profile_path="solo_coder", n_agents=1), "is of the team"),
                                        (dict(seed=3), "seed was 42, is 3"), (dict(n_rollout_threads=4), "n_rollout_threads was 8")])
def test_another_runs_checkpoint_is_refused(pool, tmp_path, other, said):
    played(pool, num_env_steps=8)[2].save(tmp_path / "steps_0001")
    if "model_name_or_path" in other: other = dict(model_name_or_path=str(tiny_model("qwen2", seed=1)))
    cfg = config(**other)
    team = build_team(cfg)
    with pytest.raises(ValueError, match=said): Session(cfg, team, build_env(cfg, team, build_tasks(cfg)[0], pool)).resume(tmp_path)


def test_a_roles_adapter_tells_merge_what_it_was_trained_on():
    from codetune.merge import MergeConfig, merge, start_run as start_merge
    _, run, _ = finished(num_env_steps=8, load_in_4bit=True)
    for role, keys in (("coder", {"kl_nf4", "kl_16bit"}), ("all", {"coder/kl_nf4", "analyzer/kl_16bit"})):
        cfg = MergeConfig(base_model_path=str(tiny_model("qwen2")), adapter_path=str(run.out / "final"), role=role)
        with start_merge(cfg) as done: assert keys <= set(merge(cfg, done))


def test_wandb_without_login_records_offline(tmp_path):
    (tmp_path / "r.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in (TINY | dict(
        model_name_or_path=str(tiny_model("qwen2")), num_env_steps=8, use_wandb=True, wandb_project="p", wandb_entity="someone")).items()))
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | dict(PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1", HOME=str(tmp_path),
                                                                                  CODETUNE_RUNS=str(tmp_path / "runs"), NETRC=str(tmp_path / "none"))
    done = subprocess.run([sys.executable, "-m", "codetune.cli", "appo", "-f", str(tmp_path / "r.yaml")], env=env, cwd=ROOT, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "recorded offline" in done.stdout and list((tmp_path / "runs").rglob("wandb/offline-run-*/*.wandb"))


def test_a_runs_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODETUNE_RUNS", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="CODETUNE_RUNS"): start_run(config())


@pytest.mark.parametrize("recipe,shrunk", [
    ("qwen25_coder_duo", dict(num_env_steps=4, episode_length=1, n_rollout_threads=4, use_wandb=False, max_new_tokens=4, eval_tasks=2, gradient_cp_steps=2)),
    ("quickstart_appo", dict(num_env_steps=8, n_rollout_threads=8, max_new_tokens=4, eval_samples=1, eval_tasks=2))])
def test_recipe_runs_on_a_tiny_model(recipe, shrunk):
    values = load_recipe(recipe)
    whole = configure(APPOConfig, overrides=values | (dict(cuda=None)))
    assert whole.n_updates == (625 if recipe == "qwen25_coder_duo" else whole.num_env_steps // whole.n_rollout_threads)
    cfg = configure(APPOConfig, overrides=values | shrunk | dict(model_name_or_path=str(tiny_model("qwen2")), train_dataset_path="mini", test_dataset_path=None))
    run = start_run(cfg)
    with run: summary = train_appo(cfg, run); run.finish(summary)
    assert summary["updates"] == 1 and (run.out / "final" / "coder" / "adapter_model.safetensors").exists()


SEVERAL = """
import os, sys, torch
from codetune.appo import *
from codetune.learner import *
from codetune.rollout import Rollout, credit
from codetune.runs import set_seed
import importlib.util; spec = importlib.util.spec_from_file_location("t", sys.argv[2]); t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t); config = t.config
from codetune.ranks import start_ranks
rank = start_ranks()
assert world() == int(os.environ.get("WORLD_SIZE", 1))
set_seed(0)
cfg = config(num_mini_batch=1, n_rollout_threads=8, max_grad_norm=1e9)
team = build_team(cfg)
for p in sum(team.lora.values(), []): torch.nn.init.normal_(p, std=.05)
g = torch.Generator().manual_seed(3)
from codetune.team import Action
acts = [[[Action([5, 6, b], torch.randint(3, 300, (1+b%4,), generator=g).tolist(), "x", False, []) for m in (0, 1)] for b in range(8)]]
rewards = torch.rand(1, 8, 2, generator=g)
mine = slice(rank*8//world(), (rank+1)*8//world())
acts = [acts[0][mine]]; rewards = rewards[:, mine]
B = rewards.shape[1]
f = torch.stack([team.features([a[m].prompt for a in acts[0]]) for m in (0, 1)], 1)[None]
ro = Rollout(acts, rewards, torch.ones(1, B).bool(), torch.ones(1, B).bool(), [[{"task_id": b} for b in range(B)]], [[None]*B], f, f[0, :, 0])
out = []
for algorithm in ("APPO", "TPPO"):
    c = credit(team, ro, algorithm, gather=gathered)
    L = Learner(team, Settings(algorithm, num_mini_batch=1, critic_epochs=1, kl_coef=.1), cfg.sampling)
    minis = L.lay_out(1, ro, c); L.recall_start(minis); L.remember(1, minis)
    with team.use(1): L.minibatch(1, minis[0], None)
    sum_gradients(team.lora["coder"])
    out.append([p.grad.clone() for p in team.lora["coder"]]); team.model.zero_grad()
if world() > 1:                                   # one rank has fewer verdicts than there are minibatches: all make as many steps, or none
    for lost in (1, 4):
        ro.valid[0, :lost] = rank == 0
        c = credit(team, ro, gather=gathered)
        L = Learner(team, Settings(num_mini_batch=4, gradient_cp_steps=2, critic_epochs=1, kl_coef=.1), cfg.sampling)
        counts = update(L, ro, c, [1])
        assert counts["coder/steps"] == {1: (3, 2)[world() - 2], 4: 0}[lost], counts
if rank == 0: torch.save(out, sys.argv[1])
"""


CPU_RANKS = ["--config_file", str(ROOT / "codetune/assets/accelerate/ddp_cpu.yaml")]    # two; with --cpu alone accelerate starts one process


def test_several_processes_give_the_gradient_of_one(tmp_path):
    (tmp_path / "several.py").write_text(SEVERAL)
    env = os.environ | dict(PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1")
    def gradients(*launch):
        subprocess.run([*launch, str(tmp_path / "several.py"), str(tmp_path / "g.pt"), __file__], check=True, env=env, cwd=ROOT, timeout=300)
        return torch.load(tmp_path / "g.pt")
    one = gradients(sys.executable)
    for ranks in "23":                                            # 8 problems: four each; two, three and three
        several = gradients(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29631")
        for a, b in zip(one, several):
            assert any(x.abs().sum() > 0 for x in a)
            for x, y in zip(a, b, strict=True):                   # entries that nearly cancel are judged by the tensor's largest
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


def test_accelerate_launch_trains(tmp_path):
    values = TINY | dict(model_name_or_path=str(tiny_model("qwen2")), use_eval=True, eval_tasks=2, save_interval=1)
    (tmp_path / "r.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    env = os.environ | dict(PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1", CODETUNE_RUNS=str(tmp_path / "runs"))
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *CPU_RANKS, "--main_process_port=29633", "-m", "codetune.cli", "appo", "-f",
                    str(tmp_path / "r.yaml")], check=True, env=env, cwd=ROOT, timeout=400)
    manifest, = (tmp_path / "runs").rglob("manifest.json")
    assert json.loads(manifest.read_text())["status"] == "complete"
    assert len(read_metrics(manifest.parent)) == 2 and (manifest.parent / "final" / "coder").is_dir()
    assert json.loads((manifest.parent / "checkpoints" / "steps_0002" / "trainer_state.json").read_text())["n_ranks"] == 2


def test_two_processes_stop_together_and_go_on(tmp_path):
    values = TINY | dict(model_name_or_path=str(tiny_model("qwen2")), num_env_steps=80000, save_interval=0)
    env = os.environ | dict(PYTHONPATH=f"{ROOT}", OMP_NUM_THREADS="1", CODETUNE_RUNS=str(tmp_path / "runs"))
    def launch(**more):
        (tmp_path / "r.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in (values | more).items()))
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *CPU_RANKS, "--main_process_port=29635", "-m", "codetune.cli", "appo", "-f",
             str(tmp_path / "r.yaml")], env=env, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    p = launch()
    end = time.monotonic() + 200
    while not list((tmp_path / "runs").rglob("metrics.jsonl")) and time.monotonic() < end: time.sleep(.5)
    os.killpg(p.pid, signal.SIGINT)                               # Ctrl-C reaches the whole group
    said = p.communicate(timeout=200)[1]
    manifest, = (tmp_path / "runs").rglob("manifest.json")
    folder, = (manifest.parent / "checkpoints").iterdir()
    assert p.returncode and json.loads(manifest.read_text())["status"] == "interrupted", said[-2000:]
    kept = json.loads((folder / "trainer_state.json").read_text())
    assert kept["n_ranks"] == 2 and kept["update"] == len(read_metrics(manifest.parent)) == int(folder.name[-4:])
    p = launch(load_path=str(folder), num_env_steps=(kept["update"] + 1) * 8)
    said = p.communicate(timeout=200)[1]
    assert p.returncode == 0, said[-2000:]


def test_every_parameter_is_tested():
    here = Path(__file__).read_text()
    names = {f.name for f in dataclasses.fields(APPOConfig)} - {"experiment_name", "dataset_name"}  # they name the folder
    assert not sorted(n for n in names if n not in here)
