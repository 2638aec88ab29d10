"""
From data sets to batches: the mixture of text, speech and interleaved sequences, and the loader for training.

A data set (runtime/datasets.py) is a folder of plain .npy arrays, which are memory-mapped. There are three kinds:

    text     the token ids of all documents in a row; each document ends with the text EOS
    speech   speech units 0 .. n_units-1; each document ends with the speech EOS
    paired   both of them, cut into the same words: word i is written as text[text_words[i]:text_words[i+1]] and spoken
             as speech[speech_words[i]:speech_words[i+1]]. Any span of words is one slice of either array.

In a batch all symbols share one id space: text ids, then units, then the speech EOS, then the switch token.

    python data.py FOLDER       check a data set, or all data sets in a folder, in full and describe them
"""
import json
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import Layout, make_layout
from runtime.datasets import open_set
from runtime.files import DataError, find_files

STEPS_AHEAD = 2  # number of steps for which the loader makes batches in advance


# ---------------------------------------------------------------------------------------------------------------------
# the mixture. Sequence i of a stage has the same tokens on any number of processes and after any restart.

class Source(NamedTuple):
    """The data sets (shards) from which one kind of sequence is drawn, and their cumulative shares."""
    shards: list
    cumulated: np.ndarray


def sets_in(folder):
    """The data sets in a folder, at any depth, or the folder itself if it is a data set."""
    folder = Path(folder)
    if (folder / "meta.json").exists() or not folder.is_dir():
        return [folder]
    # Sets that are still being written are in hidden folders, which find_files leaves out.
    inside = [path.parent for path in find_files(folder, ["meta.json"]) if path.name == "meta.json"]
    return inside or [folder]


def open_source(kind, sets, tokenizer=None, units=None, length=1):
    """Open all data sets for one kind of sequence: "text", "speech" or "interleaved" -> Source.

    sets               a list of folders, drawn in proportion to their size, or a dict {folder: weight}
    tokenizer, units   hashes that the sets must have been made with (None: any)
    length             number of tokens in a sequence that will be drawn
    """
    if not sets:
        raise DataError(f"{kind}: no data set named; set --{kind}='[\"FOLDER\"]'")
    weights = sets if isinstance(sets, dict) else dict.fromkeys(sets)
    streams = ("text", "speech") if kind == "interleaved" else (kind,)
    shards, shares = [], []
    for folder, weight in weights.items():
        sizes = []  # of the folder's shards, in tokens
        for path in sets_in(folder):
            shard = open_set(path, tokenizer, units)
            if any(getattr(shard, stream) is None for stream in streams):
                raise DataError(f"{shard.folder}: a {shard.meta['kind']} set cannot give {kind} sequences")
            size = sum(len(getattr(shard, stream)) for stream in streams)
            if kind != "interleaved" and size < length:
                raise DataError(f"{shard.folder / kind}.npy: {size} tokens, fewer than a sequence of {length}; use a"
                                f" shorter --sequence_length or more data")
            shards.append(shard)
            sizes.append(size)
        sizes = np.array(sizes, float)
        shares += list(sizes if weight is None else weight * sizes / sizes.sum())
    if not (min(shares) >= 0 and 0 < sum(shares) < np.inf):
        raise DataError(f"{kind}: the weights of the data sets are {list(weights.values())}; give positive ones")
    return Source(shards, np.cumsum(shares) / np.sum(shares))


