"""
The text tokenizer: a SmolLM-style tokenizer.json, read by tiktoken.
"""
import hashlib
import json
import re
import reprlib
import warnings

import tiktoken

from runtime.files import DataError, read_json, reading
from runtime.hub import local_folder

END_OF_TEXT = "<|endoftext|>"
LONGEST_SPACE = 100_000  # whitespace characters in a row; a million would overflow tiktoken's regular expressions

# SmolLM first splits off every digit (any Unicode number) and then applies the GPT-2 pattern to the text in between.
# This one pattern does the same. \p{N} takes one digit at a time. The last character of a run of whitespace goes with
# the next word. Before a digit the run is not split, because the text ends there for the GPT-2 pattern.
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

def byte_alphabet():
    """{character: byte}: the printable character that stands for each byte in a GPT-2 style vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def cutting_rules(spec):
    """{field: settings} of a tokenizer.json that determine how a text is split and merged into tokens."""
    cut, merge = spec["pre_tokenizer"], spec["model"]
    digits, letters = cut["pretokenizers"]
    return {
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": [cut["type"], digits["type"], digits["individual_digits"], letters["type"],
                          letters["add_prefix_space"], letters.get("use_regex") in (True, None)],
        "model": [merge["type"], merge.get("dropout"), merge.get("unk_token"), merge.get("byte_fallback") or False,
                  merge.get("continuing_subword_prefix") or "", merge.get("end_of_word_suffix") or ""]}


SMOLLM_RULES = {"normalizer": None, "pre_tokenizer": ["Sequence", "Digits", True, "ByteLevel", False, True],
                "model": ["BPE", None, None, False, "", ""]}


def read_smollm_tokenizer(path):
    """Read a SmolLM-style tokenizer.json -> (vocabulary {bytes: id}, special tokens {name: id}).

    DataError for a tokenizer of any other kind, because our Tokenizer would give other ids.
    """
    def check(condition, field, fault):
        if not condition:
            raise DataError(f"{path}: {field} {fault}; take the tokenizer.json of a SmolLM model")

    try:
        spec = read_json(path)
        with reading(path, "not a SmolLM tokenizer"):
            found = cutting_rules(spec)
            added, vocab = spec["added_tokens"], spec["model"]["vocab"]
            only_specials = all(token.get("special") is True and token["content"].isprintable() for token in added)
            specials = {token["content"]: token["id"] for token in added}
            ids, agree = sorted((vocab | specials).values()), vocab | specials == specials | vocab
            vocab = {token: i for token, i in vocab.items() if token not in specials}
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in spec["model"]["merges"]]
            merged, parts = [left + right for left, right in merges], {part for pair in merges for part in pair}
    except ValueError as error:
        raise DataError(f"{error}; copy tokenizer.json from a SmolLM model again") from None
    for field, wanted in SMOLLM_RULES.items():
        check(found[field] == wanted, field, f"has {reprlib.repr(found[field])}, but SmolLM's has {wanted}")
    # HF tokenizers find an added token that is not special inside a text. Our Tokenizer would encode its letters.
    check(only_specials, "added_tokens", "holds more than special tokens")
    check(END_OF_TEXT in specials, "added_tokens", f"has no {END_OF_TEXT}, the end of a document")
    check(agree and ids == list(range(len(ids))) and all(type(i) is int for i in ids), "model.vocab",
          "does not give every id from 0 on, with added_tokens, to one token")
    alphabet = byte_alphabet()
    check("" not in vocab and alphabet.keys() >= set("".join(vocab)), "model.vocab", "has tokens without bytes")
    # tiktoken has no list of merges. It joins the two neighbours whose union has the lowest id. The result is the same
    # if each longer token is made by exactly one merge, and if the ids rise in the order of the merges.
    by_id = sorted((token for token in vocab if len(token) > 1), key=vocab.get)
    check(merged == by_id and parts <= vocab.keys(), "model.merges",
          "does not make the tokens of model.vocab one by one in the order of ids")
    return {bytes(alphabet[c] for c in token): i for token, i in vocab.items()}, specials


def end_of_text(path):
    """The id of <|endoftext|> in a tokenizer.json, or None if it has no such token. ValueError."""
    spec = read_json(path)
    with reading(path, "not a tokenizer"):
        return next((token["id"] for token in spec["added_tokens"] if token["content"] == END_OF_TEXT), None)


class Tokenizer:
    """The byte-level BPE of a SmolLM-style tokenizer.json. It gives the ids of HF tokenizers at the speed of tiktoken.

    vocab_size    the number of ids, including the special tokens
    eos           the id of <|endoftext|>
    hash          16 hex digits, a hash of everything that determines the ids

    The name of a special token inside a text is encoded as letters, never as the special token. SmolLM's vocabulary
    lacks 21 single bytes (six control characters, and bytes that occur in no assigned character). They are left out
    with a warning; HF leaves them out too. One difference is known: 13 digits that are newer than tiktoken's Unicode
    tables (U+11DE0-9 and U+16FF4-6) count as symbols. DataError if the file is not SmolLM-style.
    """

    def __init__(self, path):
        vocab, specials = read_smollm_tokenizer(local_folder(path))
        self.vocab_size = 1 + max(*vocab.values(), *specials.values())
        self.eos = specials[END_OF_TEXT]
        rules = [SMOLLM_PATTERN, sorted((i, token.hex()) for token, i in vocab.items()), sorted(specials.items())]
        self.hash = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
        self._bytes = {i: token for token, i in vocab.items()} | {i: name.encode() for name, i in specials.items()}
        # tiktoken panics at a byte without an id, so missing bytes borrow ids past the end. encode() drops these ids.
        borrowed = {bytes([byte]): self.vocab_size + byte for byte in range(256) if bytes([byte]) not in vocab}
        self._bpe = tiktoken.Encoding("smollm", pat_str=SMOLLM_PATTERN, mergeable_ranks=vocab | borrowed,
                                      special_tokens={})

    def encode(self, text):
        """The ids of a text, list[int], without EOS. ValueError for more than LONGEST_SPACE whitespace in a row."""
        if len(text) > LONGEST_SPACE and any(len(run[0]) > LONGEST_SPACE for run in re.finditer(r"\s+", text)):
            raise ValueError(f"text with too much space: more than {LONGEST_SPACE} whitespace characters in a row")
        ids = self._bpe.encode_ordinary(text)
        if max(ids, default=0) < self.vocab_size:
            return ids
        for byte in sorted({i - self.vocab_size for i in ids if i >= self.vocab_size}):
            warnings.warn(f"byte 0x{byte:02X} is not in the vocabulary of the text tokenizer: dropped", stacklevel=2)
        return [i for i in ids if i < self.vocab_size]

    def encode_words(self, words):
        """The ids of each word of a document: list[str] -> list[list[int]]. Joined, they equal encode(" ".join(words)).

        Every word but the first is encoded with the space before it. ValueError for an empty word or whitespace in it.
        """
        for word in words:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not one word: split the text at whitespace, as str.split() does")
        return [self.encode(" " + word if i else word) for i, word in enumerate(words)]

    def decode_bytes(self, ids):
        """The bytes of ids (integers of any type). A special token gives its name. KeyError for an unknown id."""
        return b"".join(self._bytes[int(i)] for i in ids)

    def decode(self, ids):
        """The text of ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")
