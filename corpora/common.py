"""
Turn a corpus into a data set: items become audio, units, word times and tokens, and are written to disk in parts.

    python -m corpora.librispeech --source=LibriSpeech --out=data/librispeech --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --kind=paired --aligner=aligners/mms --shard=0/8

An item is an utterance, or a document of text. The script of a corpus defines two functions and hands them to main():

    find(source, settings)     returns the files that list or hold the items, as a sorted list of paths
    read(path, settings)       yields the items of one such file: an Item, or a Bad for one that cannot be used

Worker processes read the sound, make mel units, and match known word times with the transcript (hear). For a text set
they tokenise (encode). The main process holds the neural networks. It makes the units and word times that need a
network, and assigns units to words (finish). It writes the documents in parts (parts.py). After a kill, the same
command resumes after the last finished part. The data is the same as without the kill.

An item with any fault is dropped. dropped.jsonl in its part says why, and report.json in --out counts the reasons.
Files below --source that no item comes from are listed in left_out.json, and report.json counts their endings.

Only the main process reads the files of a corpus. For a text set it can keep four or five workers busy. To use more
cores or GPUs, start several shards. torchrun does that: each of its processes takes a shard, and a GPU if there is one.

    torchrun --nproc_per_node=4 -m corpora.librilight --source=librilight --out=data/librilight --units=units/mhubert
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from corpora.parts import Bad, Document, finished_parts, write_part, write_report
from runtime.files import find_files, one_line, read_json, replace_file
from runtime.hub import local_folder
from runtime.tokenizer import Tokenizer
from speech.align import align, load_aligner
from speech.audio import SAMPLE_RATE, SUFFIXES, check_sound, read_audio
from speech.transcripts import assign_units, match_words
from speech.units import load_units, n_frames, read_vocabulary

DEFAULTS = dict(
    source="",                    # folder of the corpus, or one of its files
    out="",                       # folder for the data set; all shards of a corpus go to the same folder
    kind="paired",                # paired (text and speech, aligned word by word), speech, or text
    units="",                     # folder of the unit vocabulary; not needed for text
    tokenizer="",                 # a tokenizer.json; not needed for speech
    aligner="",                   # finds missing word times: folder of MMS's aligner, or pocketsphinx
    shard="0/1",                  # i/n takes the items i, i + n, i + 2n, ...; shards can run anywhere, in any order
    shard_by="items",             # or files: i/n takes the files i, i + n, ..., and reads no others
    workers=os.cpu_count() or 1,  # processes that read sound, make mel units and tokenise; 0: one thread
    device="auto",                # where HuBERT and the aligner run: cpu, cuda, or auto
    part_tokens=1 << 26,          # the data set is written in parts of about this many tokens
    max_tokens=0,                 # stop after about this many tokens, over all shards; 0: take the whole corpus
    val_share=0.0,                # share of the items that are held out; a hash of an item's id decides
    split="train",                # train: all items that are not held out; val: only these
    max_seconds=300.0,            # items with longer audio are dropped
)
PART_NAME = re.compile(r"(?:\.unfinished-)?shard-\d+-of-\d+-\d{5}")  # the folder of a part, see make()
REPORT_NAME = re.compile(r"report(?:-\d+-of-\d+)?\.json|left_out\.json")
BLOCK = dict(text=256, speech=64, paired=64)  # items in a block; a worker takes a sixteenth of a block at a time
IDENTITY = ("part_tokens", "max_tokens", "val_share", "split", "max_seconds", "shard_by")  # they determine the data
MISSING = 20  # a run ends if the sound of so many first items does not exist
AHEAD = 2  # how many blocks the workers may be ahead of the main process


class Item(NamedTuple):
    """What read() yields: an utterance, or a document of text."""
    id: str
    audio: object = None  # path or bytes of a sound file, or a function -> (waveform, [(start, end) of each word])
    start: float = 0.0  # seconds; the item is [start, end) of the sound file
    end: float | None = None
    text: str | None = None  # as written; its words are text.split()
    words: list | None = None  # [(word, start, end), ...], in seconds of the sound file


@dataclass
class Heard:
    """An item with sound, as a worker passes it to the main process."""
    item: Item  # without its audio
    n_samples: int
    waveform: np.ndarray | None = None  # float32 [n_samples] at 16 kHz, if the main process needs it
    units: tuple | None = None  # (ids, frame_start); None if the main process makes them
    times: list | ValueError | None = None  # (start, end) of each word from the start of the item; or why there is none


class Models(NamedTuple):
    """What the main process holds. A field that the kind of set does not need is None."""
    vocabulary: object
    aligner: object
    tokenizer: object


# ---------------------------------------------------------------------------------------------------------------------
# In a worker

cached_units = functools.cache(load_units)
cached_tokenizer = functools.cache(Tokenizer)


@contextlib.contextmanager
def timing(seconds, stage):
    """Add the time that a block of code takes to seconds[stage]."""
    began = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - began


def text_size(item):
    """Return the number of bytes of an item's text in UTF-8. Raises ValueError if its file was not UTF-8 or no text."""
    text = item.text or ""
    if "\0" in text:
        raise ValueError(f"no text: {item.id} has NUL characters; save it as UTF-8")
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # files.lines() keeps wrong bytes as surrogates
        raise ValueError(f"text is not UTF-8: {item.id}") from None


