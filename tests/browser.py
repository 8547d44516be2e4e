"What the browser tests share: the machine's Chromium, a web server for a folder, a page's faults."

import functools
import http.server
import os
import shutil
import threading
from contextlib import contextmanager

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    not CHROMIUM,
    reason="no Chromium on this machine (Debian: apt-get install chromium; or set CHROMIUM=/path)",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Say nothing."


@contextmanager
def serve(folder):
    "Serve a folder on a free port; gives the address."
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


@contextmanager
def browser(**kw):
    "A headless Chromium that reaches nothing but this machine."
    from playwright.sync_api import sync_playwright

    args = [
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=CHROMIUM, args=args, **kw)
        try:
            yield chrome
        finally:
            chrome.close()


def watch(page):
    "Collect every console error, page error, failed request and answer of 400 or more."
    faults = []
    page.on("console", lambda m: faults.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: faults.append(f"page error: {e}"))
    page.on("requestfailed", lambda r: faults.append(f"failed: {r.url}"))
    page.on("response", lambda r: faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return faults
