"Figures of an analysis, from runs that `Run` itself wrote: three seeds of one recipe, one run of another."

import json
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from codetune.analysis import AnalysisConfig, analyse, figures_of, logs_of
from codetune.evaluations import assess, gather
from codetune.records import find_runs
from codetune.runs import Run

TASKS = [f"CodetuneMini/{i}" for i in range(0, 60, 2)]
KINDS = [
    ("failed", "x = 1", "failed"),
    ("failed", "x = 1", "error"),
    ("failed", "", None),
    ("failed", "def f(:", None),
    ("timeout", "x = 1", None),
    ("oom", "x = 1", None),
]


def update(step, seed, lr):
    "What one update logs: learning that saturates, seeds a little apart."
    rng = random.Random(f"{seed} {step} {lr}")
    up, noise = 1 - math.exp(-step * lr / 12), lambda s: rng.gauss(0, s)
    row = {
        "reward/mean": 0.2 + 0.5 * up + noise(0.03),
        "reward/pass_rate": 0.1 + 0.55 * up + noise(0.03),
        "reward/std": 0.3,
        "value/explained_variance": 0.7 * up + noise(0.05),
        "count/tokens": 4000 + 50 * step + seed,
        "count/executions": 36,
        "exec/failed_rate": 0.6 - 0.3 * up,
        "exec/timeout_rate": 0.1 * (1 - up),
        "exec/oom_rate": 0.0,
        "exec/invalid_rate": 0.2 * (1 - up),
    }
    for i, role in enumerate(("analyzer", "coder")):
        row |= {
            f"{role}/approx_kl": 0.02 + 0.02 * i + abs(noise(0.004)),
            f"{role}/clipfrac": 0.1 + 0.05 * i + abs(noise(0.01)),
            f"{role}/entropy": 0.9 - 0.4 * up - 0.2 * i,
            f"length/{role}": 22 + 10 * i - 6 * up + noise(0.5),
            f"reward/{role}": 0.2 + 0.4 * up - 0.1 * i,
        }
    return row


def answers(rng, rate):
    "An evaluation in which about `rate` of the programs pass."
    for task in TASKS:
        for sample in range(4):
            passed = rng.random() < rate
            status, program, test = (
                ("passed", "x = 1", "passed") if passed else rng.choices(KINDS, [5, 3, 2, 2, 1, 0.5])[0]
            )
            verdict = dict(status=status, tests={"test_a": test} if test else {})
            yield dict(
                task_id=task,
                sample=sample,
                messages=[dict(role="coder", text="x")],
                program=program,
                verdict=verdict,
                passed=passed,
            )


@dataclass
class Parameters:
    seed: int
    lr: float
    init_adapter_path: str  # each seed has its own, of one recipe all the same
    experiment_name: str = "synthetic"


def write_run(seed, lr):
    parameters = Parameters(seed=seed, lr=lr, init_adapter_path=f"sft/{seed}")
    run = Run.start("05_appo", parameters, model="tiny", dataset="mini", algorithm="APPO", n_agents=2)
    for step in range(1, 31):
        run._t0 -= 12 + seed  # as if it had taken so long
        run.log(update(step, seed, lr), step, trackers=False)
    for tag, rate in dict(
        base=0.15,
        start=0.25,
        final=0.25 + 0.3 * lr,
        heard_none=0.2 + 0.2 * lr,
        heard_other=0.22 + 0.25 * lr,
        heard_start=0.25 + 0.27 * lr,
        **{"0010": 0.4, "0020": 0.5},
    ).items():
        text = "".join(json.dumps(r) + "\n" for r in answers(random.Random(f"{seed}{tag}{lr}"), rate))
        (run.dir / f"eval_{tag}.jsonl").write_text(text)
    run.finish({})
    return run


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "The manifests, the figures' axes by name, and the folder with the saved report."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CODETUNE_RUNS", str(tmp_path_factory.mktemp("runs")))
        for seed, lr in ((1, 1.0), (2, 1.0), (3, 1.0), (1, 0.5)):
            write_run(seed, lr)
        manifests = find_runs()
        cfg = AnalysisConfig(runs="synthetic/*", n_boot=500)
        found = assess(gather(manifests), n_boot=500)
        figures = figures_of(manifests, found, cfg)
        plt.close("all")
        run = Run.start("07_analysis", cfg, algorithm="analysis")
        analyse(cfg, run)
        run.finish({})
    return SimpleNamespace(
        manifests=manifests, axes={k: f.axes[0] for k, f in figures.items()}, figures=figures, dir=run.dir
    )


