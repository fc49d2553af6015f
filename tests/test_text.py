"""Text encoders, their features beside latents, and a model that learns from words."""

import copy
import json
import shutil

import pytest
import torch

import ssmgen
from ssmgen import build
from ssmgen.data import DrawnFaces, LatentCache, WithTexts, cache_record, write_latent_cache
from ssmgen.data.texts import collate
from ssmgen.text import from_record
from ssmgen.training import TrainSettings, train

WORDS = ["<pad>", "</s>", "<unk>", "a", "face", "black", "brown", "hair", "hat", "cap"]
TEXTS = ["a face, black hair", "hat", "a face, brown hair, cap"]


def vectors(**given):
    return build("word-vectors", **{"width": 16, **given})


def test_words_have_the_same_vectors_on_every_machine():
    found = vectors().encode(["hat"])
    assert found["tokens"].shape == (1, 2, 16) and found["lengths"].tolist() == [2]
    expected = torch.tensor([[0.423909, 0.620458, 0.526100, 0.820423]])
    torch.testing.assert_close(found["tokens"][0, :1, :4], expected, rtol=0, atol=1e-6)


def test_vectors_tell_words_and_their_neighbours_apart():
    found = vectors(width=256).encode(["black hair", "black background", "Black, hair!", "black"])
    tokens, lengths = found["tokens"], found["lengths"]
    assert lengths.tolist() == [3, 3, 3, 2]
    assert torch.equal(tokens[0], tokens[2])
    alike = torch.nn.functional.cosine_similarity(tokens[0], tokens[1], dim=1)
    assert 0.3 < float(alike[0]) < 0.7 and abs(float(alike[1])) < 0.7  # the word, and then another
    assert not tokens[3, 2].any(), "padding"
    many = vectors(width=256).encode([" ".join(map(str, range(30)))])["tokens"]
    assert abs(float(many.mean())) < 0.05 and 0.9 < float(many.std()) < 1.1


def test_an_empty_text_is_its_end_alone():
    found = vectors().encode(["", "hat"])
    assert found["lengths"].tolist() == [1, 2]
    torch.testing.assert_close(found["tokens"][0, 0], found["tokens"][1, 1])


def test_long_texts_are_cut_and_said_so():
    with pytest.warns(
        UserWarning, match="1 of 2 texts have more than max_length=3 tokens and are cut; the first has 5"
    ):
        found = vectors(max_length=3).encode(["a b c d", "a b"])
    assert found["lengths"].tolist() == [3, 3]


@pytest.mark.parametrize("texts", ["hat", [1], [], [None]])
def test_what_is_no_list_of_texts_is_rejected(texts):
    with pytest.raises((TypeError, ValueError), match="texts"):
        vectors().encode(texts)


def test_a_record_gives_the_encoder_back():
    encoder = vectors(seed=3)
    record = json.loads(json.dumps(encoder.describe()))
    again = from_record(record)
    assert again.describe() == record
    assert torch.equal(again.encode(TEXTS)["tokens"], encoder.encode(TEXTS)["tokens"])
    assert not torch.equal(vectors().encode(TEXTS)["tokens"], encoder.encode(TEXTS)["tokens"])
    with pytest.raises(ValueError, match="has the weights None, and abc are recorded"):
        from_record({**record, "weights": "abc"})
    with pytest.raises(ValueError, match="'identity' is .*text-encoder"):
        from_record({"name": "identity", "weights": None})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny encoders of three architectures with random weights, by name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: extra text")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    layers |= {"max_position_embeddings": 12, "vocab_size": 16}
    t5 = {"vocab_size": 16, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    networks = {
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5, decoder_start_token_id=0)),
        "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**layers, eos_token_id=1)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**layers)),
    }
    root = tmp_path_factory.mktemp("encoders")
    for name, make in networks.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_a_tokenizer_that_cannot_pad_is_named_at_once(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "bert")
    file = tmp_path / "bert/tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    for other in ("special_tokens_map.json", "added_tokens.json"):
        (tmp_path / "bert" / other).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="bert: the tokenizer has no padding token.*set its pad_token"):
        build("transformers-text", source=str(tmp_path / "bert"), max_length=8)


@pytest.mark.parametrize("name", ["t5", "clip", "bert"])
def test_an_encoder_of_transformers(folders, name):
    encoder = build("transformers-text", source=str(folders / name), max_length=8)
    found = encoder.encode(TEXTS)
    assert encoder.width == 16 and found["lengths"].tolist() == [6, 2, 8]
    assert found["tokens"].shape == (3, 8, 16) and found["tokens"].dtype == torch.float32
    assert not found["tokens"][1, 2:].any()
    for text, tokens, length in zip(TEXTS, found["tokens"], found["lengths"].tolist(), strict=True):
        torch.testing.assert_close(encoder.encode([text])["tokens"][0], tokens[:length])
    assert from_record(encoder.describe()).describe() == encoder.describe()
    with pytest.warns(UserWarning, match="are cut"):
        assert encoder.encode(["a " * 20])["lengths"].tolist() == [8]


