"""Check and merge the photographs' masks: ``python -m recipes.clothes.prepare source=DIR target=DIR``.

The source holds ``images/*.jpg``, ``masks/*.png`` of the dataset's 59 labels, and their names by id in ``labels.json``.
They become the classes of ``merge=``, by default the 20 in ``classes.txt`` beside this file. Pairs with an empty mask
or another fault are left out and listed, unless ``on_bad=stop``.
"""

from pathlib import Path

from recipes.sisma import prepare
from recipes.sisma.arguments import run_command
from recipes.sisma.prepare import DataSet, Settings, label_masks, merged
from recipes.sisma.prepare.readers import Reader


def read_masks(settings: Settings) -> Reader:
    """The reader of masks of the labels that a file names, merged by a table."""
    return merged(label_masks(settings), settings)


CLOTHES = DataSet(
    recipe="recipes.clothes",
    train=(),
    settings=Settings(labels="labels.json", merge=str(Path(__file__).with_name("classes.txt")), on_bad="skip"),
    reader=read_masks,
)


def main(argv: list[str]) -> int | None:
    """`recipes.sisma.prepare.main` with the defaults and the reader of this recipe."""
    return prepare.main(argv, CLOTHES)


if __name__ == "__main__":
    run_command(main)
