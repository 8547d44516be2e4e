"""What takes a night: named parts, one after the other, and a log of when, where, at which commit.

    python tests/long.py                      every part
    python tests/long.py stages jupyterlab    only these; the other sections of the log stay as they are

`make test-long` and `make test-long PARTS="stages jupyterlab"` do the same. Exit status 1: a part failed.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from codetune.files import atomic_path
from codetune.provenance import git_state, hardware, versions

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / "tests/benchmarks/results/test-long.log"
LIMIT_S, TAIL = 8 * 3600, 60  # of each part: seconds until it is stopped, lines of output kept
SANDBOX = sorted(f"tests/{p.name}" for p in (ROOT / "tests").glob("test_sandbox*.py"))
PYTEST = ["-m", "pytest", "-m"]
PARTS = {  # name: arguments of Python, run in the project's root
    "stages": ["tests/stages.py"],
    "seeds": ["tests/benchmarks/appo_learning.py", "all"],
    "sandbox": [*PYTEST, "long", *SANDBOX],
    "pytest": [*PYTEST, "long and not browser", *(f"--ignore={p}" for p in SANDBOX)],
    "jupyterlab": [*PYTEST, "browser", "tests/test_jupyterlab.py"],
    "docs": [*PYTEST, "browser", "tests/test_docs.py"],
}


def anonymous(line):
    "A line of output without this machine's folders and terminal codes."
    line = re.sub(r"\x1b\[[0-9;]*m", "", line.rstrip("\n")).rsplit("\r", 1)[-1]
    places = {ROOT: ".", Path(sys.executable).parent: "$BIN", tempfile.gettempdir(): "$TMP", Path.home(): "~"}
    for place, name in places.items():
        line = line.replace(f"{place}/", f"{name}/")
    return line


def execute(args, limit_s=LIMIT_S):
    "Run Python with `args` and show its output; exit status (124: too long), seconds, last lines."
    start, late = time.monotonic(), threading.Event()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timer = threading.Timer(limit_s, lambda: (late.set(), os.killpg(child.pid, signal.SIGKILL)))
    timer.start()
    tail = deque(maxlen=TAIL)
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            tail.append(anonymous(line))
        status = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    return 124 if late.is_set() else status, time.monotonic() - start, list(tail)


def section(name, args, limit_s=LIMIT_S):
    "Run one part; its section of the log and whether it passed."
    git, machine, found = git_state(), hardware(), versions()
    lines = [
        f"== {name}",
        f"date      {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"machine   {machine['cpus']} cores, {machine['memory_gib']} GiB, {machine['platform']}, "
        f"Python {found['python']}, torch {found.get('torch')}, GPUs: {', '.join(machine['gpus']) or 'none'}",
        f"commit    {git.get('revision', 'unknown')}{' with changes' if git.get('dirty') else ''}",
        f"command   {anonymous('python ' + shlex.join(args))}",
    ]
    status, took, tail = execute(args, limit_s)
    how = {0: "passed", 124: f"FAILED: stopped after its limit of {limit_s} s"}.get(
        status, f"FAILED, exit status {status}"
    )
    lines += [f"duration  {took:.0f} s", f"status    {how}", *("    " + line for line in tail), ""]
    return "\n".join(lines), status == 0


def read_log(path):
    "The sections of a log, by name."
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return {m[1]: m[0].rstrip("\n") + "\n" for m in re.finditer(r"^== (\S+)\n(?:(?!== ).*\n?)*", text, re.M)}


def run_parts(names, parts=PARTS, log=LOG, limit_s=LIMIT_S):
    "Run the named parts in the table's order, each replacing its section; the names of those that failed."
    failed = []
    for name in (n for n in parts if n in names):
        print(f"== {name}", flush=True)
        text, passed = section(name, parts[name], limit_s)
        found = read_log(log) | {name: text}
        with atomic_path(log) as tmp:
            tmp.write_text("\n".join(found[n] for n in parts if n in found), encoding="utf-8")
        if not passed:
            failed.append(name)
    return failed


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none takes all")
    names = args.parse_args().parts or list(PARTS)
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        args.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = run_parts(names)
    print(
        f"test-long: {len(names) - len(failed)} of {len(names)} parts passed; see {LOG.relative_to(ROOT)}"
    )
    if failed:
        sys.exit(f"test-long: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
