"""The README of a model on the hub: what it is, how it is called, what it was made from and what was measured."""

from __future__ import annotations

from ssmgen.data.labels import LabelSet

#: Stands in a card where the name belongs by which the model is loaded.
NAME = "OWNER/NAME"


def model_card(
    title: str,
    about: str,
    labels: LabelSet,
    *,
    license: str = "other",
    sections: dict[str, str] | None = None,
) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        title: of the page.
        about: a line on what the model can do.
        labels: classes of its masks.
        license: lines of the metadata that tell it: an identifier of the hub's list, or ``other`` and those on it.
        sections: text by heading: data and its licence, the command of the training, what was measured.
    """
    metadata = [
        "library_name: ssmgen",
        "pipeline_tag: image-to-image",
        f"license: {license}",
        "tags: [mamba, state-space-model, flow-matching, semantic-image-synthesis]",
    ]
    usage = [
        "```python",
        "from ssmgen import MaskToImage",
        "",
        f'pipe = MaskToImage.from_pretrained("{NAME}")',
        'pipe("mask.png", seed=0)[0].save("image.png")',
        "```",
    ]
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(labels.classes))
    parts = ["\n".join(["---", *metadata, "---"]), f"# {title}", about, "\n".join(usage)]
    parts.append(f"Masks have {len(labels)} classes, in the order {labels.name}: {classes}.")
    for heading, text in (sections or {}).items():
        parts += [f"## {heading}", text]
    return "\n\n".join(part for part in parts if part) + "\n"
