"""Complete recipes on top of the public names of ssmgen: data, training, sampling and evaluation of a paper."""

import sys

# Python sets this while ``python -m recipes.RECIPE.COMMAND`` looks for the command, before its seconds of imports.
if sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv):
    from recipes.sisma.startup import end_on_signals

    end_on_signals()
