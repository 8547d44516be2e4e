"""Tokens per CPU-second against transformers, and memory on a large file. One run prints the ratios.

    python tests/benchmarks/tokenize [--model FOLDER] [--gb 1] [--write]

`--model` is a folder with Qwen2.5's tokenizer, or any model with a vocabulary of that size. Without it one is trained on the
Python sources that are installed here (151,643 byte-level tokens, Qwen's pattern and template; once, a minute or two, then kept
in the cache), so that the figures need no network.
Chats are made of the functions of Python's standard library: the docstring asks, the source answers. All engines run on
one thread, side by side, in rounds; the best round of each counts. Every row is compared with transformers' ids and mask.
"""
import argparse
import ast
import datetime
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

os.environ |= dict(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
GENERATION = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ SYSTEM }}{% endif %}{{ '<|im_start|>' + m.role + '\\n' }}"
              "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
              "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}")
BRANCH = ("{%- if message.role == \"assistant\" and not message.tool_calls %}{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}"
          "{% endgeneration %}{{- '\\n' }}{%- elif (message.role == \"user\")")


def built():
    "A folder with a tokenizer of Qwen's size, trained on installed sources."
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from codetune.embedded import cache_root
    folder = cache_root()/"bench-tokenizer-151643"
    if (folder/"tokenizer.json").exists(): return str(folder)
    print("training a tokenizer of Qwen's size, once", flush=True)
    fixture = Path(__file__).parents[2]/"fixtures"/"tokenizer"/"qwen25"
    like = json.loads((fixture/"tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((fixture/"tokenizer_config.json").read_text(encoding="utf-8"))
    tok = Tokenizer(models.BPE())
    tok.normalizer, tok.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = like["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=151643, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(sources(40 << 20), trainer)
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]); tok.add_tokens(["<tool_call>", "</tool_call>"])
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", chat_template=config["chat_template"]).save_pretrained(folder)
    return str(folder)


def sources(limit):
    "About `limit` bytes of installed Python files."
    done = 0
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield text
            done += len(text)
            if done > limit: return


def with_generation(template, system):
    "The model's template with its answers marked, as trainers keep one; a plain ChatML template where it has another build."
    first = '{%- if (message.role == "user")'
    return template.replace(first, BRANCH) if first in template else GENERATION.replace("SYSTEM", repr(system))


def chats(n):
    "Question and answer from documented functions of the standard library."
    found, root = [], Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts): continue
        try: source = path.read_text(encoding="utf-8"); tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError): continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not (doc := ast.get_docstring(node)): continue
            code = ast.get_source_segment(source, node)
            if 200 < len(code) < 6000:
                found.append([dict(role="user", content=f"Write `{node.name}` for {path.stem}.\n{doc[:600]}"),
                              dict(role="assistant", content=f"```python\n{code}\n```")])
        if len(found) >= n: return found[:n]
    return found


def cpu(fn):
    start = time.process_time(); out = fn()
    return time.process_time()-start, out


def ratios(model, n, rounds):
    "Thousand tokens per CPU-second of each way, best round."
    from transformers import AutoTokenizer
    from codetune.chat_encode import IGNORE, ChatTokenizer
    from codetune.embedded import resolve_model
    from codetune.fasttok import make_pack
    tok = AutoTokenizer.from_pretrained(model if Path(model, "tokenizer_config.json").exists() else resolve_model(model))
    rows, chat = chats(n), ChatTokenizer(make_pack(tok, model))
    texts = [tok.apply_chat_template(c, tokenize=False) for c in rows]
    system = chat.render(rows[0][:1]).split("<|im_start|>user")[0]
    masked = with_generation(tok.chat_template, system)
    ways = {
        "encode_batch_fast, ids only": lambda: [e.ids for e in tok.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)],
        "apply_chat_template, assistant mask": lambda: [tok.apply_chat_template(c, chat_template=masked, return_dict=True, return_assistant_tokens_mask=True) for c in rows],
        "codetune, ids and labels": lambda: [chat.encode_chat(c) for c in rows]}
    best, out = {}, {}
    for _ in range(rounds):
        for name, fn in ways.items():
            seconds, out[name] = cpu(fn)
            best[name] = min(best.get(name, 1e9), seconds)
    ids, masks, ours = out.values()
    assert all(list(a) == b[0] for a, b in zip(ids, ours)), "ids differ from encode_batch_fast"
    assert all(m["input_ids"] == o[0] and [bool(x) for x in m["assistant_masks"]] == [y != IGNORE for y in o[1]] for m, o in zip(masks, ours)), "labels differ from the assistant mask"
    tokens = sum(map(len, ids))
    return len(tok), len(rows), tokens, {k: tokens/v/1e3 for k, v in best.items()}


def big_file(path, size, rows):
    "A file of about `size` bytes whose rows all differ."
    lines, k, done = [json.dumps(dict(messages=c), ensure_ascii=False) for c in rows], 0, 0
    with path.open("w", encoding="utf-8") as f:
        while done < size:
            line = lines[k % len(lines)].replace('"content": "', f'"content": "{k:09d} ', 1)+"\n"
            done += f.write(line); k += 1
    return k


