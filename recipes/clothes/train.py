"""Train on street photographs: ``python -m recipes.clothes.train data=PREPARED [key=value ...]``.

The keys are those of ``recipes.sisma.train``. The commands sample, evaluate, watch and parser of ``recipes.sisma`` work
on the run and its data as they are.
"""

from recipes.clothes.presets import PRESETS
from recipes.sisma import train
from recipes.sisma.arguments import run_command


def main(argv: list[str]) -> int | None:
    """`recipes.sisma.train.main` with the presets of this recipe."""
    return train.main(argv, PRESETS)


if __name__ == "__main__":
    run_command(main)
