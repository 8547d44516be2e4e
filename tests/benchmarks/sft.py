"""Real tokens per second and extra memory of LoRA: ours, TRL's SFTTrainer with packing, padded Trainer batches.

    python tests/benchmarks/sft.py [--model embedded] [--tokens 16000] [--methods ours padded trl]

Every method trains one epoch of the same rows (lengths as in chat data: a median near 180 tokens and a long tail up to
2,048; 30 % prompt) with the same LoRA on the same 16-bit model, one after the other, each in a process of its own.
An optimizer step is about 2,048 real tokens for all: one packed block, or two padded batches of four rows in the order of
arrival, Trainer's default. Attention is each one's best on the device: ours, and PyTorch's for the others (on a GPU
FlashAttention 2, where flash-attn is installed). TRL goes into `.venv-trl`, an environment that otherwise sees this one;
nothing here is replaced.

A real token is one of the data; padding is not counted. Extra memory is the peak during training above what the process
held with the model and its adapter loaded and one small step made (resident memory on a CPU, allocated memory on a GPU).
Leak is how far the hidden states of a packed row's second sample move when the first sample's tokens change; above 0 the
samples see each other. Writes results/sft_<cpu or cuda>.json.
"""
import argparse, importlib.util, json, os, platform, random, site, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRL = "1.16.0"
METHODS = ("ours", "padded", "trl", "ours, checkpointing", "padded, checkpointing", "trl, checkpointing")
MAX_LEN, BATCH, ACCUMULATE = 2048, 4, 2
GOALS = {"ours / padded": dict(tokens_per_s=2., extra_gib=.4), "ours / trl": dict(tokens_per_s=1., extra_gib=1.)}


def make_rows(n_tokens, vocab, seed=0):
    "Rows of log-normal length until there are `n_tokens`; the first 30 % of each is prompt."
    rng, rows, total = random.Random(seed), [], 0
    while total < n_tokens:
        n = min(MAX_LEN, max(32, int(rng.lognormvariate(5.2, .8))))
        ids = [rng.randrange(vocab) for _ in range(n)]
        rows.append(dict(input_ids=ids, label=[-100]*(n*3//10) + ids[n*3//10:]))
        total += n
    return rows


def resident(field):
    "A line of this process's status, in bytes."
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1])*1024


class Meter:
    "Time and memory from `start` on, memory above what was held when the meter was made."
    def __init__(self):
        import torch
        self.torch, self.cuda = torch, torch.cuda.is_available()
        self.held = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")
    def start(self):
        if self.cuda: self.torch.cuda.synchronize(); self.torch.cuda.reset_peak_memory_stats()
        else: Path("/proc/self/clear_refs").write_text("5")
        self.wall, self.cpu = time.perf_counter(), time.process_time()
    def read(self):
        if self.cuda: self.torch.cuda.synchronize()
        peak = self.torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return dict(seconds=time.perf_counter() - self.wall, cpu_seconds=time.process_time() - self.cpu,
                    extra_gib=(peak - self.held)/2**30)


def arguments(cls, folder, method, batch, accumulate, **more):
    "The same training arguments for every trainer."
    import torch
    cuda, checkpointing = torch.cuda.is_available(), "checkpointing" in method
    extra = dict(gradient_checkpointing_kwargs=dict(use_reentrant=False)) if checkpointing else {}
    return cls(output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=2e-4,
               gradient_accumulation_steps=accumulate, optim="adamw_torch", use_cpu=not cuda, bf16=cuda, report_to="none",
               save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, gradient_checkpointing=checkpointing,
               remove_unused_columns=False, dataloader_pin_memory=cuda, **extra, **more)


def ours(method, model, rows, folder):
    "Our trainer: packed blocks, attention inside samples, logits at labels."
    from transformers import TrainingArguments
    from codetune.packing import add_label_loss, pack
    from codetune.tokenized import collate
    from codetune.trainer import SFTTrainer
    class Silent:
        is_main = True
        def log(self, row, step): pass
    add_label_loss(model)
    blocks = [[rows[i] for i in b] for b in pack([len(r["input_ids"]) for r in rows], MAX_LEN)]
    trainer = SFTTrainer(Silent(), model=model, train_dataset=blocks, data_collator=collate,
                         args=arguments(TrainingArguments, folder, method, 1, 1, label_names=["labels"]))
    trainer._show = lambda row: None
    return trainer


def padded(method, model, rows, folder):
    "transformers' Trainer on batches padded to their longest row."
    import torch
    from transformers import Trainer, TrainingArguments
    def collate(batch):
        longest = max(len(r["input_ids"]) for r in batch)
        fill = lambda xs, pad: torch.tensor([x + [pad]*(longest - len(x)) for x in xs])
        ids = [r["input_ids"] for r in batch]
        return dict(input_ids=fill(ids, 0), labels=fill([r["label"] for r in batch], -100),
                    attention_mask=fill([[1]*len(x) for x in ids], 0))
    return Trainer(model=model, train_dataset=rows, data_collator=collate,
                   args=arguments(TrainingArguments, folder, method, BATCH, ACCUMULATE))


def trl(method, model, rows, folder):
    "TRL's trainer with packing by best fit, its default, and its own label-only loss."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from codetune.embedded import load_tokenizer
    data = Dataset.from_list([dict(input_ids=r["input_ids"], completion_mask=[int(l >= 0) for l in r["label"]]) for r in rows])
    args = arguments(SFTConfig, folder, method, 1, 1, packing=True, max_length=MAX_LEN, completion_only_loss=True)
    args.remove_unused_columns = True
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=load_tokenizer(os.environ["BENCH_MODEL"]))