def uniform(seed, stage_number, index, draw):
    """Uniform random numbers in [0, 1) as a pure function of four integers (arrays broadcast).

    This is a counter-based generator. The finaliser of splitmix64 (Steele, Lea and Flood 2014) mixes in one integer
    after the other, so that neighbouring integers give unrelated numbers.
    """
    x = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in (seed, stage_number, index, draw):
            x = (x ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 2.0 ** -53


def kinds_of(mixture, index):
    """The kind of each sequence. A mixture {kind: parts} gives a repeating pattern, with each kind evenly spread."""
    spread = sorted(((j + 0.5) / parts, kind) for kind, parts in mixture.items() for j in range(parts))
    return np.array([kind for _, kind in spread])[np.asarray(index) % len(spread)]


def sample(sources, mixture, seed, stage_number, index, length, config, text_span=(10, 30), speech_span=(5, 15)):
    """Make the sequences with the numbers `index` [n] -> rows int64 [n, length].

    sources              {kind: Source}
    mixture              {kind: parts}, whole numbers
    seed, stage_number   integers; together with the number of a sequence they determine its tokens
    config               has .vocab_size and .switch
    """
    index = np.asarray(index)
    kinds = kinds_of(mixture, index)
    rows = np.empty((len(index), length), np.int64)
    for kind in mixture:
        of_kind = np.flatnonzero(kinds == kind)
        # the shard of the source from which each sequence comes
        shards = np.searchsorted(sources[kind].cumulated, uniform(seed, stage_number, index[of_kind], 0), side="right")
        for i in np.unique(shards):
            shard, at = sources[kind].shards[i], of_kind[shards == i]
            if kind == "interleaved":
                rows[at] = interleave(shard, seed, stage_number, index[at], length, config, text_span, speech_span)
            else:
                rows[at] = windows(shard, kind, seed, stage_number, index[at], length, config)
    return rows


def describe(sources, mixture, seed, stage_number, index):
    """Name sequences for a message -> list of strings like "sequence 123 (interleaved, data/demo/paired)"."""
    names = []
    for i, kind in zip(index, kinds_of(mixture, index)):
        which = np.searchsorted(sources[kind].cumulated, uniform(seed, stage_number, i, 0), side="right")
        shard = sources[kind].shards[which]
        names.append(f"sequence {i} ({kind}, {shard.folder})")
    return names


def windows(shard, stream, seed, stage_number, index, length, config):
    """Random windows of one stream -> int64 [n, length]. Documents follow one another, separated by EOS."""
    tokens = getattr(shard, stream)
    start = (uniform(seed, stage_number, index, 1) * (len(tokens) - length + 1)).astype(np.int64)
    rows = tokens[start[:, None] + np.arange(length)].astype(np.int64)  # [n, length]
    return rows + config.vocab_size if stream == "speech" else rows


# ---------------------------------------------------------------------------------------------------------------------
# sequences of both modalities

def draw_spans(shard, seed, stage_number, index, n_spans, text_span, speech_span):
    """Draw the first n_spans spans of each sequence -> (is_speech, begin, end), each [n, n_spans].

    is_speech    whether a span is speech
    begin, end   where the tokens of a span begin and end in their stream. After its last word a stream starts again
                 from the first word, so these numbers may be larger than the length of the stream.
    """
    draws = uniform(seed, stage_number, np.asarray(index)[:, None], np.arange(1, n_spans + 3))  # [n, n_spans + 2]
    n_words = len(shard.text_words) - 1
    first_word = (draws[:, :1] * n_words).astype(np.int64)    # [n, 1]
    speech_first = draws[:, 1:2] < 0.5                        # [n, 1], whether the sequence begins with speech
    is_speech = (np.arange(n_spans) + speech_first) % 2 == 1  # [n, n_spans]
    least = np.where(is_speech, speech_span[0], text_span[0])
    most = np.where(is_speech, speech_span[1], text_span[1])
    words = least + (draws[:, 2:] * (most - least + 1)).astype(np.int64)  # [n, n_spans], number of words

    borders = np.cumsum(np.concatenate([first_word, words], axis=1), axis=1)  # [n, n_spans + 1], counted in words
    lap, word = np.divmod(borders, n_words)
    in_text = shard.text_words[word] + lap * len(shard.text)  # the same borders, counted in tokens of each stream
    in_speech = shard.speech_words[word] + lap * len(shard.speech)
    begin = np.where(is_speech, in_speech[:, :-1], in_text[:, :-1])
    end = np.where(is_speech, in_speech[:, 1:], in_text[:, 1:])
    return is_speech, begin, end


def interleave(shard, seed, stage_number, index, length, config, text_span=(10, 30), speech_span=(5, 15)):
    """Make sequences that change modality at word boundaries -> int64 [n, length].

    A sequence starts at a random word in a random modality. Spans of text and of speech alternate, with a switch token
    between them. text_span is (fewest, most) words in a span of text, and every number in this range is equally likely.
    speech_span is the same for speech. A sequence continues across documents. There is no loop over words.
    """
    n, n_spans = len(index), 2 + length // (2 * text_span[0] + 4)  # nearly always enough; otherwise doubled below
    while True:
        is_speech, begin, end = draw_spans(shard, seed, stage_number, index, n_spans, text_span, speech_span)
        begin[:, 1:] -= 1  # make room for the switch token before each span but the first
        filled = np.minimum(np.cumsum(end - begin, axis=1), length)  # [n, n_spans], tokens in the row so far
        if filled[:, -1].min() == length:
            break
        n_spans *= 2
    size = np.diff(filled, axis=1, prepend=0)           # [n, n_spans], tokens of each span that fit into the row
    first = np.cumsum(size).reshape(size.shape) - size  # [n, n_spans], where each begins in the flattened rows

    # For each position of the flattened rows [n * length]: its modality, and the index of its token in that stream.
    is_speech = np.repeat(is_speech.ravel(), size.ravel())
    token = np.arange(n * length) + np.repeat((begin - first).ravel(), size.ravel())
    rows = np.empty(n * length, np.int64)
    rows[~is_speech] = shard.text.take(token[~is_speech], mode="wrap")
    rows[is_speech] = shard.speech.take(token[is_speech], mode="wrap")
    rows[is_speech] += config.vocab_size
    rows[first[:, 1:][size[:, 1:] > 0]] = config.switch
    return rows.reshape(n, length)


def prompt_sequence(context, continuation, modalities, config, bos=True, whole=False, prefix=()):
    """Lay out a prompt and its continuation: EOS, context, a switch token if the modality changes, continuation.

    Scoring uses it for stories and their endings, sampling for prompts.
    context, continuation   lists of ids, in the id space that all symbols share; the context may be empty
    modalities              "text" or "speech" for each of the two
    bos                     begin with the EOS of the modality that comes first
    whole                   score the context too, not only the continuation
    prefix                  ids to put at the very beginning, in the place of that EOS
    Returns (ids, (first, end)): ids[first:end] are to be scored. ids[0] is never scored.
    """
    ids = [*prefix]
    if bos and not prefix:
        ids = [config.eos_token_id if modalities[0] == "text" else config.speech_eos]
    ids += [*context]
    if len(context) and modalities[0] != modalities[1]:
        ids += [config.switch]
    first = 1 if whole else max(1, len(ids))
    return [*ids, *continuation], (first, len(ids) + len(continuation))


# ---------------------------------------------------------------------------------------------------------------------
# batches

class Batch(NamedTuple):
    """A micro-batch on the CPU. The model reads ids and predicts targets, the id that follows each of them."""
    ids: torch.Tensor      # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T]
    layout: Layout
    index: np.ndarray      # int64 [B], the number of each sequence in the stage

    def apply(self, function):
        """The batch with a function applied to each tensor, e.g. one that moves it to a GPU."""
        layout = Layout(*(tensor if tensor is None else function(tensor) for tensor in self.layout))
        return Batch(function(self.ids), function(self.targets), layout, self.index)


def micro_batches(step, sources, stage, stage_number, settings, config, world):
    """Make this process's batches of one step -> list[Batch]. For the parameters, see loader.

    Text sequences come first, in separate batches. In these, layout.speech is None, and the model skips its speech
    modules. There are two exceptions. The last batch of a step uses every trained module, because there
    DistributedDataParallel waits for a gradient of every trained parameter. If only the speech modules are trained, no
    batch skips them, because it would have no gradient at all.
    """
    # In each step, all processes together read the same sequences, no matter how many processes there are.
    n = settings.batch_tokens // settings.sequence_length // world.size
    index = (step * world.size + world.rank) * n + np.arange(n)
    is_text = kinds_of(stage["mixture"], index) == "text"
    parts = []
    for group in (index[is_text], index[~is_text]):
        if len(group):
            parts += np.array_split(group, -(-len(group) // settings.micro_batch))
    batches = []
    for i, part in enumerate(parts):
        rows = torch.from_numpy(sample(sources, stage["mixture"], settings.seed, stage_number, part,
                                       settings.sequence_length + 1, config, settings.text_span, settings.speech_span))
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        layout = make_layout(ids, targets, config)
        needs_speech = stage["train"] == "new" or stage["train"] == "all" and i == len(parts) - 1
        if kinds_of(stage["mixture"], part[0]) == "text" and not needs_speech:
            layout = layout._replace(speech=None)
        batches.append(Batch(ids, targets, layout, part))
    if world.device.type == "cuda":  # page-locked memory is copied to a GPU while the CPU does other work
        batches = [batch.apply(torch.Tensor.pin_memory) for batch in batches]
    return batches


def loader(sources, stage, stage_number, first, settings, config, world):
    """Yield (step, micro-batches of this process) for each step of a stage, from step `first` on.

    sources        {kind: Source}
    stage          dict with steps, mixture {kind: parts} and train ("all", "new" or "text")
    stage_number   seeds the sampling, together with the step
    settings       has seed, batch_tokens, sequence_length, micro_batch, text_span and speech_span
    config         the model's Config
    world          a runtime.distributed.World
    A thread makes the batches of the next steps. If it fails at a step, the exception is raised at that step.
    """

    def start_thread():  # a new thread works with the first GPU, and page-locked memory would take room there
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)

    steps, worker = range(first, stage["steps"]), ThreadPoolExecutor(1, initializer=start_thread)
    jobs = (worker.submit(micro_batches, step, sources, stage, stage_number, settings, config, world) for step in steps)
    waiting = deque(islice(jobs, STEPS_AHEAD))
    try:
        for step in steps:
            waiting.extend(islice(jobs, 1))
            yield step, waiting.popleft().result()
    finally:  # also when the caller leaves its loop early
        worker.shutdown(cancel_futures=True)


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    elif len(sys.argv) != 2:
        raise SystemExit("name the folder of a data set: python data.py FOLDER")
    else:
        for folder in sets_in(sys.argv[1]):
            print(f"{folder}: {json.dumps(open_set(folder, full=True).meta, indent=1)}")
