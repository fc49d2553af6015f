"""The demo page without a browser: its components, its server and its command."""

import asyncio
import base64
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gradio", reason="the page needs ssmgen[demo]")
pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")

from pipelines import told_pipe

from benchmarks.demo_soak import Client, attempts, files_in, soak, untrained_pipe
from recipes.sisma.arguments import UsageError
from recipes.sisma.demo import __main__ as command
from recipes.sisma.demo.exchange import encode_png, from_text, image_from_url, to_text
from recipes.sisma.demo.handlers import Handlers
from recipes.sisma.demo.jobs import JobRunner
from recipes.sisma.demo.page import QUEUE, brushes, build_page
from recipes.sisma.demo.server import MAX_BODY, Guard, serve
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, LabelSet, draw_face

SIDE = 32
CONTROLS = [3, 2, "euler", 1.0, 2]  # seed, steps, solver, guidance, number of images


@pytest.fixture(scope="module")
def face():
    return draw_face(2, SIDE)[1]


@pytest.fixture(scope="module")
def runner():
    return JobRunner(untrained_pipe(SIDE))


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def reached():
    """Hosts and addresses that this process asked for while the page was served."""
    return []


@pytest.fixture(scope="module")
def client(runner, temporary, reached):
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self, address):
        reached.append(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    def looking_up(host, *rest, **settings):
        reached.append(host)
        return look_up(host, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connecting)
        patch.setattr(socket, "getaddrinfo", looking_up)
        patch.setenv("GRADIO_TEMP_DIR", str(temporary))
        page = build_page(runner)
        try:
            yield Client(serve(page, runner, host="127.0.0.1", port=0))
        finally:
            page.close()


def test_every_class_has_a_name_and_its_colour():
    shown = brushes(CELEBAMASK19)
    assert [each["class"] for each in shown] == list(CELEBAMASK19.classes)
    assert len({each["name"] for each in shown}) == 19 and shown[15]["name"] == "earring"
    assert tuple(shown[13]["colour"]) == CELEBAMASK19.palette[13]


def test_the_page_is_not_tied_to_faces():
    pipe = untrained_pipe(SIDE)
    args = pipe.recipe.model_args | {"num_classes": 3}
    labels = LabelSet("street", ("road", "sky", "car"), ((0, 0, 0), (0, 0, 255), (255, 0, 0)))
    import ssmgen
    from ssmgen.pipeline import Recipe

    recipe = Recipe("sisma-debug", args, "identity", SIDE, labels, {"solver": "euler", "steps": 1})
    runner = JobRunner(MaskToImage(ssmgen.build("sisma-debug", **args), ssmgen.build("identity"), recipe))
    page = build_page(runner)
    painter = next(block for block in page.blocks.values() if getattr(block, "elem_id", "") == "painter")
    assert [each["name"] for each in painter.props["brushes"]] == ["road", "sky", "car"]
    assert painter.props["examples"] == []


def test_handlers_address_components_by_name(runner, face):
    names = ("painter", "upload", "progress", "results", "mask_message", "settings_message", "edit_message")
    handlers = Handlers(runner, SimpleNamespace(**{name: name for name in names}))
    *_, finished = handlers.generate(to_text(face), *CONTROLS)
    assert finished.pop("results")["mask"] == to_text(face)
    cleared = {"progress": None, "mask_message": "", "settings_message": "", "edit_message": ""}
    assert finished == cleared
    (refused,) = handlers.between(to_text(face), *CONTROLS, 3)
    assert "must differ" in refused["edit_message"] and refused | {"edit_message": ""} == cleared
    assert handlers.upload(base64.b64encode(encode_png(face)).decode(), "celebamask19")["painter"] == to_text(face)


def test_a_page_has_controls_for_what_its_model_is_told():
    def ids(pipe):
        return {getattr(block, "elem_id", None) for block in build_page(JobRunner(pipe)).blocks.values()}

    told = {"words", "style", "style-upload", "guidance-words", "guidance-style"}
    assert told <= ids(told_pipe()) and not told & ids(untrained_pipe(SIDE))


def test_an_uploaded_style_is_checked_and_scaled(face):
    names = ("painter", "upload", "progress", "results", "mask_message", "settings_message", "edit_message")
    style = SimpleNamespace(control="control", upload="upload", message="message")
    runner = JobRunner(told_pipe((32, 48)))
    handlers = Handlers(runner, SimpleNamespace(**{name: name for name in names}, styles={"style": style}))
    picture, mask = draw_face(3, 64)
    files = {"picture": encoded(encode_png(picture)), "mask": encoded(encode_png(mask))}
    taken = handlers.upload_style("style", files, "celebamask19")
    assert image_from_url(taken["control"]["png"], (32, 48)).shape == (3, 32, 48) and taken["upload"] is None
    assert from_text(taken["control"]["mask"], CELEBAMASK19).shape == (32, 48) and "now that" in taken["message"]
    for wrong, message in (
        (None, "The picture cannot be read"),
        ({"picture": "", "mask": files["mask"]}, "The picture cannot be read: choose a PNG, JPEG or WebP file"),
        ({"picture": files["picture"], "mask": ""}, "choose a PNG file"),
        ({"picture": files["picture"], "mask": files["picture"]}, "looks like a photograph"),
        (files | {"mask": encoded(encode_png(mask[:32]))}, "The picture is 64 x 64 and its mask 64 x 32"),
        (files | {"picture": encoded(b"GIF89a")}, "not a PNG file"),
    ):
        refused = handlers.upload_style("style", wrong, "celebamask19")
        assert message in refused["message"] and "control" not in refused, "the style chosen before stays"
    assert "class order" in handlers.upload_style("style", files, "other")["message"]


def encoded(png):
    return base64.b64encode(png).decode()


def words(answer):
    return [each for each in answer[2:] if isinstance(each, str) and each]


def test_the_page_generates_what_was_asked(client, runner, face):
    *_, answer = client.call("generate", to_text(face), *CONTROLS)
    assert words(answer) == []
    shown = answer[1]
    expected = runner.pipe(face, seed=3, num_images=2, steps=2, solver="euler", output_type="pt")
    for image, wanted in zip(shown["images"], expected, strict=True):
        assert torch.equal(image_from_url(image["png"], (SIDE, SIDE)), (wanted * 255).round().to(torch.uint8))
    assert torch.equal(from_text(shown["mask"], CELEBAMASK19), face)


def test_messages_stand_where_the_fault_is_and_nothing_else_changes(client, face):
    mask = to_text(face)
    *_, unmasked = client.call("generate", "", *CONTROLS)
    assert "no mask yet" in unmasked[2] and unmasked[3:] == ["", ""]
    *_, wrong = client.call("generate", mask, 3, 1000, "euler", 1.0, 2)
    assert "Steps must be a whole number from 1 to 100" in wrong[3] and wrong[2] == wrong[4] == ""
    *_, nothing = client.call("vary", mask, *CONTROLS, None, 0.5)
    assert "no picture to change" in nothing[4] and nothing[2:4] == ["", ""]
    *_, bad = client.call("upload", base64.b64encode(b"<script>").decode(), "celebamask19")
    assert "not a PNG" in bad[2]
    for answer in (unmasked, wrong, nothing):
        assert answer[1]["__type__"] == "update" and "value" not in answer[1]  # results stay
    assert bad[0]["__type__"] == "update" and "value" not in bad[0]  # so does the mask


def test_a_fault_of_the_model_is_said_and_the_page_goes_on(client, runner, face, monkeypatch, capsys):
    monkeypatch.setattr(runner.pipe, "decode", lambda latents: 1 / 0)
    *_, answer = client.call("generate", to_text(face), *CONTROLS)
    assert "Drawing failed" in answer[3]
    monkeypatch.undo()
    assert client.call("generate", to_text(face), *CONTROLS)[-1][1]["title"]


def test_twenty_clients_at_once_get_their_own_pictures(client, runner, face):
    def picture(seed):
        for _ in range(100):
            try:
                return client.call("generate", to_text(face), seed, 1, "euler", 1.0, 1)[-1][1]["images"][0]["png"]
            except RuntimeError as error:  # the queue is bounded: who does not fit is told, and comes again
                assert "503" in str(error) and "Queue is full" in str(error)
                time.sleep(0.2)
        return ""

    with ThreadPoolExecutor(20) as clients:
        pictures = list(clients.map(picture, range(20)))
    expected = runner.pipe(face, seed=0, num_images=20, steps=1, solver="euler", output_type="pt", batch_size=1)
    for png, wanted in zip(pictures, expected, strict=True):
        assert torch.equal(image_from_url(png, (SIDE, SIDE)), (wanted * 255).round().to(torch.uint8))


def test_the_queue_is_bounded(client, runner, face):
    taken, refused = [], 0
    with runner._device:
        for _ in range(QUEUE + 4):
            try:
                taken.append(client.join("generate", to_text(face), 0, 1, "euler", 1.0, 1))
            except RuntimeError as error:
                assert "Queue is full" in str(error)
                refused += 1
            time.sleep(0.02)
    assert QUEUE <= len(taken) <= QUEUE + 2 and refused >= 2
    for session in taken:
        assert list(client.news(session))[-1][1]["images"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("POST", "/gradio_api/run/generate"),
        ("POST", "/gradio_api/call/generate"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("GET", "/gradio_api/deep_link"),
        ("PUT", "/"),
    ],
)
def test_doors_the_page_does_not_need_are_shut(client, method, path):
    status, text = client.get(path, method, b"{}" if method != "GET" else None)
    assert (status, json.loads(text)["detail"]) == (404, "There is nothing here.")


@pytest.mark.parametrize(
    ("host", "status"), [("127.0.0.1:7860", 200), ("localhost", 200), ("evil.example", 403), ("[", 403)]
)
def test_only_this_machines_own_name_is_answered(host, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "method": "GET", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, None, {}, local=True)(scope, None, send))
    assert sent[0]["status"] == status
    sent.clear()
    asyncio.run(Guard(app, None, {})(scope, None, send))
    assert sent[0]["status"] == 200, "a page that is served to others has other names"