def leak(trainer, model):
    "Largest move of the second sample's hidden states when the first one changes; None where rows are not packed."
    import torch
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist() if "position_ids" in inputs else []
    if len(starts) < 2: return None
    seen, second = [], slice(starts[1], starts[2] if len(starts) > 2 else None)
    hook = model.get_base_model().base_model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state[0, second].float()))
    with torch.no_grad():
        for change in (0, 1):
            ids = inputs["input_ids"].clone()
            ids[0, :starts[1]] += change
            trainer.compute_loss(trainer.model, dict(inputs, input_ids=ids))
    hook.remove()
    return (seen[0] - seen[1]).abs().max().item()


def child(method, name, n_tokens):
    "Train with one method and print what it took."
    import torch
    from peft import get_peft_model
    from codetune.qlora_load import add_adapter, load_base, lora_config
    os.environ["BENCH_MODEL"] = name
    torch.manual_seed(0)
    kind = method.split(",")[0]
    adapt = add_adapter if kind == "ours" else get_peft_model  # ours keeps an adapter's input once, PEFT a copy for each
    model = adapt(load_base(name, quant="none", dtype="bf16"), lora_config(r=8, alpha=16))
    if kind != "ours" and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        model.get_base_model().set_attn_implementation("flash_attention_2")
    if "checkpointing" in method: model.enable_input_require_grads()
    rows = make_rows(n_tokens, model.config.vocab_size - 1)
    with tempfile.TemporaryDirectory() as folder:
        padded("warm", model, make_rows(64, 300), folder).train()  # kernels and libraries are loaded
        meter = Meter()
        trainer = dict(ours=ours, padded=padded, trl=trl)[kind](method, model, rows, folder)
        leaked = leak(trainer, model)
        meter.start()
        trainer.train()
        found = meter.read()
    real = sum(len(r["input_ids"]) for r in rows)
    losses = [float(r["loss"]) for r in trainer.state.log_history if "loss" in r]
    attention = model.get_base_model().config._attn_implementation
    print("RESULT " + json.dumps(dict(method=method, attention=attention, tokens=real, rows=len(rows), steps=trainer.state.global_step,
          leak=leaked, first_loss=losses[0], last_loss=losses[-1], tokens_per_s=real/found["seconds"],
          tokens_per_cpu_s=real/found["cpu_seconds"], **found)))


def trl_python():
    "The interpreter of an environment that has TRL besides everything here."
    home = ROOT/".venv-trl"
    if not (home/"ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        lib = next(home.glob("lib/python*/site-packages"))
        (lib/"parent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        subprocess.run([home/"bin"/"pip", "install", "-q", "--no-deps", f"trl=={TRL}"], check=True)
        (home/"ready").touch()
    return str(home/"bin"/"python")


def compare(rows):
    "Ours over each other method with the same checkpointing: speed, speed by processor time, memory."
    by, out = {r["method"]: r for r in rows}, {}
    for a in (m for m in by if m.startswith("ours")):
        for b in (m for m in by if not m.startswith("ours") and m.endswith("checkpointing") == a.endswith("checkpointing")):
            out[f"{a} / {b}"] = {k: round(by[a][k]/by[b][k], 3) for k in ("tokens_per_s", "tokens_per_cpu_s", "extra_gib")}
    return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="embedded")
    p.add_argument("--tokens", type=int, default=16000)
    p.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    p.add_argument("--child")
    args = p.parse_args()
    if args.child: return child(args.child, args.model, args.tokens)
    import torch
    env, rows = os.environ | dict(PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false"), []
    for method in args.methods:
        python = trl_python() if method.startswith("trl") else sys.executable
        done = subprocess.run([python, __file__, "--child", method, "--model", args.model, "--tokens", str(args.tokens)],
                              env=env, capture_output=True, text=True)
        line = next((l for l in done.stdout.splitlines() if l.startswith("RESULT ")), None)
        if not line: raise SystemExit(f"{method} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        rows.append(r := json.loads(line[7:]))
        print(f"{method:<24}{r['tokens_per_s']:9.1f} tokens/s {r['tokens_per_cpu_s']:8.1f} tokens/CPU-s "
              f"{r['extra_gib']:7.2f} GiB extra  leak {r['leak']}", flush=True)
    ratios, cuda = compare(rows), torch.cuda.is_available()
    for pair,goal in GOALS.items():
        if pair not in ratios: continue
        ratios[pair]["goals"] = (f"tokens_per_s >= {goal['tokens_per_s']:g}, extra_gib <= {goal['extra_gib']:g}: "
            + ("met" if ratios[pair]["tokens_per_s"] >= goal["tokens_per_s"] and ratios[pair]["extra_gib"] <= goal["extra_gib"] else "missed"))
    device = torch.cuda.get_device_name(0) if cuda else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    (HERE/"results").mkdir(exist_ok=True)
    (HERE/"results"/f"sft_{'cuda' if cuda else 'cpu'}.json").write_text(json.dumps(dict(device=device, model=args.model,
        date=time.strftime("%Y-%m-%d"), max_len=MAX_LEN, padded_batch=BATCH, padded_accumulation=ACCUMULATE,
        versions={n: version(n) for n in ("torch", "transformers", "peft")} | dict(trl=TRL), rows=rows, ratios=ratios), indent=1) + "\n")
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__": main()
