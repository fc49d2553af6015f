"""The page of an evaluation."""

import json
import re

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")


from recipes.sisma import evaluate, parser
from recipes.sisma.evaluation import report
from recipes.sisma.evaluation.settings import Settings
from recipes.sisma.pairs import HELD_OUT
from recipes.sisma.sheets import save_sheet
from ssmgen.data import CELEBAMASK19
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.data.images import read_image
from ssmgen.metrics import MaskAgreement


def agreement_of_each(folder, count):
    """mIoU of every image by itself, by the shipped parser."""
    network, _ = parser.load_parser(parser.SHIPPED)
    found = []
    for index in range(count):
        image = read_image(folder / f"{index:05d}.png").unsqueeze(0).float() / 127.5 - 1
        agreement = MaskAgreement(CELEBAMASK19.classes)
        agreement.update(network.parse(image), DrawnFaces(count, size=64, start=HELD_OUT)[index][1].unsqueeze(0))
        found.append(agreement.result()["miou"])
    return found


def test_the_report_stands_alone(trained):
    result = evaluate.evaluate_run(trained, Settings(), command="<script>")
    folder = next(trained.glob("evaluation/*/record.json")).parent
    of_each = agreement_of_each(folder, 4)
    page = (trained / "report.html").read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)(https?:|/|\.)", page), "it loads nothing"
    assert page.count("data:image/png;base64,") == 3 * 4 + 4 * 6  # one mask a group of the four, diversity rows
    assert f"best {max(of_each):.3f}" in page and f"worst {min(of_each):.3f}" in page
    assert f"{result['mask_agreement']['miou']:.3f}" in page and "second-hand" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "polyline" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(guidance_scale=1.0), "guidance 1.0, the same noise left and right."),
        (Settings(guidance_scale=2.0, shared_noise=False), "guidance 2.0 from t = 0.2 on."),
    ],
)
def test_the_report_says_how_it_was_sampled(trained, settings, said):
    evaluate.evaluate_run(trained, settings, command="evaluate")
    assert said in (trained / "report.html").read_text()


def test_every_published_row_says_what_differs_from_this_result():
    drawn = {"data": "drawn", "image_size": 128, "masks": 64}
    alike = {"data": "prepared folder", "image_size": 256, "masks": 2000, "distances": {"sdm-oasis": {}}}
    rows = {row.method: row for row in report.PUBLISHED}
    assert list(rows) == ["SPADE", "CLADE", "INADE", "SDM", "SCDM", "SISMA"]
    for row in rows.values():
        assert "photos, here drawn faces" in report.differences(row, drawn) and row.known
    scdm = report.differences(rows["SCDM"], drawn)
    assert "256 pixels, here 128" in scdm and "2,000 images, here 64" in scdm and "here not measured" in scdm
    assert report.differences(rows["SCDM"], alike) == (
        "trained on 28,000 photos of CelebAMask-HQ; mIoU by another parser; resized as by OASIS"
    )
    assert "against train images, here against test images" in report.differences(rows["CLADE"], alike)
    assert "not stated" in report.differences(rows["SISMA"], alike)


def test_curves_are_drawn_from_a_log(tmp_path):
    assert report.curves(tmp_path) == []
    lines = [json.dumps({"step": step, "loss": 2 / step, "lr": float("nan")}) for step in range(1, 501)]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 501, "lo']))
    (loss,) = report.curves(tmp_path)
    points = [tuple(map(float, point.split(","))) for point in loss["lines"][0]["raw"].split()]
    assert len(points) == 500 and points == sorted(points), "x grows"
    assert [y for _, y in points] == sorted(y for _, y in points), "a falling loss goes down the page"
    assert (points[0], points[-1]) == ((0, 0), (1000, 1000))


def test_sheets_refuse_ragged_rows(tmp_path):
    image = CELEBAMASK19.colorize(torch.zeros(8, 8, dtype=torch.uint8))
    save_sheet(tmp_path / "a.png", [[image, image]], ["x", "y"])
    assert read_image(tmp_path / "a.png").shape[0] == 3
    with pytest.raises(ValueError, match="2 headings"):
        save_sheet(tmp_path / "a.png", [[image]], ["x", "y"])
