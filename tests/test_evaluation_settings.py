"""Batch sizes, parsers and other settings of an evaluation."""

import shutil

import pytest

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")


from recipes.sisma import evaluate, parser
from recipes.sisma.evaluation.results import summary
from recipes.sisma.evaluation.settings import Settings


def evaluated(run, **settings):
    """The figures of an evaluation, and its images by name."""
    result = evaluate.evaluate_run(run, Settings(**settings), command="test")
    folder = max((run / "evaluation").iterdir(), key=lambda folder: (folder / "record.json").stat().st_mtime_ns)
    images = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    return {key: result[key] for key in ("mask_agreement", "ceiling", "floor", "diversity")}, images, folder


def test_a_stopped_evaluation_goes_on_and_finds_the_same(trained):
    whole, images, folder = evaluated(trained, batch_size=6)
    assert len(images) == 4 + 4 * 4
    for name in sorted(images)[3:9]:
        (folder / name).unlink()
    (folder / f"{sorted(images)[4]}.tmp-1").write_bytes(b"half an ima")
    assert evaluated(trained, batch_size=6) == (whole, images, folder)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_with_a_micro_batch_the_batch_size_changes_no_bit(trained, micro_batch):
    found = []
    for batch_size in (8, 3, 1):
        figures, images, folder = evaluated(trained, batch_size=batch_size, micro_batch=micro_batch)
        found.append((figures, images))
        shutil.rmtree(folder)
    assert found[0] == found[1] == found[2]


def test_without_one_it_changes_no_more_than_rounding(trained):
    found = []
    for batch_size in (8, 3, 1):
        figures, _, folder = evaluated(trained, batch_size=batch_size)
        found.append(figures)
        shutil.rmtree(folder)
    for other in found[1:]:
        assert found[0]["diversity"] == pytest.approx(other["diversity"], abs=1e-3)
        for key in ("miou", "pixel_accuracy"):
            assert found[0]["mask_agreement"][key] == pytest.approx(other["mask_agreement"][key], abs=1e-3)


def test_bad_batches_are_refused_before_sampling(trained):
    for batch_size, micro_batch in ((0, 0), (4, -1)):
        with pytest.raises(ValueError, match="batch_size must be at least 1 and micro_batch at least 0"):
            evaluate.evaluate_run(trained, Settings(batch_size=batch_size, micro_batch=micro_batch), command="test")


def test_a_parser_of_other_classes_is_refused(trained, tmp_path):
    parser.save_parser(parser.UNetParser(7, 4), tmp_path / "seven.safetensors", {"num_classes": 7, "width": 4})
    with pytest.raises(ValueError, match=r"seven.safetensors: predicts 7 classes, the masks have 19"):
        evaluate.evaluate_run(trained, Settings(parser=str(tmp_path / "seven.safetensors")), command="test")


def test_evaluation_repeats_and_takes_other_settings(trained):
    first = evaluate.evaluate_run(trained, Settings(), command="first")  # other tests left that of another batch size
    again = evaluate.evaluate_run(trained, Settings(), command="again")
    assert again["mask_agreement"] == first["mask_agreement"] and again["diversity"] == first["diversity"]
    other = evaluate.evaluate_run(trained, Settings(masks=3, steps=1, solver="euler"), command="other")
    assert other["sampling"]["solver"] == "euler" and other["masks"] == 3
    none = evaluate.evaluate_run(trained, Settings(parser="none"), command="none")
    assert "mask_agreement" not in none and "not measured" in summary(none)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such parser"):
        evaluate.evaluate_run(trained, Settings(parser="nothing.safetensors"), command="")
    evaluate.evaluate_run(trained, Settings(), command=first["command"])
