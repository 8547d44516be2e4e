"""Every stage with untouched defaults, through papermill, from the root and from nbs/: seconds of each.

    python tests/stages.py [STAGE ...]

Exit status 1 if one fails, leaves no complete run, or takes longer than the 90 s that defaults are meant for.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from codetune.runner import STAGES

ROOT, LIMIT_S = Path(__file__).resolve().parents[1], 90


def run(stage, folder, scratch):
    "One stage, started in `folder`: its seconds and what is wrong with it, if anything."
    runs = Path(tempfile.mkdtemp(dir=scratch))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    env |= dict(
        CODETUNE_RUNS=str(runs),
        HF_HUB_OFFLINE="1",
        WANDB_MODE="disabled",
        TQDM_MININTERVAL="10",
        PYTHONPATH=str(ROOT),
    )
    args = [
        sys.executable,
        "-m",
        "papermill",
        os.path.relpath(ROOT / "nbs" / f"{stage}.ipynb", folder),
        str(runs / "out.ipynb"),
    ]
    start = time.monotonic()
    done = subprocess.run(
        args, cwd=folder, env=env, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL
    )
    took = time.monotonic() - start
    status = [
        m["status"]
        for p in runs.rglob("manifest.json")
        if (m := json.loads(p.read_text())).get("stage") == stage
    ]
    if done.returncode:
        return took, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    if status != ["complete"]:
        return took, f"left the runs {status}, one complete run was expected"
    return took, f"longer than {LIMIT_S} s" if took > LIMIT_S else ""


def main():
    faults, total = [], time.monotonic()
    print(f"{'stage':24}{'from':8}{'seconds':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for stage in sys.argv[1:] or STAGES:
            for folder in (ROOT, ROOT / "nbs"):
                took, fault = run(stage, folder, scratch)
                print(f"{stage:24}{folder.name if folder != ROOT else '.':8}{took:8.1f}  {fault}", flush=True)
                faults += [stage] if fault else []
    print(f"together {time.monotonic() - total:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