def test_bodies_are_capped_and_may_not_name_files(client):
    status, text = client.get("/gradio_api/queue/join", "POST", b'"' + b"a" * MAX_BODY + b'"')
    assert status == 413 and "larger than 10 MB" in text
    for named in (b'{"data": [{"path": "http://127.0.0.1/"}]}', b'[[{"a": {"\\u0070ath": ""}}]]', b'{"_type": 1}'):
        status, text = client.get("/gradio_api/queue/join", "POST", named)
        assert status == 400 and "references a file" in text


def test_headers_forbid_what_is_elsewhere(client):
    import http.client

    connection = http.client.HTTPConnection(client.host, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200 and answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.host.startswith("127.0.0.1:") and "googleapis" not in text and "cdn" not in text


def test_no_file_is_read_or_left(client, temporary, tmp_path):
    tmp_path.joinpath("secret.txt").write_text("open sesame")
    answers = list(attempts(client, tmp_path, 200))
    assert len(answers) == 200
    assert not [text for text in answers if "open sesame" in text or "root:x:0:0" in text]
    assert files_in(temporary) == []


def test_the_server_reaches_nothing_else(client, reached, face):
    client.call("generate", to_text(face), *CONTROLS)
    assert reached and {str(host) for host in reached} <= {"127.0.0.1", "localhost"}


def test_a_port_that_is_taken_is_told(client, runner):
    taken = int(client.host.partition(":")[2])
    with pytest.raises(OSError, match=f"cannot serve at 127.0.0.1, port {taken} .*port=0 for a free one"):
        serve(None, runner, host="127.0.0.1", port=taken)


@pytest.mark.slow
def test_many_requests_leave_memory_and_disk_as_they_were():
    found = soak(requests=32, tries=20)
    assert found["answers"] == {"pictures": 16, "mask": 4, "message": 12}
    assert found["files_left"] == 0 and found["files_read"] == 0
    assert abs(found["memory_growth"]) < 0.05


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["port=70000"], "port must be from 0 to 65535"),
        (["timeout=0"], "timeout must be positive"),
        (["prot=1"], "Did you mean 'port'"),
    ],
)
def test_a_bad_command_line_is_refused_before_anything_is_loaded(words, message, monkeypatch):
    monkeypatch.setattr(command, "load_pipe", lambda settings: pytest.fail("loaded"))
    with pytest.raises(UsageError, match=message):
        command.main(words)


def test_the_command_loads_what_it_is_told(tmp_path):
    untrained_pipe(SIDE).save_pretrained(tmp_path / "model")
    assert command.load_pipe(command.Settings(pipe=str(tmp_path / "model"))).recipe.about == "Untrained."
    with pytest.raises(FileNotFoundError):
        command.load_pipe(command.Settings(pipe=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="config.yaml"):
        command.load_pipe(command.Settings(run=str(tmp_path)))


def test_the_default_serves_this_machine_only():
    assert command.Settings().host == "127.0.0.1" and command.Settings().open_browser is False
