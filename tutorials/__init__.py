"""Scripts behind the pages of docs/tutorials; run one with ``python -m tutorials.NAME``."""
