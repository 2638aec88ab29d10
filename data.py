"""
From arrays on disk to batches: the text tokenizer, the data sets, the mixture and the interleaving of text and speech.

A data set is a folder of plain .npy arrays, memory-mapped, and one meta.json. There are three kinds:

    text     text.npy    uint16 [n]      token ids of all documents one after the other, each ended by the text EOS
    speech   speech.npy  uint16 [m]      speech units 0..n_units-1, each document ended by the speech EOS = n_units
    paired   both of these, and two offset tables that cut the two streams into the same words:
             text_words.npy    int64 [w+1]   word i is written as text[text_words[i]:text_words[i+1]], never empty,
             speech_words.npy  int64 [w+1]   and spoken as speech[speech_words[i]:speech_words[i+1]], perhaps empty.
             A document's EOS is its last word, in both streams, so any span of words is one slice in either modality.
    all      documents.npy     int64 [d+1]   where documents start, in tokens (in words for paired sets); last = the end

meta.json says {format, kind, source, documents, words, text: {tokens, vocab_size, eos, tokenizer}, speech: {tokens,
n_units, rate, vocabulary}, sha256}; `tokenizer` and `vocabulary` are hashes: a model is only ever fed ids made with its
own. Opening a set finds ids and offsets that cannot be; one id in the place of another only the check below finds.
A paired set also serves as a text or a speech set, by one of its streams. A folder of such folders is one sharded set.

In a batch all symbols share one id space: text ids, then units, then the speech EOS, then the switch token.

    python data.py FOLDER       checks a data set whole and prints what it holds
"""
import hashlib
import json
import queue
import re
import reprlib
import sys
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from checkpoint import whole_folder
from foreign import read_array, read_json

FORMAT = 1
STREAMS = {"text": ("text",), "speech": ("speech",), "paired": ("text", "speech")}
LONGEST_RUN = 100_000  # whitespace characters in a row; at a million tiktoken's regular expressions overflow
FULL_CHECK = 1 << 26  # arrays up to this long are checked whole when opened (0.1 s), longer ones in samples


class DataError(SystemExit):
    """A data set that cannot be used: one line that names the file, the fault and the remedy. Ends a script."""


# ---------------------------------------------------------------------------------------------------------------------
# the text tokenizer

# How SmolLM cuts text: first every digit (Unicode numeric) alone, then the GPT-2 pattern on each stretch between. As
# one pattern: \p{N} takes one character; and a run of whitespace, which leaves its last character to the word that
# follows, stays whole before a digit, because there the stretch ends as a text does at its end.
SMOLLM_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# All that tokenizer.json says about cutting and merging. Other values would mean other ids than ours: refused.
SMOLLM_FIELDS = {
    "normalizer": [None],
    "pre_tokenizer.type": ["Sequence"],
    "pre_tokenizer.pretokenizers.0.type": ["Digits"],
    "pre_tokenizer.pretokenizers.0.individual_digits": [True],
    "pre_tokenizer.pretokenizers.1.type": ["ByteLevel"],
    "pre_tokenizer.pretokenizers.1.add_prefix_space": [False],
    "pre_tokenizer.pretokenizers.1.use_regex": [True, None],  # None: the file does not say, which means True
    "pre_tokenizer.pretokenizers.2": [None],
    "model.type": ["BPE"],
    "model.dropout": [None],
    "model.unk_token": [None],
    "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""],
    "model.byte_fallback": [False, None],
}


