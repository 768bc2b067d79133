"""python .ci/check_pages.py PAGE...: each HTML report in headless Chromium, 1,280 pixels wide.

No line of the console is an error, every image has loaded, and no table or page scrolls sideways. The screenshot of
each page is written beside it, as .png.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH, HEIGHT = 1280, 6000
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
PROBE = """<script>
window.addEventListener("load", () => {
  const wide = [...document.querySelectorAll(".scroll, html, body")].filter(e => e.scrollWidth > e.clientWidth + 1);
  const images = [...document.images];
  const found = {images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).length,
                 wide: wide.map(e => `${e.tagName} ${e.scrollWidth} > ${e.clientWidth}`)};
  document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(found)}));
});
</script>"""
LEFT = re.compile(r'<pre id="probe">(.*?)</pre>')


def chromium(*arguments: str) -> subprocess.CompletedProcess:
    """Chromium's answer, which has to come within a minute."""
    command = [str(shutil.which("chromium")), *OPTIONS, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def look(page: Path, scratch: Path) -> list[str]:
    """What is wrong with the page, and its screenshot beside it."""
    probed = scratch / page.name
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    done = chromium("--enable-logging=stderr", "--dump-dom", probed.as_uri())
    found = json.loads(LEFT.findall(done.stdout)[-1].replace("&gt;", ">"))
    chromium(f"--screenshot={page.with_suffix('.png')}", page.resolve().as_uri())
    print(f"{page}: {found['images']} images, {found['broken']} broken, too wide: {found['wide'] or 'nothing'}")
    wrong = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if not found["images"] or found["broken"]:
        wrong.append(f"{found['broken']} of {found['images']} images did not load")
    return wrong + [f"scrolls sideways: {element}" for element in found["wide"]]


def main() -> int:
    """The number of pages with faults."""
    if shutil.which("chromium") is None:
        print("chromium not found: no page was opened")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        wrong = {page: look(Path(page), Path(scratch)) for page in sys.argv[1:]}
    for page, faults in wrong.items():
        for fault in faults:
            print(f"NOT SO {page}: {fault}")
    return sum(map(bool, wrong.values()))


sys.exit(main())
