"""Replace the shipped sample of notebook 07 by a real run: `python .ci/sample_run.py RUN_DIR`.

Copies what the analysis reads (manifest, metrics, summary, evaluations; adapters never), without what belongs to the machine it
ran on: absolute paths, host name, process ids, the programs' output. Then draws the README's picture from the copy.
"""
import json
import shutil
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parents[1]/"codetune"/"assets"/"sample_runs"
VERDICT = ("status", "n_passed", "n_tests", "tests")


def portable(value):
    "The same value with absolute paths cut to their last part."
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def copy_json(source, target, drop=()):
    "One JSON file, portable, without some of its keys."
    data = {k: v for k, v in json.loads(source.read_text(encoding="utf-8")).items() if k not in drop}
    if "host" in data:
        data["host"] = "sample"
    target.write_text(json.dumps(portable(data), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def picture():
    "nbs/images/pass_rate.png: the sample's models on the held-out tasks."
    from codetune.evaluations import assess, gather
    from codetune.plots import evaluation_figures
    from codetune.records import find_runs
    out = PLACE.parents[2]/"nbs"/"images"/"pass_rate.png"
    out.parent.mkdir(exist_ok=True)
    found = assess(gather(find_runs(str(PLACE))))
    evaluation_figures(found)["pass_rate"].savefig(out, dpi=120)
    for (a, b), c in found["comparisons"].items():
        print(c.sentence(a, b))
    print(out)


def main(run):
    manifest = json.loads((run/"manifest.json").read_text(encoding="utf-8"))
    if manifest["status"] != "complete" or not list(run.glob("eval_*.jsonl")):
        sys.exit(f"{run}: a sample is a complete run with eval_*.jsonl files; this one is {manifest['status']}")
    shutil.rmtree(PLACE, ignore_errors=True)
    target = PLACE/f"{manifest['stage']}_seed{manifest['seed']}"
    target.mkdir(parents=True)
    copy_json(run/"manifest.json", target/"manifest.json", ("output_dir", "pid", "pid_start"))
    copy_json(run/"summary.json", target/"summary.json", ("outputs",))
    if (run/"metrics.jsonl").exists():
        shutil.copy(run/"metrics.jsonl", target)
    for path in sorted(run.glob("eval_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        for r in rows:
            r["verdict"] = {k: r["verdict"][k] for k in VERDICT if k in r["verdict"]}
        (target/path.name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{target}: {sum(p.stat().st_size for p in target.iterdir())/1e3:.0f} KB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
    picture()
