"""Model cards: the README of a model on the hub, with usage, data, training and results."""

from collections.abc import Sequence

from ssmgen.data.labels import LabelSet

#: Placeholder in a card for the name that `MaskToImage.from_pretrained` takes.
NAME = "OWNER/NAME"
_METADATA = """---
library_name: ssmgen
pipeline_tag: image-to-image
license: {}
tags: [mamba, state-space-model, flow-matching, semantic-image-synthesis]
---"""
_USAGE = """```python
from ssmgen import MaskToImage

pipe = MaskToImage.from_pretrained("{name}")
pipe("mask.png", {told}seed=0)[0].save("image.png")
```"""


def model_card(
    title: str,
    about: str,
    labels: LabelSet,
    *,
    license: str = "other",
    sections: dict[str, str] | None = None,
    told: Sequence[str] = (),
) -> str:
    """A model card in Markdown, with the metadata that the hub reads.

    Args:
        title: title of the page.
        about: one line on what the model can do.
        labels: classes of its masks.
        license: the hub's identifier of the licence, or ``other`` followed by the metadata lines that describe it.
        sections: text by heading: data and its licence, training command, results.
        told: examples of further arguments of a call, such as ``words="..."``.
    """
    classes = ", ".join(f"{i} {name}" for i, name in enumerate(labels.classes))
    parts = [
        _METADATA.format(license),
        f"# {title}",
        about,
        _USAGE.format(name=NAME, told="".join(f"{one}, " for one in told)),
        f"Masks have {len(labels)} classes, in the order {labels.name}: {classes}.",
    ]
    for heading, text in (sections or {}).items():
        parts += [f"## {heading}", text]
    return "\n\n".join(part for part in parts if part) + "\n"
