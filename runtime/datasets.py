"""
Data sets on disk: written whole or not at all, and checked when they are opened.

A data set is a folder with one meta.json and plain .npy arrays, which are memory-mapped. There are three kinds:

    text     text.npy    uint16 [n]      the token ids of all documents in a row; each document ends with the text EOS
    speech   speech.npy  uint16 [m]      speech units 0 .. n_units-1; each document ends with the speech EOS = n_units
    paired   both of them, and two tables of offsets that cut both streams into the same w words:
             text_words.npy    int64 [w+1]   word i is written as text[text_words[i]:text_words[i+1]], never empty,
             speech_words.npy  int64 [w+1]   and spoken as speech[speech_words[i]:speech_words[i+1]], perhaps empty.
             A document's EOS is its last word in both streams, so any span of words is one slice in either modality.
    all      documents.npy     int64 [d+1]   where documents start, in tokens (paired: in words); the last is the end

meta.json holds {format, kind, source, documents, words, text: {tokens, vocab_size, eos, tokenizer}, speech: {tokens,
n_units, rate, vocabulary}, sha256}. `tokenizer` and `vocabulary` are hashes of the tokenizer and of the units that the
set was made with. A model reads only sets that were made with its own. A paired set can also be used as a text set or
as a speech set. A folder of data sets can be used as one set with several shards.
"""
import hashlib
import json
import reprlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.files import DataError, digest, get_field, read_array, read_json, whole_folder

FORMAT = 1
STREAMS = {"text": ("text",), "speech": ("speech",), "paired": ("text", "speech")}
NUMBERS = {"text": ["text.tokens", "text.vocab_size", "text.eos"],  # what meta.json must say about each stream
           "speech": ["speech.tokens", "speech.n_units", "speech.rate"]}
FULL_CHECK = 1 << 26     # elements; arrays up to this size are checked whole when a set is opened, which takes 0.1 s


def write_set(folder, kind, documents, tokenizer=None, units=None, source=""):
    """Write a data set -> its meta.json as a dict. The folder appears whole, or not at all.

    documents   an iterable. For kind text and speech: of 1-D sequences of ids. For kind paired: of (text words, speech
                words), two lists of equal length with the ids of each word. EOS is added here, as the last word.
    tokenizer   has .vocab_size, .eos and .hash; needed where there is text
    units       dict(n_units, rate in Hz, hash); needed where there is speech
    """
    folder, streams, paired = Path(folder), STREAMS[kind], kind == "paired"
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it or write elsewhere")
    if (tokenizer and tokenizer.vocab_size > 1 << 16) or (units and units["n_units"] >= 1 << 16):
        raise DataError(f"{folder}: ids are kept in 16 bits: at most 65536 of a tokenizer and 65535 units")
    eos = {"text": tokenizer.eos if tokenizer else None, "speech": units["n_units"] if units else None}
    tokens = {stream: [] for stream in streams}       # an array for each document
    word_sizes = {stream: [0] for stream in streams}  # the tokens of each word, of all documents
    starts = [0]
    for document in documents:
        for stream, words in zip(streams, document if paired else [[document]], strict=True):
            words = [np.asarray(word, np.uint16) for word in [*words, [eos[stream]]]]
            tokens[stream].append(np.concatenate(words))
            word_sizes[stream] += [len(word) for word in words]
        if paired:
            assert len(document[0]) == len(document[1]), "a paired document needs as many spoken words as written ones"
        starts.append(starts[-1] + len(words if paired else tokens[kind][-1]))
    if len(starts) == 1:
        raise DataError(f"{folder}: not one document to write")

    arrays = {stream: np.concatenate(tokens[stream]) for stream in streams}
    arrays["documents"] = np.array(starts, np.int64)
    meta = dict(format=FORMAT, kind=kind, source=source, documents=len(starts) - 1)
    if paired:
        for stream in streams:
            arrays[f"{stream}_words"] = np.cumsum(word_sizes[stream], dtype=np.int64)
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
        meta["sha256"] = checksum(new, meta)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def checksum(folder, meta):
    """SHA-256 of meta.json, without its own sha256, and of all arrays in the folder, in hex."""
    total = hashlib.sha256(json.dumps({**meta, "sha256": None}, sort_keys=True).encode())
    for path in sorted(folder.glob("*.npy")):
        total.update(bytes.fromhex(digest(path)))
    return total.hexdigest()


class DataSet(NamedTuple):
    """One opened folder, which is one shard. The arrays are memory maps; those that its kind lacks are None."""
    folder: Path
    meta: dict
    documents: np.ndarray
    text: np.ndarray | None = None
    speech: np.ndarray | None = None
    text_words: np.ndarray | None = None
    speech_words: np.ndarray | None = None

    def document(self, i):
        """(text ids, units, word offsets in text, in speech) of document i of a paired set, int64, with its EOS."""
        first, end = self.documents[i], self.documents[i + 1]
        text_words, speech_words = self.text_words[first:end + 1], self.speech_words[first:end + 1]
        ids = self.text[text_words[0]:text_words[-1]].astype(np.int64)
        units = self.speech[speech_words[0]:speech_words[-1]].astype(np.int64)
        return ids, units, text_words - text_words[0], speech_words - speech_words[0]