def test_every_question_has_its_figure_as_png_and_svg(seen):
    wanted = set(
        "reward reward_by_agent kl clipfrac entropy length exec value cost_seconds cost_tokens "
        "cost_executions recipes pass_rate differences failures progress worth".split()
    )
    assert wanted <= set(seen.axes)
    for name in wanted:
        assert (seen.dir / f"{name}.png").stat().st_size > 5000 and (
            seen.dir / f"{name}.svg"
        ).stat().st_size > 5000


def test_seeds_of_one_recipe_share_a_band_and_other_recipes_do_not(seen):
    logs = logs_of(seen.manifests)
    assert {k: len(v) for k, v in logs.items()} == {"lr=1": 3, "lr=0.5": 1}
    ax = seen.axes["reward"]
    assert len(ax.lines) == len(ax.collections) == 2  # mean and pass rate, each with its band
    rates = np.array([[r["reward/pass_rate"] for r in rows] for rows in logs["lr=1"]])
    line = next(l for l in ax.lines if l.get_label() == "pass rate")
    np.testing.assert_allclose(line.get_ydata(), rates.mean(0))
    band = ax.collections[ax.lines.index(line)].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), rates.max()) and np.isclose(band.min(), rates.min())
    assert [t.get_text() for t in seen.axes["recipes"].get_legend().get_texts()] == [
        "lr=1, 3 seeds",
        "lr=0.5, 1 seed",
    ]


def test_progress_goes_from_the_start_to_the_end(seen):
    assert seen.axes["progress"].containers[0].lines[0].get_xdata().tolist() == [0, 10, 20, 30]


def test_recipes_are_compared_by_their_ends_only(seen):
    rows = [t.get_text() for t in seen.axes["differences"].get_yticklabels()]
    assert [r for r in rows if "lr=1)" in r and "lr=0.5" in r] == [
        "after APPO (lr=0.5) − after APPO (lr=1)"
    ] and len(rows) == 7


def test_costs_are_totals_of_what_was_logged(seen):
    rows = next(iter(logs_of(seen.manifests).values()))[0]
    for cost, total in dict(
        cost_tokens=sum(r["count/tokens"] for r in rows),
        cost_executions=36 * 30,
        cost_seconds=rows[-1]["time_s"],
    ).items():
        ax = seen.axes[cost]
        assert len(ax.lines) == 3 and np.isclose(ax.lines[0].get_xdata()[-1], total)


def test_every_axis_is_labelled_and_lines_differ_without_colour(seen):
    for name, ax in seen.axes.items():
        assert ax.get_title(loc="left").endswith("?") and ax.get_xlabel(), name
        assert ax.get_ylabel() or [t.get_text() for t in ax.get_yticklabels()], name
        looks = [
            (
                l.get_linestyle(),
                l.get_dashes() if hasattr(l, "get_dashes") else str(l._dash_pattern),
                l.get_marker(),
            )
            for l in ax.lines
            if l.get_label()[0] != "_"
        ]
        assert len(set(map(str, looks))) == len(looks), name


def test_colours_stay_apart_in_grey_print(seen):
    "The bars of the failure figure have hatches; the curves' first two colours differ in luminance too."
    from codetune.plots import COLOURS, HATCHES, KINDS as kinds

    grey = [0.299 * int(c[1:3], 16) + 0.587 * int(c[3:5], 16) + 0.114 * int(c[5:], 16) for c in COLOURS[:2]]
    assert abs(grey[0] - grey[1]) > 20 and len(set(HATCHES)) >= len(kinds)


def test_report_is_readable_without_a_notebook(seen):
    report = json.loads((seen.dir / "report.json").read_text())
    assert (
        len(report["runs"]) == 4
        and report["n_seeds"]["after APPO (lr=1)"] == 3
        and "model-index" in (seen.dir / "model_card.md").read_text()
    )
    assert set(report["worth"]) == {
        f"heard {h} (lr={lr})" for h in ("none", "other", "start") for lr in ("1", "0.5")
    }
    assert Image.open(seen.dir / "reward.png").size[0] >= 900