def hear(item, settings, seconds):
    """Return the Heard of an item. Raises ValueError "REASON: details" if the item cannot be used.

    seconds: a Counter, to which the time spent in each stage is added.
    """
    paired, synthesised = settings["kind"] == "paired", callable(item.audio)
    if paired and (text_size(item) == 0 or not item.text.split()):
        raise ValueError(f"no transcript: {item.id}")
    if paired and item.words is None and not synthesised and not settings["aligner"]:
        raise ValueError(f"no word times: {item.id}, and no --aligner")
    if item.audio is None:
        raise ValueError(f"no audio: {item.id}")
    with timing(seconds, "read"):
        if synthesised:
            waveform, times = item.audio()
        else:
            waveform, times = read_audio(item.audio, item.start, item.end, settings["max_seconds"]), None
    duration = len(waveform) / SAMPLE_RATE
    if synthesised:
        check_sound(waveform, item.id)
    if duration > settings["max_seconds"]:
        raise ValueError(f"audio too long: {duration:.0f} s in {item.id}, see --max_seconds")
    if paired and item.words is not None:
        words = [(word, start - item.start, end - item.start) for word, start, end in item.words]
        times = match_words(item.text.split(), words, duration)
    elif paired and synthesised and times is None:
        raise ValueError(f"word without a time: espeak-ng gave none for a word of {item.id}")
    heard = Heard(item._replace(audio=None), len(waveform), waveform, times=times)
    if settings["mel"]:  # other units need a model
        with timing(seconds, "units"):
            heard.units = cached_units(settings["units"]).encode([waveform])[0]
        if times is not None or not paired:
            heard.waveform = None
    return heard


def encode(item, settings, seconds):
    """Return the Document of an item's text. Raises ValueError if the text is empty."""
    size = text_size(item)
    with timing(seconds, "tokens"):
        ids = np.array(cached_tokenizer(settings["tokenizer"]).encode(item.text or ""), np.uint16)
    if len(ids) == 0 or not item.text.strip():
        raise ValueError(f"empty document: {item.id}")
    return Document(ids, dict(size=len(ids), words=len(item.text.split()), bytes=size))


def work(items, settings):
    """Return (a Heard, Document or Bad for each item, seconds spent in each stage)."""
    results, seconds = [], Counter()
    process = encode if settings["kind"] == "text" else hear
    for item in items:
        try:
            results.append(item if isinstance(item, Bad) else process(item, settings, seconds))
        except ValueError as error:
            results.append(Bad(item.id, error))
        except Exception as error:  # one strange item must not stop all others
            results.append(Bad(item.id, ValueError(f"unexpected fault: {one_line(error)} at {item.id}")))
    return results, seconds


