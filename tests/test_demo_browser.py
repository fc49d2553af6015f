"""The painting page in a real Chromium, without a screen: what a person sees and does."""

import base64
import io
import json
import shutil
import threading

import pytest
import torch

pytest.importorskip("gradio", reason="the page needs ssmgen[demo]")
pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")
pytest.importorskip("selenium", reason="drives the browser")

from PIL import Image
from pipelines import told_pipe
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from benchmarks.demo_soak import files_in, untrained_pipe
from recipes.sisma.demo.exchange import encode_png
from recipes.sisma.demo.jobs import JobRunner
from recipes.sisma.demo.page import build_page
from recipes.sisma.demo.server import serve
from ssmgen.data import BISENET19, CELEBAMASK19, draw_face, remap
from ssmgen.data.images import to_pil

SIDE = 32
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000"),
)

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def runner():
    return JobRunner(untrained_pipe(SIDE))


@pytest.fixture(scope="module")
def address(runner, temporary):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(temporary))
        page = build_page(runner)
        try:
            yield serve(page, runner, host="127.0.0.1", port=0)
        finally:
            page.close()


class Page:
    """The page in a browser, and what one does there."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        self.wait = WebDriverWait(driver, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])

    def open(self, width=1280, height=1000, dark=False):
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(self.address)
        self.drawn()
        return self

    def drawn(self):
        """Wait until the painter is there, and the results, which come with what they kept."""
        self.wait.until(lambda _: len(self.all("#painter .brushes button")) == 19 and self.all("#results .results"))
        self.wait.until(lambda _: "of 19 classes" in self.text("#painter .count"))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def click(self, selector):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(selector))
        self.one(selector).click()

    def paint(self, label, points):
        """Drag a brush of a class over the mask, along points in shares of its sides."""
        self.click(f'#painter [data-brush="{label}"]')
        canvas = self.one("#painter .board canvas")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        width, height = canvas.size["width"], canvas.size["height"]
        spots = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in points]
        chain = ActionChains(self.driver, duration=20).move_to_element_with_offset(canvas, *spots[0]).click_and_hold()
        for (x0, y0), (x1, y1) in zip(spots, spots[1:], strict=False):
            chain.move_by_offset(x1 - x0, y1 - y0)
        chain.release().perform()

    def mask(self):
        """Labels on the board, by the colours it shows."""
        script = "return arguments[0].toDataURL('image/png').split(',')[1]"
        image = Image.open(
            io.BytesIO(base64.b64decode(self.driver.execute_script(script, self.one("#painter canvas"))))
        )
        colours = list(image.convert("RGB").getdata())
        return torch.tensor([CELEBAMASK19.palette.index(colour) for colour in colours]).view(SIDE, -1)

    def picture(self, which=".second"):
        return self.one(f"#results {which} img").get_attribute("src") or ""

    def results_after(self, button):
        """Press a button and wait for another picture."""
        before = self.text("#results .work") + self.picture()
        self.click(button)
        self.wait.until(lambda _: self.picture() and self.text("#results .work") + self.picture() != before)
        self.wait.until(lambda _: not self.one("#live .live").is_displayed())

    def message(self, name):
        self.wait.until(lambda _: self.all(f"#{name} p") and self.text(f"#{name} p"))
        return self.text(f"#{name} p")

    def upload(self, path):
        self.one("#upload input").send_keys(str(path))


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, address):
    yield from opened(driver, address)


def opened(driver, address):
    driver.get_log("performance"), driver.get_log("browser")
    yield Page(driver, address).open()
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")


@pytest.fixture
def told_page(driver, temporary):
    """The page of a model that is told words and a style, and makes rectangles of 32 x 48."""
    page = build_page(runner := JobRunner(told_pipe((SIDE, 48))))
    try:
        yield from opened(driver, serve(page, runner, host="127.0.0.1", port=0))
    finally:
        page.close()


def requested(driver):
    """Addresses that the page asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if url.startswith(("http", "ws"))]


