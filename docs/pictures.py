"""Make the pictures of README from pages of a run on drawn pedestrians, with headless Chromium.

    mprd report runs/first --out report.html
    mprd search runs/first --gallery GALLERY --query QUERY... --top 11 --cameras others --html search.html
    python docs/pictures.py report.html search.html

Drawn pedestrians only: no photograph of a person belongs into this repository.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "figures"
WIDTH, HEIGHT = 1200, 880
TOPS = {"report": 940, "search": 0}
"""Where the part that is shown begins."""
SCHEMES = {"light": "1", "dark": "0"}


def main(report: str, search: str) -> None:
    """Write each page's picture, light and dark."""
    for name, page in (("report", report), ("search", search)):
        for scheme, code in SCHEMES.items():
            with tempfile.NamedTemporaryFile(suffix=".png") as whole:
                shoot(Path(page), Path(whole.name), scheme=code, height=TOPS[name] + HEIGHT)
                picture = Image.open(whole.name).convert("RGB").crop((0, TOPS[name], WIDTH, TOPS[name] + HEIGHT))
            picture.quantize(128, dither=Image.Dither.NONE).save(FOLDER / f"{name}-{scheme}.png", optimize=True)


def shoot(page: Path, out: Path, *, scheme: str, height: int) -> None:
    """Render the top of a page."""
    look = [f"--blink-settings=preferredColorScheme={scheme}", "--hide-scrollbars", f"--window-size={WIDTH},{height}"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *look, f"--screenshot={out}"]
    subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
