"""A page in a real browser: what it says on its console, which of its images are missing, how well it can be read."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_BROWSER = "Chromium is not installed here"
_LOOK = """<script>addEventListener("load", () => {
const told = document.documentElement.dataset, images = [...document.images];
told.images = images.length;
told.missing = images.filter(image => !image.complete || !image.naturalWidth).length;
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const bright = colour => channels(colour).slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
const paper = element => { for (; element; element = element.parentElement) {
  const colour = getComputedStyle(element).backgroundColor;
  if (!(channels(colour)[3] === 0)) return colour; } return "rgb(255, 255, 255)"; };
const contrasts = [...document.body.querySelectorAll("*")].filter(
  element => !["SCRIPT", "STYLE"].includes(element.tagName) && element.getClientRects().length
    && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(element => {
  const style = getComputedStyle(element), ink = element instanceof SVGElement ? style.fill : style.color;
  const [one, two] = [bright(ink), bright(paper(element))].sort((a, b) => b - a);
  return [(one + 0.05) / (two + 0.05), element.textContent.trim().slice(0, 40)]; }).sort((a, b) => a[0] - b[0]);
const [least, faintest] = contrasts[0] ?? [21, ""];
told.contrast = least.toFixed(2) + " " + faintest;
told.paper = bright(paper(document.body)).toFixed(3);
});</script></body>"""


@dataclass(frozen=True)
class Seen:
    """console: lines. requests: addresses that were asked for, other than of the page and in it. contrast: least of any
    text with what is behind it, as WCAG 2.2 measures it, 1 to 21; faintest: that text. paper: luminance of the page."""

    images: int
    missing: int
    contrast: float
    faintest: str
    paper: float
    console: list[str]
    requests: list[str]


def look_at(page: Path, folder: Path, dark: bool = False) -> Seen:
    """Loads a copy of the page that looks at itself. dark: as whoever prefers dark pages sees it."""
    copy = folder / "looked-at.html"
    html = page.read_text()
    copy.write_text(html.replace("</body>", _LOOK))
    how = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    told = subprocess.run(
        [CHROMIUM or "", *how, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    looked = {
        name: unescape(re.findall(rf'data-{name}="([^"]*)"', told.stdout)[0])
        for name in ("images", "missing", "contrast", "paper")
    }
    contrast, _, faintest = looked["contrast"].partition(" ")
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url\(["']?([^"')]+)""", html)
    return Seen(
        images=int(looked["images"]),
        missing=int(looked["missing"]),
        contrast=float(contrast),
        faintest=faintest,
        paper=float(looked["paper"]),
        console=[line for line in told.stderr.splitlines() if "CONSOLE" in line],
        requests=[a or b for a, b in addresses if not (a or b).startswith(("data:", "#"))],
    )
