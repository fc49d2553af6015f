"""Export a run of this recipe: ``python -m recipes.clothes.export run=RUN out=FOLDER``.

The keys are those of ``recipes.sisma.export``.
"""

from recipes.clothes.presets import PRESETS
from recipes.sisma import export
from recipes.sisma.arguments import run_command


def main(argv: list[str]) -> None:
    """`recipes.sisma.export.main` with the presets and the name of this recipe."""
    export.main(argv, PRESETS, "recipes.clothes")


if __name__ == "__main__":
    run_command(main)
