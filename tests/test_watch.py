"""The page that watches runs: what it shows, that it stands alone, and that it serves nothing else."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("omegaconf", reason="the recipe needs ssmgen[train]")

from recipes.sisma import watch
from recipes.sisma.arguments import UsageError
from recipes.sisma.curves import SIDE, chart, points_of, read_log, smoothed
from ssmgen.data.images import write_png

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def make_run(folder: Path, *, count=20, steps=400, grids=(100, 200)) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"steps: {steps}\nbatch_size: 8\n")
    lines = [
        {"step": 10 * i, "loss": 2 / i, "grad_norm": 1.0, "lr": 1e-3, "images_per_second": 40.0}
        for i in range(1, count + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in grids:
        write_png(folder / "samples" / f"step-{step:06d}.png", torch.full((8, 8), step % 19, dtype=torch.uint8))
    return folder


@contextlib.contextmanager
def served(*runs: Path, **settings):
    with watch.Server(list(runs), watch.Settings(port=0, **settings)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, address: str, host: str = "127.0.0.1", method: str = "GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, address, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_page_shows_curves_progress_and_grids(tmp_path):
    run = make_run(tmp_path / "faces")
    text = watch.page([run], 0.6, refresh=5)
    assert "step 200 of 400" in text and "40 images a second" in text and "40 s to go" in text
    assert text.count('class="plot"') == 4 and text.count("<polyline") == 2 * 3 + 1, "lr is drawn once, unsmoothed"
    frames = json.loads(re.search(r"data-frames='([^']*)'", text)[1])
    assert [frame["step"] for frame in frames] == [100, 200]
    assert frames[0]["src"].startswith("/grids/0/100?")


def test_skipped_steps_and_spikes_are_shown_and_their_lines_are_no_points(tmp_path):
    run = make_run(tmp_path / "faces")
    assert "skipped step" not in watch.page([run], 0.6)
    with (run / "log.jsonl").open("a") as log:
        log.write(
            json.dumps({"step": 205, "event": "spike", "loss": 77.0, "grad_norm": 9.0, "examples": [[1, 0]]}) + "\n"
        )
        log.write(json.dumps({"step": 210, "loss": 0.1, "skipped": 1, "spikes": 2}) + "\n")
    text = watch.page([run], 0.6)
    assert "<span>1 skipped step</span>" in text and "<span>2 loss spikes</span>" in text
    assert 77.0 not in [loss for _, loss in points_of(read_log(run), "loss")]


def test_progress_is_read_from_nested_settings_too(tmp_path):
    run = make_run(tmp_path / "faces")
    (run / "config.yaml").write_text("sampling: {steps: 9}\ntrain:\n  steps: 400\n  batch_size: 8\n")
    text = watch.page([run], 0.6)
    assert "step 200 of 400" in text and "40 s to go" in text


def test_a_run_that_has_not_logged_yet_is_watched_too(tmp_path):
    (tmp_path / "new").mkdir()
    text = watch.page([tmp_path / "new"], 0.6, refresh=5)
    assert "nothing logged yet" in text and "step 0" in text and "<polyline" not in text


def test_several_runs_share_the_axes(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", count=10)]
    text = watch.page(runs, 0.0)
    assert text.count("<polyline") == 4 * 2 and "2 runs" in text and str(runs[1]) in text
    found = chart("loss", [points_of(read_log(run), "loss") for run in runs])
    ends = [float(line["raw"].split()[-1].split(",")[0]) for line in found["lines"]]
    assert ends == [SIDE, pytest.approx(SIDE * 90 / 190, abs=0.1)]


def test_points_lie_where_their_values_are():
    found = chart("x", [[(0, 1.0), (5, 3.0), (10, 2.0)]])
    assert found["lines"][0]["raw"] == "0.0,1000.0 500.0,0.0 1000.0,500.0"
    assert ("2", pytest.approx(50.0)) in found["y"]
    steep = chart("x", [[(i, 10.0 ** -(i / 10)) for i in range(41)]])
    assert steep["logarithmic"] and steep["lines"][0]["raw"].split()[20] == "500.0,500.0"
    assert [label for label, _ in steep["y"]] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert not chart("x", [[(i, 10.0 ** -(i / 10)) for i in range(41)]], linear=True)["logarithmic"]
    assert chart("x", [[(0, 1.0)], []]) is None
    assert chart("x", [[(0, 5.0), (1, 5.0)]])["lines"][0]["raw"] == "0.0,500.0 1000.0,500.0"


def test_smoothing_is_an_unbiased_moving_average():
    assert smoothed([(0, 3.0), (1, 3.0)], 0.9) == [(0, pytest.approx(3)), (1, pytest.approx(3))]
    assert smoothed([(0, 0.0), (1, 1.0)], 0.5)[1] == (1, pytest.approx(2 / 3))
    many = [(i, float(i % 2)) for i in range(5000)]
    raw = chart("x", [many])["lines"][0]["raw"].split()
    assert len(raw) <= 600 and raw[-1].startswith("1000.0,")


def test_a_log_with_gaps_and_a_cut_line_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": null}\n[]\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert points_of(read_log(tmp_path), "loss") == [(2, 0.5)]


def test_once_writes_a_file_that_stands_alone(tmp_path, capsys):
    run = make_run(tmp_path / "run", grids=range(10, 310, 10))
    watch.main([f"run={run}", "once=true"])
    text = (run / "watch.html").read_text()
    assert str(run / "watch.html") in capsys.readouterr().out
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)(https?:|/|\.)", text), "it must load nothing"
    frames = json.loads(re.search(r"data-frames='([^']*)'", text)[1])
    assert len(frames) == 12 and (frames[0]["step"], frames[-1]["step"]) == (10, 300)
    assert all(frame["src"].startswith("data:image/png;base64,iVBOR") for frame in frames)
    assert [p.name for p in run.glob("watch*")] == ["watch.html"]


def test_the_server_gives_the_page_and_the_grids(tmp_path):
    run = make_run(tmp_path / "run")
    with served(run) as port:
        answer, body = ask(port, "/")
        assert answer.status == 200 and b"step 200 of 400" in body
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert b'value="0.6" selected' in body and b'value="0.97" selected' in ask(port, "/?smoothing=0.97")[1]
        assert b'value="0.6" selected' in ask(port, "/?smoothing=nan")[1]
        answer, body = ask(port, "/grids/0/100?1")
        assert answer.status == 200 and body == (run / "samples" / "step-000100.png").read_bytes()
        with (run / "log.jsonl").open("a") as log:
            log.write('{"step": 400, "loss": 0.1, "images_per_second": 40}\n')
        assert b"step 400 of 400" in ask(port, "/")[1]


OUTSIDE = [
    *("/config.yaml", "/log.jsonl", "/samples/step-000100.png", "/watch.html", "//", "/.", "/..", "*", "/grids"),
    *("/grids/0/../../config.yaml", "/grids/../config.yaml", "/../config.yaml", "/grids/0/%2e%2e/config.yaml"),
    *("/grids/0/..%2fconfig.yaml", "/grids/0/100.png", "/grids/0/step-000100.png", "/grids/0/100/", "/grids/0/100%00"),
    *("/grids/1/100", "/grids/-1/100", "/grids/0/-100", "/grids/0/300", "/grids/00000000000/100", "/grids/0/1e2"),
    *(
        "/etc/passwd",
        "//etc/passwd",
        "/%2fetc/passwd",
        "file:///etc/passwd",
        "/grids/0//etc/passwd",
        "/\\..\\config.yaml",
    ),
    *("/?/../config.yaml/../secret", "/grids/0/" + "9" * 5000, "/" + "../" * 60 + "etc/passwd", "/grids/0/٣"),
]


@pytest.mark.parametrize("address", OUTSIDE, ids=lambda address: address[:30])
def test_no_address_reaches_a_file(tmp_path, address):
    run = make_run(tmp_path / "run")
    (tmp_path / "secret").write_text("XYZZY")
    (run / "samples" / "step-000300.png").symlink_to(tmp_path / "secret")
    (run / "samples" / "step-100.png").mkdir()
    with watch.Server([run], watch.Settings(port=0)) as server:
        found = server.answer(address)
    if found is not None:  # a query of the page itself
        assert found[0].startswith("text/html") and address.startswith("/?")
        assert b"XYZZY" not in found[1] and b"batch_size" not in found[1]


def test_over_http_too_nothing_else_is_found(tmp_path):
    run = make_run(tmp_path / "run")
    with served(run) as port:
        for address in [a for a in OUTSIDE if a.isascii() and a.isprintable() and " " not in a and a != "*"]:
            answer, body = ask(port, address)
            page = address.startswith("/?") or address == "//"
            assert answer.status == (200 if page else 404), address
            assert b"batch_size" not in body and b"root:" not in body
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, "/", method=method)[0].status == 501


def test_only_this_machines_names_are_answered(tmp_path):
    run = make_run(tmp_path / "run")
    with served(run) as port:
        assert ask(port, "/", host="localhost:1234")[0].status == 200
        for host in ("evil.example", "127.0.0.1.evil.example", ""):
            answer, body = ask(port, "/", host=host)
            assert answer.status == 403 and b"step 200" not in body


def test_names_in_the_page_are_escaped(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>'\"")
    text = watch.page([run], 0.6)
    assert "<img src=x" not in text and "&lt;img src=x" in text


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["run=nowhere"], FileNotFoundError, "run=nowhere: no such folder; it appears when"),
        (["run=nowhere/*"], FileNotFoundError, "matches no run of recipes.sisma.train"),
        (["run="], UsageError, "names 0 runs"),
        (["smoothing=1"], UsageError, r"smoothing must be in \[0, 1\), got 1"),
        (["refresh=0"], UsageError, "refresh must be at least 1"),
        (["prot=1"], UsageError, "'port'"),
    ],
)
def test_mistakes_are_explained(words, error, message, tmp_path):
    with pytest.raises(error, match=message):
        watch.main(words)


def test_a_port_that_is_taken_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with served(run) as port, pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be served on .*port=0"):
        watch.main([f"run={run}", f"port={port}"])


def test_ctrl_c_ends_it_without_a_traceback(tmp_path):
    import signal

    run = make_run(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.sisma.watch", f"run={run}", "port=0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # under nohup it is ignored
    )
    assert "http://127.0.0.1:" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0 and "Traceback" not in process.stderr.read()


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="drives the browser")
    if not (BROWSER and DRIVER):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def test_in_a_browser_it_renews_itself_and_keeps_what_was_chosen(browser, tmp_path):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    run, wait = (
        make_run(tmp_path / "run"),
        WebDriverWait(browser, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException]),
    )

    def text(selector):
        return browser.find_element("css selector", selector).text

    def set_to(selector, value, event):
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event(arguments[2]))"
        browser.execute_script(script, browser.find_element("css selector", selector), value, event)

    def log(step):
        with (run / "log.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "loss": 0.1, "lr": 1e-3, "images_per_second": 40.0}) + "\n")
        wait.until(lambda _: f"step {step} of 400" in text(".runs"))

    with served(run, refresh=1.0) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        plot = browser.find_element("css selector", ".plot")
        ActionChains(browser).move_to_element(plot).perform()
        step, value = re.fullmatch(r"step (\d+) +([\d.]+)", text(".plot output")).groups()
        expected = dict(smoothed(points_of(read_log(run), "loss"), 0.6))[int(step)]
        assert float(value) == pytest.approx(expected, rel=0.02) and int(step) in (100, 110)
        ActionChains(browser).move_to_element(browser.find_element("tag name", "h1")).perform()
        set_to(".grid input", "0", "input")
        assert text(".grid output") == "step 100"
        write_png(run / "samples" / "step-000300.png", torch.zeros(8, 8, dtype=torch.uint8))
        log(300)
        assert text(".grid output") == "step 100", "it must not move to the newest by itself"
        assert browser.execute_script("return document.querySelector('.grid img').naturalWidth") == 8
        set_to(".grid input", "2", "input")
        write_png(run / "samples" / "step-000310.png", torch.zeros(8, 8, dtype=torch.uint8))
        wait.until(lambda _: text(".grid output") == "step 310")
        drawn = "return document.querySelector('polyline:not(.faint)').getAttribute('points')"
        before = browser.execute_script(drawn)
        set_to("#smoothing", "0.97", "change")
        wait.until(lambda _: browser.execute_script(drawn) != before)
        log(320)
        assert browser.execute_script("return document.getElementById('smoothing').value") == "0.97"
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    wait.until(lambda _: "no longer served" in text("#notice"))


def test_ctrl_c_right_after_the_address_ends_it_too(tmp_path, monkeypatch):
    said = []

    def say(text, **_):
        said.append(text)
        if "Ctrl-C ends" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch, "print", say, raising=False)
    watch.main([f"run={make_run(tmp_path / 'run')}", "port=0"])
    assert len(said) == 2 and said[1] == "ended"
