"The sandbox as a whole: attacks, layers, kills, soaks, load. Small here; the large versions are marked long."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's classes A to C need Linux")

from codetune.sandbox import Pool, SandboxError, Verdict  # noqa: E402
from codetune.sandbox_attacks import CASES, attack_suite, load_attacks  # noqa: E402

RIGHT, WRONG = "def task_func(a, b): return a+b", "def task_func(a, b): return a-b"


def family(pid):
    "All living descendants of a process, with their depth below it."
    parent = {}
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            parent[int(p)] = int(words[1])
    depth, grew = {pid: 0}, True
    while grew:
        new = {p: depth[q] + 1 for p, q in parent.items() if q in depth and p not in depth}
        depth.update(new)
        grew = bool(new)
    return {p: d for p, d in depth.items() if d}


def reachable_python():
    "An interpreter that works without mounts too: root's own may lie where nobody else can read it."
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        who = dict(user=65534, group=65534, extra_groups=[]) if os.getuid() == 0 else {}
        try:
            if subprocess.run([python, "-c", "import os; os.pidfd_open"], stderr=subprocess.DEVNULL, cwd="/",
                              **who).returncode == 0:
                return python
        except OSError:
            continue
    pytest.skip("no Python 3.9 or newer that every user can run; needed where namespaces are off")


def wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(.05)
    return true()


@pytest.fixture(scope="module")
def rows():
    return attack_suite()


def test_attacks_do_not_get_through(rows):
    bad = [(r["cls"], r["name"], r["mode"], r["status"], r["harm"], r["output"]) for r in rows if not r["ok"]
           and not r["residue"]]
    assert not bad, bad
    assert all(r["ok"] for r in rows if r["mode"] == "io"), "io mode has no residue"


def test_residue_is_what_the_docs_say(rows):
    "Exactly the residue that the docs name wins, and that in one process only."
    residue = {"library_restored"}
    assert {(r["name"], r["mode"]) for r in rows if not r["ok"]} == {(n, "inprocess") for n in residue}
    page = (Path(__file__).parents[1] / "nbs/machinery/sandbox.ipynb").read_text(encoding="utf-8")
    assert all(f"`{n}`" in page for n in residue)


def test_attacks_win_elsewhere(rows):
    "An attack that never succeeds anywhere does not count; enough must."
    lost = sorted({r["name"] for r in rows if r["control"] is False})
    print("no control on this machine:", lost)
    wins = {r["name"] for r in rows if r["control"]}
    free = {a.name for a in load_attacks() if not a.control}
    assert len(wins) + len(free) >= 145
    per_class = {c: sum(a.cls == c for a in load_attacks()) for c in {a.cls for a in load_attacks()}}
    facts = dict(exit=13, forge=31, peek=3, resource=24, persist=8, escape=32, network=7, stdio=7, broken=8,
                 legit=12)
    assert all(per_class[c] >= n for c, n in facts.items()), per_class
    must = {a.name for a in load_attacks(["exit", "forge", "persist", "resource"])}
    assert not must - wins, f"these must win in their weaker runner: {sorted(must - wins)}"


LAYER_OFF = {
    "namespaces": ["loopback_http"], "landlock": ["kill_everyone"], "seccomp": ["memory_file", "new_user_namespace"],
    "caps": ["raw_socket"], "rlimits": ["descriptor_bomb", "file_too_large"], "canaries": ["fake_unittest"],
    "pristine": ["numpy_testing_selective"], "witness": ["frame_walk", "frame_from_signal"],
    "equality": ["always_equal"], "seal": ["restore_add_error", "restore_on_subclass"],
}


@pytest.mark.parametrize("layer", LAYER_OFF)
def test_every_layer_is_needed(layer):
    "Switching one layer off lets something through (or, for namespaces, refuses something legitimate)."
    names = LAYER_OFF[layer]
    python = reachable_python() if layer == "namespaces" else None
    off = attack_suite(python=python, names=names, off=(layer,), controls=False, require="C",
                       allow_unsafe=True)
    assert layer not in off[0]["layers"]  # canaries and the like are no kernel layers and are never listed
    assert {r["name"] for r in off if not r["ok"]} == set(names)


def test_weak_isolation_is_refused():
    python = reachable_python()
    with pytest.raises(SandboxError, match="class B .* weaker than A"):
        Pool(n_slots=1, python=python, require="A", off=("namespaces",))
    with pytest.raises(SandboxError, match="class C .* allow_unsafe"):
        Pool(n_slots=1, python=python, off=("namespaces", "landlock", "seccomp"))
    with Pool(n_slots=1, python=python, off=("namespaces", "landlock", "seccomp"), allow_unsafe=True) as pool:
        verdict = pool.check(RIGHT, CASES["sum"])
    assert verdict.passed and verdict.layers.startswith("C ")