def byte_alphabet():
    """{character: byte}: the printable character that stands for each byte in a GPT-2 style vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def read_smollm_tokenizer(path):
    """(vocabulary {bytes: id}, specials {name: id}) of a SmolLM-style tokenizer.json; DataError for any other kind."""
    def check(fine, field, fault, remedy="take the tokenizer.json of a SmolLM model"):
        if not fine:
            raise DataError(f"{path}: {field} {fault}; {remedy}")

    try:
        spec = read_json(path)
    except ValueError as error:
        fault = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: not a readable tokenizer.json ({fault}); copy it from the model again") from None
    for field, allowed in SMOLLM_FIELDS.items():
        value = spec
        for key in field.split("."):
            try:
                value = value[int(key) if key.isdigit() else key]
            except (KeyError, IndexError, TypeError):
                value = None
        check(value in allowed, field, f"is {reprlib.repr(value)}, but SmolLM's is {allowed[0]!r}")
    added, vocab, merges = spec.get("added_tokens") or [], spec["model"].get("vocab"), spec["model"].get("merges")
    check(isinstance(added, list) and all(map(is_special, added)), "added_tokens", "holds more than special tokens")
    specials = {token["content"]: token["id"] for token in added}
    check("<|endoftext|>" in specials, "added_tokens", "has no <|endoftext|>, the end of a document", "add it")
    check(isinstance(vocab, dict) and all(type(i) is int for i in vocab.values()), "model.vocab", "is no {token: id}")
    check(sorted((vocab | specials).values()) == list(range(len(vocab | specials))) and
          all(vocab.get(token, i) == i for token, i in specials.items()), "model.vocab",
          "does not give every id from 0 on, with added_tokens, to one token")
    vocab = {token: i for token, i in vocab.items() if token not in specials}
    check(isinstance(merges, list) and all(isinstance(p, str | list) for p in merges), "model.merges", "is no list")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    check(all(len(pair) == 2 and all(isinstance(part, str) and part in vocab for part in pair) for pair in merges),
          "model.merges", "holds more than pairs of tokens of model.vocab")
    # tiktoken knows no merges: it joins the two neighbours whose union has the lowest id. That is the same if each
    # longer token is made by exactly one merge and the ids go up in the order of the merges, as training leaves them.
    made = ["".join(pair) for pair in merges]
    order = sorted((token for token in vocab if len(token) > 1), key=vocab.get)
    check(made == order, "model.merges", "does not make the tokens of model.vocab one by one in the order of ids")
    alphabet = byte_alphabet()
    check(alphabet.keys() >= set("".join(vocab)) and "" not in vocab, "model.vocab", "has tokens without bytes")
    return {bytes(alphabet[c] for c in token): i for token, i in vocab.items()}, specials


def is_special(token):
    """Is this entry of added_tokens a special token? HF finds others in any text, where they would be letters here."""
    return (isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"].isprintable() and
            type(token.get("id")) is int and token.get("special") is True)


class Tokenizer:
    """The byte-level BPE of a SmolLM-style `tokenizer.json`: ids as HF tokenizers gives them, at tiktoken's speed.

    vocab_size    number of ids, special tokens among them
    eos           id of <|endoftext|>
    hash          16 hex digits over all that determines ids

    Text is only text: a special token's name inside it is encoded as its letters, never as the special token. SmolLM's
    vocabulary lacks 21 single bytes (six control characters, and bytes that no assigned character has): they are left
    out, as HF does, and a warning says so. Limits: 13 digits are newer than tiktoken's Unicode tables (U+11DE0-9,
    U+16FF4-6) and count as symbols. DataError (one line) if the file is of another kind.
    """

    def __init__(self, path):
        vocab, specials = read_smollm_tokenizer(path)
        self.vocab_size = 1 + max(*vocab.values(), *specials.values())
        self.eos = specials["<|endoftext|>"]
        rules = [SMOLLM_PATTERN, sorted((i, token.hex()) for token, i in vocab.items()), sorted(specials.items())]
        self.hash = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
        self._bytes = {i: token for token, i in vocab.items()} | {i: name.encode() for name, i in specials.items()}
        # tiktoken panics on a byte that has no id, so the missing ones borrow ids past the end; encode drops these
        borrowed = {bytes([byte]): self.vocab_size + byte for byte in range(256) if bytes([byte]) not in vocab}
        self._bpe = tiktoken.Encoding("smollm", pat_str=SMOLLM_PATTERN, mergeable_ranks=vocab | borrowed,
                                      special_tokens={})

    def encode(self, text):
        """Ids of a text: str -> list[int]. No EOS is added. ValueError for over LONGEST_RUN whitespace in a row."""
        if len(text) > LONGEST_RUN and any(len(run[0]) > LONGEST_RUN for run in re.finditer(r"\s+", text)):
            raise ValueError(f"text with too much space: more than {LONGEST_RUN} whitespace characters in a row")
        ids = self._bpe.encode_ordinary(text)
        if max(ids, default=0) < self.vocab_size:
            return ids
        for byte in sorted({i - self.vocab_size for i in ids if i >= self.vocab_size}):
            warnings.warn(f"byte 0x{byte:02X} is not in the vocabulary of the text tokenizer: dropped", stacklevel=2)
        return [i for i in ids if i < self.vocab_size]

    def encode_words(self, words):
        """Ids of each word of a document: list[str] -> list[list[int]], one after the other the ids of " ".join(words).

        Every word but the first carries the space before it. Words are as str.split() gives them: ValueError if not.
        """
        for word in words:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not one word: split the text at whitespace, as str.split() does")
        return [self.encode(" " + word if i else word) for i, word in enumerate(words)]

    def decode_bytes(self, ids):
        """The bytes that ids (integers of any kind) stand for; special tokens by name. KeyError: no such id."""
        return b"".join(self._bytes[int(i)] for i in ids)

    def decode(self, ids):
        """The text of ids; bytes that are no UTF-8, as at the cut edges of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# data sets on disk

