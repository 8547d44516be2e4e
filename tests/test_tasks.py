"Tasks on real rows and through the command line: what the notebooks, with their small inputs, cannot show."
import gzip, json, os, subprocess, sys
from pathlib import Path

import pytest

from codetune.answers import canonical, compose, extract_code, parses
from codetune.calibration import calibrate, imports, usable_tasks
from codetune.sandbox import Pool
from codetune.tasks import FIELDS, near_duplicates, partition, select_tasks, to_task

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("CODETUNE_TEST_DATA") or ROOT.parent/"shared"/"data")
BCB, HUMANEVAL = DATA/"bigcodebench_v0.1.4_part.jsonl.gz", DATA/"humaneval_as_bcb.jsonl.gz"
real = pytest.mark.skipif(not BCB.exists(), reason="no real rows; set CODETUNE_TEST_DATA to the folder that has them")
REACHES_OUT = {"os", "shutil", "subprocess", "signal", "psutil", "socket", "ctypes", "multiprocessing"}

def command(*args):
    return subprocess.run([sys.executable, "-m", "codetune.cli", *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}, timeout=300)

def ids(rows): return [r["task_id"] for r in rows]

@real
@pytest.mark.parametrize("path", [BCB, HUMANEVAL])
def test_answers_of_real_rows(path):
    "Every canonical solution survives a chat: fenced with an example call after it, and in bare prose."
    for row in select_tasks(str(path))[0]:
        entry, code = row["entry_point"], canonical(row)
        fenced = extract_code(f"Here:\n```python\n{code}\n```\nUse it so:\n```python\nprint({entry}(1))\n```", entry)
        prose = extract_code(f"Sure, this is the code.\n\n{code}\n\nIt does what you asked.", entry)
        assert fenced == prose and parses(compose(row, fenced)), row["task_id"]
        assert f"print({entry}(1))" not in fenced and parses(compose(row, "")), row["task_id"]

@real
def test_real_partition_does_not_leak():
    rows = select_tasks(str(BCB))[0]
    train, test = partition(rows)
    assert len(test) == round(.2*len(rows)) and not set(ids(train)) & set(ids(test)) and len(train)+len(test) == len(rows)
    groups = [[rows[i]["task_id"] for i in g] for g in near_duplicates(rows) if len(g) > 1]
    assert any({"BigCodeBench/1120", "BigCodeBench/1121"} <= set(g) for g in groups)
    for g in groups: assert len({i in set(ids(test)) for i in g}) == 1, g

@real
def test_humaneval_is_sound():
    "Other entry points: every canonical passes; no empty body does, though some earn part of the credit, and are named."
    with Pool(n_slots=2) as pool: records = calibrate(select_tasks(str(HUMANEVAL))[0], pool, repeats=1)
    assert [r["task_id"] for r in records if "passed" in r["empty"] or "passed" not in r["canonical"]] == []
    assert all(r["usable"] == (r["baseline"] == 0) for r in records) and 0 < sum(r["usable"] for r in records) < len(records)

SLOW = {"BigCodeBench/0": "computes for some five seconds", "BigCodeBench/220": "its tests sleep for twenty seconds"}

@real
def test_calibration_of_real_rows():
    "Standard-library rows under our own interpreter are sound, all but those that are slow by what they do."
    harmless = set(sys.stdlib_module_names) - REACHES_OUT
    rows = [r for r in select_tasks(str(BCB))[0] if (imports(canonical(r)) | imports(r["test"])) <= harmless][:24]
    assert len(rows) == 24 and {r["task_id"] for r in rows} >= set(SLOW)
    rows = [r for r in rows if r["task_id"] not in SLOW]
    with Pool(n_slots=2) as pool: records = calibrate(rows, pool, repeats=2, exec_timeout_s=10)
    assert [(r["task_id"], r["reasons"], r["message"]) for r in records if r["canonical"] != {"passed": 2}] == []

@real
def test_calibration_keeps_the_mode_that_works():
    "BigCodeBench/833 returns a generator, which cannot travel between processes although its tests look as if it could."
    row, = [r for r in select_tasks(str(BCB))[0] if r["task_id"] == "BigCodeBench/833"]
    with Pool(n_slots=1) as pool: records = calibrate([row], pool, repeats=1)
    assert records[0]["forced"] and records[0]["mode"] == "inprocess" and records[0]["canonical"] == {"passed": 1}
    assert to_task(usable_tasks([row], records, keep_partial=True)[0])["mode"] == "inprocess"

def test_convert_makes_two_parts_that_do_not_overlap(tmp_path):
    for split, n in (("train", 1000), ("test", 30)):
        done = command("convert-bigcodebench", "--input", "mini", "--output", tmp_path/f"{split}.json", "--split", split, "--max_samples", n)
        assert done.returncode == 0, done.stderr
        assert "codetune's own partition" in done.stdout
    assert "taking all of them" in command("convert-bigcodebench", "--input", "mini", "--output", tmp_path/"x.json", "--max_samples", 9999).stdout
    train, test = (json.loads((tmp_path/f"{s}.json").read_text()) for s in ("train", "test"))
    assert list(train[0]) == [*FIELDS, "prompt"] and not set(ids(train)) & set(ids(test))

def test_convert_says_what_exists(tmp_path):
    for args, says in ((["--split", "dev"], "all, train, test, v0.1.0_hf"), (["--dataset_type", "full"], "regular and hard"), ([], "mini")):
        done = command("convert-bigcodebench", "--output", tmp_path/"x.json", *args)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())

def test_convert_keeps_the_old_file_when_it_fails(tmp_path):
    out, bad = tmp_path/"tasks.json", tmp_path/"bad.jsonl.gz"
    out.write_text("[]")
    bad.write_bytes(gzip.compress(b'{"task_id": "x"}\n'))
    assert command("convert-bigcodebench", "--input", bad, "--output", out).returncode == 2
    assert out.read_text() == "[]" and sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl.gz", "tasks.json"]

def test_calibrate_names_what_is_wrong(tmp_path):
    "One sound task, one whose library is missing, one that an empty body passes."
    good = select_tasks("mini", max_samples=1)[0][0]
    lacks = good | dict(task_id="x/lacks", canonical_solution="    import no_such_lib\n")
    free = good | dict(task_id="x/free", test="import unittest\nclass TestCases(unittest.TestCase):\n    def test_a(self): pass\n")
    (tmp_path/"t.json").write_text(json.dumps([good, lacks, free]))
    done = command("calibrate", tmp_path/"t.json", "--repeats", 2, "--output", tmp_path/"c.json")
    assert done.returncode == 0 and "1 of 3 tasks usable" in done.stdout, done.stdout + done.stderr
    for says in ("x/lacks", "missing libraries: no_such_lib", "x/free", "empty body passes"): assert says in done.stdout
    assert [r["usable"] for r in json.loads((tmp_path/"c.json").read_text())["records"]] == [True, False, False]
