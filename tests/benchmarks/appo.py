"""Speed and memory of one APPO rollout and update, against the textbook loop.

    python tests/benchmarks/appo.py [--models embedded qwen2x8] [--epochs 1 5] [--samples 2 1] [--repeats 3] [--costs] [--write]

8 problems x 2 agents x 64 new tokens on 255-token prompts, 4 minibatches, bf16. A prompt is the agent's role (30 tokens), the problem, for the coder the
analyzer's message, and 10 tokens of template; the 8 are 4 tasks with 2 samples each, which is 05's default, and for comparison 8 tasks with one. All sides run in processes of their own, one after the other, with the
same weights, prompts, `generate`, dtype and token counts (the end token is switched off so that every message has 64 tokens), warm. With `--repeats`, rounds of
all sides alternate, and the round with the median ratio is reported. The textbook loop has four wastes, whose costs `--costs` prints by switching each off by itself:

    bases    one full base per agent and one for the critic, instead of one for all
    logits   logits of every position of prompt and message in fp32, instead of the message's in chunks
    second   a second, discarded forward whenever log-probabilities are computed
    critic   the critic's trunk is run again in every minibatch of every epoch, instead of once per rollout

Outside `generate` it runs the libraries' own layers on rows padded to the right: transformers' attention (`sdpa`), norms and MLPs, PEFT's LoRA. It scores every
message once before the first step (the old log-probabilities), as textbooks do. Ours computes beginnings that rows share once, has layers of its own
(codetune.prefix, attention, lean, fast_lora) and takes the old log-probabilities from generation, after its first minibatch has shown that they are the training
path's to the last bit (codetune.learner); `score` is what is left, the KL to the start. The third side, `four wastes`, is the textbook loop on our layers, rows
still padded: what the four wastes cost by themselves.

The programs are eight reference solutions. All sides hand them to the sandbox when the last agent has spoken; ours then computes the critic's features,
so `waiting` is what is left. Peak memory is the process's resident high-water mark. `--write` puts the table into results/appo.md.
"""
import argparse, contextlib, json, os, platform, resource, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
B, N, NEW, PROMPT, MINI = 8, 2, 64, 255, 4
WASTE = ("bases", "logits", "second", "critic")
TEXTBOOK = (*WASTE, "library")
REFERENCE = dict(embedded=(33.7, 71.0), qwen2x8=(14.4, 13.1))  # seconds of rollout and update, measured on the reference code, 1 epoch
KINDS = ("generate", "score", "value", "forward", "backward", "waiting")


def model_dir(name):
    from codetune.embedded import embedded_dir
    from codetune.fixtures import tiny_model
    if name == "embedded": return str(embedded_dir())
    return str(tiny_model("qwen2", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, vocab_size=49152))


