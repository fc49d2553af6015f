"""Frozen text encoders: sentences become sequences of vectors, values of the condition ``token-sequence``."""

import random
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ssmgen.extras import require
from ssmgen.hub import download_folder, local_folder
from ssmgen.registry import divided, find, make, register
from ssmgen.values import pad_sequences
from ssmgen.weights import hash_of_weights

# What AutoModel would load with a decoder or an image tower: the class of its text encoder alone.
_ENCODERS = {
    **{"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
    **{"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"},
}
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_AT_ONCE = 64
_END = ""  # no word is empty


class TextEncoder(Protocol):
    """The interface of a text encoder.

    Attributes:
        name: the registered name.
        width: width of the vectors.
        max_length: tokens at most; what is longer is cut, with a warning.
    """

    name: str
    width: int
    max_length: int

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``{"tokens": (n, m, width) float32, "lengths": (n,) int64}`` on the CPU, padded to the longest."""

    def describe(self) -> dict[str, Any]:
        """The record for a cache or pipeline: name, arguments, and a hash of the weights or None."""


@register("text-encoder", "word-vectors")
class WordVectors:
    """A fixed pseudo-random vector per word, the same on every machine; nothing to download.

    It knows nothing of what words mean: a model learns that from its training texts, and only for words in them. That
    suits small vocabularies, such as that of the drawn faces. Upper case and punctuation do not matter. Half of a
    vector's variance comes from the next word, so that the "black" of "black hair" is not that of "black background".
    The last token of each text stands for its end.

    Args:
        width: width of the vectors, whose components have mean 0 and variance 1.
        max_length: tokens at most.
        seed: the set of vectors.
    """

    name = "word-vectors"

    def __init__(self, width: int = 64, max_length: int = 32, seed: int = 0) -> None:
        if width < 1 or max_length < 2:
            raise ValueError(f"width must be positive and max_length at least 2, got {width} and {max_length}")
        self.width, self.max_length, self.seed = width, max_length, seed

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """See `TextEncoder.encode`: tokens ``(n, m, width)`` and lengths ``(n,)``."""
        found = [re.findall(r"[\w'-]+", text.lower()) for text in _checked(texts)]
        _warn_of_cuts(texts, [len(words) + 1 for words in found], self.max_length)
        sequences = [self._vectors(words[: self.max_length - 1]) for words in found]
        return pad_sequences(sequences)

    def describe(self) -> dict[str, Any]:
        """See `TextEncoder.describe`."""
        arguments = {"width": self.width, "max_length": self.max_length, "seed": self.seed}
        return {"name": self.name, **arguments, "weights": None}

    def _vectors(self, words: list[str]) -> Tensor:
        said = [*words, _END]
        pairs = zip(said, [*said[1:], _END], strict=True)
        rows = [[*self._random("word", word), *self._random("next", after)] for word, after in pairs]
        return torch.tensor(rows).view(len(rows), 2, self.width).sum(dim=1) * 0.5**0.5

    def _random(self, role: str, word: str) -> tuple[float, ...]:
        return _random_vector(f"ssmgen {role} {self.seed} {word}", self.width)


@lru_cache(65536)
def _random_vector(key: str, width: int) -> tuple[float, ...]:
    """Uniform with variance 1: unlike ``gauss`` it needs no function of the C library, which may round differently."""
    rng = random.Random(key)
    return tuple((2.0 * rng.random() - 1.0) * 3.0**0.5 for _ in range(width))


@register("text-encoder", "transformers-text")
class TransformersText:
    """A frozen text encoder of the package transformers: CLIP, T5, BERT and what else its ``AutoModel`` loads.

    Only safetensors are read, and no code from the folder is run. The features are the last hidden states.

    Args:
        source: a folder with ``config.json``, weights and tokenizer as ``save_pretrained`` writes them, or a hub id
            ``owner/name``, whose files are fetched once into the hub's local cache.
        max_length: tokens at most, within what the encoder has positions for.
        device: where the encoder runs.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such folder, or the hub does not have it.
        ValueError: the folder does not hold such an encoder, or its tokenizer cannot pad; names it.
    """

    name = "transformers-text"

    def __init__(self, source: str, max_length: int = 77, device: str = "cpu") -> None:
        self.source, self.device = str(source), torch.device(device)
        folder = local_folder(self.source) or download_folder(self.source, _FILES)
        self.tokenizer, self.network = _load(folder, self.source)
        self.network.eval().requires_grad_(False).to(self.device)
        self.width: int = self.network.config.hidden_size
        self.max_length = max_length
        positions = getattr(self.network.config, "max_position_embeddings", None)
        limit = min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)
        if not 1 <= max_length <= limit:
            raise ValueError(f"{source}: max_length must be 1 to {limit}, its positions, got {max_length}")

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """See `TextEncoder.encode`: tokens ``(n, m, width)`` and lengths ``(n,)``."""
        texts = list(_checked(texts))
        ids = self.tokenizer(texts, verbose=False)["input_ids"]
        _warn_of_cuts(texts, [len(each) for each in ids], self.max_length)
        sequences: list[Tensor] = []
        for start in range(0, len(texts), _AT_ONCE):
            sequences += self._encoded(texts[start : start + _AT_ONCE])
        return pad_sequences(sequences)

    def describe(self) -> dict[str, Any]:
        """See `TextEncoder.describe`."""
        return {"name": self.name, "source": self.source, "max_length": self.max_length, "weights": self._weights}

    @cached_property
    def _weights(self) -> str:
        return hash_of_weights(self.network)

    def _encoded(self, texts: list[str]) -> list[Tensor]:
        given = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, padding_side="right", return_tensors="pt"
        )
        mask = given["attention_mask"].to(self.device)
        states = self.network(input_ids=given["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
        lengths = mask.sum(dim=1).tolist()
        return [each[:length].float().cpu() for each, length in zip(states, lengths, strict=True)]


def from_record(record: Mapping[str, Any], **replaced: Any) -> TextEncoder:
    """The encoder that a record describes, such as that of a cache or pipeline.

    Args:
        record: what `TextEncoder.describe` returned.
        **replaced: other arguments, such as ``source`` of a folder that was moved, or ``device``.

    Raises:
        ValueError: the encoder has other weights than recorded, or the name is none of a text encoder; and what
            building it raises.
    """
    arguments = {key: value for key, value in record.items() if key != "weights"}
    spec = {**arguments, **replaced}
    find(divided(spec)[0], "text-encoder")
    encoder: TextEncoder = make(spec)
    found, wanted = encoder.describe()["weights"], record.get("weights")
    if found != wanted:
        raise ValueError(
            f"the text encoder {record['name']!r} has the weights {found}, and {wanted} are recorded: give the source "
            "of the recorded one"
        )
    return encoder


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts must be a list of sentences, got {texts!r}: write encode([text])")
    if not len(texts):
        raise ValueError("texts is empty: give at least one sentence")
    return texts


def _warn_of_cuts(texts: Sequence[str], lengths: Sequence[int], longest: int) -> None:
    cut = [i for i, length in enumerate(lengths) if length > longest]
    if cut:
        first = texts[cut[0]]
        warnings.warn(
            f"{len(cut)} of {len(texts)} texts have more than max_length={longest} tokens and are cut; the first has "
            f"{lengths[cut[0]]}: {first[:80]!r}",
            stacklevel=3,
        )


def _load(folder: Path, source: str) -> tuple[Any, Any]:
    """Tokenizer and network of a folder."""
    transformers = require("transformers", extra="text")
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **safe)
        network = getattr(transformers, _ENCODERS.get(config.model_type, "AutoModel"))
        given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        found, loaded = network.from_pretrained(folder, **given)
        missing = sorted(loaded["missing_keys"])
        needed = [key for key in missing if "pooler" not in key]  # a pooler comes after the last hidden states
        if needed:
            raise ValueError(f"{len(needed)} weights are missing, such as {needed[0]}")
        for key in missing:  # transformers drew them at random, and the hash has to be that of the next time
            found.get_parameter(key).data.zero_()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **safe)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{source}: holds no text encoder that transformers loads from safetensors: {error}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{source}: the tokenizer has no padding token, which texts of different lengths need: set its pad_token, "
            "for example to its eos_token, and save it again"
        )
    return tokenizer, found