def test_bad_folders_of_transformers(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder, and not a hub id"):
        build("transformers-text", source="no/such/folder")
    with pytest.raises(ValueError, match="holds no text encoder that transformers loads"):
        build("transformers-text", source=str(tmp_path))
    with pytest.raises(ValueError, match="max_length must be 1 to 12"):
        build("transformers-text", source=str(folders / "clip"))
    safetensors = pytest.importorskip("safetensors.torch")
    for file in (folders / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    dropped = next(key for key in weights if "attention" in key)
    safetensors.save_file({key: weights[key] for key in weights if key != dropped}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 weights are missing, such as .*attention"):
        build("transformers-text", source=str(tmp_path), max_length=8)


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ssmgen\[text\]'"):
        build("transformers-text", source=str(tmp_path))


class Counting:
    """Word vectors that count the texts they encode."""

    def __init__(self):
        self.inner, self.texts = vectors(), []

    def encode(self, texts):
        self.texts += texts
        return self.inner.encode(texts)

    def describe(self):
        return self.inner.describe()


def test_features_lie_in_the_cache_and_each_text_is_encoded_once(tmp_path):
    faces, encoder = DrawnFaces(40, size=16), Counting()
    pairs = WithTexts(faces, faces.words, encoder)
    write_latent_cache(pairs, build("identity"), tmp_path / "cache", flip=True)
    assert sorted(encoder.texts) == sorted(faces.words(i) for i in range(40))
    cache = LatentCache(tmp_path / "cache", faces.labels, cache_record(pairs, build("identity"), True))
    for index in (0, 9, 39):
        alone = encoder.inner.encode([faces.words(index)])["tokens"][0]
        assert torch.equal(cache[index]["text"], alone) and torch.equal(cache.flipped(index)["text"], alone)
    batch = cache.collate([cache[0], cache[9]])
    assert batch["text"]["lengths"].tolist() == [len(cache[0]["text"]), len(cache[9]["text"])] == [10, 11]
    assert batch["text"]["tokens"].shape == (2, 11, 16) and batch["data"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("batch_size", [4, 16])
def test_each_text_is_encoded_once_also_where_buckets_take_turns(tmp_path, batch_size):
    class InTurns(DrawnFaces):
        def bucket_of(self, index):
            return index % 4

    faces, encoder = InTurns(36, size=16), Counting()
    pairs = WithTexts(faces, faces.words, encoder)
    write_latent_cache(pairs, build("identity"), tmp_path / "cache", batch_size=batch_size)
    assert sorted(encoder.texts) == sorted(faces.words(i) for i in range(36))
    cache = LatentCache(tmp_path / "cache", faces.labels)
    for index in (0, 7, 35):
        assert torch.equal(cache[index]["text"], pairs[index][2]["text"])


def test_the_fingerprint_covers_texts_and_encoder():
    faces = DrawnFaces(3, size=16)
    prints = {
        WithTexts(faces, texts, encoder).fingerprint()
        for texts in (faces.words, ["a", "b", "c"], ["a", "b c", ""])
        for encoder in (vectors(), vectors(seed=1))
    }
    assert len(prints) == 6 and all(each.startswith(faces.fingerprint()) for each in prints)
    with pytest.raises(ValueError, match="there are 2 texts for 3 pairs"):
        WithTexts(faces, ["a", "b"], vectors())


def test_collate_pads_sequences_and_nothing_else():
    examples = [{"data": torch.zeros(3, 4, 4), "text": torch.ones(n, 5), "edges": torch.zeros(2, 4)} for n in (2, 3)]
    batch = collate(examples)
    assert batch["text"]["lengths"].tolist() == [2, 3] and batch["text"]["tokens"][0, 2].tolist() == [0] * 5
    assert batch["edges"].shape == (2, 2, 4)
    with pytest.raises(RuntimeError, match="stack"):
        collate([{"text": torch.ones(2, 5)}, {"text": torch.ones(2, 6)}])


def test_a_model_trains_with_words_and_samples_them_with_their_own_guidance(tmp_path):
    torch.manual_seed(0)
    faces, encoder = DrawnFaces(8, size=16), vectors()
    pairs = WithTexts(faces, faces.words, encoder)
    write_latent_cache(pairs, build("identity"), tmp_path / "cache")
    text = {"name": "token-sequence", "width": 16}
    model = build(
        "sisma-debug", conditions={"mask": "label-map", "text": text},
        cross={"mask": "cross-mamba", "text": "cross-attention"}, dropout=0.1,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    settings = TrainSettings(steps=30, batch_size=4, num_workers=0, checkpoint_every=30)
    train(model, build("flow-matching"), LatentCache(tmp_path / "cache", faces.labels), settings, tmp_path / "run")
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("cross_attention" in name for name in moved) and "conditions.text.proj.weight" in moved
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    noise, mask = ssmgen.initial_noise(seeds=[0, 1], shape=(3, 16, 16)), faces[0][1][None]
    said = encoder.encode(["a face, black hair", "a face, long blond hair, hat"])
    images = ssmgen.sample(model, noise, mask, text=said, steps=3, guidance_scale={"mask": 2, "text": 4})
    assert images.shape == (2, 3, 16, 16) and bool(images.isfinite().all())
    alone = encoder.encode(["a face, black hair"])
    again = ssmgen.sample(model, noise[:1], mask, text=alone, steps=3, guidance_scale={"mask": 2, "text": 4})
    torch.testing.assert_close(images[:1], again, atol=1e-5, rtol=1e-4)
