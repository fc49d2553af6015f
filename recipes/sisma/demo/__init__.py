"""The painting page; ``python -m recipes.sisma.demo``."""