def end_with_parent():
    """Make a worker end when the main process is killed. Otherwise it would wait for work forever."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def worker_environment():
    """Prepare for processes that start inside this block.

    Each gets one BLAS thread, because more would compete for the cores. glibc keeps memory that was freed, because
    otherwise the kernel maps and clears every large array anew. That takes a seventh of the time of corpora.demo.
    """
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    variables |= dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="1000000000", MALLOC_TOP_PAD_="67108864")
    before = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(variables)  # a process reads them when it starts
    try:
        yield
    finally:
        for variable, value in before.items():
            del os.environ[variable]
            if value is not None:
                os.environ[variable] = value


@contextlib.contextmanager
def worker_pool(workers):
    """A pool of `workers` fresh processes, or of one thread if `workers` is 0."""
    pool = ThreadPoolExecutor(1)
    if workers:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent)
    with worker_environment():
        try:
            yield pool
        except BrokenProcessPool:
            raise SystemExit("a worker process died, perhaps for lack of memory; start again with fewer --workers, and "
                             "the run resumes after the last finished part") from None
        finally:
            pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# In the main process

def read_files(files, read, settings, bar, used):
    """Yield all items of a split of a corpus, in order. A damaged file counts as one more item, a Bad.

    used: a set, to which the paths of sound files are added. SystemExit if there is no sound file for the first items.
    """
    n_sounds, missing = 0, 0
    for path in files:
        try:
            for item in read(path, settings):
                if isinstance(item, Item) and isinstance(item.audio, str | os.PathLike):
                    used.add(Path(item.audio))
                    n_sounds += 1
                    missing += n_sounds <= MISSING and not os.path.exists(item.audio)
                    if missing == MISSING:
                        raise SystemExit(f"{item.audio}: does not exist, nor does the sound of any of the first "
                                         f"{missing} items; put the sound there")
                if is_held_out(item.id, settings["val_share"]) == (settings["split"] == "val"):
                    yield item
        except Exception as error:
            if type(error) is RuntimeError:  # an optional package is missing
                raise SystemExit(str(error)) from None
            if getattr(error, "errno", None) is not None:  # the disk fails, so later files would fail too
                raise SystemExit(f"{error}; the same command resumes after the last part") from None
            yield Bad(str(path), ValueError(f"unreadable file: {path} ({one_line(error)})"))
        bar.update(os.path.getsize(path))


def make_blocks(items, settings, models, pool):
    """Yield blocks of finished items in the form that write_part takes. The pool works a few blocks ahead."""
    size = BLOCK[settings["kind"]]
    queue = deque()
    while True:
        while len(queue) <= AHEAD and (block := list(itertools.islice(items, size))):
            shares = [block[i:i + size // 16] for i in range(0, len(block), size // 16)]
            queue.append([pool.submit(work, share, settings) for share in shares])
        if not queue:
            return
        results, seconds = [], Counter()
        for future in queue.popleft():
            its_results, its_seconds = future.result()
            results += its_results
            seconds.update(its_seconds)
        yield finish(results, models, seconds), seconds, not queue


def finish(results, models, seconds):
    """Turn each Heard of a block into a Document or a Bad. Models run here, on the whole block at once."""
    heard = [result for result in results if isinstance(result, Heard)]
    if heard and heard[0].units is None:
        with timing(seconds, "units"):
            units = models.vocabulary.encode([each.waveform for each in heard])
        for i, each in enumerate(heard):
            each.units = units[i]
    untimed = [each for each in heard if each.times is None]
    if untimed and models.aligner:
        with timing(seconds, "align"):
            times = align([each.waveform for each in untimed], [each.item.text for each in untimed], models.aligner)
        for i, each in enumerate(untimed):
            each.times = times[i]
    finished = []
    for result in results:
        try:
            finished.append(spoken_document(result, models) if isinstance(result, Heard) else result)
        except ValueError as error:
            finished.append(Bad(result.item.id, error))
    return finished


def spoken_document(heard, models):
    """Return the Document of a Heard. Raises ValueError if the item cannot be used."""
    item, (ids, frame_start), hours = heard.item, heard.units, heard.n_samples / SAMPLE_RATE / 3600
    if len(ids) == 0:
        raise ValueError(f"audio too short: {heard.n_samples} samples in {item.id}")
    if models.tokenizer is None:
        return Document(ids, dict(size=len(ids), hours=hours))
    if isinstance(heard.times, ValueError):
        raise heard.times
    words = item.text.split()
    written = models.tokenizer.encode_words(words)
    if not all(written):
        raise ValueError(f"word without tokens: {words[written.index([])]!r} in {item.id}")
    total = n_frames(heard.n_samples, models.vocabulary)
    offsets = assign_units(words, heard.times, frame_start, total, models.vocabulary.rate)
    spoken = [ids[start:end] for start, end in itertools.pairwise(offsets)]
    size = sum(map(len, written)) + len(ids)
    return Document((written, spoken), dict(size=size, hours=hours, words=len(words), bytes=text_size(item)))


def check(settings, kinds):
    """Return (shard, n_shards). Raises SystemExit for wrong settings."""
    if settings["kind"] not in kinds:
        raise SystemExit(f"--kind={settings['kind']}: this corpus gives {', '.join(kinds)}; write --kind={kinds[0]}")
    check_paths(settings, settings["kind"])
    if settings["max_tokens"] < 0:
        raise SystemExit(f"--max_tokens={settings['max_tokens']}: give 0 for all, or more")
    if settings["shard_by"] not in ("items", "files"):
        raise SystemExit(f"--shard_by={settings['shard_by']}: write items or files")
    if settings["split"] not in ("train", "val") or not 0 <= settings["val_share"] < 1:
        raise SystemExit(f"--split={settings['split']} --val_share={settings['val_share']}: write train or val, and a "
                         "share of at least 0 and less than 1")
    if settings["split"] == "val" and not settings["val_share"]:
        raise SystemExit("--split=val: nothing is held out; write --val_share=0.001, as for --split=train")
    return read_shard(settings["shard"])


def check_paths(settings, kind):
    """SystemExit if a file or folder that a kind of set needs is missing."""
    needed = dict(text=["tokenizer"], speech=["units"], paired=["units", "tokenizer"])[kind]
    for key in ["source", *needed]:
        if not os.path.exists(local_folder(settings[key])):
            raise SystemExit(f"--{key}={settings[key]}: give an existing file or folder; a {kind} set needs it")
    if not settings["out"]:
        raise SystemExit("--out is missing: give a folder for the data sets")


def read_shard(text):
    """(shard, n_shards) of this process, from --shard=i/n. torchrun's processes share the shard of their machine."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise SystemExit(f"--shard={text}: write i/n, with i from 0 to n - 1")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return int(match[1]) * processes + rank, int(match[2]) * processes