def child(name, epochs, samples, waste):
    import torch
    from codetune.embedded import load_tokenizer
    from codetune.engine import Sampling
    from codetune.learner import Learner, Settings
    from codetune.ppo import appo_loss, value_loss
    from codetune.qlora_load import load_base, lora_config
    from codetune.answers import compose
    from codetune.learner import update
    from codetune.rollout import Rollout, credit
    from codetune.sandbox import Pool
    from codetune.tasks import select_tasks
    from codetune.team import Team
    path = model_dir(name)
    profiles = [dict(role="analyzer", prompt="", with_answer=False), dict(role="coder", prompt="", with_answer=True)]
    def build(): return Team(load_base(path, "none", "bf16", "cpu"), load_tokenizer(path), profiles, lora_config("dense", r=8, dropout=0.))
    torch.manual_seed(0)
    teams = [build() for _ in range(3)] if "bases" in waste else [build()] * 3   # the two agents', the critic's
    for t in teams: t.eos_ids = set()
    g, s = torch.Generator().manual_seed(0), Sampling(NEW, 1.)
    draw = lambda n: torch.randint(5, 390, (n,), generator=g).tolist()
    def dialogue(m):
        "Agent m's prompts: samples of one task differ in what the agents before said."
        role, end, heard = draw(30), draw(10), NEW*m
        tasks = [draw(PROMPT - 40 - heard) for _ in range(B//samples)]
        return [role + tasks[b//samples] + draw(heard) + end for b in range(B)]
    prompts = [dialogue(m) for m in range(N)]
    spent = dict.fromkeys(KINDS, 0.)
    tasks, pool = select_tasks("mini", "test", B)[0], Pool()
    programs = [(compose(t, t["code_prompt"] + t["canonical_solution"]), t["test"], t["entry_point"]) for t in tasks]

    def timed(kind, f):
        t = clock(); out = f(); spent[kind] += clock() - t
        return out

    def full_logprobs(team, m, ps, ys):
        "Log-probabilities the plain way: logits of all positions, in fp32."
        ids = torch.tensor([p + y for p, y in zip(ps, ys)])
        with team.use(m):
            team._mode()
            z = team.causal(ids).logits.float()
        lp = z[:, PROMPT-1:-1].log_softmax(-1)
        y = torch.tensor(ys)
        grad = torch.is_grad_enabled()
        with torch.no_grad(): H = -(lp.exp() * lp).sum(-1) if grad else None    # entropy_coef is 0 on both sides: reported, not differentiated
        return lp.gather(-1, y[..., None])[..., 0], H, torch.ones_like(y, dtype=torch.bool)

    def score(m, ps, ys):                             # the textbook asks for entropies where it has a use for them, as ours does
        team = teams[m]
        f = (lambda: full_logprobs(team, m, ps, ys)) if "logits" in waste else (lambda: team.logprobs(m, ps, ys, s, entropy_grad=False if torch.is_grad_enabled() else None))
        with layers(team):
            out = f()
            if "second" in waste:
                with torch.no_grad(): f()
        return out

    @contextlib.contextmanager
    def layers(team):
        "The libraries' own layers, or ours, in the textbook's passes; rows are padded in both."
        own = [(m, m.__dict__.pop("forward")) for m in team.model.modules() if "library" in waste and "forward" in m.__dict__]
        if waste: team.causal.set_attn_implementation("sdpa" if "library" in waste else "short")
        yield
        if waste: team.causal.set_attn_implementation("tree")
        for m, f in own: m.forward = f

    def features(ps):
        critic = teams[2]
        if "critic" in waste: critic._seen.clear()
        with layers(critic): return critic.features(ps)

    def rollout(s):
        def say(m):
            out = timed("generate", lambda: teams[m].generate(m, prompts[m], s, g))
            if waste: teams[m]._decoder = None        # the copy that generates: never one for each base at a time
            return out
        actions = [say(m) for m in range(N)]
        jobs = [pool.submit(p, t, entry_point=e) for p, t, e in programs]
        if waste: timed("waiting", lambda: [j.result() for j in jobs])
        if waste:                                     # the textbook takes old log-probabilities while it plays
            with torch.no_grad(): old = [timed("score", lambda: score(m, prompts[m], [a.ids for a in actions[m]])) for m in range(N)]
        f = timed("value", lambda: torch.stack([features(prompts[m]) for m in range(N)], 1))
        assert all(v.passed for v in timed("waiting", lambda: [j.result() for j in jobs]))
        rewards = torch.rand(1, B, N, generator=g)
        ok = torch.ones(1, B).bool()
        ro = Rollout([list(map(list, zip(*actions)))], rewards, ok, ok, [[{"task_id": b//samples} for b in range(B)]], [[None] * B], f[None], f[:, 0])
        return ro, old if waste else None

    def textbook(ro, old, epochs):
        c = credit(teams[2], ro)
        for m in range(N):
            rows = ro.rows(m)
            adv, ret, val = (x.view(B, N)[:, m] for x in (c.advantages, c.returns, c.values))
            opt, critic = learners[m].opts[teams[m].roles[m]], learners[2].critic
            for _ in range(epochs):
                for idx in torch.randperm(B, generator=g).chunk(MINI):
                    i = idx.tolist()
                    ps, ys = [rows[k].prompt for k in i], [rows[k].ids for k in i]
                    lp, H, on = timed("forward", lambda: score(m, ps, ys))
                    loss, _ = appo_loss(lp, old[m][0][idx], adv[idx], on, H)
                    with layers(teams[m]): timed("backward", loss.backward)
                    torch.nn.utils.clip_grad_norm_(teams[m].lora[teams[m].roles[m]], .5); opt.step(); opt.zero_grad(set_to_none=True)
                    f = timed("value", lambda: features(ps))
                    value_loss(teams[2].values(f), val[idx], ret[idx]).backward()
                    critic.step(); critic.zero_grad(set_to_none=True)

    def learn(epochs): return [Learner(t, Settings(ppo_epoch=epochs, critic_epochs=epochs, num_mini_batch=MINI), s) for t in teams]
    def ours(L):
        remember, score = L.remember, L.score
        L.remember = lambda *a: timed("score", lambda: remember(*a))
        L.score = lambda *a: timed("forward", lambda: score(*a)) if torch.is_grad_enabled() else score(*a)
        L.drift = lambda *a, f=L.drift: timed("score", lambda: f(*a))
        return L
    if not waste:
        back = torch.Tensor.backward
        torch.Tensor.backward = lambda self, *a, **k: timed("backward", lambda: back(self, *a, **k))
    for sampling, n in [(Sampling(4, 1.), 1), (s, epochs)]:     # warm, then measured
        learners = learn(n)
        for k in spent: spent[k] = 0.
        teams[2]._seen.clear()
        t0 = clock(); ro, old = rollout(sampling); t1 = clock()
        if sampling.max_new_tokens == NEW or not waste:
            if waste: textbook(ro, old, n)
            else: update(ours(learners[0]), ro, credit(teams[0], ro), [0, 1])
        t2 = clock()
    pool.close()
    print(json.dumps(dict(rollout_s=t1 - t0, update_s=t2 - t1, peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                          parameters_m=sum(p.numel() for t in set(teams) for p in t.model.parameters()) / 1e6, spent=spent)))


def measure(name, epochs, samples, waste, cpu=False):
    out = subprocess.run([sys.executable, __file__, "--child", name, str(epochs), str(samples), ",".join(waste), *["--cpu"]*cpu],
                         capture_output=True, text=True)
    if out.returncode: raise SystemExit(out.stderr[-2000:])
    d = json.loads(out.stdout.splitlines()[-1]) | dict(model=name, epochs=epochs, samples=samples, waste=waste)
    print(line(d), flush=True)
    return d


def line(d):
    "One measurement as a row of the table."
    side = {(): "ours", TEXTBOOK: "textbook", WASTE: "four wastes"}.get(d["waste"]) or "without " + ", ".join(w for w in TEXTBOOK if w not in d["waste"])
    return (f"| {d['model']} | {d['epochs']} | {d['samples']} | {side} | {d['rollout_s']:.1f} | {d['update_s']:.1f} | {d['peak_gib']:.2f} | {d['parameters_m']:.0f} | "
            + " | ".join(f"{d['spent'][k]:.1f}" for k in KINDS) + " |")


def both(d): return d["rollout_s"] + d["update_s"]


def verdict(ours, book, strict):
    "What a round of measurements says."
    said = (f"{ours['model']}, {ours['epochs']} epoch(s), {ours['samples']} sample(s) of a task: {both(book)/both(ours):.2f} x faster, {ours['peak_gib']/book['peak_gib']:.2f} x the peak memory "
            f"(four wastes alone: {both(strict)/both(ours):.2f} x, {ours['peak_gib']/strict['peak_gib']:.2f} x); {ours['spent']['waiting']/both(ours):.1%} of our time is waiting for verdicts")
    if ours["epochs"] == 1:
        r = REFERENCE[ours["model"]]
        said += (f"; textbook {book['rollout_s']:.1f} + {book['update_s']:.1f} s, {both(book)/sum(r):.2f} x the reference code's {r[0]} + {r[1]} s")
    return said


def costs(book, rows):
    "What each difference costs: the textbook loop less the loop without it."
    names = [next(w for w in TEXTBOOK if w not in d["waste"]) for d in rows]
    return f"{book['model']}, {book['epochs']} epoch(s), cost of " + "; ".join(
        f"{n}: {both(book) - both(d):.1f} s, {book['peak_gib'] - d['peak_gib']:.2f} GiB" for n, d in zip(names, rows))


def main(a):
    import torch, transformers, peft
    cpu = next((l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), platform.machine())
    head = ["| model | epochs | samples | side | rollout, s | update, s | peak, GiB | parameters, M | " + " | ".join(f"{k}, s" for k in KINDS) + " |",
            "|---" * (8 + len(KINDS)) + "|"]
    print("\n".join(head))
    rows, said = [], []
    for name, e, n in [(m, e, n) for m in a.models for e in a.epochs for n in a.samples if e == a.epochs[0] or n == a.samples[0]]:
        rounds = [[measure(name, e, n, w, a.cpu) for w in ((), TEXTBOOK, WASTE)] for _ in range(a.repeats if (e, n) == (a.epochs[0], a.samples[0]) else 1)]
        ours, book, strict = sorted(rounds, key=lambda x: both(x[1])/both(x[0]))[len(rounds)//2]
        rows += [ours, book, strict]; said.append(verdict(ours, book, strict)); print(said[-1], flush=True)
        if len(rounds) > 1: said.append("the rounds' ratios: " + ", ".join(f"{both(x[1])/both(x[0]):.2f}" for x in rounds)); print(said[-1], flush=True)
        if a.costs and (name, e, n) == (a.models[-1], a.epochs[0], a.samples[0]):
            less = [measure(name, e, n, tuple(x for x in TEXTBOOK if x != w), a.cpu) for w in WASTE] + [strict]
            rows += less[:-1]; said.append(costs(book, less)); print(said[-1], flush=True)
    if not a.write: return
    machine = (f"{time.strftime('%Y-%m-%d')}, {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, Python "
               f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; "
               f"{'CPU seconds' if a.cpu else 'seconds'}; of each model's first case the median of {a.repeats} round(s), one of the others.")
    text = ["# One APPO rollout and update", "", machine, "", *(f"- {x}" for x in said), "", *head, *map(line, rows), "", *__doc__.splitlines()[4:]]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "appo.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    clock = time.process_time if "--cpu" in sys.argv else time.perf_counter
    if "--child" in sys.argv:
        i = sys.argv.index("--child")
        child(sys.argv[i+1], *map(int, sys.argv[i+2:i+4]), tuple(x for x in sys.argv[i+4].split(",") if x)); sys.exit()
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--models", nargs="*", default=["embedded", "qwen2x8"])
    ap.add_argument("--epochs", nargs="*", type=int, default=[1, 5])
    ap.add_argument("--samples", nargs="*", type=int, default=[2, 1], help="samples of a task; all but the first at the first number of epochs only")
    ap.add_argument("--repeats", type=int, default=1, help="rounds of each model's first case")
    ap.add_argument("--costs", action="store_true", help="also switch each difference off by itself, for the last model's first case")
    ap.add_argument("--cpu", action="store_true", help="CPU seconds instead of wall clock, for a busy machine")
    ap.add_argument("--write", action="store_true", help="write results/appo.md")
    main(ap.parse_args())
