"The site as a reader meets it: built offline; links, formulas, search; on a desk and on a phone."

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from browser import browser, needs_chromium, serve, watch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(q[0] in "._" for q in p.relative_to(ROOT).parts)
)


class Links(HTMLParser):
    "The ids, links and loaded resources of one page."

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.resources = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("script", "img") and a.get("src"):
            self.resources.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") != "canonical":
            self.resources.append(a["href"])


CUT_OFF = """() => [...document.querySelectorAll('main *')].filter(e => {
  const r = e.getBoundingClientRect();
  if (r.width === 0 || r.right <= innerWidth + 1) return false;
  if (e.closest('.katex-mathml, svg, details:not([open])')) return false;
  for (let p = e.parentElement; p; p = p.parentElement)
    if (/auto|scroll/.test(getComputedStyle(p).overflowX) && p !== document.body) return false;
  return !/auto|scroll/.test(getComputedStyle(e).overflowX) || r.width > innerWidth;
}).map(e => e.outerHTML.slice(0, 120))"""  # past the screen's edge, and no scrolling brings it back


@pytest.fixture(scope="session")
def site():
    "The built site; `--check` refuses a README or a sidebar that are behind the notebooks."
    done = subprocess.run(
        [sys.executable, ROOT / "nbs/_site/build.py", "--check"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "_docs"


@pytest.fixture(scope="session")
def pages(site):
    return {p: Links(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def chrome():
    with browser() as b:
        yield b


@pytest.fixture(scope="module")
def address(site):
    with serve(site) as url:
        yield url


def page_name(notebook):
    return notebook.relative_to(ROOT / "nbs").with_name(re.sub(r"^\d\d_", "", notebook.stem) + ".html")


def test_every_notebook_has_a_page(site):
    missing = [str(n.relative_to(ROOT)) for n in NOTEBOOKS if not (site / page_name(n)).exists()]
    assert not missing


def test_internal_links_resolve_to_page_and_place(site, pages):
    bad = []
    for page, found in pages.items():
        for href in found.links:
            path, place = urldefrag(href)
            if re.match(r"[a-z]+:|//", path):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                bad.append(f"{page.relative_to(site)} -> {href}: no such page")
            elif place and target.suffix == ".html" and unquote(place) not in pages[target].ids:
                bad.append(f"{page.relative_to(site)} -> {href}: no such place on it")
    assert not bad, "\n".join(bad)


def test_nothing_is_loaded_from_elsewhere(site, pages):
    away = [
        f"{p.relative_to(site)}: {r}"
        for p, found in pages.items()
        for r in found.resources
        if re.match(r"https?:|//", r)
    ]
    assert not away, "\n".join(away)


def test_no_markup_leaks_into_the_text(site):
    "Directives, divs and front matter belong to the machinery."
    for page in site.rglob("*.html"):
        text = re.sub(r"(?s)<(script|style|pre)\b.*?</\1>|<[^>]+>", "", page.read_text(encoding="utf-8"))
        leak = re.search(r"^\s*(:::|#\||output-file:).*", text, re.M)
        assert not leak, f"{page.relative_to(site)}: {leak and leak.group(0)!r}"


def test_source_notebooks_suit_plain_nbdev_docs():
    "nbdev takes the whole title cell as front matter: prose after title and quotation would vanish."
    for path in NOTEBOOKS:
        cells = [
            c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"
        ]
        title = next("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("# "))
        rest = [line for line in title.split("\n")[1:] if line.strip() and not line.startswith(">")]
        assert not rest, f"{path.relative_to(ROOT)}: put {rest[0]!r} into a cell of its own below the title"


def test_readme_names_only_files_that_exist():
    for readme in ("README.md", "README.ko.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        gone = [
            m
            for m in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
            if not re.match(r"[a-z]+:", m) and not (ROOT / m).exists()
        ]
        assert not gone, f"{readme}: {gone}"


@pytest.mark.browser
@needs_chromium
class TestInChromium:
    def test_every_page_loads_and_its_formulas_are_set(self, chrome, address, site):
        page = chrome.new_page()
        faults = watch(page)
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            formulas = len(re.findall(r'<span class="math', path.read_text(encoding="utf-8")))
            page.goto(address + name)
            page.wait_for_function(
                "n => document.querySelectorAll('.katex').length >= n", arg=formulas, timeout=10_000
            )
            wrong = page.locator(".katex-error, .katex [style*='#cc0000'], .katex [style*='204, 0, 0']")
            assert wrong.count() == 0, f"{name}: {wrong.first.inner_text()}"
            assert not faults, f"{name}: {faults}"
        page.close()

    def test_some_page_has_formulas(self, site):
        "Else the test above would pass on a site without any."
        assert sum('<span class="math' in p.read_text(encoding="utf-8") for p in site.rglob("*.html")) >= 3

    def test_search_finds_gae(self, chrome, address):
        page = chrome.new_page(viewport=dict(width=1400, height=900))
        faults = watch(page)
        page.goto(address)
        page.fill(".smalldocs-search input", "gae")
        first = page.locator(".smalldocs-search-results .search-result").first
        first.wait_for(timeout=5000)
        assert page.locator(".smalldocs-search-results .search-result", has_text="gae").count() > 0
        colours = first.evaluate(
            "e => [e, e.closest('.smalldocs-search-results')].map(getComputedStyle)"
            ".map((s, i) => i ? s.backgroundColor : s.color)"
        )
        assert contrast(*colours) > 4.5, colours
        first.click()
        page.wait_for_load_state()
        assert page.url.rstrip("/") != address.rstrip("/") and "gae" in page.content()
        assert not faults
        page.close()

    def test_phone_width(self, chrome, address, site):
        page = chrome.new_page(viewport=dict(width=390, height=844))
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            page.goto(address + name)
            page.wait_for_timeout(150)
            cut = page.evaluate(CUT_OFF)
            assert not cut, f"{name}: on a phone of 390 px this is cut off: {cut[:3]}"
        page.close()


def contrast(front, back):
    "WCAG contrast ratio of two CSS colours."

    def luminance(css):
        rgb = [int(x) / 255 for x in re.findall(r"\d+", css)[:3]]
        return sum(
            w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for w, c in zip((0.2126, 0.7152, 0.0722), rgb)
        )

    a, b = sorted((luminance(front), luminance(back)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.long
def test_plain_nbdev_docs_reaches_quarto(tmp_path):
    "In a copy, with a Quarto that only notes how it was called: nbdev's own half of `nbdev_docs` must end well."
    import yaml

    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    quarto = tmp_path / "bin" / "quarto"
    quarto.parent.mkdir()
    quarto.write_text('#!/bin/sh\necho "$@" in $PWD >> "$(dirname "$0")/calls"\nmkdir -p _docs\n')
    quarto.chmod(0o755)
    env = dict(os.environ, PATH=f"{quarto.parent}:{os.environ['PATH']}", PYTHONPATH=str(tmp_path / "copy"))
    done = subprocess.run(
        ["nbdev_docs", "--n_workers", "0"], cwd=tmp_path / "copy", env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"render --no-cache in {tmp_path}/copy/_proc" in (quarto.parent / "calls").read_text()
    proc = tmp_path / "copy" / "_proc"
    named = re.findall(r"[\w/]+\.(?:ipynb|md)", (proc / "sidebar.yml").read_text())
    assert len(named) > 60 and not [n for n in named if not (proc / n).exists()]
    for page in proc.rglob("*.ipynb"):
        first = "".join(json.loads(page.read_text())["cells"][0]["source"])
        assert yaml.safe_load(first.strip().strip("-"))["title"], page
