"""
Data sets on disk. A set is written completely or not at all, and checked when it is opened.

A data set is a folder with a meta.json and plain .npy arrays, which are memory-mapped. There are three kinds:

    text     text.npy    uint16 [n]      the token ids of all documents in a row; each document ends with the text EOS
    speech   speech.npy  uint16 [m]      speech units 0 .. n_units-1; each document ends with the speech EOS = n_units
    paired   both of them, and two tables of offsets that cut both streams into the same w words:
             text_words.npy    int64 [w+1]   word i is text[text_words[i]:text_words[i+1]], which is never empty
             speech_words.npy  int64 [w+1]   word i is speech[speech_words[i]:speech_words[i+1]], which may be empty
             The EOS of a document is its last word in both streams. Any span of words is one slice of either array.
    all      documents.npy     int64 [d+1]   where documents start and the last one ends, in tokens (paired: in words)

meta.json holds {format, kind, source, documents, words, text: {tokens, vocab_size, eos, tokenizer}, speech: {tokens,
n_units, rate, vocabulary}, sha256}. `tokenizer` and `vocabulary` are hashes of the tokenizer and of the units with
which the set was made. A model reads only sets that have the same hashes as the model. A paired set can also be used as
a text set or as a speech set. A folder of data sets can be used as one set with several shards.
"""
import hashlib
import json
import mmap
import reprlib
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runtime.files import DataError, digest, read_array, read_json, reading, whole_folder

FORMAT = 1
STREAMS = {"text": ("text",), "speech": ("speech",), "paired": ("text", "speech")}  # of each kind of set
FULL_CHECK = 1 << 26  # when a set is opened, arrays of up to this many elements are checked in full, in 0.1 s


def write_set(folder, kind, documents, tokenizer=None, units=None, source=""):
    """Write a data set, completely or not at all -> its meta.json as a dict.

    documents   an iterable. Kinds text and speech: 1-D sequences of ids. Kind paired: pairs (text words, speech words),
                two lists of equal length with the ids of each word. EOS is added here as the last word.
    tokenizer   has .vocab_size, .eos and .hash; needed for text
    units       dict(n_units, rate in Hz, hash); needed for speech
    """
    folder, streams, paired = Path(folder), STREAMS[kind], kind == "paired"
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it or write elsewhere")
    if (tokenizer and tokenizer.vocab_size > 1 << 16) or (units and units["n_units"] >= 1 << 16):
        raise DataError(f"{folder}: ids are kept in 16 bits: at most 65536 of a tokenizer and 65535 units")
    eos = {"text": tokenizer.eos if tokenizer else None, "speech": units["n_units"] if units else None}
    with whole_folder(folder) as new:
        arrays = {stream: GrowingArray(new / f"{stream}.npy", np.uint16) for stream in streams}
        offsets = {stream: GrowingArray(new / f"{stream}_words.npy", np.int64, [0]) for stream in streams if paired}
        starts = GrowingArray(new / "documents.npy", np.int64, [0])
        for document in documents:
            for stream, words in zip(streams, document if paired else [[document]], strict=True):
                words = [np.asarray(word, np.uint16) for word in [*words, [eos[stream]]]]
                if paired:
                    offsets[stream].append(len(arrays[stream]) + np.cumsum([len(word) for word in words]))
                arrays[stream].append(np.concatenate(words))
            if paired:
                assert len(document[0]) == len(document[1]), "a paired document needs as many spoken as written words"
            starts.append([len(offsets["text"]) - 1 if paired else len(arrays[kind])])
        for array in (*arrays.values(), *offsets.values(), starts):
            array.close()
        if len(starts) == 1:
            raise DataError(f"{folder}: not one document to write")
        meta = dict(format=FORMAT, kind=kind, source=source, documents=len(starts) - 1)
        if paired:
            meta["words"] = len(offsets["text"]) - 1
        if "text" in streams:
            meta["text"] = dict(tokens=len(arrays["text"]), vocab_size=tokenizer.vocab_size, eos=tokenizer.eos,
                                tokenizer=tokenizer.hash)
        if "speech" in streams:
            meta["speech"] = dict(tokens=len(arrays["speech"]), n_units=units["n_units"], rate=units["rate"],
                                  vocabulary=units["hash"])
        meta["sha256"] = checksum(new, meta)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


class GrowingArray:
    """A 1-D array in an .npy file that is written piece by piece, so that it need not fit into memory."""

    def __init__(self, path, dtype, first=()):
        self.file, self.dtype, self.length = open(path, "wb"), np.dtype(dtype), 0
        self.write_header()
        self.append(first)

    def __len__(self):
        return self.length

    def write_header(self):
        # numpy leaves room in the header for any length, so it can be written again when the length is known.
        header = dict(descr=np.lib.format.dtype_to_descr(self.dtype), fortran_order=False, shape=(self.length,))
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values):
        array = np.asarray(values, self.dtype)
        self.file.write(array.tobytes())
        self.length += len(array)

    def close(self):
        self.file.seek(0)
        self.write_header()
        self.file.close()


def checksum(folder, meta):
    """SHA-256, in hex, of meta.json (without its entry sha256) and of all arrays in the folder."""
    total = hashlib.sha256(json.dumps({**meta, "sha256": None}, sort_keys=True).encode())
    for path in sorted(folder.glob("*.npy")):
        total.update(bytes.fromhex(digest(path)))
    return total.hexdigest()


