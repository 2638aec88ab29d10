"""
Utterances cut into words, for word segmentation (Table 3) and for the layer weights along an utterance.

Utterances come from a paired data set, with estimated times, or from the recordings of a corpus, with true times.
"""
import importlib
import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.hear import check_units
from data import open_source
from runtime.checkpoint import made_with
from runtime.files import read_json
from runtime.tokenizer import Tokenizer


def open_tokenizer(folder):
    path = folder / "tokenizer.json"
    return Tokenizer(path) if path.exists() else None


class Utterance(NamedTuple):
    units: np.ndarray           # int64 [n]
    words: list                 # as written
    offsets: np.ndarray         # int64 [words + 1]: word i is units[offsets[i]:offsets[i + 1]]
    starts: np.ndarray | None   # float64 [n + 1]: times in seconds at which units start, and the end of the last one
    ends: np.ndarray | None     # float64 [words]: times in seconds at which words end; None: with their last units
    first_tokens: np.ndarray | None = None  # int64 [words]: the first text token of each word; None: not known

    def boundaries(self):
        """Indices of the units that begin a word, int64. The first unit is not among them."""
        inner = np.unique(self.offsets[1:-1])
        return inner[(inner > 0) & (inner < len(self.units))]

    def boundary_times(self):
        """Times of the boundaries in seconds, float64."""
        inner = self.starts[self.boundaries()] if self.ends is None else np.unique(self.ends[:-1])
        return inner[(inner > self.starts[0]) & (inner < self.starts[-1])]


def read_utterances(folder, model, settings):
    """Utterances from a paired set, or from recordings if --corpus is set. ValueError if none has two words."""
    found = (read_recordings if settings.corpus else read_paired)(folder, model, settings)
    utterances = list(itertools.islice((u for u in found if len(u.units) > 1), settings.utterances))
    if not any(len(u.boundaries()) for u in utterances):
        raise ValueError(f"{folder}: no word boundary inside any utterance")
    return utterances


def read_paired(folder, model, settings):
    """Yield the utterances of a paired set. An utterance that is too long for the model is cut between words.

    Times are estimated from the mean durations of units, and None if these are not known.
    """
    longest = model.net.config.max_position_embeddings - 1  # the speech EOS comes first
    tokenizer, durations = open_tokenizer(model.folder), mean_durations(Path(settings.units or model.folder))
    for shard in open_source("interleaved", [folder], *made_with(model.folder)).shards:
        for i in range(shard.meta["documents"]):
            ids, units, text_offsets, speech_offsets = shard.document(i)
            first, n_words = 0, len(speech_offsets) - 2  # the last word of a document is its EOS
            while first < n_words:
                fitting = np.searchsorted(speech_offsets[:-1], speech_offsets[first] + longest, side="right") - 1
                last = max(first + 1, int(fitting))
                offsets, edges = speech_offsets[first:last + 1], text_offsets[first:last + 1]
                words = [tokenizer.decode(ids[a:b]).strip() if tokenizer else "" for a, b in zip(edges, edges[1:])]
                piece, starts = units[offsets[0]:offsets[-1]], None
                if durations is not None:
                    starts = np.append(0, np.cumsum(durations[piece] / shard.meta["speech"]["rate"]))
                yield Utterance(piece, words, offsets - offsets[0], starts, None, ids[edges[:-1]])
                first = last


def mean_durations(folder):
    """Mean duration of each unit in frames, from units.json in the folder or its sound/. None if neither has them."""
    for path in (folder / "units.json", folder / "sound/units.json"):
        if path.exists() and (durations := read_json(path).get("durations")):
            return np.array(durations)
    return None


def read_recordings(folder, model, settings):
    """Yield the utterances that corpora/NAME.py finds, with true times. Prints which items cannot be used, and why."""
    from corpora.common import Bad
    from speech.units import load_units

    check_units(settings.units, model.folder)
    vocabulary = load_units(settings.units, settings.device)
    reader = importlib.import_module(f"corpora.{settings.corpus}")
    options = dict(kind="paired", aligner="", max_seconds=300.0, mel=False, sa=False, alignments="", lower=False)
    for path in reader.find(Path(folder), options):
        for item in reader.read(path, options):
            try:
                if isinstance(item, Bad):
                    raise item.error
                yield read_item(item, vocabulary, options, model.net.config.max_position_embeddings - 1)
            except ValueError as error:
                print(f"left out: {error}")


def read_item(item, vocabulary, options, longest):
    """An item of a corpus -> Utterance of at most `longest` units. ValueError if the item cannot be used."""
    from corpora.common import hear
    from speech.transcripts import assign_units
    from speech.units import n_frames

    heard = hear(item, options, Counter())
    [(ids, frame_start)] = vocabulary.encode([heard.waveform])
    if len(ids) > longest:
        raise ValueError(f"{item.id}: {len(ids)} units, the model reads {longest}")
    total, words = n_frames(heard.n_samples, vocabulary), item.text.split()
    offsets = assign_units(words, heard.times, frame_start, total, vocabulary.rate)
    starts, ends = np.append(frame_start, total) / vocabulary.rate, np.array([end for _, end in heard.times])
    return Utterance(ids.astype(np.int64), words, offsets, starts, ends)