def test_paint_generate_change_and_reload(page, driver, temporary, address):
    names = [button.text.split("\n")[0] for button in page.all("#painter .brushes button")]
    assert names[:4] == ["background", "skin", "nose", "glasses"] and len(set(names)) == 19
    colours = [each.value_of_css_property("background-color") for each in page.all("#painter .swatch")]
    assert [colour.partition("(")[2][:-1].split(", ")[:3] for colour in colours] == [
        [str(value) for value in colour] for colour in CELEBAMASK19.palette
    ]
    assert torch.equal(page.mask(), draw_face(2, SIDE)[1].long())

    page.paint(14, [(0.2, 0.1), (0.8, 0.1)])
    painted = page.mask()
    assert (painted[3, 8:24] == 14).all() and page.text('#painter [data-brush="14"] .pixels') == str(
        int((painted == 14).sum())
    )
    page.click('#painter [data-act="undo"]')
    assert torch.equal(page.mask(), draw_face(2, SIDE)[1].long())
    page.click('#painter [data-act="redo"]')
    assert torch.equal(page.mask(), painted)

    page.results_after("#generate")
    first = page.picture()
    assert len(page.all("#results .strip button")) == 4 and "seed 0" in page.text("#results .second figcaption")
    assert page.one("#results .save").get_attribute("href").startswith("blob:")
    page.click("#results .strip button:nth-child(3)")
    assert page.picture() != first and "seed 2" in page.text("#results .second figcaption")
    second = page.picture()

    page.paint(18, [(0.1, 0.95), (0.9, 0.95)])
    page.click("#edits button")
    page.wait.until(lambda _: page.all("#chosen p") and "seed 2" in page.text("#chosen p"))
    page.results_after("#redraw")
    assert page.text("#results .title") == "Redrawn where the mask changed"
    assert page.picture(".first") == second and page.picture() != second
    changed = page.mask()

    driver.refresh()
    page.drawn()
    assert torch.equal(page.mask(), changed) and page.picture(".first") == second

    assert {url.split("/")[2] for url in requested(driver)} == {address.split("/")[2]}
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert files_in(temporary) == []


def test_uploads_replace_the_mask_and_bad_ones_do_not(page, tmp_path):
    page.results_after("#generate")
    kept, picture = page.mask(), page.picture()
    tmp_path.joinpath("notes.png").write_text("no picture at all")
    page.upload(tmp_path / "notes.png")
    assert page.message("mask-message") == "The file is not a PNG file: masks are PNG files."
    tmp_path.joinpath("large.png").write_bytes(encode_png(torch.zeros(8, 8, dtype=torch.uint8)) + bytes(5_100_000))
    page.upload(tmp_path / "large.png")
    page.wait.until(lambda _: "larger than 5 MB" in page.message("mask-message"))
    assert torch.equal(page.mask(), kept) and page.picture() == picture

    other = draw_face(9, 64)[1]
    to_pil(BISENET19.colorize(remap(other, CELEBAMASK19, BISENET19))).save(tmp_path / "mask.png")
    page.upload(tmp_path / "mask.png")
    page.wait.until(lambda _: page.message("mask-message").startswith("Uploaded"))
    page.wait.until(lambda _: not torch.equal(page.mask(), kept))
    assert set(page.mask().unique().tolist()) <= set(other.unique().tolist())
    page.results_after("#generate")
    assert page.picture() != picture


def test_a_setting_out_of_range_is_told_below_it(page):
    page.results_after("#generate")
    picture, mask = page.picture(), page.mask()
    seed = page.one("#seed input")
    seed.send_keys("\b\b-5\t")
    page.click("#generate")
    assert page.message("settings-message") == "The seed must be a whole number from 0 to 2,147,483,647."
    assert page.picture() == picture and torch.equal(page.mask(), mask)


