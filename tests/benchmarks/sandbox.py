"""Verdicts a second against what people use for code rewards, all on this machine, in one run.

    python tests/benchmarks/sandbox.py [--rivals /path/to/python]

The rivals live in an environment of their own: BigCodeBench's evaluator 0.2.5 and EvalPlus 0.3.1 from PyPI beside numpy
1.24 and pandas 2.0; without --rivals it is made in a temporary directory. The same interpreter hosts our programs. Every
contender gets as many workers as there are cores and distinct programs, so that no verdict is cached. The tests are the
same for all programs: we compile them once, EvalPlus is handed inputs and expected outputs for the same calls, and it
runs every one of them (its verdict demands as many results as inputs).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from codetune.sandbox import Pool
from codetune.sandbox_attacks import run_weakly

RESULTS = Path(__file__).parent / "results"
CORES = os.cpu_count()
RIVALS = ["bigcodebench==0.2.5", "evalplus==0.3.1"]
NEEDS = ["numpy==1.24.4", "pandas==2.0.3", "matplotlib==3.7.5", "psutil", "appdirs", "wget", "tempdir", "tqdm", "multipledispatch",
         "termcolor"]

STD = dict(
    program='''import collections, re
def task_func(text, n):
    words = re.findall(r"[a-z]+", text.lower())
    return sorted(collections.Counter(words).most_common(n))
''',
    calls=[(("the cat and the dog", 1), [("the", 2)]), (("a a b", 2), [("a", 2), ("b", 1)]), (("", 3), []),
           (("X x y", 1), [("x", 2)]),
           (("one two two", 2), [("one", 1), ("two", 2)])])
PANDAS = dict(
    program='''import numpy as np
import pandas as pd
def task_func(values, n):
    df = pd.DataFrame({"v": values, "g": np.arange(len(values)) % n})
    return [float(x) for x in df.groupby("g")["v"].mean()]
''',
    calls=[(([1, 2, 3, 4], 2), [2.0, 3.0]), (([1], 1), [1.0]), (([2, 4, 6], 3), [2.0, 4.0, 6.0]),
           (([0, 0], 1), [0.0]), (([5, 7], 2), [5.0, 7.0])])


def unittest_of(calls):
    "The calls as a TestCases class."
    body = "".join(f"    def test_{i}(self): self.assertEqual(task_func(*{args!r}), {want!r})\n" for i,
                   (args, want) in enumerate(calls))
    return "import unittest\nclass TestCases(unittest.TestCase):\n" + body


CHILD = '''
import json, sys, time
from concurrent.futures import ProcessPoolExecutor
job = json.load(open(sys.argv[1]))
def bigcodebench(i):
    from bigcodebench.eval import untrusted_check
    return untrusted_check(job["program"] + f"# {i}", job["test"], "task_func", 30*1024, 30*1024, 10, 1, 2)[0]=="pass"
def evalplus(i):
    from evalplus.eval import untrusted_check
    calls = [(tuple(a), e) for a, e in job["calls"]]
    inputs, want = [list(a) for a, _ in calls], [[tuple(x) if isinstance(x, list) else x for x in e] for _, e in calls]
    return untrusted_check("humaneval", job["program"] + f"# {i}", inputs, "task_func", want, 0, [1.]*len(calls))[0]=="pass"
if __name__=="__main__":
    check = globals()[job["who"]]
    with ProcessPoolExecutor(job["workers"]) as pool:
        assert all(pool.map(check, range(-job["workers"], 0))), "a right program failed"
        t = time.perf_counter()
        right = sum(pool.map(check, range(job["n"])))
        print(json.dumps(dict(rate=job["n"]/(time.perf_counter()-t), right=right, n=job["n"])))
'''


def rival(who, task, n, python):
    "Verdicts a second of a rival in its own environment; None if it fails a right program."
    with tempfile.TemporaryDirectory() as d:
        (Path(d) / "child.py").write_text(CHILD)
        (Path(d) / "job.json").write_text(json.dumps(dict(who=who, n=n, workers=CORES,
                                                          test=unittest_of(task["calls"]), **task)))
        out = subprocess.run([python, "child.py", "job.json"], cwd=d, capture_output=True, text=True,
                             timeout=500)
    if "a right program failed" in out.stderr:
        return None
    if out.returncode:
        raise RuntimeError(f"{who}: {out.stderr[-2000:]}")
    got = json.loads(out.stdout.splitlines()[-1])
    assert got["right"] == n, f"{who} called {n - got['right']} right programs wrong"
    return got["rate"]


def plain(task, n, python):
    "A subprocess for each program, as many at a time as there are cores."
    from concurrent.futures import ThreadPoolExecutor
    run = lambda i: run_weakly("plain", f"{task['program']}# {i}\n{unittest_of(task['calls'])}",
                               python=python, env=dict(OMP_NUM_THREADS="1"))
    with ThreadPoolExecutor(CORES) as pool:
        start = time.perf_counter()
        assert set(pool.map(run, range(n))) == {"passed"}
        return n / (time.perf_counter() - start)


def cpu_s(pid):
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def ours(task, n, mode, python):
    "Our rate with every layer on, latency one by one, supervisor CPU."
    test = unittest_of(task["calls"])
    with Pool(python=python, require="A") as pool:
        ask = lambda i: pool.submit(f"{task['program']}# {mode} {i}", test, mode=mode, timeout=20)
        assert all(f.result().passed for f in [ask(-i - 1) for i in range(2 * CORES)])
        cpu, start = cpu_s(pool._proc.pid), time.perf_counter()
        verdicts = [f.result() for f in [ask(i) for i in range(n)]]
        rate, cpu = n / (time.perf_counter() - start), 1000 * (cpu_s(pool._proc.pid) - cpu) / n
        assert all(v.passed and v.mode == mode for v in verdicts), [v for v in verdicts if not v.passed][:1]
        waits = []
        for i in range(min(n, 200)):
            start = time.perf_counter()
            ask(n + i).result()
            waits.append(1000 * (time.perf_counter() - start))
        waits.sort()
        return dict(rate=rate, p50=statistics.median(waits), p99=waits[int(.99 * len(waits))], cpu_ms=cpu,
                    layers=verdicts[0].layers)


def pss_mib(n_slots, task, python):
    "Proportional memory of all that a pool starts, once every slot has worked."
    test = unittest_of(task["calls"])
    with Pool(n_slots=n_slots, python=python) as pool:
        slow = task["program"] + "\nimport time; time.sleep(.3)"
        for _ in range(2):
            assert all(f.result().passed
                       for f in [pool.submit(f"{slow} # {i}", test, timeout=20, mode="inprocess")
                                 for i in range(n_slots)])
        tree, grew = {pool._proc.pid}, True
        while grew:
            children = {int(p) for p in os.listdir("/proc") if p.isdigit() and _parent(p) in tree} - tree
            tree |= children
            grew = bool(children)
        return sum(_pss(p) for p in tree)


def _parent(p):
    try:
        return int(Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _pss(p):
    lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def rivals_python(given):
    "The interpreter of the rivals' environment; made here if none is given."
    if given:
        return given
    d = tempfile.mkdtemp(prefix="rivals-")
    subprocess.run([sys.executable, "-m", "venv", d], check=True)
    subprocess.run([f"{d}/bin/pip", "install", "-q", *NEEDS], check=True)
    subprocess.run([f"{d}/bin/pip", "install", "-q", "--no-deps", *RIVALS], check=True)
    return f"{d}/bin/python"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rivals", help="python of an environment with the rivals")
    parser.add_argument("--scale", type=float, default=1., help="how many programs, relative to the default")
    args = parser.parse_args()
    python, lines, k = rivals_python(args.rivals), [], args.scale
    for name, task, counts in (("standard library", STD, (600, 300, 24, 300, 100)),
                               ("numpy + pandas", PANDAS, (120, 80, 16, 100, 20))):
        a, b, c, d, e = (max(4, int(n * k)) for n in counts)
        base = rival("bigcodebench", task, c, python)
        one, two = ours(task, a, "inprocess", python), ours(task, b, "io", python)
        rows = [("**codetune, one process**", one["rate"]), ("codetune, two processes (io)", two["rate"]),
                ("BigCodeBench evaluator 0.2.5", base),
                ("EvalPlus 0.3.1 (isolates nothing)", rival("evalplus", task, d,
                                                            python)), ("plain subprocess",
                                                                       plain(task, e, python))]
        lines += [f"## {name}", "", "| runner | verdicts/s | × evaluator |", "|---|---|---|"]
        lines += [f"| {who} | {rate:.1f} | {rate / base:.1f} |" if rate else f"| {who} | calls right programs wrong | |" for who, rate in rows]
        lines += ["", f"Latency one by one: one process p50 {one['p50']:.1f} ms, p99 {one['p99']:.1f} ms; io p50 {two['p50']:.1f} ms, "
                  f"p99 {two['p99']:.1f} ms. Supervisor CPU {one['cpu_ms']:.2f} ms a verdict.", ""]
        print("\n".join(lines[-9:]), flush=True)
    small, large = pss_mib(1, PANDAS, python), pss_mib(8, PANDAS, python)
    lines += ["## memory", "",
              f"Proportional set size with numpy and pandas imported: 1 slot {small:.0f} MiB, 8 slots {large:.0f} MiB "
              f"({large / small:.2f} ×).", ""]
    head = ["# Sandbox benchmark", "",
            f"`python tests/benchmarks/sandbox.py`, {time.strftime('%Y-%m-%d')}, {CORES} cores, layers {one['layers']}, "
            f"{CORES} workers each, load average at the end {os.getloadavg()[0]:.1f}.", ""]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sandbox.md").write_text("\n".join(head + lines))
    print("\n".join(lines[-3:]))


if __name__ == "__main__":
    main()