def write_set(folder, kind, documents, tokenizer=None, units=None, source=""):
    """Write one data set atomically: the folder appears whole, or not at all.

    documents   an iterable: of 1-D id sequences for kind text and speech, for kind paired of (text_words,
                speech_words), two equally long lists with the ids of each word. EOS is added here, as the last word.
    tokenizer   has .vocab_size, .eos and .hash; needed where there is text
    units       dict(n_units, rate in Hz, hash); needed where there is speech
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it or write elsewhere")
    streams = STREAMS[kind]
    if (tokenizer and tokenizer.vocab_size > 1 << 16) or (units and units["n_units"] >= 1 << 16):
        raise DataError(f"{folder}: ids are kept in 16 bits: at most 65536 of a tokenizer and 65535 units")
    eos = {"text": tokenizer.eos if tokenizer else None, "speech": units["n_units"] if units else None}
    tokens, words, starts = {s: [] for s in streams}, {s: [[0]] for s in streams}, [0]
    for document in documents:
        if kind == "paired":
            assert len(document[0]) == len(document[1]), "a paired document needs as many spoken words as written ones"
            for s, its_words in zip(streams, document):
                its_words = [*its_words, [eos[s]]]
                tokens[s].append(np.concatenate([np.asarray(w, np.uint16) for w in its_words]))
                words[s].append([len(w) for w in its_words])
            starts.append(starts[-1] + len(document[0]) + 1)
        else:
            tokens[kind].append(np.append(np.asarray(document, np.uint16), np.uint16(eos[kind])))
            starts.append(starts[-1] + len(tokens[kind][-1]))
    if len(starts) == 1:
        raise DataError(f"{folder}: not one document to write")

    arrays = {s: np.concatenate(tokens[s]) for s in streams}
    arrays["documents"] = np.array(starts, np.int64)
    meta = dict(format=FORMAT, kind=kind, source=source, documents=len(starts) - 1)
    if kind == "paired":
        arrays |= {f"{s}_words": np.cumsum(np.concatenate(words[s]), dtype=np.int64) for s in streams}
        meta["words"] = starts[-1]
    if "text" in streams:
        meta["text"] = dict(tokens=len(arrays["text"]), vocab_size=tokenizer.vocab_size, eos=tokenizer.eos,
                            tokenizer=tokenizer.hash)
    if "speech" in streams:
        meta["speech"] = dict(tokens=len(arrays["speech"]), n_units=units["n_units"], rate=units["rate"],
                              vocabulary=units["hash"])
    with whole_folder(folder) as new:
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array)
        meta["sha256"] = _checksum(new, meta)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


class DataSet(NamedTuple):
    """One opened folder (one shard). Arrays are memory maps; a stream that the kind lacks is None."""
    folder: Path
    meta: dict
    documents: np.ndarray
    text: np.ndarray | None = None
    speech: np.ndarray | None = None
    text_words: np.ndarray | None = None
    speech_words: np.ndarray | None = None

    def document(self, i):
        """(text ids, units) of document i of a paired set, EOS included, and its word offsets in both, from 0."""
        a, b = self.documents[i], self.documents[i + 1]
        t, s = self.text_words[a:b + 1], self.speech_words[a:b + 1]
        return self.text[t[0]:t[-1]].astype(np.int64), self.speech[s[0]:s[-1]].astype(np.int64), t - t[0], s - s[0]


def open_set(folder, tokenizer=None, units=None, full=False):
    """Open one data set and check it; full=True reads every element, otherwise long arrays are checked in samples.

    tokenizer, units   hashes that the set must have been made with (None: any)
    Raises DataError naming the file and the fault.
    """
    folder = Path(folder)
    try:
        meta = read_json(folder / "meta.json")
    except ValueError as e:
        raise DataError(f"{e}; make the set again" if (folder / "meta.json").exists() else f"{folder}: no data set here"
                        " (no meta.json); make one with python -m corpora.NAME") from None
    if meta.get("format", FORMAT) != FORMAT:
        said = reprlib.repr(meta["format"])
        raise DataError(f"{folder / 'meta.json'}: format {said}, not {FORMAT}; make the set again")
    if lacking := _not_described(meta):
        raise DataError(f"{folder / 'meta.json'}: not a data set's description ({lacking}); make the set again")
    kind, streams = meta["kind"], STREAMS[meta["kind"]]
    for stream, key, wanted in (("text", "tokenizer", tokenizer), ("speech", "vocabulary", units)):
        made_with = meta[stream].get(key) if stream in streams else None
        if stream in streams and wanted is not None and made_with != wanted:
            made_with = reprlib.repr(made_with)
            raise DataError(f"{folder / 'meta.json'}: made with {stream} {key} {made_with}, the model has {wanted!r};"
                            f" make the set again with the model's own")
    arrays = {}
    for name in ("documents", *streams, *(f"{s}_words" for s in streams if kind == "paired")):
        try:
            arrays[name] = read_array(folder / f"{name}.npy")
        except ValueError as e:
            raise DataError(f"{e}; make the set again") from None
    dataset = DataSet(folder, meta, **arrays)
    for name, fault in _faults(dataset, full):
        raise DataError(f"{folder / name}.npy: {fault}; make the set again")
    if full and meta.get("sha256", checked := _checksum(folder, meta)) != checked:
        raise DataError(f"{folder}: a file is not as it was written (sha256 in meta.json); make the set again")
    return dataset


def _not_described(meta):
    """The first key that meta.json lacks, or has with a value that cannot be meant; None if all are there."""
    if meta.get("kind") not in tuple(STREAMS):
        return "kind"
    wanted = [(meta, key) for key in ("format", "documents", "words") if key != "words" or meta["kind"] == "paired"]
    for stream in STREAMS[meta["kind"]]:
        if not isinstance(meta.get(stream), dict):
            return stream
        keys = ("tokens", "vocab_size", "eos") if stream == "text" else ("tokens", "n_units", "rate")
        wanted += [(meta[stream], key) for key in keys]
    return next((key for said, key in wanted if type(said.get(key)) is not int), None)


def _checksum(folder, meta):
    """SHA-256 of what meta.json says, its own sha256 aside, and of the arrays, one after the other."""
    digest = hashlib.sha256(json.dumps({**meta, "sha256": None}, sort_keys=True).encode())
    for path in sorted(folder.glob("*.npy")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _faults(dataset, full):
    """Yield (array name, what is wrong with it)."""
    meta, streams = dataset.meta, STREAMS[dataset.meta["kind"]]
    paired = meta["kind"] == "paired"
    for s in streams:
        array, said = getattr(dataset, s), meta[s]
        limit = said["vocab_size"] if s == "text" else said["n_units"] + 1
        if array.dtype != np.uint16 or array.ndim != 1:
            yield s, f"is {array.dtype} with {array.ndim} dimensions, not uint16 with 1"
        elif len(array) != said["tokens"] or len(array) == 0:
            yield s, f"has {len(array)} elements, meta.json says {said['tokens']}"
        elif any(part.max() >= limit for part in _parts(array, full)):
            yield s, f"has an id of {limit} or more, outside the vocabulary"
        elif array[-1] != (said["eos"] if s == "text" else said["n_units"]):
            yield s, "does not end with the end of a document"
    ends = {"documents": meta["words"] if paired else meta[streams[0]]["tokens"]}
    ends |= {f"{s}_words": meta[s]["tokens"] for s in streams if paired}
    for name, end in ends.items():
        array, least = getattr(dataset, name), 0 if name == "speech_words" else 1  # a short word may own no unit
        wanted = (meta["documents"] if name == "documents" else meta["words"]) + 1
        if array.dtype != np.int64 or array.ndim != 1:
            yield name, f"is {array.dtype} with {array.ndim} dimensions, not int64 with 1"
        elif len(array) != wanted:
            yield name, f"has {len(array)} elements, meta.json says {wanted}"
        elif array[0] != 0 or array[-1] != end:
            yield name, f"runs from {array[0]} to {array[-1]}, not from 0 to {end}"
        elif any(part.min() < 0 or part.max() > end or (np.diff(part) < least).any() for part in _parts(array, full)):
            yield name, "has offsets that do not rise"  # the former two: a difference may overflow
    for s in streams:
        eos, tokens, ends = meta[s]["eos" if s == "text" else "n_units"], getattr(dataset, s), dataset.documents[1:]
        if not full and len(tokens) > FULL_CHECK:  # the ends of all documents would be most pages of the file
            ends = ends[::1 + len(ends) // 1000]
        if paired:  # the last word of a document is its EOS, alone
            offsets = getattr(dataset, f"{s}_words")
            ends, starts = offsets.take(ends, mode="clip"), offsets.take(ends - 1, mode="clip")
            if (ends - starts != 1).any() or (tokens.take(ends - 1, mode="clip") != eos).any():
                yield f"{s}_words", "has a document whose last word is not its EOS"
        elif (tokens.take(ends - 1, mode="clip") != eos).any():
            yield "documents", "has a document that does not end with its EOS"


def _parts(array, full, pieces=64, size=1 << 16):
    """The whole array if it is short or asked for, else evenly spread pieces of it."""
    if len(array) <= FULL_CHECK:
        return [array]
    step = FULL_CHECK if full else max(size, (len(array) - size) // (pieces - 1))
    return (array[i:i + (step + 1 if full else size)] for i in range(0, len(array), step))


# ---------------------------------------------------------------------------------------------------------------------
# the mixture: sequence i of a stage is always the same tokens, whatever the world size, rank, worker or restart

class Source(NamedTuple):
    """The shards that a kind of sequence is drawn from, with the cumulated share of each."""
    shards: list
    cumulated: np.ndarray


def sets_in(folder):
    """The data sets that a folder holds, if it is not one itself."""
    inside = [] if (Path(folder) / "meta.json").exists() else sorted(p.parent for p in Path(folder).glob("*/meta.json"))
    return inside or [Path(folder)]


def open_source(kind, sets, tokenizer=None, units=None, length=1):
    """sets: a list of folders, drawn in proportion to their size, or a dict of folder -> weight.

    tokenizer, units: as for open_set. length: of the sequences that will be drawn, in tokens
    """
    if not sets:
        raise DataError(f"{kind}: no data set named; set --{kind}='[\"FOLDER\"]'")
    weights = sets if isinstance(sets, dict) else dict.fromkeys(sets)
    streams = {"text": ("text",), "speech": ("speech",), "interleaved": ("text", "speech")}[kind]
    shards, shares = [], []
    for folder, weight in weights.items():
        opened = [open_set(f, tokenizer, units) for f in sets_in(folder)]
        for shard in opened:
            if any(getattr(shard, s) is None for s in streams):
                raise DataError(f"{shard.folder}: a {shard.meta['kind']} set cannot give {kind} sequences")
            if len(streams) == 1 and len(getattr(shard, kind)) < length:
                raise DataError(f"{shard.folder / kind}.npy: {len(getattr(shard, kind))} tokens, fewer than a sequence"
                                f" of {length}; use a shorter --sequence_length or more data")
        sizes = np.array([sum(len(getattr(shard, s)) for s in streams) for shard in opened], float)
        shards += opened
        shares += list(sizes if weight is None else weight * sizes / sizes.sum())
    if min(shares) < 0 or sum(shares) <= 0:
        raise DataError(f"{kind}: the weights of the data sets are {list(weights.values())}; give positive ones")
    return Source(shards, np.cumsum(shares) / np.sum(shares))


def uniform(seed, stage, index, draw):
    """Uniform numbers in [0, 1) as a pure function of four integers (arrays broadcast): a counter-based generator.

    Each integer goes through the finaliser of splitmix64 (Steele, Lea and Flood 2014), so neighbours are unrelated.
    """
    x = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in (seed, stage, index, draw):
            x = (x ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0 ** -53


def kinds_of(mixture, index):
    """The kind of each sequence: mixture {kind: parts} as a fixed, evenly spread pattern that repeats: exact parts."""
    spread = sorted(((j + 0.5) / parts, kind) for kind, parts in mixture.items() for j in range(parts))
    return np.array([kind for _, kind in spread])[np.asarray(index) % len(spread)]


def sample(sources, mixture, seed, stage, index, length, vocab, text_span=(10, 30), speech_span=(5, 15)):
    """The sequences `index` (int array [n]) of a stage -> (int64 [n, length], number of leading text-only rows).

    sources   {kind: Source}; mixture {kind: integer parts}; vocab has .vocab_size, .n_units and .switch
    Text-only sequences come first, so that the model can skip the speech modules for these rows.
    """
    index = np.asarray(index)
    kinds = kinds_of(mixture, index)
    order = np.argsort(kinds != "text", kind="stable")
    index, kinds = index[order], kinds[order]
    which = uniform(seed, stage, index, 0)
    rows = np.empty((len(index), length), np.int64)
    for kind in mixture:
        source = sources[kind]
        shard = np.where(kinds == kind, np.searchsorted(source.cumulated, which, side="right"), -1)
        for s in np.unique(shard[shard >= 0]):
            mine = np.flatnonzero(shard == s)
            if kind == "interleaved":
                made = interleave(source.shards[s], seed, stage, index[mine], length, vocab, text_span, speech_span)
            else:
                made = windows(source.shards[s], kind, seed, stage, index[mine], length, vocab)
            rows[mine] = made
    return rows, int((kinds == "text").sum())


def windows(shard, stream, seed, stage, index, length, vocab):
    """Random windows of `length` tokens out of one stream; documents follow one another, separated by EOS."""
    tokens = getattr(shard, stream)
    start = (uniform(seed, stage, index, 1) * (len(tokens) - length + 1)).astype(np.int64)
    rows = tokens[start[:, None] + np.arange(length)].astype(np.int64)  # [n, length]
    return rows + vocab.vocab_size if stream == "speech" else rows


def interleave(shard, seed, stage, index, length, vocab, text_span=(10, 30), speech_span=(5, 15), margin=4):
    """Sequences that change modality at word boundaries -> int64 [n, length]. No loop over words or samples.

    From a random word and a random first modality on, spans of text_span words of text and of speech_span words of
    speech take turns (uniform lengths, ends included), across documents, and past the end from the beginning again; a
    switch token stands between two spans.
    """
    n, n_words = len(index), len(shard.text_words) - 1
    n_spans = 2 * -(-length // (text_span[0] + 2) // margin) + 2  # two spans, two switches: text_span[0] + 2 at least
    draws = uniform(seed, stage, np.asarray(index)[:, None], np.arange(1, n_spans + 3))  # [n, n_spans + 2]
    start, speech_first = (draws[:, 0] * n_words).astype(np.int64), draws[:, 1] < 0.5
    speech = (np.arange(n_spans) + speech_first[:, None]) % 2 == 1  # [n, n_spans], is it a speech span?
    least, most = np.where(speech[..., None], speech_span, text_span).transpose(2, 0, 1)
    words = least + (draws[:, 2:] * (most - least + 1)).astype(np.int64)  # words in each span

    word = np.cumsum(np.concatenate([start[:, None], words], axis=1), axis=1)  # [n, n_spans + 1] where spans begin
    lap, word = np.divmod(word, n_words)
    edge = {s: offsets[word] + lap * offsets[-1] for s, offsets in
            (("text", shard.text_words), ("speech", shard.speech_words))}
    begin = np.where(speech, edge["speech"][:, :-1], edge["text"][:, :-1])
    end = np.where(speech, edge["speech"][:, 1:], edge["text"][:, 1:])

    has_switch = np.arange(n_spans) > 0  # the switch counts as the first token of its span
    filled = np.minimum(np.cumsum(end - begin + has_switch, axis=1), length)  # [n, n_spans] tokens so far
    if filled[:, -1].min() < length:  # with this margin 1 would do for sure; far fewer spans usually do
        return interleave(shard, seed, stage, index, length, vocab, text_span, speech_span, margin=1)
    size = np.diff(filled, axis=1, prepend=0).ravel()  # what of each span fits into the row
    first = np.cumsum(size) - size  # where each span begins in the output
    source = np.repeat((begin - has_switch).ravel() - first, size) + np.arange(n * length)
    is_speech = np.repeat(speech.ravel(), size)

    row = np.empty(n * length, np.int64)
    for stream, at in ((shard.text, np.flatnonzero(~is_speech)), (shard.speech, np.flatnonzero(is_speech))):
        its_source = source[at]
        row[at] = stream[its_source % len(stream) if lap.any() else its_source]  # % takes long
    row += vocab.vocab_size * is_speech
    row[first[np.tile(has_switch, n) & (size > 0)]] = vocab.switch
    return row.reshape(n, length)


class Batch(NamedTuple):
    """A micro-batch: the model reads tokens[:, :-1] and is scored on tokens[:, 1:], switch tokens aside."""
    tokens: torch.Tensor  # [B, T + 1] int64
    text_rows: int        # the first so many rows hold no speech at all
    n_text: int           # scored text and speech targets
    n_speech: int
    n_runs: int           # of one modality in the other rows, at least: rounded up, so that there are few such numbers


def make_batch(rows, text_rows, vocab, pin=False):
    """rows int64 [B, T+1] -> Batch."""
    targets = rows[:, 1:]
    n_text = int((targets < vocab.vocab_size).sum())
    n_speech = targets.size - n_text - int((targets == vocab.switch).sum())
    is_speech = (rows[text_rows:, :-1] >= vocab.vocab_size) & (rows[text_rows:, :-1] != vocab.switch)
    n_runs = len(is_speech) + int((is_speech[:, 1:] != is_speech[:, :-1]).sum())
    tokens = torch.from_numpy(rows)
    return Batch(tokens.pin_memory() if pin else tokens, text_rows, n_text, n_speech, -(-n_runs // 256) * 256)


def prefetch(make, items, depth=2):
    """Yield make(item) for each item, made ahead in a thread (numpy lets go of the interpreter in its inner loops)."""
    ready, stop = queue.Queue(depth), threading.Event()

    def work():
        try:
            for item in items:
                made = (make(item), None)
                while not stop.is_set():
                    try:
                        ready.put(made, timeout=0.1)
                        break
                    except queue.Full:
                        pass
                if stop.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as e:  # handed over, and raised where the batch is asked for
            ready.put((None, e))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            made, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield made
    finally:
        stop.set()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("python data.py FOLDER   checks a data set, or all in it, whole and prints what it holds")
    for folder in sets_in(sys.argv[1]):
        print(f"{folder}: {json.dumps(open_set(folder, full=True).meta, indent=1)}")