def test_stop_gives_a_picture_up(page, runner, driver, monkeypatch):
    page.results_after("#generate")
    picture, decode = page.picture(), runner.pipe.decode
    begun, release = threading.Event(), threading.Event()

    def held(latents):
        begun.set()
        release.wait(120)
        return decode(latents)

    monkeypatch.setattr(runner.pipe, "decode", held)
    page.paint(14, [(0.2, 0.1), (0.8, 0.1)])
    page.click("#generate")
    assert begun.wait(60) and page.one("#live .live").is_displayed()
    page.click("#stop")
    page.wait.until(lambda _: page.message("settings-message") == "Stopped.")
    page.wait.until(lambda _: not page.one("#live .live").is_displayed())
    release.set()
    assert runner._device.acquire(timeout=60)
    runner._device.release()
    assert page.picture() == picture
    monkeypatch.undo()
    page.results_after("#generate")
    assert page.picture() != picture
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen_in_light_and_dark(page, width):
    shades = []
    for dark in (False, True):
        page.open(width=width, height=844, dark=dark)
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
        names = "return [...document.querySelectorAll('#painter .name')]"
        cut = page.driver.execute_script(
            f"{names}.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.textContent)"
        )
        assert cut == []
        script = "return getComputedStyle(document.querySelector('gradio-app')).backgroundColor"
        shades.append(page.driver.execute_script(script))
    assert shades[0] != shades[1]


def test_words_and_a_style_are_asked_for_from_the_keyboard(told_page, driver, tmp_path):
    page = told_page
    assert "It knows black / brown" in page.text("#words")
    assert not page.one('#style [data-from="result"]').is_enabled()
    page.results_after("#generate")
    plain = page.picture()
    page.one("#words input, #words textarea").send_keys("a hat")
    page.results_after("#generate")
    assert page.text("#results .caption").endswith("; words: a hat") and page.picture() != plain
    with_words = page.picture()
    page.one('#style [data-example="1"]').send_keys(Keys.ENTER)
    assert page.text("#style .now") == "Colours and textures of example 2."
    assert page.one('#style [data-example="1"]').get_attribute("aria-pressed") == "true"
    page.results_after("#generate")
    assert page.text("#results .caption").endswith("; style: example 2") and page.picture() != with_words

    page.one('#style [data-from="result"]').send_keys(Keys.SPACE)
    assert page.text("#style .now") == "Colours and textures of seed 0."
    picture, mask = draw_face(3, 200)
    to_pil(picture).save(tmp_path / "style.jpg")
    to_pil(mask[:150]).save(tmp_path / "other.png")
    to_pil(mask).save(tmp_path / "mask.png")
    files = '#style-upload [data-file="{}"]'
    page.one(files.format("picture")).send_keys(str(tmp_path / "style.jpg"))
    page.one(files.format("mask")).send_keys(str(tmp_path / "other.png"))
    page.wait.until(lambda _: "its mask 200 x 150: they must have the same shape" in page.message("style-message"))
    assert page.text("#style .now") == "Colours and textures of seed 0."
    page.wait.until(lambda _: "Upload a picture" in page.text("#style-upload"))
    page.one(files.format("picture")).send_keys(str(tmp_path / "style.jpg"))
    page.one(files.format("mask")).send_keys(str(tmp_path / "mask.png"))
    page.wait.until(lambda _: page.text("#style .now") == "Colours and textures of your picture.")
    page.one('#style [data-from="none"]').send_keys(Keys.ENTER)
    page.results_after("#generate")
    assert page.picture() == with_words, "without the style it is as before"
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_rectangle_is_painted_and_shown_in_its_shape(told_page):
    page = told_page
    assert "48 x 32 pixels" in page.text("#painter .count")
    board = page.one("#painter canvas").size
    assert board["width"] / board["height"] == pytest.approx(1.5, abs=0.02)
    page.paint(14, [(0.02, 0.03), (0.98, 0.03)])
    painted = page.mask()
    assert painted.shape == (SIDE, 48) and (painted[0] == 14).all() and not (painted[4:] == 14).all(dim=1).any()
    page.results_after("#generate")
    shown = page.one("#results .second img").size
    assert shown["width"] / shown["height"] == pytest.approx(1.5, abs=0.05)
