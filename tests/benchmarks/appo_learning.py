"""Does the quickstart's APPO learn, and is it the reward that teaches?

    python tests/benchmarks/appo_learning.py train VARIANT SEED [name=value ...] [--out FOLDER]
    python tests/benchmarks/appo_learning.py report [--out FOLDER] [--to FILE]
    python tests/benchmarks/appo_learning.py [all]

Each `train` starts from the quickstart's SFT adapter (made by its first stages, once), runs
nbs/recipes/quickstart_appo.yaml on the mini benchmark's training tasks, and answers all held-out
tasks, 4 samples each, before (once per seed) and after. Variants:

    duo       the recipe
    shuffled  rewards are permuted among the episodes of a batch: nothing can be learnt from them
    silent    the coder never hears the analyzer, in training and in evaluation
    frozen    the analyzer is not trained
    group     no critic: advantages against the other sample of the task
    solo      one agent, the coder alone

`all` trains the recipe on three seeds, the shuffled control and the ablations of the message on one; the others
are trained by name. What is in the folder already is kept, so that it can be interrupted. `report` pools seeds and
compares each variant with its own starting point, task by task: mean difference, 95 % interval from a bootstrap
over tasks, sign-flip p. Writes results/appo_learning.md, or FILE.
"""

import argparse, json, os, platform, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIANTS = ("duo", "shuffled", "silent", "frozen", "group", "solo")
STARTS = {"solo": "solo", "silent": "silent"}  # the others start as one team
ALL = [("duo", 42), ("duo", 43), ("duo", 44), ("shuffled", 42), ("silent", 42), ("frozen", 42)]


def start_adapter(out):
    "Where training starts: the quickstart's SFT adapter, made once by its first stages."
    from codetune.runner import fill, load_pipeline, run_stage

    kept, done = out / "start.json", {}
    if kept.exists():
        return json.loads(kept.read_text())
    for stage in load_pipeline("quickstart")["stages"]:
        if stage["id"] not in ("data_formats", "chatml_tokenize", "sft"):
            continue
        params = {n: fill(v, done) for n, v in stage.get("params", {}).items()} | dict(
            experiment_name="learning_start"
        )
        done[stage["id"]] = run_stage(stage["notebook"], params, quiet=True)
    kept.write_text(json.dumps(done["sft"]["outputs"]["adapter"]))
    return json.loads(kept.read_text())


def settings(variant, seed, given):
    from codetune.appo import Ablation, APPOConfig
    from codetune.config import configure, load_recipe
    import torch

    values = (
        load_recipe("quickstart_appo")
        | dict(seed=seed, use_eval=False, experiment_name=f"learning_{variant}")
        | given
    )
    if variant == "solo":
        values |= dict(profile_path="solo_coder", n_agents=1)
    if variant == "silent":  # what is not said has no beginning either
        from codetune.marft_env import load_profiles

        path = Path(tempfile.mkdtemp()) / "silent_duo.json"
        path.write_text(
            json.dumps(
                [
                    p if p["with_answer"] else p | dict(prefill="")
                    for p in load_profiles(values["profile_path"])
                ]
            )
        )
        values |= dict(profile_path=str(path))
    if variant == "group":
        values |= dict(advantage="group")
    g = torch.Generator().manual_seed(seed)

    def shuffled(r):
        return r.flatten(0, 1)[torch.randperm(r.shape[0] * r.shape[1], generator=g)].view_as(r)

    seams = {
        "shuffled": Ablation(pay=shuffled),
        "frozen": Ablation(frozen=("analyzer",)),
        "silent": Ablation(relay=lambda m, texts: texts if m else [""] * len(texts)),
    }
    return configure(APPOConfig, overrides=values), seams.get(variant, Ablation())


def answer(team, cfg, path, who="team", heard="own"):
    from codetune.appo import build_tasks
    from codetune.team_eval import evaluate_team, write_rows
    from codetune.sandbox import Pool

    if path.exists():
        return
    with Pool() as pool:
        rows = evaluate_team(
            team,
            build_tasks(cfg)[1],
            pool,
            cfg.eval_samples,
            cfg.eval_temperature,
            who=who,
            heard=heard,
            max_new_tokens=cfg.max_new_tokens,
            context_window=cfg.context_window,
            seed=cfg.seed,
        )
    write_rows(path, rows)
    print(f"{path.name}: {sum(r['passed'] for r in rows)}/{len(rows)}", flush=True)


