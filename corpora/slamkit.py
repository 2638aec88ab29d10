"""
Units that slamkit made: its features.jsonl or tokens.jsonl, with word times if there are any.

    python -m corpora.slamkit --source=features.jsonl --out=data/librilight --units=units/mhubert

Source: slamkit's cli/extract_features.py and cli/prepare_tokens.py (slp-rl/slamkit on GitHub, see its example_data/).
Licence: that of the recordings.

Layout: --source is a .jsonl file, perhaps compressed, or a folder of them. Each line is a recording, in one of two
forms:

    {"file_name": "a/b.flac", "units": [3, 49, 7], "duration": [1, 1, 4]}     features.jsonl; durations in frames
    {"file_name": "a/b.flac", "audio_repr": "<Un3><Un49><Un7>"}               tokens.jsonl, made from it

Both give the same speech set. Because every recording is in both files, a folder with both forms is refused. A line of
tokens.jsonl that holds text, as slamkit writes it for interleaved training, is dropped ("not only units").

With --meta=FOLDER and features.jsonl the set is paired. FOLDER/b.json then holds the words of a/b.flac, as
parse_transcriptions() in slamkit/utils/data_prep.py writes them, in seconds:

    {"text": "She had", "aligned_text": [["She", 0.1, 0.32], [" had", 0.32, 0.6]]}

Nothing in the files says which units they hold: --units must be the same k-means model. A unit that it does not have
ends the run. Equal neighbouring units become one unit. --shard=i/n takes the lines i, i + n, i + 2n, ...
"""

import itertools
import re
import sys
from pathlib import Path

import numpy as np

from configurator import configure
from corpora import tokens
from corpora.files import JSONL, numbered_lines
from corpora.parts import Bad
from runtime.files import DataError, find_files, one_line, parse_json, read_json, reading
from speech.transcripts import match_words
from speech.word_times import timed_word

DEFAULTS = dict(
    source="",            # a .jsonl file, or a folder of them
    meta="",              # folder with a .json for each recording that holds its words and their times: a paired set
    out="",               # folder for the data set; all shards go to the same folder
    units="",             # folder of the unit vocabulary
    tokenizer="",         # a tokenizer.json; needed with --meta
    shard="0/1",          # i/n makes the i-th of n shards, from 0; shards can run anywhere, in any order
    part_tokens=1 << 26,  # the data set is written in parts of about this many tokens
)
LARGEST = 10**6  # units and durations are smaller; larger numbers might not fit the integers that follow


def integers(values):
    """A list of integers from 0 to LARGEST as int64 [n]. ValueError for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value <= LARGEST for value in values):
        raise ValueError(f"not a list of integers from 0 to {LARGEST}: {str(values)[:60]}")
    return np.array(values, np.int64)


def read_record(record, name):
    """(units int64 [n], durations in frames int64 [n] or None) of a line. ValueError "REASON: details"."""
    with reading(f"unreadable record: {name}"):
        text, units, durations = record.get("audio_repr"), None, None
        if text is None:
            units, durations = integers(record["units"]), integers(record["duration"])
            if len(units) != len(durations):
                raise ValueError(f"{len(units)} units, but {len(durations)} durations")
        elif re.fullmatch("(?:<Un[0-9]{1,6}>)*", text):
            units = integers([int(number) for number in re.findall("[0-9]+", text)])
    if units is None:
        raise ValueError(f"not only units: {name} holds {text[:60]!r}")
    if len(units) == 0:
        raise ValueError(f"empty sample: {name}")
    return units, durations


def read_words(folder, record, name):
    """(text, [(word, start, end), ...]) of a recording, with times in seconds. ValueError."""
    try:
        path = Path(folder) / f"{Path(record['file_name']).stem}.json"
        meta = read_json(path)
        with reading(path, "no words with times"):
            timed = [timed_word(word, start, end, path) for word, start, end in meta["aligned_text"]]
            return meta["text"].split(), timed
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no word times: {name} ({one_line(error)})") from None


def document(line, name, meta, tokenizer, units):
    """The Document of a line. ValueError "REASON: details", or DataError."""
    with reading(f"unreadable record: {name}"):
        record = parse_json(line, name, dict)
    spoken, durations = read_record(record, name)
    if spoken.max() >= units["n_units"]:
        raise DataError(f"{name}: unit {spoken.max()}, but --units has {units['n_units']}; give the vocabulary that "
                        f"the file was made with")
    spoken = spoken.astype(np.uint16)
    if not meta:
        return tokens.speech_document(spoken, durations, units["rate"])
    if durations is None:
        raise ValueError(f"no durations: {name}; words need features.jsonl")
    words, timed = read_words(meta, record, name)
    longest = (int(durations.sum()) + 1) / units["rate"]  # the audio may exceed its frames by a part of one
    spans = match_words(words, timed, longest)
    return tokens.paired_document(words, tokenizer.encode_words(words), spans, spoken, durations, units["rate"])


def all_lines(files):
    """Yield (id, line) for each line of the files. A file that breaks off counts as one more, a Bad."""
    for path in files:
        try:
            yield from numbered_lines(path)
        except ValueError as error:
            yield Bad(str(path), ValueError(f"unreadable file: {path} ({one_line(error)})"))


def read_lines(lines, meta, tokenizer, units):
    """Yield the Document of each line, or a Bad."""
    for entry in lines:
        if isinstance(entry, Bad):
            yield entry
            continue
        name, line = entry
        try:
            yield document(line, name, meta, tokenizer, units)
        except ValueError as error:
            yield Bad(name, error)


def check_forms(files):
    """SystemExit if some of the files are in the form of tokens.jsonl and others in that of features.jsonl."""
    forms = {}
    for path in files:
        _, line = next(numbered_lines(path), (None, ""))
        forms['"audio_repr"' in line] = path
    if len(forms) == 2:
        raise SystemExit(f"{forms[True]} and {forms[False]} have both forms, perhaps of the same recordings; "
                         f"give one file to --source, or a folder with one form")


def main():
    settings, _ = configure(DEFAULTS, sys.argv[1:])
    kind = "paired" if settings["meta"] else "speech"
    shard, n_shards = tokens.check(settings, kind)
    files = find_files(settings["source"], JSONL)
    if not files:
        raise SystemExit(f"--source={settings['source']}: no .jsonl file there")
    check_forms(files)
    tokenizer, units = tokens.load_vocabularies(settings, kind)

    def read(first):
        lines = itertools.islice(all_lines(files), shard + first * n_shards, None, n_shards)
        return read_lines(lines, settings["meta"], tokenizer, units)

    try:
        report = tokens.make("slamkit", kind, read, files, tokenizer, units, shard, n_shards, settings)
    except RuntimeError as error:  # an optional package is missing
        raise SystemExit(str(error)) from None
    tokens.print_report(report, settings["out"])


if __name__ == "__main__":
    main()
