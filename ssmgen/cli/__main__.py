"""``python -m ssmgen.cli``: the command ``ssmgen``."""

from ssmgen.cli import main

raise SystemExit(main())
