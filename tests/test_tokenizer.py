"""runtime/tokenizer.py against Hugging Face tokenizers, for a small BPE and for SmolLM2's."""
import json
import re
import warnings

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from runtime.tokenizer import Tokenizer, byte_alphabet

PROSE = """It was a bright cold day in April, and the clocks were striking 13. "You'll see," she said -- "won't you?"
    I've counted 1,234.50 of them (twice!); they're café-goers, naïve ones.\tIt's 7:45pm...\r\n\n\n  The end.  """
SPECIAL = "Say <|endoftext|> or <|im_start|>user\n"
NEW_DIGITS = {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)}  # numeric for HF, not yet for tiktoken's tables
MISSING = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])  # in SmolLM's

spaces = st.text(" \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\ufeff", min_size=1, max_size=4)
digits = st.text(st.characters(categories=["Nd", "Nl", "No"]), min_size=1, max_size=3)
emoji = st.sampled_from(["😀", "👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️", "e\u0301", "ñ\u0323", "ﷺ", "각"])
english = st.sampled_from(["the", " cat", "'s", "'ll", "'S", "’s", "don't", "<|endoftext|>", "http://", "__", "?!"])
new = "".join(map(chr, NEW_DIGITS))
controls = st.text(st.characters(categories=["Cc", "Cf", "Co", "Cn"], exclude_characters=new), max_size=3)
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=new), max_size=8)
texts = st.lists(st.one_of(spaces, digits, emoji, english, controls, anything), max_size=12).map("".join)
many = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session")
def smollm2_json(smollm2_folder):
    return smollm2_folder / "tokenizer.json"


