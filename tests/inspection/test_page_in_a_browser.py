"""The page in a real browser: Chromium lays it out and paints it, in the light form and in the dark one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_lite_fx.inspection.table import SiteTable
from tests.inspection.test_inspect import layer, row, table_of

pytest.importorskip("PIL")
from PIL import Image, ImageChops, ImageStat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.broad,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]
FORMS = {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}
SCREENSHOTS = Path(__file__).with_name("screenshots")
ALIKE = 3.0
"""Other fonts differ by 1.1, another page by 10 and more."""
MEASURE = """<script>
const boxes = [...document.querySelectorAll("figure")].map((figure) => figure.getBoundingClientRect());
const streams = [...document.querySelectorAll(".stream")].map((stream) => stream.getBoundingClientRect());
const plain = (box) => [box.left, box.top, box.right, box.bottom].map(Math.round);
const page = document.documentElement;
document.title = JSON.stringify({
  figures: boxes.map(plain), streams: streams.map(plain), wide: page.scrollWidth - page.clientWidth,
  background: getComputedStyle(document.body).backgroundColor,
});
</script></body>"""


def decoder() -> SiteTable:
    """Return the table of two equal layers of a decoder, with adapters."""
    sites = [site for i in range(2) for site in layer(f"model.layers.{i}", 576)]
    adapted = [replace(site, adapters=("LoRA",), parameters=9216) for site in sites]
    return table_of(*adapted, row("lm_head", "head reader", 576, 49152))


def browse(folder: Path, *options: str, width: int = 1280) -> str:
    """Run Chromium on the page in `folder`, and return what it prints."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", *options]
    done = subprocess.run([*command, f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120)
    return done.stdout


def laid_out(folder: Path, *options: str, width: int = 1280) -> dict[str, Any]:
    """Return where the pictures of the page stand."""
    text = browse(folder, "--dump-dom", *options, width=width)
    (title,) = re.findall(r"<title>(.*?)</title>", text)
    measured: dict[str, Any] = json.loads(title)
    return measured


def with_experts() -> SiteTable:
    """Return the table of two equal layers with experts, of the sizes of Qwen3-30B-A3B, with adapters."""
    sites = []
    for home in ("model.layers.0", "model.layers.1"):
        attention = layer(f"{home}.self_attn", 2048)[:4]
        sites += [replace(site, adapters=("LoRA",), parameters=49152) for site in attention]
        sites.append(row(f"{home}.mlp.gate", "router reader", 2048, 128, reads=f"{home}.normed"))
        for name, d_in, d_out in (("gate_up_proj", 2048, 1536), ("down_proj", 768, 2048)):
            expert = row(f"{home}.mlp.experts.sites.{name}", "experts", d_in, d_out, reads=f"{home}.{name}")
            sites.append(replace(expert, kind="experts", experts=128, adapters=("LoRA",), parameters=1835008))
    return table_of(*sites)


def measured_page(table: SiteTable, folder: Path) -> Path:
    (folder / "page.html").write_text(table.to_html().replace("</body>", MEASURE), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return measured_page(decoder(), tmp_path)


def test_the_halves_of_a_layer_stand_side_by_side_at_1280_pixels(folder: Path) -> None:
    measured = laid_out(folder)
    (attention, feed_forward, _) = measured["figures"]
    assert attention[2] <= feed_forward[0] + 1  # no overlap
    assert abs(attention[3] - feed_forward[3]) <= 1  # on one line
    (first, second, *_) = measured["streams"]
    assert first[3] == second[3]  # whose streams are one
    assert second[0] - first[2] <= 1
    assert measured["wide"] == 0


def test_so_do_attention_and_experts(tmp_path: Path) -> None:
    measured = laid_out(measured_page(with_experts(), tmp_path))
    attention, experts = measured["figures"]
    assert attention[2] <= experts[0] + 1
    assert abs(attention[3] - experts[3]) <= 1
    assert experts[2] <= 1280
    assert measured["wide"] == 0


def test_a_narrow_window_stacks_them(folder: Path) -> None:
    (attention, feed_forward, _) = laid_out(folder, width=700)["figures"]
    assert feed_forward[1] >= attention[3]


def test_it_is_dark_where_the_system_is(folder: Path) -> None:
    light = laid_out(folder)["background"]
    dark = laid_out(folder, *FORMS["dark"])["background"]
    assert light == "rgb(244, 245, 247)"
    assert dark == "rgb(15, 18, 22)"


def screenshot(folder: Path, *options: str) -> Path:
    """Take a picture of the page."""
    path = folder / f"{len(options)}.png"
    browse(folder, f"--screenshot={path}", *options)
    return path


def reduced(path: Path) -> Image.Image:
    """Return a picture as grey blocks of eight pixels, in which fonts of different machines look alike."""
    return Image.open(path).convert("L").resize((160, 112), Image.Resampling.BOX)


def distance(one: Image.Image, other: Image.Image) -> float:
    """Return how far two pictures differ: the mean over blocks, of 255 grey levels."""
    return float(ImageStat.Stat(ImageChops.difference(one, other)).mean[0])


@pytest.mark.parametrize("form", FORMS)
def test_it_looks_as_it_did(folder: Path, form: str) -> None:
    """To take the pictures anew: `python -m tests.inspection.test_page_in_a_browser`."""
    taken = reduced(screenshot(folder, *FORMS[form]))
    assert distance(taken, Image.open(SCREENSHOTS / f"{form}.png")) < ALIKE


@pytest.mark.parametrize("change", ["experts", "dark", "without its stylesheet"])
def test_another_page_does_not_look_so(folder: Path, tmp_path: Path, change: str) -> None:
    page = tmp_path / "page.html"
    if change == "experts":
        measured_page(with_experts(), tmp_path)
    if change == "without its stylesheet":
        page.write_text(re.sub("<style>.*?</style>", "", page.read_text("utf-8"), flags=re.DOTALL), "utf-8")
    taken = reduced(screenshot(folder, *FORMS["dark" if change == "dark" else "light"]))
    assert distance(taken, Image.open(SCREENSHOTS / "light.png")) > 2 * ALIKE


def take_anew() -> None:
    """Write the pictures that the page is compared with."""
    SCREENSHOTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for form, options in FORMS.items():
            reduced(screenshot(measured_page(decoder(), Path(name)), *options)).save(SCREENSHOTS / f"{form}.png")


if __name__ == "__main__":
    take_anew()