class DataSet(NamedTuple):
    """An opened data set, or shard. The arrays are memory-mapped. Arrays that its kind does not have are None."""
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
    DataError names the file, the fault and the remedy.
    """
    folder, path = Path(folder), Path(folder) / "meta.json"
    if not path.exists():
        raise DataError(f"{folder}: no data set here (no meta.json); make one with python -m corpora.NAME")
    try:
        meta = read_json(path)
        with reading(path, "not a data set's description"):
            expected = expected_arrays(meta)
        arrays = {name: read_array(folder / f"{name}.npy") for name in expected}
    except ValueError as error:
        raise DataError(f"{error}; make the set again") from None
    for stream, key, wanted in (("text", "tokenizer", tokenizer), ("speech", "vocabulary", units)):
        if wanted is not None and stream in STREAMS[meta["kind"]] and meta[stream].get(key) != wanted:
            raise DataError(f"{path}: made with {stream} {key} {reprlib.repr(meta[stream].get(key))}, "
                            f"the model has {wanted!r}; make the set again with the model's own")
    dataset = DataSet(folder, meta, **arrays)
    if not full:  # the checks touch few places, and reading ahead at each would read most of a file that is not cached
        advise(arrays, mmap.MADV_RANDOM)
    for name in expected:
        fault = find_fault(arrays[name], name, *expected[name], full)
        if not fault and name in ("text", "speech") and not all_end_with_eos(dataset, name, full):
            fault = "has a document that does not end with its EOS"
        if fault:
            raise DataError(f"{folder / name}.npy: {fault}; make the set again")
    if full and "sha256" in meta and meta["sha256"] != checksum(folder, meta):
        raise DataError(f"{folder}: a file is not as it was written (sha256 in meta.json); make the set again")
    advise(arrays, mmap.MADV_NORMAL)
    return dataset


def advise(arrays, advice):
    """Tell the system how memory-mapped arrays will be read."""
    for array in arrays.values():
        array._mmap.madvise(advice)


def expected_arrays(meta):
    """{name: (length, largest number)} for the arrays of a set. Any exception may be raised if meta.json is invalid."""
    if meta["format"] != FORMAT:
        raise ValueError(f"format {reprlib.repr(meta['format'])}, not {FORMAT}")
    streams, paired = STREAMS[meta["kind"]], meta["kind"] == "paired"
    tokens = {stream: index(meta[stream]["tokens"]) for stream in streams}
    end = index(meta["words"]) if paired else tokens[streams[0]]  # where the last document ends
    expected = {"documents": (index(meta["documents"]) + 1, end)}  # offsets come before the arrays that they index
    if paired:
        expected |= {f"{stream}_words": (end + 1, tokens[stream]) for stream in streams}
    for stream in streams:
        largest = index(meta["text"]["vocab_size"]) - 1 if stream == "text" else index(meta["speech"]["n_units"])
        if not 0 <= eos_of(meta, stream) <= largest or index(meta.get("speech", {}).get("rate", 1)) < 1:
            raise ValueError("eos or rate is out of range")
        expected[stream] = tokens[stream], largest
    return expected


def eos_of(meta, stream):
    """The id that ends each document of a stream."""
    return meta["text"]["eos"] if stream == "text" else meta["speech"]["n_units"]


def find_fault(array, name, length, largest, full):
    """The fault of an array, or "": a wrong type or length, or an invalid id or offset."""
    is_offsets = name not in ("text", "speech")
    dtype = np.dtype(np.int64 if is_offsets else np.uint16)
    if array.dtype != dtype or array.shape != (length,) or length == 0:
        return f"is {array.dtype} {list(array.shape)}, not {dtype} [{length}]"
    if is_offsets and (array[0] != 0 or array[-1] != largest):
        return f"goes from {array[0]} to {array[-1]}, not from 0 to {largest}"
    least = 0 if name == "speech_words" else 1  # a short word may have no unit
    for piece in pieces(array, full):
        if piece.min() < 0 or piece.max() > largest:
            return f"holds a number outside 0..{largest}"
        if is_offsets and (np.diff(piece) < least).any():
            return "has offsets that do not rise"
    return ""


def all_end_with_eos(dataset, stream, full):
    """Whether each document ends with EOS. In a paired set, EOS must also be a word by itself."""
    tokens, ends = getattr(dataset, stream), dataset.documents[1:]
    if len(tokens) > FULL_CHECK and not full:  # checking every document would read most of the file
        ends = ends[::-(1 + len(ends) // 1000)]
    last = ends - 1                            # the position of the EOS
    if dataset.meta["kind"] == "paired":       # convert positions of words to positions of tokens
        offsets = getattr(dataset, f"{stream}_words")
        last, ends = offsets.take(last, mode="clip"), offsets.take(ends, mode="clip")
    return (ends - last == 1).all() and (tokens.take(last, mode="clip") == eos_of(dataset.meta, stream)).all()


def pieces(array, full):
    """Yield the array in pieces that overlap by one element, or 64 samples if the array is long and `full` is false."""
    if full or len(array) <= FULL_CHECK:
        starts, size = range(0, len(array), FULL_CHECK), FULL_CHECK
    else:
        starts, size = np.linspace(0, len(array) - (1 << 16), 64, dtype=np.int64), 1 << 16
    for start in starts:
        yield array[start:start + size + 1]
