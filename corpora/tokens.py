"""
The token files of the paper's authors: speech and text that they have turned into units and tokens, with word times.

    python -m corpora.tokens --source=SmolTolk/data/libriheavy --split=small --out=data/libriheavy-small \\
        --units=units/mhubert --tokenizer=weights/smollm-360m/tokenizer.json

Source: huggingface.co/Anon-SmolTolk. Licence: see there, and the corpora that the files were made from. We have not had
these files. Their format is what the code that trains on them expects: dataset.py and scripts/ in
Anon-SmolTolk/SmolTolk on GitHub, commit cc5b8d6.

Layout: --source is the folder of one corpus. SPLIT is train, small, dev-clean and the like.

    mhubert25hzl11/SPLIT.bin   uint16   units 0 .. 499; each sample ends with the EOS 500
    mhubert25hzl11/SPLIT.len   uint64   tokens of each sample, with its EOS; some files are uint16
    mhubert25hzl11/SPLIT.dur   uint8    frames of each token in .bin, the EOS included
    smollm/SPLIT.bin, .len     the same for text; the EOS is 0
    smollm/SPLIT.wrds_tms_len  uint64   text tokens of each word; each EOS is a word of its own
    smollm/SPLIT.wrds_tms      float32  end of each word in seconds from the start of its sample, or NaN

The .len file has the type whose numbers sum to the length of .bin. A split with word times becomes a paired set,
otherwise a speech or text set. meta.pkl is not read, and neither are the other files, which the release makes from
these. Nothing in the files says which units and which tokenizer they were made with: --units must be the same k-means
model, converted with tools/convert.py, and --tokenizer SmolLM's. A token that they do not have ends the run.

Our rules, as for any other corpus, turn word times into units (speech.units.word_units). A very short word may own no
unit. The release gives such a word one unit anyway, the first one of the next word. Equal neighbouring units become one
unit. A sample is dropped if its words are not the words of its text, if a word has no time, or if the times fall or
exceed the audio. dropped.jsonl says which samples and why, and report.json counts the reasons.

--shard=i/n takes the i-th of n equal runs of samples. Shards can run side by side, one core each.
"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from corpora.common import check_paths, listing_hash, read_shard
from corpora.parts import Bad, Document, finished_parts, write_part, write_report
from runtime.files import DataError, reading
from runtime.tokenizer import Tokenizer
from speech.transcripts import assign_units, fill_spans
from speech.units import collapse, read_vocabulary

DEFAULTS = dict(
    source="",                       # folder of one corpus, such as data/libriheavy
    split="train",                   # the files to read, without their endings
    speech_folder="mhubert25hzl11",  # folder of the units in --source
    text_folder="smollm",            # folder of the text in --source
    kind="",                         # paired, speech or text; empty: paired with word times, otherwise what there is
    out="",                          # folder for the data set; all shards go to the same folder
    units="",                        # folder of the unit vocabulary; not needed for text
    tokenizer="",                    # a tokenizer.json; not needed for speech
    shard="0/1",                     # i/n makes the i-th of n shards, from 0; shards can run anywhere, in any order
    part_tokens=1 << 26,             # the data set is written in parts of about this many tokens
)
BLOCK = 256  # samples in a block; a part holds whole blocks
PIECE = 1 << 22  # words that are read at once


# ---------------------------------------------------------------------------------------------------------------------
# The files. A ValueError names the one that is damaged.

class Stream(NamedTuple):
    """The samples of speech or of text. Sample i is tokens[bounds[i]:bounds[i + 1]], with its EOS."""
    path: str  # the .bin file
    tokens: np.ndarray  # uint16, memory-mapped
    bounds: np.ndarray  # int64 [samples + 1]
    eos: int
    largest: int  # the largest id of the vocabulary, or the EOS
    setting: str  # where the vocabulary comes from


class Words(NamedTuple):
    """The words of all samples. Sample i has the words starts[i] to starts[i + 1], the last of which is the EOS."""
    path: str  # the .wrds_tms file
    sizes: np.ndarray  # uint64, memory-mapped; text tokens
    ends: np.ndarray  # float32, memory-mapped; seconds
    starts: np.ndarray  # int64 [samples + 1]


class Split(NamedTuple):
    """The opened files of a split. Those that its kind of set does not need are None."""
    name: str
    text: Stream | None
    speech: Stream | None
    durations: np.ndarray | None  # uint8, memory-mapped; frames of each token of speech
    words: Words | None


def read_raw(path, dtype):
    """The numbers in a file without a header, memory-mapped and read-only. ValueError."""
    with reading(path):
        return np.memmap(path, dtype, "r")


def read_bounds(path, n_tokens):
    """Where samples start and the last one ends, int64 [samples + 1], from a .len file. ValueError."""
    raw = read_raw(path, np.uint8)
    for dtype in ("<u8", "<u2"):
        if len(raw) % np.dtype(dtype).itemsize:
            continue
        lengths = raw.view(dtype)
        if 0 < lengths.min() and lengths.max() <= n_tokens and lengths.sum(dtype=np.int64) == n_tokens:
            return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    raise ValueError(f"{path}: neither as uint64 nor as uint16 are these lengths that sum to the {n_tokens} tokens of "
                     f"its .bin")


def open_stream(stem, eos, largest, setting):
    """Open STEM.bin and STEM.len -> Stream. ValueError."""
    tokens = read_raw(f"{stem}.bin", "<u2")
    return Stream(f"{stem}.bin", tokens, read_bounds(f"{stem}.len", len(tokens)), eos, largest, setting)


def open_words(stem, bounds):
    """Open STEM.wrds_tms and STEM.wrds_tms_len -> Words. bounds: of the samples of text. ValueError."""
    sizes = read_raw(f"{stem}.wrds_tms_len", "<u8")
    ends = read_raw(f"{stem}.wrds_tms", "<f4")
    if len(ends) != len(sizes):
        raise ValueError(f"{stem}.wrds_tms: {len(ends)} word ends, but {len(sizes)} words in {stem}.wrds_tms_len")
    return Words(f"{stem}.wrds_tms", sizes, ends, first_words(f"{stem}.wrds_tms_len", sizes, bounds))


def first_words(path, sizes, bounds):
    """The number of the first word of each sample, and of all words: int64 [samples + 1].

    path: of the sizes; sizes: text tokens of each word; bounds: of the samples of text. ValueError if a sample does not
    end where a word ends. The sizes are read in pieces, because there may be a billion.
    """
    starts, tokens, done = np.zeros(len(bounds), np.int64), 0, 1  # starts[:done] are known
    for first in range(0, len(sizes), PIECE):
        piece = sizes[first:first + PIECE]
        if piece.max() > bounds[-1]:
            raise ValueError(f"{path}: a word of {piece.max()} tokens, but the text has {bounds[-1]}")
        ends = tokens + np.cumsum(piece, dtype=np.int64)
        inside = bounds[done:np.searchsorted(bounds, ends[-1], side="right")]  # ends of samples in this piece
        last = np.searchsorted(ends, inside)
        if (ends[last] != inside).any():
            sample = done - 1 + np.flatnonzero(ends[last] != inside)[0]
            raise ValueError(f"{path}: sample {sample} of the text does not end where a word ends")
        starts[done:done + len(inside)] = first + last + 1
        done, tokens = done + len(inside), ends[-1]
    if tokens != bounds[-1]:
        raise ValueError(f"{path}: its words have {tokens} tokens, but the text has {bounds[-1]}")
    return starts


def open_split(settings, kind, tokenizer, units):
    """Open the files that a kind of set needs -> Split. ValueError."""
    speech_stem, text_stem = stems(settings)
    text = speech = durations = words = None
    if kind != "text":
        speech = open_stream(speech_stem, units["n_units"], units["n_units"], "--units")
    if kind != "speech":
        text = open_stream(text_stem, tokenizer.eos, tokenizer.vocab_size - 1, "--tokenizer")
    if kind == "paired" or (kind == "speech" and os.path.exists(f"{speech_stem}.dur")):
        durations = read_raw(f"{speech_stem}.dur", np.uint8)
        if len(durations) != len(speech.tokens):
            raise ValueError(f"{speech_stem}.dur: {len(durations)} durations, but {len(speech.tokens)} tokens in "
                             f"{speech.path}")
    if kind == "paired":
        if len(text.bounds) != len(speech.bounds):
            raise ValueError(f"{text_stem}.len: {len(text.bounds) - 1} samples, but {len(speech.bounds) - 1} in "
                             f"{speech_stem}.len")
        words = open_words(text_stem, text.bounds)
    return Split(f"{Path(settings['source']).name}/{settings['split']}", text, speech, durations, words)


def stems(settings):
    """(path of the units, path of the text) of a split, without endings."""
    folders = settings["speech_folder"], settings["text_folder"]
    return [os.path.join(settings["source"], folder, settings["split"]) for folder in folders]


def find_kind(settings):
    """The kind of set that a split becomes. SystemExit if it has no files, or if that has to be said."""
    speech, text = stems(settings)
    if settings["kind"]:
        return settings["kind"]
    if os.path.exists(f"{text}.wrds_tms"):
        return "paired"
    found = [kind for kind, stem in (("speech", speech), ("text", text)) if os.path.exists(f"{stem}.bin")]
    if not found:
        raise SystemExit(f"--source={settings['source']}: neither {speech}.bin nor {text}.bin is there; check --split, "
                         f"--speech_folder and --text_folder")
    if len(found) == 2:
        raise SystemExit(f"{text}.wrds_tms is missing, so there are no word times; write --kind=speech or --kind=text")
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------
# From samples to documents. A ValueError "REASON: details" drops one sample, a DataError ends the run.

def read_sample(stream, i):
    """The ids of sample i without its EOS, uint16 [n]. ValueError or DataError."""
    ids = np.array(stream.tokens[stream.bounds[i]:stream.bounds[i + 1]])
    if ids.max() > stream.largest:
        raise DataError(f"{stream.path}: sample {i} holds {ids.max()}, but {stream.setting} only goes up to "
                        f"{stream.largest}; give the one that the file was made with, or copy the file again")
    if ids[-1] != stream.eos:
        raise DataError(f"{stream.path}: sample {i} ends with {ids[-1]}, not with the EOS {stream.eos} of "
                        f"{stream.setting}; give the one that the file was made with, or copy the file again")
    if len(ids) == 1:
        raise ValueError(f"empty sample: {i} in {stream.path}")
    if stream.eos in ids[:-1]:
        raise ValueError(f"EOS inside a sample: {i} in {stream.path}")
    return ids[:-1]


def text_document(ids, tokenizer):
    """The Document of a text."""
    text = tokenizer.decode_bytes(ids)
    words = len(text.decode(errors="replace").split())
    return Document(ids, dict(size=len(ids), words=words, bytes=len(text)))


def speech_document(units, durations, rate):
    """The Document of units. durations: in frames of 1 / rate seconds, or None if they are not known."""
    ids, _ = collapse(units)
    if durations is None:
        return Document(ids, dict(size=len(ids)))
    return Document(ids, dict(size=len(ids), hours=int(durations.sum(dtype=np.int64)) / rate / 3600))


def paired_document(words, written, spans, units, durations, rate):
    """The Document of a text and its recording.

    words      as written
    written    the token ids of each word
    spans      (start, end) of each word in seconds
    units      uint16 [n]
    durations  frames of each unit, 1 / rate seconds long, int [n]

    ValueError for a word without tokens, a unit without a duration, and word times that assign_units() refuses.
    """
    if not all(map(len, written)):
        raise ValueError(f"word without tokens: {words[[len(ids) for ids in written].index(0)]!r}")
    durations = durations.astype(np.int64)
    if durations.min() < 1:
        raise ValueError(f"impossible durations: unit {durations.argmin()} has {durations.min()} frames")
    ids, first = collapse(units)
    frame_start, n_frames = (np.cumsum(durations) - durations)[first], int(durations.sum())
    offsets = assign_units(words, spans, frame_start, n_frames, rate)
    spoken = [ids[start:end] for start, end in itertools.pairwise(offsets)]
    size = sum(map(len, written)) + len(ids)
    text_size = len(" ".join(words).encode())
    return Document((written, spoken), dict(size=size, hours=n_frames / rate / 3600, words=len(words), bytes=text_size))


def cut_text(ids, sizes, tokenizer):
    """(words as written, token ids of each), where each word has `sizes` tokens.

    ValueError if these are not the words of the text: one is empty, or two, or a word was cut.
    """
    bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    written = [ids[start:end] for start, end in itertools.pairwise(bounds)]
    pieces = [tokenizer.decode(word) for word in written]
    words = [piece.strip() for piece in pieces]
    if words != "".join(pieces).split():
        wrong = next((word for word in words if word.split() != [word]), "a cut one")
        raise ValueError(f"tokens are not words: {wrong[:60]!r} in {''.join(pieces)[:60]!r}")
    return words, written


def word_spans(words, ends, n_frames, rate):
    """(start, end) of each word in seconds, where each starts at the end of the one before.

    ends: float32, seconds. ValueError if an end is missing, falls or is outside the audio by more than a frame.
    """
    if not np.isfinite(ends).all():
        raise ValueError(f"word without a time: word {np.flatnonzero(~np.isfinite(ends))[0] + 1} of {len(words)}")
    # float32 cannot hold 20.48 and gives a little more or less, perhaps in the next frame. 0.1 ms are exact enough.
    ends = ends.astype(np.float64).round(4)
    longest = (n_frames + 1) / rate  # the audio may exceed its frames by a part of one
    # A pause belongs to the word after it, so a word may last long, and fill_spans() must see the ends alone.
    ends = [end for _, end in fill_spans(words, [(end, end) for end in ends], longest)]
    return list(itertools.pairwise([0.0, *ends]))


def document(split, i, tokenizer, units):
    """The Document of sample i of a split. ValueError or DataError."""
    if split.speech is None:
        return text_document(read_sample(split.text, i), tokenizer)
    spoken, durations = read_sample(split.speech, i), None
    if split.durations is not None:
        durations = split.durations[split.speech.bounds[i]:split.speech.bounds[i + 1] - 1]
    if split.text is None:
        return speech_document(spoken, durations, units["rate"])
    first, last = split.words.starts[i], split.words.starts[i + 1] - 1  # `last` is the word that is the EOS
    if split.words.sizes[last] != 1:
        raise ValueError(f"tokens are not words: the last word has {split.words.sizes[last]} tokens, the EOS has one")
    words, written = cut_text(read_sample(split.text, i), split.words.sizes[first:last], tokenizer)
    spans = word_spans(words, split.words.ends[first:last], int(durations.sum(dtype=np.int64)), units["rate"])
    return paired_document(words, written, spans, spoken, durations, units["rate"])


def read_split(split, tokenizer, units, shard, n_shards, first):
    """Yield the Document of each sample of a shard, or a Bad, from its sample number `first` on."""
    samples = len((split.speech or split.text).bounds) - 1
    for i in range(samples * shard // n_shards + first, samples * (shard + 1) // n_shards):
        name = f"{split.name}:{i}"
        try:
            yield document(split, i, tokenizer, units)
        except ValueError as error:
            yield Bad(name, ValueError(f"{error} ({name})"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line, also of corpora/slamkit.py

def check(settings, kind):
    """Return (shard, n_shards). SystemExit for wrong settings."""
    if kind not in ("paired", "speech", "text"):
        raise SystemExit(f"--kind={kind}: write paired, speech or text")
    check_paths(settings, kind)
    return read_shard(settings["shard"])


def load_vocabularies(settings, kind):
    """(the Tokenizer or None, dict(n_units, rate, hash) or None) that a kind of set needs. SystemExit.

    The model that makes the units need not be there, because nothing is encoded.
    """
    tokenizer = Tokenizer(settings["tokenizer"]) if kind != "speech" else None
    if kind == "text":
        return tokenizer, None
    try:
        about, _ = read_vocabulary(settings["units"])
        with reading(settings["units"], "units.json has no rate"):
            return tokenizer, dict(n_units=about["n_units"], rate=int(about["rate"]), hash=about["hash"])
    except ValueError as error:
        raise SystemExit(str(error)) from None


def make_blocks(items, bar):
    """Yield blocks of items in the form that write_part takes."""
    block = list(itertools.islice(items, BLOCK))
    while block:
        following = list(itertools.islice(items, BLOCK))
        bar.update(len(block))
        yield block, {}, not following
        block = following


def make(corpus, kind, read, files, tokenizer, units, shard, n_shards, settings):
    """Make the missing parts of one shard, and return the report. SystemExit if that fails.

    read       function of `first` that yields a Document or a Bad for each item of the shard, from number `first` on
    files      the files that are read; the parts in --out must have been made from the same ones
    settings   all settings of the script; parts made with others are refused, except for those in DEFAULTS
    """
    out = Path(settings["out"])
    own = {key: value for key, value in settings.items() if key not in DEFAULTS}
    identity = own | dict(
        corpus=corpus, kind=kind, files=listing_hash(settings["source"], files), shards=n_shards, block=BLOCK,
        part_tokens=settings["part_tokens"], tokenizer=tokenizer and tokenizer.hash, units=units and units["hash"])
    out.mkdir(parents=True, exist_ok=True)
    done = finished_parts(out, shard, n_shards, identity)
    first = done[-1]["next"] if done else 0
    with tqdm(unit=" samples", desc=corpus, initial=first, disable=None) as bar:
        blocks = make_blocks(read(first), bar)
        while not (done and done[-1]["last"]):
            folder = out / f"shard-{shard}-of-{n_shards}-{len(done):05}"
            done.append(write_part(folder, first, blocks, settings["part_tokens"], kind, tokenizer, units, identity))
            first = done[-1]["next"]
    name = "report.json" if n_shards == 1 else f"report-{shard}-of-{n_shards}.json"
    return write_report(out / name, dict(corpus=corpus, shard=f"{shard}/{n_shards}", kind=kind), done)


def print_report(report, out):
    """Print a report. SystemExit if there is not one document."""
    print(json.dumps(report, indent=1))
    if report["documents"] == 0:
        raise SystemExit(f"{out}: not one document from {report['items']} items; dropped {report['dropped']}")


def main():
    settings, _ = configure(DEFAULTS, sys.argv[1:])
    kind = find_kind(settings)
    shard, n_shards = check(settings, kind)
    tokenizer, units = load_vocabularies(settings, kind)
    try:
        split = open_split(settings, kind, tokenizer, units)
    except ValueError as error:
        raise SystemExit(f"{error}; copy the file again") from None
    files = [Path(f"{stem}{ending}") for stem in stems(settings)
             for ending in (".bin", ".len", ".dur", ".wrds_tms", ".wrds_tms_len")]
    files = [path for path in files if path.exists()]

    def read(first):
        return read_split(split, tokenizer, units, shard, n_shards, first)

    try:
        report = make("tokens", kind, read, files, tokenizer, units, shard, n_shards, settings)
    except RuntimeError as error:  # an optional package is missing
        raise SystemExit(str(error)) from None
    print_report(report, settings["out"])


if __name__ == "__main__":
    main()