def open_set(folder, tokenizer=None, units=None, full=False):
    """Open a data set and check it -> DataSet.

    tokenizer, units   hashes that the set must have been made with (None: any)
    full               check every element and the sha256; otherwise long arrays are checked in samples
    Raises DataError naming the file, the fault and the remedy.
    """
    folder = Path(folder)
    meta = read_meta(folder / "meta.json")
    for stream, key, wanted in (("text", "tokenizer", tokenizer), ("speech", "vocabulary", units)):
        if wanted is not None and stream in STREAMS[meta["kind"]] and meta[stream].get(key) != wanted:
            raise DataError(f"{folder / 'meta.json'}: made with {stream} {key} {reprlib.repr(meta[stream].get(key))}, "
                            f"the model has {wanted!r}; make the set again with the model's own")
    names = ["documents", *STREAMS[meta["kind"]]]
    if meta["kind"] == "paired":
        names += ["text_words", "speech_words"]
    try:
        dataset = DataSet(folder, meta, **{name: read_array(folder / f"{name}.npy") for name in names})
    except ValueError as error:
        raise DataError(f"{error}; make the set again") from None
    check_arrays(dataset, full)
    check_ends(dataset, full)
    if full and "sha256" in meta and meta["sha256"] != checksum(folder, meta):
        raise DataError(f"{folder}: a file is not as it was written (sha256 in meta.json); make the set again")
    return dataset


def read_meta(path):
    """Read a meta.json and check that it holds all that opening its set needs -> dict. DataError."""
    if not path.exists():
        raise DataError(f"{path.parent}: no data set here (no meta.json); make one with python -m corpora.NAME")
    try:
        meta = read_json(path)
    except ValueError as error:
        raise DataError(f"{error}; make the set again") from None
    if meta.get("kind") not in list(STREAMS):
        raise DataError(f"{path}: not a data set's description (kind); make the set again")
    fields = ["format", "documents", "words"] if meta["kind"] == "paired" else ["format", "documents"]
    for stream in STREAMS[meta["kind"]]:
        fields += NUMBERS[stream]
    for field in fields:
        if type(get_field(meta, field)) is not int:
            raise DataError(f"{path}: not a data set's description ({field}); make the set again")
    if meta["format"] != FORMAT:
        raise DataError(f"{path}: format {meta['format']}, not {FORMAT}; make the set again")
    return meta


def array_error(dataset, name, fault):
    return DataError(f"{dataset.folder / name}.npy: {fault}; make the set again")


def check_arrays(dataset, full):
    """Raise DataError if an array is not as long as meta.json says, or holds ids or offsets that cannot be."""
    meta, streams, paired = dataset.meta, STREAMS[dataset.meta["kind"]], dataset.meta["kind"] == "paired"
    # {name: (length, largest number)}
    expected = {"documents": (meta["documents"] + 1, meta["words"] if paired else meta[streams[0]]["tokens"])}
    for stream in streams:
        n_ids = meta["text"]["vocab_size"] if stream == "text" else meta["speech"]["n_units"] + 1
        expected[stream] = meta[stream]["tokens"], n_ids - 1
        if paired:
            expected[f"{stream}_words"] = meta["words"] + 1, meta[stream]["tokens"]

    for name, (length, largest) in expected.items():
        array, is_offsets = getattr(dataset, name), name not in streams
        dtype = np.dtype(np.int64 if is_offsets else np.uint16)
        if array.dtype != dtype or array.shape != (length,) or length == 0:
            raise array_error(dataset, name, f"is {array.dtype} {list(array.shape)}, not {dtype} [{length}]")
        if is_offsets and (array[0] != 0 or array[-1] != largest):
            raise array_error(dataset, name, f"goes from {array[0]} to {array[-1]}, not from 0 to {largest}")
        least = 0 if name == "speech_words" else 1  # a short word may have no unit
        for piece in pieces(array, full):
            if piece.min() < 0 or piece.max() > largest:
                raise array_error(dataset, name, f"holds a number outside 0..{largest}")
            if is_offsets and (np.diff(piece) < least).any():
                raise array_error(dataset, name, "has offsets that do not rise")


def check_ends(dataset, full):
    """Raise DataError if a document does not end with its EOS."""
    for stream in STREAMS[dataset.meta["kind"]]:
        tokens, ends = getattr(dataset, stream), dataset.documents[1:]
        if len(tokens) > FULL_CHECK and not full:  # to look at every document's end is to read most of the file
            ends = ends[::-(1 + len(ends) // 1000)]
        last, name = ends - 1, "documents"  # last: where the EOS of each document is
        if dataset.meta["kind"] == "paired":  # so far this counts words, and the EOS must be a word of its own
            name = f"{stream}_words"
            offsets = getattr(dataset, name)
            last, ends = offsets.take(last, mode="clip"), offsets.take(ends, mode="clip")
        eos = dataset.meta[stream]["eos" if stream == "text" else "n_units"]
        if (ends - last != 1).any() or (tokens.take(last, mode="clip") != eos).any():
            raise array_error(dataset, name, "has a document that does not end with its EOS")


def pieces(array, full):
    """Yield the array in pieces that overlap by one element; or 64 samples of it, if it is long and not full."""
    if full or len(array) <= FULL_CHECK:
        starts, size = range(0, len(array), FULL_CHECK), FULL_CHECK
    else:
        starts, size = np.linspace(0, len(array) - (1 << 16), 64, dtype=np.int64), 1 << 16
    for start in starts:
        yield array[start:start + size + 1]
