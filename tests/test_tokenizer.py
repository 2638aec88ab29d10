"""runtime/tokenizer.py against Hugging Face tokenizers, for a small BPE and for SmolLM2's."""
import json
import warnings

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from runtime.tokenizer import Tokenizer, byte_alphabet

PROSE = """It was a bright cold day in April, and the clocks were striking 13. "You'll see," she said -- "won't you?"
    I've counted 1,234.50 of them (twice!); they're café-goers, naïve ones.\tIt's 7:45pm...\r\n\n\n  The end.  """
SPECIAL = "Say <|endoftext|> or <|im_start|>user\n"
NEW_DIGITS = "".join(map(chr, [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]))  # not yet in tiktoken's tables

spaces = st.text(" \t\n\r\v\f\x1c\x85\xa0\u1680\u2003\u2028\u202f\u3000\u200b\ufeff", min_size=1, max_size=4)
digits = st.text(st.characters(categories=["Nd", "Nl", "No"], exclude_characters=NEW_DIGITS), min_size=1, max_size=3)
english = st.sampled_from(["the", " cat", "'s", "'ll", "'S", "’s", "don't", "<|endoftext|>", "👍🏽", "e\u0301", "?!"])
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NEW_DIGITS), max_size=8)


@pytest.fixture(scope="session")
def small_json(tmp_path_factory):
    """A BPE of 500 tokens in the style of SmolLM's, without the bytes that its text has not."""
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    text = [PROSE * 3, "aaaa aaa aa bananas " * 9, "".join(map(chr, range(32, 1500))), "0123456789\n\t\r" * 3]
    hf.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=["<|endoftext|>", "<|im_start|>"]))
    hf.save(str(path))
    return path


@pytest.fixture(params=["small", "smollm2"], scope="session")
def pair(request, small_json):
    """(ours, HF tokenizers'), of the small tokenizer and of SmolLM2's."""
    is_small = request.param == "small"
    path = small_json if is_small else request.getfixturevalue("smollm2_folder") / "tokenizer.json"
    hf = tokenizers.Tokenizer.from_file(str(path))
    hf.encode_special_tokens = True  # specials inside a text as plain text, as ours
    return Tokenizer(path), hf


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.lists(st.one_of(spaces, digits, english, anything), max_size=12).map("".join))
@example(text=PROSE)
@example(text=SPECIAL)
def test_ids_are_those_of_hf_tokenizers(pair, text):
    ours, hf = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = ours.encode(text)
    known = set(ours._bytes.values())
    kept = bytes(byte for byte in text.encode() if bytes([byte]) in known)
    if kept == text.encode():
        assert ids == hf.encode(text).ids and ours.decode(ids) == text
    else:  # HF may merge over the gap that a dropped byte leaves
        assert ours.decode_bytes(ids) == b"".join(ours._bytes[i] for i in hf.encode(text).ids) == kept


def test_words_carry_the_space_before_them(small_json):
    ours = Tokenizer(small_json)
    ids = ours.encode_words(["The", "end", "'s", "7"])
    assert [ours.decode(word) for word in ids] == ["The", " end", " 's", " 7"]
    assert sum(ids, []) == ours.encode("The end 's 7")


def test_joining_by_id_is_joining_by_merges(pair):
    """Each token, joined by lower ids alone, comes down to the halves of its own merge: the rule of tiktoken."""
    spec = json.loads(pair[1].to_str())["model"]
    vocab = spec["vocab"]
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
    assert ours.vocab_size == hf.get_vocab_size() and ours.eos == hf.token_to_id("<|endoftext|>")
    alphabet, specials = byte_alphabet(), {token.content for token in hf.get_added_tokens_decoder().values()}
    for token, i in hf.get_vocab().items():
        assert ours.decode_bytes([i]) == (token.encode() if token in specials else bytes(alphabet[c] for c in token))


def test_what_cannot_be_encoded(smollm2_folder):
    ours = Tokenizer(smollm2_folder / "tokenizer.json")
    with pytest.warns(UserWarning, match="byte 0x04 .* dropped"):
        assert ours.decode(ours.encode("a\x04b\x04c")) == "abc"
    assert ours.decode(ours.encode(" " * 100_000)) == " " * 100_000  # one more and tiktoken might overflow
    with pytest.raises(ValueError, match="^text with too much space: more than 100000 whitespace characters"):
        ours.encode("a" + "\n" * 100_001)


def test_the_hash_is_of_what_determines_ids(small_json, tmp_path):
    spec, other = json.loads(small_json.read_text(encoding="utf-8")), tmp_path / "tokenizer.json"
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]  # the older way to write the same
    other.write_text(json.dumps(spec, indent=3), encoding="utf-8")
    assert Tokenizer(other).hash == Tokenizer(small_json).hash
    spec["added_tokens"][1]["content"] = "<|other|>"
    spec["model"]["vocab"]["<|other|>"] = spec["model"]["vocab"].pop("<|im_start|>")
    other.write_text(json.dumps(spec), encoding="utf-8")
    assert Tokenizer(other).hash != Tokenizer(small_json).hash


@pytest.mark.parametrize("field, value, message", [
    ("normalizer", {"type": "NFC"}, "normalizer has"),
    ("pre_tokenizer.pretokenizers.0.individual_digits", False, "pre_tokenizer has"),
    ("pre_tokenizer.pretokenizers.1.use_regex", False, "pre_tokenizer has"),
    ("model.merges", [], "model.merges does not make"),
    ("added_tokens.1.special", False, "added_tokens holds more than special tokens"),
    ("model.vocab", {"<|endoftext|>": 0, "<|im_start|>": 1, "a": 1 << 40}, "model.vocab does not give every id")])
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
