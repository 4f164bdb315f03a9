"""The page of a report in a real browser: headless Chromium, at the width of a desk and of a phone.

`pytest -m browser` needs Chromium (Debian: `apt-get install chromium`), and fails without it.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from madjax import report

pytestmark = pytest.mark.browser

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
QUIET += ("--disable-background-networking", "--disable-component-update", "--disable-sync")

PROBE = """
const frame = document.querySelector("iframe");
const told = {};
frame.addEventListener("load", () => {
  const page = frame.contentDocument;
  const view = frame.contentWindow;
  const board = page.getElementById("board");
  const column = i => [...board.tBodies[0].rows].map(row => row.cells[i].textContent);
  const shown = () => [...board.tBodies[0].rows].filter(row => !row.hidden).length;
  const heads = [...board.tHead.rows[0].cells].map(head => head.textContent.trim());
  told.heads = heads;
  told.wide = page.documentElement.scrollWidth;
  told.width = view.innerWidth;
  told.pictures = [...page.images].map(image => image.naturalWidth);
  const attacker = heads.indexOf("attacker");
  const button = board.tHead.rows[0].cells[attacker].querySelector("button");
  button.click();
  told.up = column(attacker);
  told.sorted = board.tHead.rows[0].cells[attacker].getAttribute("aria-sort");
  button.click();
  told.down = column(attacker);
  board.tHead.rows[0].cells[heads.indexOf("defence")].querySelector("button").click();
  told.words = column(heads.indexOf("defence"));
  told.all = shown();
  const filter = page.getElementById("filter");
  filter.value = "argmax knockoff";
  filter.dispatchEvent(new view.Event("input"));
  told.kept = shown();
  told.back = view.getComputedStyle(page.body).backgroundColor;
  told.row = view.getComputedStyle(page.querySelector(".cards tbody tr")).display;
  document.getElementById("told").textContent = JSON.stringify(told);
});
frame.src = "report.html";
"""


def chromium(*words):
    """What Chromium prints; the test fails where there is none, and for an error in a script."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "no Chromium on PATH: install it (Debian: apt-get install chromium)"
    done = subprocess.run([path, *QUIET, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Uncaught" not in done.stderr, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of committed rows with a figure, beside a copy of them."""
    out = tmp_path_factory.mktemp("page")
    run = RESULTS / "mnist_defenses"
    picture = (run / "tradeoff.png").read_bytes()
    section = report.Section("A figure", "a command", picture, report.table(report.read_rows(run)))
    report.write_page(out / "report.html", run, title="A page", sections=[section])
    return out


def probed(folder, width, tmp_path):
    """What the page says of itself in a frame of that width, after clicks."""
    frame = f'<iframe width="{width}" height="900"></iframe>'
    text = f'<!doctype html><pre id="told"></pre>{frame}<script>{PROBE}</script>'
    (folder / "probe.html").write_text(text)
    dom = chromium(
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "probe.html").as_uri(),
    )
    (said,) = re.findall(r'<pre id="told">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(said))


@pytest.mark.parametrize(("width", "row"), [(1280, "table-row"), (390, "block")])
def test_the_page_opens_sorts_and_filters_and_is_no_wider_than_the_window(
    folder, tmp_path, width, row
):
    told = probed(folder, width, tmp_path)
    assert told["width"] == width
    assert told["wide"] <= width
    assert min(told["pictures"]) > 100
    assert told["row"] == row  # claims are cards on a phone
    up = [float(text.split(" ")[0]) for text in told["up"]]
    assert up == sorted(up)
    assert told["sorted"] == "ascending"
    assert [float(text.split(" ")[0]) for text in told["down"]] == up[::-1]
    assert told["words"][0].startswith("DP-SGD")
    assert told["words"][-1] == "undefended"
    assert told["all"] == len(up) > 30
    rows = report.read_rows(RESULTS / "mnist_defenses")
    argmax = {row["strength"] for row in rows if row["defense"] == "mad_argmax"}
    assert told["kept"] == len(argmax) == 3
