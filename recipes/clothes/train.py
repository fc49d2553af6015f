"""Train on street photographs: ``python -m recipes.clothes.train data=PREPARED [key=value ...]``.

The keys are those of ``recipes.sisma.train``. The other commands of ``recipes.sisma`` (sample, evaluate, watch, export,
parser, demo) work on the run as they are.
"""

from recipes.clothes.presets import PRESETS
from recipes.sisma import train
from recipes.sisma.arguments import run_command


def main(argv: list[str]) -> int | None:
    """`recipes.sisma.train.main` with the presets of this recipe."""
    return train.main(argv, PRESETS)


if __name__ == "__main__":
    run_command(main)
