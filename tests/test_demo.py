"""The painting page without a browser: masks and uploads, what the studio draws, what the server takes."""

import asyncio
import base64
import io
import json
import socket
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the page needs ssmgen[demo]")
pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")

from benchmarks.demo_soak import Client, attempts, files_in, soak, untrained_pipe
from recipes.sisma.arguments import UsageError
from recipes.sisma.demo import __main__ as command
from recipes.sisma.demo.guard import MAX_BODY, Guard, names_files
from recipes.sisma.demo.jobs import Pictures, Preview, Stopped, Studio
from recipes.sisma.demo.masks import MAX_BYTES, Refused, as_png, from_text, from_upload, image_from, snap, to_text
from recipes.sisma.demo.page import QUEUE, build_page, serve
from recipes.sisma.demo.results import brushes, results
from ssmgen import MaskToImage
from ssmgen.data import BISENET19, CELEBAMASK19, LabelSet, draw_face, remap
from ssmgen.data.images import to_pil

SIDE = 32
CONTROLS = [3, 2, "euler", 1.0, 2]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png_of(image: Image.Image, **settings) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **settings)
    return encoded(buffer.getvalue())


def header(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture(scope="module")
def face():
    return draw_face(2, SIDE)[1]


@pytest.fixture(scope="module")
def studio():
    return Studio(untrained_pipe(SIDE))


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def reached():
    """Hosts and addresses that this process asked for while the page was served."""
    return []


@pytest.fixture(scope="module")
def client(studio, temporary, reached):
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
        page = build_page(studio)
        try:
            yield Client(serve(page, host="127.0.0.1", port=0))
        finally:
            page.close()


# Masks as text


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_comes_back_from_its_text(seed):
    mask = draw_face(seed, SIDE)[1]
    assert torch.equal(from_text(to_text(mask), CELEBAMASK19), mask)
    assert len(to_text(mask)) < mask.numel() * 2


BAD_TEXTS = [
    ("", "paint one"),
    (None, "paint one"),
    ({"a": 1}, "did not arrive whole"),
    ("/etc/passwd", "did not arrive whole"),
    ("2 0x4,", "did not arrive whole"),
    ("2 0x5", "square of at most 1024"),
    ("0 0x0", "square of at most 1024"),
    ("9999 0x99980001", "did not arrive whole"),
    ("1025 0x1050625", "square of at most 1024"),
    ("2 0x3,19x1", "label 19"),
    ("2 " + "0x1," * 300_000 + "0x1", "square of at most 1024"),
    ("2 " + "0x1," * 3_000_000 + "0x1", "did not arrive whole"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_what_is_no_mask_is_refused(text, message):
    with pytest.raises(Refused, match=message):
        from_text(text, CELEBAMASK19)


# Uploads


def palette_image(mask, labels):
    image = to_pil(mask).copy()
    image.putpalette([value for colour in labels.palette for value in colour])
    return image


def test_each_kind_of_file_gives_the_same_mask(face):
    theirs = remap(face, CELEBAMASK19, BISENET19)
    grey_as_rgb = to_pil(face).convert("RGB")
    for file, order in [
        (png_of(to_pil(face)), ""),
        (png_of(grey_as_rgb), ""),
        (png_of(to_pil(CELEBAMASK19.colorize(face))), "celebamask19"),
        (png_of(to_pil(CELEBAMASK19.colorize(face)).convert("RGBA")), ""),
        (png_of(palette_image(face, CELEBAMASK19)), ""),
        (png_of(to_pil(theirs)), "bisenet19"),
        (png_of(palette_image(theirs, BISENET19)), "bisenet19"),
        (png_of(to_pil(BISENET19.colorize(theirs))), "bisenet19"),
        (png_of(palette_image(theirs, BISENET19)), "celebamask19"),  # colours say which class, whatever the index
    ]:
        upload = from_upload(file, CELEBAMASK19, SIDE, order)
        assert torch.equal(upload.mask, face), order
        assert upload.notes == ()


def test_ids_of_the_other_order_are_told(face):
    theirs = png_of(to_pil(remap(face, CELEBAMASK19, BISENET19)))
    assert "look like the order bisenet19" in from_upload(theirs, CELEBAMASK19, SIDE).notes[0]


def test_edges_between_two_colours_go_to_the_nearest(face):
    colours = CELEBAMASK19.colorize(face).clone()
    colours[:, 5, 7] = torch.tensor([200, 12, 9], dtype=torch.uint8)  # skin is (204, 0, 0)
    colours[:, 6, 7] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    mask, moved = snap(colours, CELEBAMASK19)
    expected = face.clone()
    expected[5, 7], expected[6, 7] = 1, 0
    assert torch.equal(mask, expected) and moved == 2
    note = from_upload(png_of(to_pil(colours)), CELEBAMASK19, SIDE).notes[0]
    assert note.startswith("2 of 1,024 pixels (0.2 %)")


def test_what_is_not_square_is_cut_and_told(face):
    wide = torch.cat([torch.zeros(SIDE, 8, dtype=torch.uint8), face, torch.zeros(SIDE, 8, dtype=torch.uint8)], dim=1)
    upload = from_upload(png_of(to_pil(wide)), CELEBAMASK19, SIDE)
    assert torch.equal(upload.mask, face)
    assert upload.notes == ("It was 48 x 32: the middle square was taken.",)


def photo(kind="PNG"):
    buffer = io.BytesIO()
    image = torch.randint(90, 160, (3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    to_pil(image).save(buffer, format=kind)
    return encoded(buffer.getvalue())


def transparent(face):
    image = to_pil(CELEBAMASK19.colorize(face)).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    return png_of(image)


def animation(face):
    frames = [to_pil(face), to_pil(face.flip(0))]
    return png_of(frames[0], save_all=True, append_images=frames[1:])


BAD_FILES = {
    "no file": (lambda face: "", "choose a PNG"),
    "no text": (lambda face: {"a": 1}, "choose a PNG"),
    "no base64": (lambda face: "<svg>", "did not arrive whole"),
    "svg": (lambda face: encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a PNG file"),
    "passwords": (lambda face: encoded(b"root:x:0:0:root"), "not a PNG file"),
    "jpeg": (lambda face: photo("JPEG"), "JPEG, whose compression alters labels"),
    "too many bytes": (lambda face: encoded(header(8, 8) + bytes(MAX_BYTES)), "larger than 5 MB"),
    "huge header": (lambda face: encoded(header(60_000, 60_000)), "60,000 x 60,000 pixels.*at most 1024"),
    "large header": (lambda face: encoded(header(1025, 8)), "1,025 x 8 pixels.*at most 1024"),
    "no pixels": (lambda face: encoded(header(0, 8)), "0 x 8 pixels"),
    "16 bits": (lambda face: encoded(header(8, 8, 16)), "16 bits per channel"),
    "cut off": (lambda face: encoded(as_png(face)[:60]), "damaged"),
    "lying header": (lambda face: encoded(header(64, 64)), "damaged"),
    "transparent": (transparent, "transparent pixels"),
    "animation": (animation, "damaged.*animation"),
    "photo": (lambda face: photo(), "looks like a photograph"),
    "label 19": (lambda face: png_of(to_pil(face.clone().fill_(19))), "label 19.*no mask of celebamask19"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_refused_in_words(face, kind):
    make, message = BAD_FILES[kind]
    with pytest.raises(Refused, match=message):
        from_upload(make(face), CELEBAMASK19, SIDE)


def test_what_is_too_large_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(Refused, match="60,000 x 60,000"):
        from_upload(encoded(header(60_000, 60_000)), CELEBAMASK19, SIDE)
    with pytest.raises(Refused, match="5 MB"):
        from_upload("A" * 7_000_000, CELEBAMASK19, SIDE)


@pytest.mark.parametrize("given", [None, 3, "", "/etc/passwd", "http://127.0.0.1/x.png", {"url": "x"}])
def test_an_image_to_change_is_one_the_page_made(given):
    with pytest.raises(Refused, match="no image to change yet"):
        image_from(given, SIDE)


# The studio


def finished(job):
    *previews, pictures = job
    assert all(isinstance(one, Preview) for one in previews) and isinstance(pictures, Pictures)
    return previews, pictures


def test_pictures_are_the_pipelines_own(studio, face):
    previews, pictures = finished(studio.generate(face, studio.checked(*CONTROLS)))
    expected = studio.pipe(face, seed=3, num_images=2, steps=2, solver="euler", output_type="pt")
    assert torch.equal(pictures.images, (expected * 255).round().to(torch.uint8))
    assert pictures.seeds == (3, 4) and pictures.names == ("seed 3", "seed 4")
    assert previews and previews[0].steps == 2 and previews[0].images.shape == pictures.images.shape


def test_the_zip_makes_the_same_pictures_again(studio, face, tmp_path):
    _, pictures = finished(studio.generate(face, studio.checked(*CONTROLS)))
    shown = results(pictures, face, studio.pipe.recipe)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(shown["zip"]))) as zipped:
        assert sorted(zipped.namelist()) == ["image-0.png", "image-1.png", "mask.png", "settings.json"]
        zipped.extractall(tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert {"shift", "guidance_start"} <= set(settings) and settings["call"].startswith("pipe('mask.png', ")
    call = settings["call"].replace("mask.png", str(tmp_path / "mask.png"))
    again = eval(call, {"pipe": studio.pipe})  # the words a reader would copy
    for number, image in enumerate(again):
        assert image.tobytes() == Image.open(tmp_path / f"image-{number}.png").tobytes()


def test_a_redraw_keeps_what_did_not_change(studio, face):
    wish = studio.checked(*CONTROLS)
    _, pictures = finished(studio.generate(face, wish))
    image, changed = pictures.images[0], face.clone()
    changed[:8, :8] = 14
    for start in ("inversion", "noise"):
        previews, redrawn = finished(studio.redraw(image, face, changed, wish, start))
        assert torch.equal(redrawn.images[0, :, 16:], image[:, 16:])
        assert not torch.equal(redrawn.images[0, :, :8, :8], image[:, :8, :8])
        assert previews[0].steps == (4 if start == "inversion" else 2)
    with pytest.raises(Refused, match="Nothing to redraw"):
        studio.redraw(image, face, face, wish)
    with pytest.raises(Refused, match="inversion, noise"):
        studio.redraw(image, face, changed, wish, "middle")


def test_variations_and_the_way_between(studio, face):
    wish = studio.checked(*CONTROLS)
    _, pictures = finished(studio.generate(face, wish))
    _, near = finished(studio.vary(pictures.images[0], face, 0.2, wish))
    _, far = finished(studio.vary(pictures.images[0], face, 1, wish))
    distance = [(each.images.float() - pictures.images[0].float()).square().mean() for each in (near, far)]
    assert 0 < distance[0] < distance[1]
    _, between = finished(studio.between(face, 4, wish))
    assert between.names == ("seed 3", "50 %", "seed 4")
    assert (between.images[0].int() - pictures.images[0].int()).abs().max() <= 1
    assert (between.images[2].int() - pictures.images[1].int()).abs().max() <= 1


BAD_CONTROLS = [
    (0, -1, "The seed must be a whole number from 0"),
    (0, 2**31, "The seed"),
    (0, None, "The seed"),
    (0, "7", "The seed"),
    (1, 0, "Steps must be a whole number from 1 to 100"),
    (1, 2.5, "Steps"),
    (1, True, "Steps"),
    (2, "dopri5", "The solver must be one of"),
    (2, ["euler"], "The solver"),
    (3, float("nan"), "Guidance must be a number from 0 to 10"),
    (3, float("inf"), "Guidance"),
    (4, 9, "The number of images must be a whole number from 1 to 8"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_CONTROLS)
def test_a_control_out_of_range_is_refused(studio, place, value, message):
    with pytest.raises(Refused, match=message):
        studio.checked(*[value if i == place else given for i, given in enumerate(CONTROLS)])


def test_guidance_needs_a_model_that_has_it():
    pipe = untrained_pipe(SIDE)
    pipe.model.mask_dropout = 0.0
    with pytest.raises(Refused, match="trained without guidance"):
        Studio(pipe).checked(3, 2, "euler", 2.0, 2)


class Endless(MaskToImage):
    """A pipeline that never comes to an end."""

    steps = 0

    def __call__(self, mask, *, callback, **settings):
        while True:
            Endless.steps += 1
            callback(1, torch.zeros(1, 3, SIDE, SIDE))
            time.sleep(0.01)


@pytest.fixture
def endless():
    pipe = untrained_pipe(SIDE)
    return Studio(Endless(pipe.model, pipe.autoencoder, pipe.recipe), timeout=0.3)


def is_free(studio, seconds=2.0):
    taken = studio._device.acquire(timeout=seconds)
    if taken:
        studio._device.release()
    return taken


def test_what_takes_too_long_is_given_up(endless, face):
    with pytest.raises(Stopped, match="fewer steps or images"):
        list(endless.generate(face, endless.checked(*CONTROLS)))
    assert is_free(endless)


def test_closing_a_job_stops_it(endless, face):
    job = endless.generate(face, endless.checked(*CONTROLS))
    assert isinstance(next(job), Preview)
    job.close()
    assert is_free(endless)
    done = Endless.steps
    time.sleep(0.1)
    assert Endless.steps == done


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
    studio = Studio(MaskToImage(ssmgen.build("sisma-debug", **args), ssmgen.build("identity"), recipe))
    page = build_page(studio)
    painter = next(block for block in page.blocks.values() if getattr(block, "elem_id", "") == "painter")
    assert [each["name"] for each in painter.props["brushes"]] == ["road", "sky", "car"]
    assert painter.props["examples"] == []


# The server


def words(answer):
    return [each for each in answer[2:] if isinstance(each, str) and each]


def test_the_page_generates_what_was_asked(client, studio, face):
    *_, answer = client.call("generate", to_text(face), *CONTROLS)
    assert words(answer) == []
    shown = answer[1]
    expected = studio.pipe(face, seed=3, num_images=2, steps=2, solver="euler", output_type="pt")
    for image, wanted in zip(shown["images"], expected, strict=True):
        assert torch.equal(image_from(image["png"], SIDE), (wanted * 255).round().to(torch.uint8))
    assert torch.equal(from_text(shown["mask"], CELEBAMASK19), face)


def test_messages_stand_where_the_fault_is_and_nothing_else_changes(client, face):
    mask = to_text(face)
    *_, unmasked = client.call("generate", "", *CONTROLS)
    assert "no mask yet" in unmasked[2] and unmasked[3:] == ["", ""]
    *_, wrong = client.call("generate", mask, 3, 1000, "euler", 1.0, 2)
    assert "Steps must be a whole number from 1 to 100" in wrong[3] and wrong[2] == wrong[4] == ""
    *_, nothing = client.call("vary", mask, *CONTROLS, None, 0.5)
    assert "no image to change" in nothing[4] and nothing[2:4] == ["", ""]
    *_, bad = client.call("upload", encoded(b"<script>"), "celebamask19")
    assert "not a PNG" in bad[2]
    for answer in (unmasked, wrong, nothing):
        assert answer[1]["__type__"] == "update" and "value" not in answer[1]  # results stay
    assert bad[0]["__type__"] == "update" and "value" not in bad[0]  # so does the mask


def test_a_fault_of_the_model_is_said_and_the_page_goes_on(client, studio, face, monkeypatch, capsys):
    monkeypatch.setattr(studio.pipe, "decode", lambda latents: 1 / 0)
    *_, answer = client.call("generate", to_text(face), *CONTROLS)
    assert "could not be drawn" in answer[3]
    monkeypatch.undo()
    assert client.call("generate", to_text(face), *CONTROLS)[-1][1]["title"]


def test_twenty_clients_at_once_get_their_own_pictures(client, studio, face):
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
    expected = studio.pipe(face, seed=0, num_images=20, steps=1, solver="euler", output_type="pt", batch_size=1)
    for png, wanted in zip(pictures, expected, strict=True):
        assert torch.equal(image_from(png, SIDE), (wanted * 255).round().to(torch.uint8))


def test_the_queue_is_bounded(client, studio, face):
    taken, refused = [], 0
    with studio._device:
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


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1:7860", 200), ("localhost", 200), ("evil.example", 403)])
def test_only_this_machines_own_name_is_answered(host, status):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/", "method": "GET", "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, local=True)(scope, None, send))
    assert sent[0]["status"] == status
    sent.clear()
    asyncio.run(Guard(app)(scope, None, send))
    assert sent[0]["status"] == 200, "a page that is served to others has other names"


def test_bodies_are_capped_and_may_not_name_files(client):
    status, text = client.get("/gradio_api/queue/join", "POST", b'"' + b"a" * MAX_BODY + b'"')
    assert status == 413 and "larger than 10 MB" in text
    status, text = client.get("/gradio_api/queue/join", "POST", b'{"data": [{"path": "http://127.0.0.1/"}]}')
    assert status == 400 and "names a file" in text


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", False),
        (b'{"data": ["path", 1, null, {"png": "x"}]}', False),
        (b'{"data": [[{"a": [{"\\u0070ath": "x"}]}]]}', True),
        (b'{"_type": "gradio.FileData"}', True),
        (b"no json", True),
        (b"[" * 100_000, True),
    ],
)
def test_files_in_a_body_are_found(body, found):
    assert names_files(body) is found


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


def test_a_port_that_is_taken_is_told(client):
    taken = int(client.host.partition(":")[2])
    with pytest.raises(OSError, match=f"cannot serve at 127.0.0.1, port {taken} .*port=0 for a free one"):
        serve(None, host="127.0.0.1", port=taken)


@pytest.mark.slow
def test_many_requests_leave_memory_and_disk_as_they_were():
    found = soak(requests=32, tries=20)
    assert found["answers"] == {"pictures": 16, "mask": 4, "message": 12}
    assert found["files_left"] == 0 and found["files_read"] == 0
    assert abs(found["memory_growth"]) < 0.05


# The command


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
