"""A page in a real browser: what it says on its console, and which of its images are missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_BROWSER = "Chromium is not installed here"
_COUNT = """<script>addEventListener("load", () => { const images = [...document.images];
document.documentElement.dataset.images = images.length;
document.documentElement.dataset.missing = images.filter(image => !image.complete || !image.naturalWidth).length; });
</script></body>"""


@dataclass(frozen=True)
class Seen:
    """console: lines. requests: addresses that were asked for, other than of the page and in it."""

    images: int
    missing: int
    console: list[str]
    requests: list[str]


def look_at(page: Path, folder: Path) -> Seen:
    """Loads a copy of the page that counts its own images."""
    copy = folder / "looked-at.html"
    html = page.read_text()
    copy.write_text(html.replace("</body>", _COUNT))
    how = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    ]
    told = subprocess.run(
        [CHROMIUM or "", *how, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    counts = [
        int(found) for name in ("images", "missing") for found in re.findall(rf'data-{name}="(\d+)"', told.stdout)
    ]
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url\(["']?([^"')]+)""", html)
    return Seen(
        *counts,
        console=[line for line in told.stderr.splitlines() if "CONSOLE" in line],
        requests=[a or b for a, b in addresses if not (a or b).startswith(("data:", "#"))],
    )