@pytest.fixture(scope="session")
def small_json(tmp_path_factory):
    """A BPE of 500 tokens in the style of SmolLM's, without the bytes that its text has not."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    hf.decoder = decoders.ByteLevel()
    text = [PROSE * 3, "aaaa aaa aa bananas " * 9, "".join(map(chr, range(32, 1500))), "0123456789\n\t\r" * 3]
    hf.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|im_start|>"]))
    hf.save(str(path))
    return path


@pytest.fixture(params=["small_json", "smollm2_json"], scope="session")
def pair(request):
    """(ours, HF tokenizers'), of the small tokenizer and of SmolLM2's."""
    path = request.getfixturevalue(request.param)
    hf = tokenizers.Tokenizer.from_file(str(path))
    hf.encode_special_tokens = True  # specials inside a text as plain text, as ours
    return Tokenizer(path), hf


def quiet(encode, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode(text)


def missing_bytes(ours):
    there = set(ours._bytes.values())
    return bytes(byte for byte in range(256) if bytes([byte]) not in there)


@many
@given(text=texts)
@example(text=PROSE)
@example(text=SPECIAL)
@example(text="a  1  b \n 2\n\n c   ")
@example(text="x \u0661\u0662 \u4e8c \u2167 \u00bd\u00b2")
def test_ids_are_those_of_hf_tokenizers(pair, text):
    ours, hf = pair
    ids, gone = quiet(ours.encode, text), missing_bytes(ours)
    if any(byte in gone for byte in text.encode()):  # HF may merge over the gap that a dropped byte leaves
        kept = bytes(byte for byte in text.encode() if byte not in gone)
        assert ours.decode_bytes(ids) == kept
        assert b"".join(ours._bytes[i] for i in hf.encode(text).ids) == kept
    else:
        assert ids == hf.encode(text).ids
        assert ours.decode(ids) == text


@many
@given(text=texts)
def test_words_one_after_the_other_are_the_text(pair, text):
    ours, _ = pair
    words = text.split()
    ids = quiet(ours.encode_words, words)
    assert len(ids) == len(words)
    assert sum(ids, []) == quiet(ours.encode, " ".join(words))


def test_words_carry_the_space_before_them(small_json):
    ours = Tokenizer(small_json)
    assert [ours.decode(ids) for ids in ours.encode_words(["The", "end", "'s", "7"])] == ["The", " end", " 's", " 7"]
    for wrong in ("", " a", "a\u00a0b", "a\n"):
        with pytest.raises(ValueError, match="not one word"):
            ours.encode_words(["a", wrong])


@pytest.mark.parametrize("path", ["small_json", "smollm2_json"])
def test_joining_by_id_is_joining_by_merges(path, request):
    """The proof that tiktoken's rule agrees with the merges on *every* text: each token, joined by lower ids alone,
    comes down to the two halves of its own merge. A first wrong step on any text would be the last step on a token."""
    spec = json.loads(request.getfixturevalue(path).read_text(encoding="utf-8"))["model"]
    vocab, alphabet = spec["vocab"], byte_alphabet()
    assert set(alphabet.values()) == set(range(256))
    for left, right in spec["merges"]:
        parts, whole = list(left + right), vocab[left + right]
        while True:
            unions = [vocab.get(a + b, whole) for a, b in zip(parts, parts[1:], strict=False)]
            if min(unions) >= whole:
                break
            at = unions.index(min(unions))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        assert parts == [left, right]


def test_every_id_has_the_bytes_that_hf_gives_it(pair):
    ours, hf = pair
    assert ours.vocab_size == hf.get_vocab_size(with_added_tokens=True)
    assert ours.eos == hf.token_to_id("<|endoftext|>") and ours.eos not in ours.encode(SPECIAL)
    alphabet, specials = byte_alphabet(), {token.content for token in hf.get_added_tokens_decoder().values()}
    for token, i in hf.get_vocab().items():
        assert ours.decode_bytes([i]) == (token.encode() if token in specials else bytes(alphabet[c] for c in token))
    with pytest.raises(KeyError):
        ours.decode([ours.vocab_size])
    half = [i for i, token in ours._bytes.items() if token == b"\xc3"]
    assert ours.decode(half) == "\ufffd"  # half a character


def test_missing_bytes_are_dropped_with_a_warning(smollm2_json):
    ours = Tokenizer(smollm2_json)
    assert (ours.vocab_size, ours.eos, missing_bytes(ours)) == (49152, 0, MISSING)
    with pytest.warns(UserWarning) as seen:
        assert ours.decode(ours.encode("a\x04b\x1d\x04c")) == "abc"
    assert [re.search(r"0x..", str(warning.message))[0] for warning in seen] == ["0x04", "0x1D"]


def test_a_run_of_space_that_would_overflow_is_refused(small_json):
    ours = Tokenizer(small_json)
    assert ours.decode(ours.encode("a" + " " * 100_000 + "b")) == "a" + " " * 100_000 + "b"
    for text in ("a" + " " * 1_100_000 + "b", "\n" * 100_001):
        with pytest.raises(ValueError, match="^text with too much space: more than 100000 whitespace characters"):
            ours.encode(text)


def test_the_hash_is_of_what_determines_ids(small_json, tmp_path):
    spec, other = json.loads(small_json.read_text(encoding="utf-8")), tmp_path / "tokenizer.json"
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]  # the older way to write the same
    other.write_text(json.dumps(spec, indent=3), encoding="utf-8")
    assert Tokenizer(other).hash == Tokenizer(small_json).hash
    assert re.fullmatch("[0-9a-f]{16}", Tokenizer(other).hash)
    vocab, last = spec["model"]["vocab"], max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    del vocab[last], spec["model"]["merges"][-1]
    other.write_text(json.dumps(spec), encoding="utf-8")
    assert Tokenizer(other).hash != Tokenizer(small_json).hash


@pytest.mark.parametrize("field, value, message", [
    ("normalizer", {"type": "NFC"}, "normalizer has"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}, "not a SmolLM tokenizer"),
    ("pre_tokenizer.pretokenizers.0.individual_digits", False, "pre_tokenizer has"),
    ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, "pre_tokenizer has"),
    ("pre_tokenizer.pretokenizers.1.use_regex", False, "pre_tokenizer has"),
    ("model.type", "Unigram", "model has"), ("model.byte_fallback", True, "model has"),
    ("model.unk_token", "<unk>", "model has"), ("model.merges", [], "model.merges does not make"),
    ("added_tokens", [], "added_tokens has no <|endoftext|>"),
    ("added_tokens", [{"id": 0, "content": "<|endoftext|>", "special": True}, {"id": 7, "content": "a"}],
     "added_tokens holds more than special tokens"),
    ("model.vocab", {"<|endoftext|>": 0, "<|im_start|>": 1, "a": 2, "b": 2}, "model.vocab does not give every id"),
    ("model.vocab", {"<|endoftext|>": 0, "<|im_start|>": 1, "a": 1 << 40}, "model.vocab does not give every id"),
])
def test_other_kinds_of_tokenizer_are_refused(small_json, tmp_path, field, value, message):
    spec, path = json.loads(small_json.read_text(encoding="utf-8")), tmp_path / "other.json"
    *above, last = [int(key) if key.isdigit() else key for key in field.split(".")]
    inside = spec
    for key in above:
        inside = inside[key]
    inside[last] = value
    path.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(SystemExit) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", None])
def test_unreadable_files_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit, match=f"{tmp_path}/a.json"):
        Tokenizer(tmp_path / "a.json")
