"""SISMA on CelebAMask-HQ: prepare the data, train, sample, evaluate."""

import sys

# Python sets this while ``python -m recipes.sisma.COMMAND`` looks for the command, before its seconds of imports.
if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    from recipes.sisma.startup import end_on_signals

    end_on_signals()
