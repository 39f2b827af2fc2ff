"""Look at the built pages in a real browser without a network: `make browse`.

Each page is opened in a frame of two widths, in the light and in the dark theme. The script fails if a formula is not
rendered, a figure does not load, a page is wider than the frame, the search finds nothing, or the browser's console
has an error.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

HARNESS = """<!doctype html><meta charset="utf-8"><title>harness</title><body><pre id="out"></pre><script>
const pages = PAGES, widths = WIDTHS, themes = ["light", "dark"], found = [];
const wait = ms => new Promise(done => setTimeout(done, ms));
async function until(test, ms) { for (let k = 0; k < ms / 50 && !test(); k++) await wait(50); return test(); }
async function open(page, width, theme) {
  localStorage.setItem("theme", theme);
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.src = page; });
  return frame;
}
async function look(page, width, theme) {
  const frame = await open(page, width, theme), doc = frame.contentDocument;
  const say = text => found.push(`${page} (${width} px, ${theme}): ${text}`);
  const formulas = [...doc.querySelectorAll("span.math, div.math")];
  const raw = () => formulas.filter(f => !f.querySelector("mjx-container"));
  if (!await until(() => raw().length == 0, 20000)) say(`formula not rendered: ${raw()[0].textContent.slice(0, 60)}`);
  for (const error of doc.querySelectorAll("mjx-merror")) say(`formula with an error: ${error.textContent}`);
  for (const image of doc.images) {
    image.loading = "eager";
    if (!await until(() => image.complete, 5000) || !image.naturalWidth) say(`figure missing: ${image.src}`);
  }
  const root = doc.documentElement;
  if (root.scrollWidth > root.clientWidth + 1) {
    const wide = [...doc.body.querySelectorAll("article *")].find(e =>
      e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest("pre, .table-wrapper, div.math"));
    say(`wider than the frame by ${root.scrollWidth - root.clientWidth} px: ${wide?.outerHTML.slice(0, 120)}`);
  }
  if (doc.body.dataset.theme != theme) say(`theme is ${doc.body.dataset.theme}`);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of widths) for (const theme of themes) await look(page, width, theme);
  const frame = await open("search.html?q=WORD", 1280, "light");
  const results = () => frame.contentDocument.querySelectorAll("#search-results li").length;
  if (!await until(() => results() > 0, 20000)) found.push("search finds nothing for WORD");
  document.getElementById("out").textContent = "DONE " + JSON.stringify(found);
})();
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, *args: object) -> None:
        pass


def browser() -> str | None:
    """Path of a browser, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def problems(site: Path, pages: list[str], word: str, minutes: float = 15) -> list[str]:
    """What is wrong with the pages of a built site."""
    program = browser()
    assert program is not None
    harness = site / "harness.html"
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", "[1280, 390]").replace("WORD", word)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        harness.write_text(text)
        with tempfile.TemporaryDirectory() as profile:
            done = subprocess.run(
                [
                    program,
                    *"--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split(),
                    f"--user-data-dir={profile}",
                    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                    f"--timeout={int(60000 * minutes)}",
                    "--virtual-time-budget=100000000",
                    f"http://127.0.0.1:{server.server_port}/harness.html",
                ],
                capture_output=True,
                text=True,
                timeout=60 * minutes + 60,
            )
    finally:
        server.shutdown()
        harness.unlink(missing_ok=True)
    match = re.search(r'<pre id="out">DONE (.*?)</pre>', done.stdout, re.S)
    if match is None:
        return [f"the browser did not finish: {done.stderr[-2000:]}"]
    found: list[str] = json.loads(match[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "harness" not in line]
    return found + [f"console: {line}" for line in console]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("docs/_build/html"))
    parser.add_argument("--pages", nargs="*", help="pages to look at; by default all but most of the reference")
    parser.add_argument("--word", default="UniPC", help="what the search must find")
    options = parser.parse_args()
    if browser() is None:
        print(f"no browser on the path ({', '.join(NAMES)}): the pages were not looked at")
        return 0
    pages = options.pages
    if not pages:
        every = [str(path.relative_to(options.site)) for path in sorted(options.site.rglob("*.html"))]
        skipped = ("_modules", "genindex", "py-modindex", "search", "harness", "gallery/sg_execution_times")
        pages = [page for page in every if not page.startswith(skipped)]
        reference = [page for page in pages if page.startswith("api/generated")]
        pages = [page for page in pages if page not in reference] + reference[::12]
    found = problems(options.site, pages, options.word)
    print(*found, sep="\n")
    print(f"{len(pages)} pages at 1280 and 390 pixels, light and dark: {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
