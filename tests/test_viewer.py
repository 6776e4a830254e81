"""The viewer in a real browser: Debian's Chromium, driven by playwright."""

import re
import shutil
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from vitreg_core import create_model, save_model
from vitreg_core.data.scenes import draw_scenes
from vitreg_core.planted import plant_register_neurons
from vitreg_core.vit import VisionTransformer

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytest.importorskip("gradio", reason="gradio is not installed: uv run --group viewer")
ROOT = Path(__file__).parents[1]
USERS = 20
CONTROLS = (3, "mean", "class token", False)
"""Block, head, token, test-time registers."""
SECONDS = 60
"""For anything to happen; a busy machine is slow."""


@torch.no_grad()
def even_model(registers: int) -> VisionTransformer:
    """A random model whose patch norms are even, as those of trained models are."""
    torch.manual_seed(0)
    model = create_model("vit_ti8", image_size=64, depth=4, embed_dim=96, layer_scale=0.1, registers=registers).eval()
    model.positions.patches.mul_(20)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, the first with a planted artifact; good and broken pictures."""
    folder = tmp_path_factory.mktemp("viewer")
    model = even_model(0)
    images = model.preprocess.normalize(draw_scenes(96, 3, image_size=64).image)
    save_model(plant_register_neurons(model, images, layer=2)[0], folder / "planted")
    save_model(even_model(2), folder / "registers")
    (folder / "photos").mkdir()
    noise = Image.effect_noise((300, 200), 60).convert("RGB")
    noise.save(folder / "photos" / "one.png")
    noise.save(folder / "photo.jpg")
    noise.resize((1, 1)).save(folder / "tiny.png")
    noise.convert("RGBA").save(folder / "alpha.png")
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "bomb.png").write_bytes(promise(20_000, 20_000))
    (folder / "heavy.jpg").write_bytes(b"x" * (21 * 2**20))
    return folder


def promise(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than it has."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A running viewer."""
    port = free_port()
    models = [f"--model={folder / name}" for name in ("planted", "registers")]
    command = [sys.executable, "apps/viewer.py", *models, "--images", str(folder / "photos"), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line
        yield f"http://127.0.0.1:{port}"
        assert server.poll() is None, "the server died"
        server.terminate()
    assert server.returncode == 0


@contextmanager
def browsing(address: str, width: int = 1280) -> Iterator["Page"]:
    """A page of a new browser; afterwards, nothing was asked of another host and nothing went wrong in the console."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(1000 * SECONDS)
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".maps img")
        yield page
        browser.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert said == []


def changed(page: "Page", act: Callable[[], object]) -> str:
    """The maps after something was done that changes them."""
    before = page.inner_html(".maps")
    act()
    page.wait_for_function("before => document.querySelector('.maps')?.innerHTML !== before", arg=before)
    return page.inner_html(".maps")


def captions(page: "Page", card: str) -> list[str]:
    return page.locator(f".card:has(h3:text-is('{card}')) figcaption").all_inner_texts()


def set_block(page: "Page", block: int) -> None:
    page.fill("#layer input[type=number]", str(block))
    page.keyboard.press("Tab")


def test_maps_follow_what_is_chosen(address: str, folder: Path) -> None:
    with browsing(address) as page:
        assert "drawn scene 0" in page.inner_text("#status")
        assert page.locator(".maps img").count() == 2 * 4 + 2 * 5
        changed(page, lambda: page.set_input_files("input[type=file]", folder / "photo.jpg"))
        page.wait_for_selector("#status :text('photo.jpg')")
        changed(page, lambda: page.click("#picture img", position={"x": 5, "y": 5}))
        assert "row 0, column 0" in captions(page, "Similarity")[0]
        assert "block 3" in captions(page, "Attention")[0]
        changed(page, lambda: set_block(page, 2))
        assert "block 2" in captions(page, "Attention")[0]
        assert "photo.jpg" in page.inner_text("#status")
        page.click("#listed input")
        changed(page, lambda: page.get_by_role("option", name="one.png").click())
        page.wait_for_selector("#status :text('one.png')")
        page.click("input[aria-label='Attention of']")
        changed(page, lambda: page.get_by_role("option", name="register 1").click())
        assert "no register 1: this model has 0 registers" in page.inner_text(".maps")


def test_test_time_registers_make_the_artifact_vanish(address: str) -> None:
    with browsing(address) as page:
        page.click("#listed input")
        changed(page, lambda: page.get_by_role("option", name="drawn scene 2").click())
        assert re.search(r"[1-9] outliers?, .* times the others", captions(page, "Norms")[0])
        with_artifact = page.inner_html(".maps")
        changed(page, lambda: page.click("#test-time input"))
        assert "no outliers" in captions(page, "Norms")[0]
        assert ": outliers " in page.inner_text("#status")
        assert changed(page, lambda: page.click("#test-time input")) == with_artifact


@pytest.mark.parametrize("name", ["tiny.png", "alpha.png", "cmyk.jpg"])
def test_odd_uploads_are_shown(name: str, address: str, folder: Path) -> None:
    with browsing(address) as page:
        changed(page, lambda: page.set_input_files("input[type=file]", folder / name))
        page.wait_for_selector(f"#status :text('{name}')")


@pytest.mark.parametrize(
    ("name", "words"), [("text.jpg", "text.jpg: not a readable image"), ("bomb.png", "bomb.png: far too many pixels")]
)
def test_broken_uploads_give_a_message_and_the_page_goes_on(name: str, words: str, address: str, folder: Path) -> None:
    with browsing(address) as page:
        page.set_input_files("input[type=file]", folder / name)
        page.wait_for_selector(f"#status .error :text('{words}')")
        changed(page, lambda: set_block(page, 1))
        assert page.locator("#status .error").count() == 0


def test_too_large_a_file_gives_a_message(address: str, folder: Path) -> None:
    with browsing(address) as page:
        page.set_input_files("input[type=file]", folder / "heavy.jpg")
        page.wait_for_selector("text=/exceed|too large|at most 20 MB.*heavy/i")
        changed(page, lambda: set_block(page, 1))


def test_a_phone_shows_the_page_without_scrolling_sideways(address: str) -> None:
    with browsing(address, width=390) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert min(one.bounding_box()["width"] for one in page.locator(".maps img").all()) > 70


def test_many_users_at_once_are_served(address: str, folder: Path) -> None:
    from gradio_client import Client, handle_file

    names = [folder / f"user{number}.png" for number in range(USERS)]
    for number, path in enumerate(names):
        Image.effect_noise((200 + number, 200), 60).convert("RGB").save(path)

    def use(path: Path) -> str:
        client = Client(address, verbose=False, download_files=False)
        found = client.predict(handle_file(str(path)), *CONTROLS, api_name="/upload")
        client.close()
        return found[2]

    with ThreadPoolExecutor(USERS) as pool:
        told = list(pool.map(use, names))
    assert [path.name in one for path, one in zip(names, told, strict=True)] == [True] * USERS


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "pyproject.toml")])
def test_no_file_outside_the_uploads_is_given_out(path: str, address: str) -> None:
    from gradio_client import Client

    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    client = Client(address, verbose=False, download_files=False)
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match=r"(?i)cannot access|not allowed|invalid|upload"):
        client.predict(given, *CONTROLS, api_name="/upload")
    client.close()


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "apps" / "viewer.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_mistakes_end_with_one_line(address: str, folder: Path, tmp_path: Path) -> None:
    model = f"--model={folder / 'planted'}"
    mistakes = {
        "no model: give --model SOURCE": run(cwd=tmp_path),
        "given twice": run(model, model),
        "give another --port": run(model, "--port", address.rpartition(":")[2]),
        "--host 192.0.2.1": run(model, "--host", "192.0.2.1"),
        "at most 2": run(model, model, model),
    }
    for words, found in mistakes.items():
        assert found.returncode == 2, words
        assert words in found.stderr
        assert found.stderr.count("\n") == 1, found.stderr


def test_help_teaches() -> None:
    told = run("--help").stdout
    assert "Give the option twice to compare two" in " ".join(told.replace("│", " ").split())
    assert "test-time registers" in told
