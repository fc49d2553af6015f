"""The version of the drawn faces and the random streams they are drawn from."""

from __future__ import annotations

import random

#: Increase it when a change alters any pixel: caches and checkpoints record which faces they were made from.
DRAWN_FACES_VERSION = 1


def random_stream(*key: object) -> random.Random:
    """The random stream of a key. Text seeds and ``random()`` are the same on every platform and Python version."""
    return random.Random(" ".join(map(str, ("ssmgen drawn face", DRAWN_FACES_VERSION, *key))))