def test_class_b_holds():
    "Without namespaces: nothing escapes or forges; what is lost is the network and files outside the work directory."
    rows = attack_suite(["escape", "network", "persist", "peek", "exit"], python=reachable_python(),
                        off=("namespaces",), controls=False, modes=("io",))
    assert rows[0]["layers"].startswith("B ")
    assert not [r for r in rows if not r["ok"]]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: it closes a directory to everyone else")
def test_root_with_an_interpreter_under_a_closed_home(tmp_path):
    "Mounts show a prefix that the dropped user could not reach; without mounts the sandbox refuses and names the directory."
    home = Path(tempfile.mkdtemp())
    home.chmod(0o700)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True)
        python = str(home / "venv/bin/python")
        with Pool(n_slots=1, python=python, require="A") as pool:
            code = "import os\ndef task_func(a, b): return a + b if os.getuid() else None"
            assert pool.check(code, CASES["sum"]).passed
        with pytest.raises(SandboxError, match="is closed to the user"):
            Pool(n_slots=1, python=python, off=("namespaces",))
    finally:
        shutil.rmtree(home)


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"),
                    reason="already an ordinary user, or no setpriv")
def test_ordinary_user_suffices(tmp_path):
    "The same sandbox, started by a user without rights, under the system's python."
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if not python or subprocess.run([python, "-c",
                                     "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("no system python 3.11 that every user can run")
    place = Path(tempfile.mkdtemp())
    try:
        (place / "codetune").mkdir()
        import codetune
        for f in Path(codetune.__file__).parent.glob("*.py"):
            if f.stem == "__init__" or f.stem.startswith(("isolation", "sandbox")):
                shutil.copy(f, place / "codetune" / f.name)
        place.chmod(0o755)
        code = ("from codetune.sandbox import Pool\nimport json\n"
                f"with Pool(n_slots=1, require='A') as p: print(json.dumps([p.check(s, {CASES['sum']!r}).asdict() for s in {[RIGHT, WRONG]!r}]))")
        out = subprocess.run(["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", python, "-c",
                              code], cwd=place,
                             env=dict(PATH=os.environ["PATH"], PYTHONPATH=str(place),
                                      HOME="/"), capture_output=True, text=True, timeout=60)
    finally:
        shutil.rmtree(place)
    assert out.returncode == 0, out.stderr
    right, wrong = (Verdict(**v) for v in json.loads(out.stdout))
    assert right.passed and wrong.status == "failed" and right.layers.startswith("A ")


def kill_at_random(n_kills, seed=0):
    rng, lies, lost, errors = random.Random(seed), [], 0, 0
    pool = Pool(n_slots=2)
    supervisor = pool._proc.pid
    everyone = set(family(os.getpid()))
    slow = {RIGHT: RIGHT + "\nimport time; time.sleep(.02)", WRONG: WRONG + "\nimport time; time.sleep(.02)"}
    for k in range(n_kills):
        asked = [(s, pool.submit(slow[s], CASES["sum"], mode=rng.choice(["io", "inprocess"])))
                 for s in rng.choices([RIGHT, WRONG], k=6)]
        time.sleep(rng.random() * .15)
        tree = family(pool._proc.pid)
        victim = rng.choice([pool._proc.pid] + [p for p, d in tree.items() if d <= 3])   # 4: the program's own
        everyone |= set(tree) | {pool._proc.pid}
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for source, future in asked:
            try:
                verdict = future.result(timeout=60)
            except SandboxError:
                errors += 1
                continue
            lost += verdict.status == "internal"
            if verdict.status not in ("internal", "passed" if source == RIGHT else "failed"):
                lies.append((source, verdict))
    everyone |= set(family(pool._proc.pid))
    pool.close()
    alive = lambda: [p for p in everyone if Path(f"/proc/{p}/stat").exists()
                     and b"codetune" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert wait_until(lambda: not alive()), f"orphans: {alive()}"
    assert not lies, lies
    print(f"{n_kills} kills: {lost} internal, {errors} exceptions of {6*n_kills} verdicts; first supervisor {supervisor}")


def test_killing_any_part_loses_and_invents_nothing():
    kill_at_random(15)


@pytest.mark.long
def test_killing_any_part_two_hundred_times():
    kill_at_random(200, seed=1)


def weight(pool):
    "Descriptors here, descriptors and resident MiB of the supervisor, processes below it, temporary places."
    pid = pool._proc.pid
    rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
    return dict(ours=len(os.listdir("/proc/self/fd")), theirs=len(os.listdir(f"/proc/{pid}/fd")), rss=rss,
                processes=len(family(pid)),
                temp=len(list(Path(tempfile.gettempdir()).glob("codetune-*"))))


def soak(n):
    programs = [RIGHT, WRONG, "import os\nos._exit(0)",
                "import subprocess\nsubprocess.Popen(['sleep', '60'])\n" + RIGHT,
                RIGHT + "\nopen('x', 'w').write('x'*10000)", "def task_func("]
    statuses = ["passed", "failed", None, "passed", "passed", "failed"]
    with Pool(n_slots=2) as pool:
        pool.map([(p, CASES["sum"]) for p in programs] * 3)
        for mode in ("io", "inprocess"):
            [f.result() for f in [pool.submit(p, CASES["sum"], mode=mode) for p in programs * 10]]
        before = weight(pool)
        for start in range(0, n, 500):
            asked = [(k % 6, pool.submit(programs[k % 6], CASES["sum"], mode=("io", "inprocess")[k // 6 % 2]))
                     for k in range(start, min(n, start + 500))]
            for k, future in asked:
                verdict = future.result()
                assert verdict.status == (statuses[k] or ("crash" if verdict.mode == "inprocess"
                                                          else "failed"))
        assert wait_until(lambda: weight(pool)["processes"] <= before["processes"])
        after = weight(pool)
    assert after["rss"] < before["rss"] + 3 + before["rss"] / 10, (before, after)
    for key in ("ours", "theirs", "processes"):
        assert after[key] <= before[key], (key, before, after)
    assert after["temp"] <= before["temp"] + 1, (before, after)
    print(before, after)


def test_soak_small():
    soak(300)


@pytest.mark.long
def test_soak_ten_thousand():
    soak(10_000)


def statuses(n, busy):
    "Statuses of n programs, some quick, some that compute or sleep for half of their limit, some that never end."
    spin = "import time\nc = time.thread_time\ndef task_func(a, b):\n    e = c() + {}\n    while c() < e: pass\n    return a+b"
    kinds = [(RIGHT, 2.), (WRONG, 2.), (spin.format(.05), 1.), (spin.format(1.), .4),
             ("import time\n" + RIGHT + "\ntime.sleep(.3)", 1.),
             ("import time\n" + RIGHT + "\ntime.sleep(9)", .4), (RIGHT.replace("a+b", "a//(b-b)"),
                                                                 2.), ("import os\nos.abort()", 2.)]
    burners = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(busy)]
    try:
        with Pool(n_slots=2) as pool:
            asked = [pool.submit(kinds[k % 8][0], CASES["sum"], timeout=kinds[k % 8][1], mode="inprocess")
                     for k in range(n)]
            return [f.result().status for f in asked]
    finally:
        for b in burners:
            b.kill()
            b.wait()


def load_test(n):
    idle, loaded = statuses(n, 0), statuses(n, 4)
    different = [(k, a, b) for k, (a, b) in enumerate(zip(idle, loaded)) if a != b]
    assert not different, different
    assert {"passed", "failed", "timeout", "crash"} == set(idle)


def test_verdicts_do_not_depend_on_load():
    load_test(32)


@pytest.mark.long
def test_verdicts_do_not_depend_on_load_two_hundred():
    load_test(200)


def test_nothing_is_left_for_the_next_program():
    "Neither files nor closed directories reach the program that follows in the same slot."
    leave = RIGHT + "\nimport os\nopen('x', 'w').close()\nos.mkdir('d')\nos.chmod('d', 0)\nos.chmod('/tmp', 0)"
    find = "import os\nopen('y', 'w').close()\ndef task_func(a, b): return 0 if {'x', 'd'} & set(os.listdir('.')) else a + b"
    with Pool(n_slots=1) as pool:
        for mode in ("inprocess", "io"):
            for solution in (leave, "import os\nos.chmod('/tmp', 0)\n" + RIGHT, find):
                verdict = pool.check(solution, CASES["sum"], mode=mode)
                assert verdict.passed, (solution, verdict)


def test_many_threads_may_ask():
    with Pool(n_slots=2) as pool:
        got = []
        ask = lambda k: got.append((k, pool.check([RIGHT, WRONG][k % 2], CASES["sum"]).passed))
        threads = [threading.Thread(target=ask, args=(k,)) for k in range(16)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert sorted(got) == [(k, k % 2 == 0) for k in range(16)]


def test_import_is_light():
    "The sandbox must not pull torch or numpy into the process that only wants verdicts."
    code = "import sys, codetune.sandbox; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
