"The mini benchmark: every row is well formed, solvable, and not to be had by guessing."
import ast, doctest, json, re, subprocess, sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from codetune.tasks import near_duplicates, partition

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("task_id", "complete_prompt", "instruct_prompt", "canonical_solution", "code_prompt", "test",
          "entry_point", "doc_struct", "libs")
ROWS = [json.loads(line) for line in open(ROOT/"codetune"/"assets"/"tasks"/"mini.jsonl", encoding="utf-8")]

# Runs in its own process. Per row: methods, then the methods that fail under each solution tried.
RUNNER = r'''
import io, json, sys, unittest
from copy import deepcopy

def run(row, solution, wrap=None):
    "The official calibrated program; wrap may replace the function. Returns (methods failed, methods run)."
    ns = {"__name__": "mini"}
    exec(row["code_prompt"] + "\n    pass\n" + solution + "\n" + row["test"], ns)
    if wrap: ns["task_func"] = wrap(ns["task_func"])
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(ns["TestCases"])
    out = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    return len({test.id() for test, _ in out.failures + out.errors}), out.testsRun

def report(row):
    full = row["code_prompt"] + row["canonical_solution"]
    seen = []
    def spy(func):
        def call(*args, **kwargs):
            result = func(*args, **kwargs)
            seen.append(deepcopy(result))
            return result
        return call
    failed, n = run(row, full, spy)
    constants = {repr(value): value for value in seen}.values()
    return dict(n=n, canonical=failed,
                empty=run(row, row["code_prompt"] + "    pass")[0],
                none=run(row, full, lambda func: lambda *args, **kwargs: None)[0],
                first_argument=run(row, full, lambda func: lambda *args, **kwargs: deepcopy(args[0]))[0],
                constants=[run(row, full, lambda func: lambda *args, **kwargs: deepcopy(value))[0]
                           for value in constants])

json.dump([report(json.loads(line)) for line in sys.stdin], sys.stdout)
'''


@pytest.fixture(scope="module")
def reports():
    "What each row's tests say about its solution and about the wrong ones, all from one child process."
    text = "\n".join(map(json.dumps, ROWS))
    done = subprocess.run([sys.executable, "-c", RUNNER], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return {row["task_id"]: report for row, report in zip(ROWS, json.loads(done.stdout), strict=True)}


def function(code):
    "The one function that a piece of code defines."
    found, = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    return found


def description(row):
    "What the task asks, without the parts that all tasks share."
    return " ".join(json.loads(row["doc_struct"])["description"])


def ngrams(text, n=3):
    "The set of runs of n tokens in a text."
    tokens = re.findall(r"\w+|[^\w\s]", text.lower())
    return {tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)}


def jaccard(a, b): return len(a & b) / max(1, len(a | b))


def shape(row):
    "The solution with its own names numbered and its constants blanked: what a copy with new numbers keeps."
    func = function(row["code_prompt"] + row["canonical_solution"])
    nodes = list(ast.walk(func))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    number = {}
    for node in nodes:
        if isinstance(node, ast.Constant): node.value = ""
        if isinstance(node, ast.Name) and node.id in local: node.id = number.setdefault(node.id, f"v{len(number)}")
    return "\n".join(map(ast.dump, func.body))


def test_schema():
    for i, row in enumerate(ROWS):
        assert tuple(row) == FIELDS and all(type(value) is str for value in row.values())
        assert row["task_id"] == f"CodetuneMini/{i}" and row["entry_point"] == "task_func"
        assert function(row["code_prompt"] + row["canonical_solution"]).name == "task_func"
        assert row["code_prompt"].endswith(":\n") and row["canonical_solution"].startswith("    ")
        ending = f"You should write self-contained code starting with:\n```\n{row['code_prompt']}```"
        assert row["instruct_prompt"].endswith(ending)
        assert row["instruct_prompt"].startswith(description(row))
        doc = ast.get_docstring(function(row["complete_prompt"]))
        assert all(f"\n{part}:\n" in doc for part in ("Parameters", "Returns", "Requirements", "Example"))
        assert row["complete_prompt"].replace("\n\n", "\n").startswith(row["code_prompt"])


def test_standard_library_only():
    for row in ROWS:
        for node in ast.walk(ast.parse(row["code_prompt"] + row["canonical_solution"] + "\n" + row["test"])):
            names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, row["task_id"]
        assert all(lib in row["code_prompt"] for lib in ast.literal_eval(row["libs"]))


def test_size_and_mix():
    assert len(ROWS) >= 379
    level = Counter(json.loads(row["doc_struct"])["difficulty"] for row in ROWS)
    least = dict(elementary=150, easy=140, loop=40, medium=30)
    assert set(level) == set(least) and all(level[name] >= n for name, n in least.items())
    for row in ROWS:
        cases, = [node for node in ast.parse(row["test"]).body if isinstance(node, ast.ClassDef)]
        methods = [node for node in cases.body if isinstance(node, ast.FunctionDef)]
        assert 4 <= len(methods) == len({method.name for method in methods}) <= 6
        for method in methods: assert "self.assert" in ast.unparse(method), (row["task_id"], method.name)
        if json.loads(row["doc_struct"])["difficulty"] in ("elementary", "easy"):
            only, = function(row["code_prompt"] + row["canonical_solution"]).body
            assert isinstance(only, ast.Return), row["task_id"]


def test_canonical_passes_all(reports):
    assert {task: report for task, report in reports.items() if report["canonical"] or report["n"] < 4} == {}


def test_empty_body_fails_every_method(reports):
    assert {task for task, report in reports.items() if report["empty"] < report["n"]} == set()
    assert {task for task, report in reports.items() if report["none"] < report["n"]} == set()


def test_guesses_fail(reports):
    "Echoing the first argument, or any constant that the tests themselves expect, is never a solution."
    assert {task for task, report in reports.items() if report["first_argument"] == 0} == set()
    assert {task for task, report in reports.items() if 0 in report["constants"]} == set()
    half = {task for task, report in reports.items() if min(report["constants"]) <= report["n"] / 2}
    assert half == set(), "a constant should earn less than half of the tests"


def test_examples_are_true():
    for row in ROWS:
        ns = {}
        exec(row["code_prompt"] + row["canonical_solution"], ns)
        doc = ast.get_docstring(function(row["complete_prompt"]))
        example = doctest.DocTestParser().get_doctest(doc, ns, row["task_id"], None, 0)
        failed, attempted = doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None)
        assert failed == 0 < attempted, row["task_id"]


def test_no_near_duplicates():
    shapes = Counter(map(shape, ROWS))
    assert [form for form, count in shapes.items() if count > 1] == []
    asks = [ngrams(description(row)) for row in ROWS]
    programs = [ngrams(row["canonical_solution"]) for row in ROWS]
    for i, j in combinations(range(len(ROWS)), 2):
        assert jaccard(asks[i], asks[j]) < .4, (i, j)
        assert jaccard(programs[i], programs[j]) < .7, (i, j)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_partition_is_clean(seed):
    assert [group for group in near_duplicates(ROWS) if len(group) > 1] == []
    train, test = partition(ROWS, seed)
    assert len(test) >= 40 and len(train) + len(test) == len(ROWS)
    assert not {row["task_id"] for row in train} & {row["task_id"] for row in test}
    seen = [ngrams(description(row)) for row in train]
    closest = max((jaccard(ngrams(description(row)), other), row["task_id"]) for row in test for other in seen)
    assert closest[0] < .4, closest
    levels = {json.loads(row["doc_struct"])["difficulty"] for row in test}
    assert levels == {"elementary", "easy", "loop", "medium"}
