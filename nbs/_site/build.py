"""Build the documentation site and README.md with no network and no Quarto: `make docs`.

The source notebooks and `_quarto.yml` stay as nbdev expects them, for plain `nbdev_docs` where Quarto is. Here
nbdev processes the notebooks, smalldocs (in an environment of its own) lays them out, and the rest of this file
mends what the two leave open: page names, links between pages, formulas without a CDN.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS, PROC, OUT = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
KATEX_CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")
STAGES = r"\b\d\d_(\w+)\.ipynb"
MACHINERY = {  # rooms in the order of a walk through the house; a room that is not named here goes under More
    "Ground": "config files provenance records runs runner cli doctor hints",
    "Data": "raw_files json_values readers messages shapes workers dedup data_report chat_template chat_encode "
    "fasttok row_length mask_view convert tokenized packing",
    "Models": "embedded fixtures memory streaming safefile tensorfile audit experts4bit lowrank adapters lineage "
    "sft_config train_data trainer oom probe progress merge_plan merge_check",
    "Tasks": "answers task_rows tasks partition calibration observations rewards code_env",
    "Sandbox": "sandbox sandbox_server sandbox_warm sandbox_slot sandbox_worker sandbox_watch sandbox_wire "
    "sandbox_judge sandbox_believe sandbox_outcomes sandbox_evidence sandbox_seal sandbox_io sandbox_tests "
    "sandbox_verdict isolation isolation_layers isolation_calls sandbox_attacks sandbox_canary",
    "Learning": "appo_config team role_adapters team_store fast_lora logprobs attention prefix lean fast_decode engine "
    "engine_vllm rollout ppo ranks learner session alarms team_eval",
    "Seeing": "passk evaluations plots curves report runs_table chat",
}
GUIDES = "bring_your_own_data bring_your_own_tasks add_an_agent change_the_reward troubleshooting".split()


def say(text):
    print(f"docs: {text}", flush=True)


def reading_order(folder, known):
    "The folder's pages: those named in `known` first, in that order, then the others by name."
    pages = [p for p in (NBS / folder).glob("*.*") if p.suffix in (".ipynb", ".md") and p.name[0] not in "._"]
    order = sorted(pages, key=lambda p: (known.index(p.stem) if p.stem in known else 99, p.stem))
    return [f"{folder}/{p.name}" for p in order]


def title(path):
    "The heading of a notebook."
    cells = json.loads((NBS / path).read_text(encoding="utf-8"))["cells"]
    return next(
        m[1]
        for c in cells
        if c["cell_type"] == "markdown" and (m := re.match(r"#\s+(.+)", "".join(c["source"])))
    )


def section(name, pages, depth=6):
    "One section of the sidebar."
    pad = " " * depth
    return (
        [f"{pad}- section: {name}", f"{pad}  contents:", *(f"{pad}    - {p}" for p in pages)] if pages else []
    )


def write(path, text, check):
    "Write a file that is committed, or, with --check, refuse when it would change."
    name = path.relative_to(ROOT)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if check:
        sys.exit(f"docs: {name} is behind the notebooks: run `make docs` and commit it")
    path.write_text(text, encoding="utf-8")
    say(f"{name} rewritten")


def write_sidebar(check):
    "nbs/sidebar.yml in reading order; `custom_sidebar = True` in settings.ini keeps nbdev from replacing it."
    stages = [
        f'{{text: "{p.name[:2]} {title(p.name)}", href: {p.name}}}'
        for p in sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
    ]
    rooms = {name: words.split() for name, words in MACHINERY.items()}
    order = reading_order("machinery", sum(rooms.values(), []))
    lines = [
        "website:",
        "  sidebar:",
        "    contents:",
        "      - index.ipynb",
        *section("The eight stages", stages),
        *section("Guides", reading_order("guides", GUIDES)),
        "      - section: Machinery",
        "        contents:",
    ]
    for name, words in rooms.items():
        mine = [p for p in order if Path(p).stem in words]
        order = [p for p in order if p not in mine]
        lines += section(name, mine, 10)
    lines += section("More", order, 10)
    write(NBS / "sidebar.yml", "\n".join(lines) + "\n", check)


def environment():
    "The Python of `.venv-docs`, made on first use from the pins beside this file."
    home, pins = ROOT / ".venv-docs", Path(__file__).with_name("requirements.txt")
    python, stamp = home / "bin" / "python", home / "pins.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return python
    say(f"making {home.name} for the site builder (once, about 20 s)")
    venv.create(home, with_pip=True, clear=True)
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", pins])
    if done.returncode:
        sys.exit(
            f"docs: pip could not install {pins.relative_to(ROOT)} (its message is above); "
            "the site needs it once, so run `make docs` again where a package index can be reached"
        )
    stamp.write_text(pins.read_text())
    return python


def split_title(nb):
    "nbdev turns the whole title cell into front matter: keep what follows title and quotation."
    from execnb.nbio import mk_cell

    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown" and cell.source.lstrip().startswith("# "):
            head = re.match(r"\s*#\s[^\n]*(\n+>[^\n]*(\n>[^\n]*)*)?", cell.source)
            rest = cell.source[head.end() :].strip()
            cell.source = head.group(0)
            if rest:
                nb.cells.insert(i + 1, mk_cell(rest, "markdown"))
            return


def parts(cell, defs):
    "A cell cut before each of its public definitions, each under its heading."
    from execnb.nbio import mk_cell
    from fastcore.basics import AttrDict
    from nbdev.showdoc import showdoc_nm

    lines, out = cell.source.split("\n"), []
    starts = [min([d.lineno, *(x.lineno for x in d.decorator_list)]) - 1 for d in defs]
    for d, a, b in zip([None, *defs], [1, *starts], [*starts, len(lines)]):
        code = "\n".join(lines[a:b]).strip("\n")
        out += ([mk_cell(f"### {showdoc_nm(d)}", "markdown")] if d else []) + (
            [mk_cell(code, metadata=AttrDict())] if code else []
        )
    out[-1]["outputs"] = cell.get("outputs", [])
    return out


def show_exports(nb):
    "An exported definition is shown as it is written, under a heading that links can name."
    defs, imports = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), (ast.Import, ast.ImportFrom)
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code" and re.match(r"#\|\s*exports?\b", cell.source):
            body = ast.parse(cell.source).body
            if not all(isinstance(o, imports) for o in body):
                cells += parts(cell, [o for o in body if isinstance(o, defs) and not o.name.startswith("_")])
                continue
        cells.append(cell)
    nb.cells = cells


def process(check):
    "nbdev's steps up to the call of Quarto: indexes, cell directives, links; the copy lands in _proc."
    os.chdir(ROOT)
    import nbdev.doclinks
    import nbdev.serve
    from nbdev.processors import add_show_docs, exec_show_docs, mv_exports
    from nbdev.quarto import refresh_quarto_yml

    write_sidebar(check)
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()

    class Site(nbdev.serve.FilterDefaults):
        def base_procs(self):  # the source is on the page, so nothing has to be imported to describe it
            return [p for p in super().base_procs() if p not in (add_show_docs, exec_show_docs, mv_exports)]

        def __call__(self, nb):
            split_title(nb)
            show_exports(nb)
            return super().__call__(nb)

    nbdev.serve.FilterDefaults = Site
    shutil.rmtree(PROC, ignore_errors=True)
    nbdev.serve.proc_nbs(n_workers=0, force=True)
    return nbdev.config.get_config()


def rename_pages():
    "05_appo.ipynb becomes appo.ipynb, as nbdev's `output-file` asks; links in pages and sidebar follow."
    for path in [*PROC.rglob("*.ipynb"), *PROC.rglob("*.md"), PROC / "sidebar.yml", PROC / "_quarto.yml"]:
        text = path.read_text(encoding="utf-8")
        text = re.sub(STAGES, r"\1.ipynb", text)
        path.write_text(text, encoding="utf-8")
        if re.fullmatch(STAGES, path.name):
            path.rename(path.with_name(re.sub(STAGES, r"\1.ipynb", path.name)))


def known_pages(yml):
    "Leave out of a menu the pages that do not exist (a stage notebook that is not written yet)."
    lines = yml.read_text().splitlines()
    keep = [l for l in lines if not (m := re.fullmatch(r"\s*- (\S+\.ipynb)", l)) or (PROC / m[1]).exists()]
    yml.write_text("\n".join(keep) + "\n")


def mend(page, site, base):
    "One HTML page: formulas from our own copy of KaTeX, links to this site relative."
    text = page.read_text(encoding="utf-8")
    up = "../" * len(page.relative_to(site).parents[:-1]) if page.parent != site else ""
    text = KATEX_CDN.sub(f"{up}_static/katex", text)
    text = re.sub(
        rf'(<a\b[^>]*\bhref="){re.escape(base)}/?(?:([^"]*))"',
        lambda m: f'{m[1]}{up}{m[2] or "index.html"}"',
        text,
    )
    page.write_text(text, encoding="utf-8")


def render(cfg):
    "smalldocs turns _proc into HTML; the mended site replaces _docs in one move."
    known_pages(PROC / "_quarto.yml")
    done = subprocess.run(
        [environment().with_name("smalldocs"), "render", PROC], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"docs: smalldocs failed\n{done.stdout}{done.stderr}")
    for line in done.stderr.splitlines():
        if "warning" in line and "output-file" not in line:  # rename_pages did what it asks for
            say(line)
    site = PROC / OUT.name
    shutil.copytree(NBS / "_static", site / "_static", dirs_exist_ok=True)
    for page in site.rglob("*.html"):
        mend(page, site, cfg.doc_host.rstrip("/") + cfg.doc_baseurl.rstrip("/"))
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(site, OUT)
    return len(list(OUT.rglob("*.html")))


def readme_text(cfg):
    "README.md from the processed index: nbconvert's Markdown, links turned to the files of the repository."
    import nbformat
    import yaml
    from nbconvert import MarkdownExporter

    nb = nbformat.read(PROC / "index.ipynb", 4)
    front = nb.cells.pop(0).source
    front = yaml.safe_load(front.strip().strip("-"))
    nb.cells = [c for c in nb.cells if "AUTOGENERATED" not in c.source]
    body = MarkdownExporter().from_notebook_node(nb)[0]
    base = re.escape(cfg.doc_host.rstrip("/") + cfg.doc_baseurl.rstrip("/"))
    source = {
        p.stem[3:] if p.stem[:2].isdigit() else p.stem: p.relative_to(ROOT).as_posix()
        for p in NBS.rglob("*.ipynb")
        if not any(q[0] in "._" for q in p.relative_to(NBS).parts)
    }
    body = re.sub(rf"\]\({base}/(?:\w+/)*(\w+)\.html(?:#[^)]*)?\)", lambda m: f"]({source[m[1]]})", body)
    body = re.sub(
        r"\]\((?![a-z]+:|#|/|nbs/)((?:\.\./)*)([^)\s]+)\)",
        lambda m: f"]({m[2]})" if m[1] else f"](nbs/{m[2]})",
        body,
    )
    note = "<!-- Made from nbs/index.ipynb by `make docs`: edit the notebook. -->"
    return f"{note}\n# {front['title']}\n\n> {front['description']}\n\n{body.strip()}\n"


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument(
        "--check", action="store_true", help="fail when README.md or nbs/sidebar.yml would change"
    )
    opts = args.parse_args()
    say("nbdev processes the notebooks")
    cfg = process(opts.check)
    write(ROOT / "README.md", readme_text(cfg), opts.check)
    rename_pages()
    n = render(cfg)
    say(f"{n} pages in {OUT.name}/: open {OUT.name}/index.html through `python -m http.server -d {OUT.name}`")


if __name__ == "__main__":
    main()