def watched(argv):
    "Run a command; seconds, CPU seconds and peak resident MB of the whole process tree."
    import psutil
    start, peak = time.monotonic(), 0
    p = psutil.Popen([sys.executable, "-c", "import sys; from codetune.convert import convert_command as c; import resource as r; code = c(sys.argv[1:]);"
                      "print('CPU', sum(x.ru_utime+x.ru_stime for x in map(r.getrusage, (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)))); sys.exit(code)", *argv],
                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    text = []
    reader = threading.Thread(target=lambda: text.append(p.stdout.read())); reader.start()
    while p.poll() is None:
        now = 0
        try:
            for q in [p, *p.children(recursive=True)]:
                try: now += q.memory_info().rss
                except psutil.NoSuchProcess: pass
        except psutil.NoSuchProcess: pass
        peak = max(peak, now); time.sleep(.05)
    reader.join()
    assert p.returncode == 0, text
    return time.monotonic()-start, float(text[0].split("CPU")[1].split()[0]), peak/2**20


def memory(model, gb, workers):
    "Peak memory and throughput on 10 MB and on the large file, without and with tokenization; bytes for 1, 2 and 4 workers."
    rows, out = chats(3000), []
    with tempfile.TemporaryDirectory(prefix="codetune-bench-") as d:
        small, large = Path(d)/"small.jsonl", Path(d)/"large.jsonl"
        big_file(small, 10*2**20, rows)
        seen = set()
        for n in (1, 2, 4):
            watched([str(small), "-t", "-m", model, "--max_len", "9999", "--workers", str(n), "-o", f"{d}/w{n}.jsonl"])
            seen.add(Path(f"{d}/w{n}.jsonl").read_bytes())
        assert len(seen) == 1, "the output depends on the number of workers"
        for name, size in (("10 MB", 10*2**20), (f"{gb:g} GB", int(gb*2**30))):
            if size > 10*2**20: n = big_file(large, size, rows)
            for mode, flags in (("conversations", []), ("tokens", ["-t", "-m", model, "--max_len", "9999"])):
                wall, cpus, peak = watched([str(small if size == 10*2**20 else large), *flags, "--workers", str(workers), "-o", f"{d}/o.jsonl"])
                Path(f"{d}/o.jsonl").unlink()
                out.append((name, mode, wall, cpus, peak, size/2**20/cpus))
                print(f"  {name:>7} {mode:<14}{wall:8.1f} s  {cpus:8.1f} CPU-s  {out[-1][-1]:6.1f} MB/CPU-s  peak {peak:6.0f} MB", flush=True)
        print(f"  rows in the large file: {n}")
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a folder, embedded, or a hub id; default: one built here"); p.add_argument("--chats", type=int, default=3000); p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--gb", type=float, default=1, help="size of the large file; 0 leaves it out"); p.add_argument("--workers", type=int, default=2)
    p.add_argument("--write", action="store_true", help="append to results/tokenize.md")
    args = p.parse_args()
    args.model = args.model or built()
    vocab, n, tokens, speed = ratios(args.model, args.chats, args.rounds)
    ids, mask, ours = speed.values()
    print(f"{n} chats, {tokens} tokens, vocabulary {vocab}; every row equals transformers' ids and mask")
    for k, v in speed.items(): print(f"  {k:<38}{v:8.0f} ktok/CPU-s")
    print(f"  against encode_batch_fast {ours/ids:.2f} x (goal 3.5), against the assistant mask {ours/mask:.2f} x (goal 7)")
    rows = memory(args.model, args.gb, args.workers) if args.gb else []
    if not args.write: return
    path = Path(__file__).parent.with_name("results")/"tokenize.md"
    if not path.exists():
        path.write_text("# Tokenization\n\nMade by `python tests/benchmarks/tokenize --write`; ktok is thousand tokens per CPU-second.\n\n"
                        "| date | machine | vocabulary | chats | HF ids ktok | HF mask ktok | ours ktok | x ids | x mask | peak MB conversations / tokens | MB per CPU-s, 10 MB → large |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
    cpu_name = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), platform.machine())
    peaks = " / ".join(f"{r[4]:.0f}" for r in rows[2:]) or "-"
    flow = ", ".join(f"{a[5]:.1f} → {b[5]:.1f}" for a, b in zip(rows[:2], rows[2:])) or "-"
    with path.open("a") as f:
        f.write(f"| {datetime.date.today()} | {cpu_name}, {os.cpu_count()} cores, Python {platform.python_version()} | {vocab} | {n} ({tokens} tokens) | {ids:.0f} | {mask:.0f} | {ours:.0f} | "
                f"{ours/ids:.2f} | {ours/mask:.2f} | {peaks} ({args.gb:g} GB, {args.workers} workers) | {flow} |\n")


if __name__ == "__main__": main()
