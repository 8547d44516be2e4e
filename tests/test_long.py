"The night's runner: sections are replaced one by one, failures are told, no path of the machine is kept."

import re
import subprocess
import sys
from pathlib import Path

import long

ROOT = Path(__file__).parents[1]
PARTS = {
    "good": ["-c", f"print('first'); print('{ROOT}/x')"],
    "bad": ["-c", "print('no'); raise SystemExit(3)"],
}


def test_only_the_parts_that_ran_get_new_sections(tmp_path):
    log = tmp_path / "long.log"
    assert long.run_parts(["good", "bad"], PARTS, log) == ["bad"]
    before = long.read_log(log)
    assert (
        list(before) == ["good", "bad"]
        and "status    passed" in before["good"]
        and "FAILED, exit status 3" in before["bad"]
    )
    assert re.search(r"^commit    [0-9a-f]{40}", before["good"], re.M) and re.search(
        r"^machine   \d+ cores", before["good"], re.M
    )
    again = PARTS | {"bad": ["-c", "print('== good')"]}  # output that looks like a heading is still output
    assert long.run_parts(["bad"], again, log) == []
    after = long.read_log(log)
    assert (
        after["good"] == before["good"]
        and "status    passed" in after["bad"]
        and list(after) == ["good", "bad"]
    )


def test_no_path_of_the_machine_is_logged(tmp_path):
    long.run_parts(["good"], PARTS, tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert "    ./x\n" in text and str(ROOT) not in text


def test_a_part_that_hangs_is_ended_and_fails(tmp_path):
    log = tmp_path / "log"
    hangs = {"hangs": ["-c", "import time; print('started', flush=True); time.sleep(60)"]}
    assert long.run_parts(["hangs"], hangs, log, limit_s=2) == ["hangs"]
    assert "stopped after its limit" in log.read_text() and "    started" in log.read_text()


def test_an_unknown_part_is_refused_with_the_list():
    done = subprocess.run([sys.executable, ROOT / "tests/long.py", "stage"], capture_output=True, text=True)
    assert done.returncode == 2 and "there are stages, seeds, sandbox" in done.stderr


def test_every_long_test_belongs_to_one_part():
    "What `pytest` ignores is in `sandbox`; what it leaves to Chromium is in `jupyterlab` or `docs`."
    browser = {p.name for p in (ROOT / "tests").glob("test_*.py") if "mark.browser" in p.read_text()}
    assert browser - {"test_long.py"} == {"test_jupyterlab.py", "test_docs.py"}
    assert all(f"--ignore={p}" in long.PARTS["pytest"] for p in long.SANDBOX) and long.SANDBOX