def load_models(settings):
    """Return the Models that the kind of set needs. Raises SystemExit if one cannot be loaded."""
    import torch

    device, kind = settings["device"], settings["kind"]
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        return Models(
            vocabulary=load_units(settings["units"], device) if kind != "text" else None,
            aligner=load_aligner(settings["aligner"], device) if kind == "paired" and settings["aligner"] else None,
            tokenizer=Tokenizer(settings["tokenizer"]) if kind != "speech" else None)
    except (ValueError, RuntimeError) as error:  # RuntimeError: an optional package is missing
        raise SystemExit(str(error)) from None


def listing_hash(folder, files):
    """Return a hash of the names and sizes of files below a folder, as 16 hex digits."""
    lines = [f"{os.path.relpath(path, folder)} {os.path.getsize(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def identify(corpus, files, n_shards, models, settings):
    """Return everything that determines the data. All parts in one --out must have the same identity."""
    own = {key: value for key, value in settings.items() if key not in DEFAULTS}
    aligner_folder = local_folder(settings["aligner"])
    aligner = find_files(aligner_folder) if os.path.isdir(aligner_folder) else []
    return own | dict(
        corpus=corpus, kind=settings["kind"], files=listing_hash(settings["source"], files), shards=n_shards,
        block=BLOCK[settings["kind"]], **{key: settings[key] for key in IDENTITY},
        tokenizer=models.tokenizer and models.tokenizer.hash, units=models.vocabulary and models.vocabulary.hash,
        aligner=models.aligner and (listing_hash(aligner_folder, aligner) if aligner else settings["aligner"]))


def is_held_out(name, share):
    """Whether the item with this id is among the share of items that are held out."""
    return zlib.crc32(name.encode(errors="surrogateescape")) < share * 2**32


def is_result(path, source, out):
    """Whether a file was made by these scripts, and so does not belong to the corpus in the folder `source`."""
    if any(PART_NAME.fullmatch(folder) for folder in path.parts[:-1]):
        return True
    if REPORT_NAME.fullmatch(path.name) and any(map(PART_NAME.fullmatch, os.listdir(path.parent))):
        return True
    out, path = os.path.abspath(out), Path(os.path.abspath(path))
    return path.is_relative_to(out) and not Path(os.path.abspath(source)).is_relative_to(out)


def write_left_out(out, source, used, companions):
    """Write OUT/left_out.json, a list of the files below `source` that no item comes from.

    companions: endings of files that are not listed, such as word times
    """
    found = find_files(source, hidden=True) if source.is_dir() else []
    left = [path for path in found if path not in used and not path.name.lower().endswith(tuple(companions))]
    left = [str(path) for path in left if not is_result(path, source, out)]
    replace_file(out / "left_out.json", json.dumps(left, indent=1))


def tokens_left(done, most):
    """How many tokens a shard may still get, given the records of its parts. most: 0 for no limit."""
    return most - sum(sum(record["tokens"].values()) for record in done) if most else math.inf


def make(corpus, find, read, settings, kinds, companions=()):
    """Make the missing parts of one shard of a corpus, and return the report. Raises SystemExit if that fails."""
    shard, n_shards = check(settings, kinds)
    out, kind = Path(settings["out"]), settings["kind"]
    source = Path(os.path.normpath(settings["source"]))
    if out.resolve() == source.resolve():
        raise SystemExit(f"--out={out}: is --source; give a folder of its own, which may lie inside --source")
    files = [path for path in find(source, settings) if path.exists() and not is_result(path, source, out)]
    if not files:
        raise SystemExit(f"--source={settings['source']}: nothing of {corpus} found; its script describes the layout")
    models = load_models(settings)
    if models.tokenizer and models.tokenizer.vocab_size > 1 << 16:
        raise SystemExit(f"{settings['tokenizer']}: {models.tokenizer.vocab_size} ids, but data sets have 16 bits")
    identity = identify(corpus, files, n_shards, models, settings)
    units, mel = None, False
    if kind != "text":
        units = {key: getattr(models.vocabulary, key) for key in ("n_units", "rate", "hash")}
        mel = read_vocabulary(settings["units"])[0]["kind"] == "mel"
    out.mkdir(parents=True, exist_ok=True)
    done = finished_parts(out, shard, n_shards, identity)

    bar = tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc=corpus, disable=None)
    workers = -(-settings["workers"] // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of this process
    with worker_pool(workers) as pool, bar:
        first = done[-1]["next"] if done else 0
        used, by_files = set(files), settings["shard_by"] == "files"
        if by_files:
            items = read_files(files[shard::n_shards], read, settings, bar, used)
            items = itertools.islice(items, first, None)
        else:
            items = read_files(files, read, settings, bar, used)
            items = itertools.islice(items, shard + first * n_shards, None, n_shards)
        blocks = make_blocks(items, settings | dict(mel=mel), models, pool)
        while not (done and done[-1]["last"]) and (room := tokens_left(done, settings["max_tokens"] / n_shards)) > 0:
            folder = out / f"shard-{shard}-of-{n_shards}-{len(done):05}"
            done.append(write_part(folder, first, blocks, min(settings["part_tokens"], room), kind, models.tokenizer,
                                   units, identity))
            first = done[-1]["next"]
            bar.set_postfix(parts=len(done), items=first)
            if done[-1]["last"]:  # all items were read, or by files all of this shard: the others may use more sound
                write_left_out(out, source, used, (*companions, *SUFFIXES) if by_files and n_shards > 1 else companions)
    listed = read_json(out / "left_out.json", list) if (out / "left_out.json").exists() else []
    left_out = Counter(Path(path).suffix.lower() for path in listed)
    name = "report.json" if n_shards == 1 else f"report-{shard}-of-{n_shards}.json"
    about = dict(corpus=corpus, shard=f"{shard}/{n_shards}", kind=kind, left_out=left_out)
    return write_report(out / name, about, done)


def main(corpus, find, read, kinds=("paired", "speech", "text"), companions=(), **options):
    """The command line of a corpus.

    kinds: the kinds of set that it can make, the default first; companions: endings of files that read() may open too;
    options: its further settings with their defaults.
    """
    defaults = DEFAULTS | dict(kind=kinds[0]) | options
    settings, _ = configure(defaults, sys.argv[1:], described_in=[__file__])
    report = make(corpus, find, read, settings, kinds, companions)
    print(json.dumps(report, indent=1))
    if left_out := sum(report["left_out"].values()):
        print(f"left out: {left_out} files below --source, see {settings['out']}/left_out.json")
    if report["documents"] == 0 and report["shard"].endswith("/1"):
        for folder in Path(settings["out"]).glob("shard-0-of-1-*"):  # so that the same command tries again
            shutil.rmtree(folder)
        raise SystemExit(f"{settings['out']}: not one document from {report['items']} items; dropped "
                         f"{report['dropped']}")