def train(variant, seed, out, given):
    from codetune.appo import start_run, train_appo
    from codetune.provenance import git_state
    from codetune.records import read_metrics
    from codetune.team import Team

    out.mkdir(parents=True, exist_ok=True)
    cfg, ablation = settings(variant, seed, dict(init_adapter_path=start_adapter(out)) | given)
    done = out / f"{variant}_{seed}.json"
    if done.exists():
        print(f"{done.name}: kept, trained {json.loads(done.read_text())['trained']}", flush=True)
        return
    t0 = time.time()
    run = start_run(cfg)
    with run:
        summary = train_appo(cfg, run, ablation)
        run.finish(summary)
    minutes = (time.time() - t0) / 60
    keep = ("step", "reward/mean", "reward/pass_rate", "time/all_s")
    log = [
        {
            k: v
            for k, v in r.items()
            if k in keep or k.endswith(("/approx_kl", "/entropy", "/kl_start", "/kl_stop"))
        }
        for r in read_metrics(run.dir)
    ]
    team = Team.load(summary["outputs"]["final"])
    mute = "none" if variant == "silent" else "own"
    answer(team, cfg, out / f"{STARTS.get(variant, 'team')}_{seed}_start.jsonl", "start", mute)
    answer(team, cfg, out / f"{variant}_{seed}_final.jsonl", heard=mute)
    if variant == "duo":
        for heard in ("none", "other"):
            answer(team, cfg, out / f"duo_{seed}_heard_{heard}.jsonl", heard=heard)
    trained = f"{time.strftime('%Y-%m-%d %H:%M')} at commit {git_state().get('revision', 'unknown')[:7]}"
    done.write_text(
        json.dumps(
            dict(variant=variant, seed=seed, minutes=minutes, trained=trained, log=log, parameters=given)
        )
    )


def by_difficulty(before, after):
    "A table row for each difficulty: held-out tasks, mean pass rate before and after."
    from codetune.tasks import load_tasks

    level = {t["task_id"]: json.loads(t["doc_struct"])["difficulty"] for t in load_tasks("mini", "test")}
    rows = ["| difficulty | held-out tasks | before | after |", "|---|---|---|---|"]
    for name in dict.fromkeys(level.values()):
        ids = [t for t in before if level[t] == name]
        mean = [sum(x[t] for t in ids) / len(ids) for x in (before, after)]
        rows.append(f"| {name} | {len(ids)} | {mean[0]:.3f} | {mean[1]:.3f} |")
    return rows


def p_text(p):
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def report(out, to):
    from codetune.team_eval import pass_rates
    from codetune.evaluations import read_rows
    from codetune.passk import compare, estimate, pool_seeds

    def rates(name):
        return pass_rates(read_rows(out / name))

    import torch

    lines = [
        "# Does the quickstart's APPO learn?",
        "",
        f"Machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}; {time.strftime('%Y-%m-%d')}. "
        "Held-out pass rate, 4 samples a task, temperature 0.7; pooled over seeds; "
        "intervals: 95 %, bootstrap over tasks, paired.",
        "",
        "| variant | seeds | before | after | after - before | p | minutes of training |",
        "|---|---|---|---|---|---|---|",
    ]
    worth, levels = [], []
    for v in VARIANTS:
        seeds = sorted(int(p.stem.split("_")[1]) for p in out.glob(f"{v}_*_final.jsonl"))
        if not seeds:
            continue
        start = STARTS.get(v, "team")
        a = pool_seeds([rates(f"{start}_{s}_start.jsonl") for s in seeds])
        b = pool_seeds([rates(f"{v}_{s}_final.jsonl") for s in seeds])
        c = compare(a, b)
        m = [json.loads((out / f"{v}_{s}.json").read_text())["minutes"] for s in seeds]
        lines.append(
            f"| {v} | {', '.join(map(str, seeds))} | {estimate(a)} | {estimate(b)} | **{c.diff}** "
            f"| {p_text(c.p_value)} | {sum(m) / len(m):.1f} |"
        )
        if v == "duo":
            levels = by_difficulty(a, b)
        for h in ("none", "other"):
            have = [s for s in seeds if (out / f"{v}_{s}_heard_{h}.jsonl").exists()]
            if v == "duo" and have:
                d = compare(
                    pool_seeds([rates(f"duo_{s}_heard_{h}.jsonl") for s in have]),
                    pool_seeds([rates(f"duo_{s}_final.jsonl") for s in have]),
                )
                worth.append(f"| {h} | {', '.join(map(str, have))} | {d.diff} | {p_text(d.p_value)} |")
    lines += [
        "",
        "The recipe (duo), by difficulty; it trains on the elementary tier alone:",
        "",
        *levels,
        "",
        "What the trained analyzer's message is worth to the trained coder: own message minus another.",
        "",
        "| instead of it | seeds | difference | p |",
        "|---|---|---|---|",
        *worth,
        "",
        "Reward by update:",
        "",
    ]
    for p in sorted(out.glob("*_*.json")):
        d = json.loads(p.read_text())
        lines.append(
            f"- {d['variant']}, seed {d['seed']} (trained {d['trained']}): "
            + " ".join(f"{r['reward/mean']:.2f}" for r in d["log"])
        )
    to.parent.mkdir(exist_ok=True)
    to.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", nargs="?", default="all", choices=("train", "report", "all"))
    ap.add_argument("rest", nargs="*")
    ap.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "appo_learning")
    ap.add_argument("--to", type=Path, default=HERE / "results" / "appo_learning.md", help="the report")
    a = ap.parse_intermixed_args()
    if a.what == "train":
        train(a.rest[0], int(a.rest[1]), a.out, dict(x.split("=", 1) for x in a.rest[2:]))
    if a.what == "all":
        import subprocess

        for v, s in ALL:
            subprocess.run([sys.executable, __file__, "train", v, str(s), "--out", str(a.out)], check=True)
    if a.what != "train":
        report(a.out, a.to)
