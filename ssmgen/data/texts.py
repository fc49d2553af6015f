"""Pairs with texts: features of a frozen encoder beside image and mask, for the latent cache."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ssmgen.data.labels import LabelSet
from ssmgen.data.pairs import Pairs
from ssmgen.values import pad_sequences

# Texts encoded at a time where pairs are asked for one by one.
_AT_ONCE = 16


class WithTexts(Dataset[tuple[Tensor, Tensor, dict[str, Tensor]]]):
    """Pairs whose extras have the features of a text, ``(m, width)`` with the text's own length m.

    Write them to a latent cache: there each text is encoded once. The examples of the cache then hold the features
    under ``name``, and its batches are values of the condition ``token-sequence``.

    Args:
        pairs: images and masks, with or without extras.
        texts: one text per pair, or a function of its index such as ``DrawnFaces(...).words``. A mirrored example has
            the same text, so leave out left and right if the cache holds flips.
        encoder: one of `ssmgen.text`.
        name: of the extra, that of the model's condition.

    Raises:
        ValueError: another number of texts than of pairs.
    """

    def __init__(
        self, pairs: Pairs, texts: Sequence[str] | Callable[[int], str], encoder: Any, name: str = "text"
    ) -> None:
        self.pairs, self.encoder, self.name = pairs, encoder, name
        self.labels: LabelSet = pairs.labels
        self.texts = [texts(i) for i in range(len(pairs))] if callable(texts) else list(texts)
        if len(self.texts) != len(pairs):
            raise ValueError(f"there are {len(self.texts)} texts for {len(pairs)} pairs: give one for each")
        self._block, self._encoded = -1, list[Tensor]()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self._with(self.pairs[index], self.features(index % len(self)))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """The pairs of a batch, whose texts are encoded together and, in whatever order batches come, once.

        A data loader calls this instead of ``[index]``, also through a subset.
        """
        pairs = [self.pairs[index] for index in indices]  # first: an index that is too large ends here
        features = self._encode([self.texts[index] for index in indices])
        return [self._with(pair, each.clone()) for pair, each in zip(pairs, features, strict=True)]

    def features(self, index: int) -> Tensor:
        """Features ``(m, width)`` of a pair's text. Those of neighbours are encoded with it."""
        block, place = divmod(index, _AT_ONCE)
        if block != self._block:
            self._encoded = self._encode(self.texts[block * _AT_ONCE : (block + 1) * _AT_ONCE])
            self._block = block
        return self._encoded[place].clone()

    def _encode(self, texts: list[str]) -> list[Tensor]:
        value = self.encoder.encode(texts)
        return [each[:length] for each, length in zip(value["tokens"], value["lengths"].tolist(), strict=True)]

    def _with(self, pair: tuple[Any, ...], features: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        image, mask = pair[:2]
        extras = pair[2] if len(pair) > 2 else {}
        return image, mask, {**extras, self.name: features}

    def bucket_of(self, index: int) -> int:
        """Number of a pair's shape, see `Pairs`."""
        return getattr(self.pairs, "bucket_of", lambda index: 0)(index)

    def fingerprint(self) -> str:
        """That of the pairs, with the texts and the encoder."""
        digest = hashlib.sha256()
        for text in [*self.texts, str(sorted(self.encoder.describe().items()))]:
            digest.update(f"{len(text)} {text}".encode())
        return f"{self.pairs.fingerprint()}-{self.name}-{digest.hexdigest()[:16]}"


def collate(examples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of examples, where tensors that differ in their first dimension only become padded sequences.

    These are ``{"tokens": (b, m, width), "lengths": (b,)}``, as the condition ``token-sequence`` takes them. All else
    is batched by torch's default.
    """
    ragged = [name for name in examples[0] if _is_ragged([example[name] for example in examples])]
    rest = [{name: value for name, value in example.items() if name not in ragged} for example in examples]
    return default_collate(rest) | {name: pad_sequences([each[name] for each in examples]) for name in ragged}


def _is_ragged(values: Sequence[Any]) -> bool:
    if not all(isinstance(value, torch.Tensor) and value.dim() == 2 for value in values):
        return False
    return len({len(value) for value in values}) > 1 and len({value.shape[1] for value in values}) == 1
