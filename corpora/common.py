"""
What all corpora share: items become audio, units, word times and tokens, and these become data sets on disk.

    python -m corpora.librispeech --source=LibriSpeech --out=data/librispeech --units=units/mhubert \\
        --tokenizer=weights/smollm-360m/tokenizer.json --kind=paired --aligner=aligners/mms --shard=0/8

A corpus is a script with two functions, and a call of main():

    find(source, settings)     the files that list or hold its items, sorted: a list of paths
    read(path, settings)       yields the items of one such file: Item, or Bad for one that cannot be used

--kind    paired (text and speech, cut into the same words), speech, or text (tokens of the texts alone)
--shard   i/n takes the items i, i + n, i + 2n, ...; the shards of a corpus go to one --out, in any order, anywhere
--aligner where items have no word times: the folder of MMS's aligner, or pocketsphinx (see speech/align.py)
--workers processes that read sound, make mel units and tokenise; the main process reads the corpus, which feeds four or
          five of them where there is only text: for more, start several shards. Models run in the main process

A shard is written in parts of about part_tokens tokens, OUT/shard-0-of-8-00000 and so on: each a data set (see
data.py), all of them one sharded set. A part appears whole or not at all, and its part.json says which items it
covers, so the same command, started again after a kill, goes on behind the last part. Work goes on in blocks of items,
parts end with blocks, and only the items decide where: however often a run is interrupted, the data is the same.
Whatever is wrong with an item drops that item: dropped.jsonl in its part says why, report.json in OUT counts the
reasons.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import reprlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import configure
from runtime.datasets import STREAMS, write_set
from runtime.files import one_line, read_json
from runtime.tokenizer import Tokenizer
from speech.align import align, load_aligner
from speech.audio import SAMPLE_RATE, read_audio
from speech.transcripts import match_words
from speech.units import load_units, n_frames, read_vocabulary, word_units

DEFAULTS = dict(source="", out="", kind="paired", units="", tokenizer="", aligner="", shard="0/1",
                workers=os.cpu_count() or 1, device="auto", part_tokens=1 << 26, max_seconds=300.0)
BLOCK = dict(text=256, speech=64, paired=64)  # items to a block; memory holds one part and AHEAD + 1 blocks
CHUNK = dict(text=16, speech=4, paired=4)  # items that a worker takes at once
AHEAD = 2  # blocks under way while one is being finished
STAGES = ("read", "units", "align", "write")


class Item(NamedTuple):
    id: str
    audio: object = None  # path of a sound file, its bytes, or what makes (waveform, [(start, end) of each word])
    start: float = 0.0  # the span of the sound file that is meant, in seconds
    end: float | None = None
    text: str | None = None
    words: list | None = None  # timed words (text, start, end), on the clock of the sound file, as start and end are


class Bad(NamedTuple):
    id: str
    error: ValueError  # "REASON: details"


class Heard(NamedTuple):
    """What a worker makes of an item with sound."""
    n_samples: int
    waveform: np.ndarray | None  # kept if the main process needs it
    units: tuple | None  # (ids, frame_start)
    times: list | ValueError | None  # (start, end) of each word, from the start of the item on; why there are none


class Models(NamedTuple):
    """What the main process holds, each None where the kind does not need it."""
    vocabulary: object
    aligner: object
    tokenizer: object


# ---------------------------------------------------------------------------------------------------------------------
# Workers

cached_units = functools.cache(load_units)


@functools.cache
def cached_tokenizer(path):
    return Tokenizer(path)


def text_size(item):
    """Bytes of an item's text; ValueError if it holds what is no character (files.lines() lets such bytes through)."""
    try:
        return len((item.text or "").encode())
    except UnicodeEncodeError:
        raise ValueError(f"text is not UTF-8: {item.id}") from None


def hear(item, settings, seconds):
    """Item -> Heard; ValueError "REASON: details". seconds: a Counter that the time of each stage is added to."""
    if settings["kind"] == "paired" and (text_size(item) == 0 or not item.text.split()):
        raise ValueError(f"no transcript: {item.id}")
    timed = item.words is not None or callable(item.audio)
    if settings["kind"] == "paired" and not timed and not settings["aligner"]:
        raise ValueError(f"no word times: {item.id}, and no --aligner")
    if item.audio is None:
        raise ValueError(f"no audio: {item.id}")
    if item.end is not None and item.end - item.start > settings["max_seconds"]:
        raise ValueError(f"audio too long: {item.end - item.start:.0f} s in {item.id}, see --max_seconds")
    began = time.perf_counter()
    if callable(item.audio):
        waveform, times = item.audio()
        times = times or ValueError(f"word without a time: espeak-ng gave none for one in {item.id}")
    else:
        waveform, times = read_audio(item.audio, item.start, item.end, settings["max_seconds"]), None
    seconds["read"] += time.perf_counter() - began
    duration = len(waveform) / SAMPLE_RATE
    if duration > settings["max_seconds"]:
        raise ValueError(f"audio too long: {duration:.0f} s in {item.id}, see --max_seconds")
    if settings["kind"] == "paired" and item.words is not None:
        timed = [(word, start - item.start, end - item.start) for word, start, end in item.words]
        times = match_words(item.text.split(), timed, duration)
    if not settings["mel"]:
        return Heard(len(waveform), waveform, None, times)
    began = time.perf_counter()
    units = cached_units(settings["units"]).encode([waveform])[0]
    seconds["units"] += time.perf_counter() - began
    untimed = settings["kind"] == "paired" and times is None
    return Heard(len(waveform), waveform if untimed else None, units, times)


def encode(item, settings, seconds):
    """Item -> a finished text document, as finish() yields them; ValueError "empty document: ..."."""
    began, size = time.perf_counter(), text_size(item)
    ids = np.array(cached_tokenizer(settings["tokenizer"]).encode(item.text or ""), np.uint16)
    seconds["tokens"] += time.perf_counter() - began
    if len(ids) == 0:
        raise ValueError(f"empty document: {item.id}")
    return ids, 0.0, len(item.text.split()), size


def work(items, settings):
    """A worker's share of a block: (what becomes of each item, a Bad included; seconds that each stage took)."""
    seconds, results = collections.Counter(), []
    for item in items:
        if isinstance(item, Item):
            try:
                item = (encode if settings["kind"] == "text" else hear)(item, settings, seconds)
            except ValueError as error:
                item = Bad(item.id, error)
            except Exception as error:  # of a kind that nobody thought of, and no reason to stop all the others
                item = Bad(item.id, ValueError(f"unexpected fault: {one_line(error)} at {item.id}"))
        results.append(item)
    return results, seconds


def end_with_parent():
    """Without this the workers of a killed process wait for work forever."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def one_blas_thread():
    """Processes begun meanwhile have a BLAS of one thread each: more would only hinder one another."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {variable: os.environ.get(variable) for variable in variables}
    os.environ.update(dict.fromkeys(variables, "1"))  # read once, when a process loads its BLAS
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable)
            if value is not None:
                os.environ[variable] = value


@contextlib.contextmanager
def worker_pool(workers):
    """A pool of fresh processes; None if workers is 0."""
    spawn = multiprocessing.get_context("spawn")
    with one_blas_thread():
        pool = ProcessPoolExecutor(workers, spawn, end_with_parent) if workers else None
        try:
            yield pool
        except BrokenProcessPool:
            raise SystemExit("a worker process died, perhaps for want of memory: start again with fewer --workers, "
                             "and it goes on behind the last part") from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Items to documents

def checked(item):
    """An item as it came out of someone's file, or a Bad if a field of it holds what it cannot."""
    if isinstance(item, Bad):
        return item
    spans = [(item.start, item.start if item.end is None else item.end), *(word[1:] for word in item.words or ())]
    if not isinstance(item.id, str) or not item.id.isprintable() or len(item.id) > 500:
        return Bad(reprlib.repr(item.id), ValueError(f"unreadable record: {reprlib.repr(item.id)} is no name"))
    if not isinstance(item.text, str | None) or not isinstance(item.audio, str | bytes | Callable | None):
        return Bad(item.id, ValueError(f"unreadable record: text or sound of {item.id} is of another type"))
    if not all(isinstance(word[0], str) for word in item.words or ()) or not all(
            isinstance(t, float | int) and 0 <= span[0] <= t < math.inf for span in spans for t in span):
        return Bad(item.id, ValueError(f"unreadable record: {item.id} has times that cannot be"))
    return item


def read_files(files, read, settings, bar):
    """All items of a corpus, in order. A file whose content is damaged counts as one more item, a bad one."""
    for path in files:
        try:
            yield from map(checked, read(path, settings))
        except Exception as error:
            if getattr(error, "errno", None) is not None:  # the disk, not the file: nothing to go on after
                raise SystemExit(f"{error}; the same command will go on behind the last part") from None
            yield Bad(str(path), ValueError(f"unreadable file: {path} ({one_line(error)})"))
        bar.update(os.path.getsize(path))


def blocks(items, settings, pool):
    """Yield (items, what becomes of them, seconds, is it the last block?); the pool works ahead on a few blocks."""
    size, chunk = BLOCK[settings["kind"]], CHUNK[settings["kind"]]
    queue = collections.deque()
    while True:
        while len(queue) <= AHEAD and (block := list(itertools.islice(items, size))):
            chunks = [block[i:i + chunk] for i in range(0, len(block), chunk)]
            queue.append((block, [(pool.submit if pool else functools.partial)(work, c, settings) for c in chunks]))
        if not queue:
            return
        block, shares = queue.popleft()
        made = [share.result() if pool else share() for share in shares]
        seconds = sum((spent for _, spent in made), collections.Counter())
        yield block, [result for results, _ in made for result in results], seconds, not queue


def finish(items, results, models, seconds):
    """
    What the main process, which holds the models, adds to a block: units, word times, token ids.

    Yields for each item a Bad, or (document as write_set wants it, hours, words, bytes of text).
    """
    began = time.perf_counter()
    raw = [i for i, heard in enumerate(results) if isinstance(heard, Heard) and heard.units is None]
    for i, units in zip(raw, models.vocabulary.encode([results[i].waveform for i in raw]) if raw else ()):
        results[i] = results[i]._replace(units=units)
    aligning = time.perf_counter()
    untimed = [i for i, heard in enumerate(results) if models.aligner and isinstance(heard, Heard)
               and heard.times is None]
    waveforms, texts = [results[i].waveform for i in untimed], [items[i].text for i in untimed]
    for i, times in zip(untimed, align(waveforms, texts, models.aligner) if untimed else ()):
        results[i] = results[i]._replace(times=times)
    seconds["units"] += aligning - began
    seconds["align"] += time.perf_counter() - aligning
    for item, result in zip(items, results):
        try:
            yield spoken_document(item, result, models) if isinstance(result, Heard) else result
        except ValueError as error:
            yield Bad(item.id, error)


def spoken_document(item, heard, models):
    """(document, hours, words, bytes of text) of an item that was heard; ValueError if it makes no document."""
    hours = heard.n_samples / SAMPLE_RATE / 3600
    ids, frame_start = heard.units
    if len(ids) == 0:
        raise ValueError(f"audio too short: {heard.n_samples} samples in {item.id}")
    if models.tokenizer is None:
        return ids, hours, 0, 0
    if isinstance(heard.times, ValueError):
        raise heard.times
    words = item.text.split()
    written = models.tokenizer.encode_words(words)
    if not all(written):
        raise ValueError(f"word without tokens: {words[written.index([])]!r} in {item.id}")
    total = n_frames(heard.n_samples, models.vocabulary)
    offsets = word_units([end for _, end in heard.times], frame_start, total, models.vocabulary.rate)
    spoken = [ids[a:b] for a, b in zip(offsets, offsets[1:])]
    return (written, spoken), hours, len(words), text_size(item)


# ---------------------------------------------------------------------------------------------------------------------
# Parts on disk

def finished_parts(out, shard, n_shards, identity):
    """What part.json says of each finished part of a shard, in order; SystemExit if OUT holds something else."""
    parts = {path.parent.name: read_json(path) for path in sorted(out.glob("*/part.json"))}
    for name, about in parts.items():
        for key in identity | about["identity"]:
            now, then = identity.get(key), about["identity"].get(key)
            if now != then:
                raise SystemExit(f"{out / name}: made with {key} {then!r}, now it is {now!r}; use the same again, or "
                                 f"another --out")
    mine = [about for name, about in parts.items() if name.startswith(f"shard-{shard}-of-{n_shards}-")]
    for before, about in zip([dict(next=0), *mine], mine):
        if about["first"] != before["next"]:
            raise SystemExit(f"{out}: a part of shard {shard} before its item {about['first']} is missing; remove the "
                             f"later ones and start again")
    return mine


def write_part(folder, first, stream, models, settings, identity):
    """Write one part: whole blocks of the stream up to part_tokens tokens; returns what its part.json says."""
    kind, seconds, dropped = settings["kind"], collections.Counter(), []
    about = dict(identity=identity, first=first, next=first, last=True, items=0, documents=0, hours=0.0, words=0,
                 bytes=0, tokens={})

    def documents():
        tokens = 0
        for items, results, spent, about["last"] in stream:
            seconds.update(spent)
            for made in finish(items, results, models, seconds):
                if isinstance(made, Bad):
                    dropped.append(dict(id=made.id, reason=str(made.error)))
                    continue
                for key, value in zip(("documents", "hours", "words", "bytes"), (1, *made[1:])):
                    about[key] += value
                tokens += sum(map(len, itertools.chain(*made[0]))) if kind == "paired" else len(made[0])
                left = time.perf_counter()
                yield made[0]
                seconds["write"] += time.perf_counter() - left
            about["next"] += len(items)
            if tokens >= settings["part_tokens"]:
                break

    began = time.perf_counter()
    waiting = folder.parent / f".unfinished-{folder.name}" / folder.name  # too deep for data.open_source to find
    its_documents = documents()
    if (one := next(its_documents, None)) is not None:
        its_units = models.vocabulary and {key: getattr(models.vocabulary, key) for key in ("n_units", "rate", "hash")}
        meta = write_set(waiting, kind, itertools.chain([one], its_documents), models.tokenizer, its_units,
                              f"corpora/{identity['corpus']}.py")
        about["tokens"] = {stream: meta[stream]["tokens"] for stream in STREAMS[kind]}
    elif about["next"] == 0:
        raise SystemExit(f"{settings['source']}: no items found, for shard {settings['shard']} at least")
    else:  # the end of the corpus, and nothing of use in it: no data set, but the record of it
        waiting.mkdir(parents=True)
    seconds["all"] = time.perf_counter() - began
    reasons = collections.Counter(line["reason"].partition(":")[0] for line in dropped)
    about.update(items=about["next"] - first, dropped=dict(reasons), seconds=dict(seconds))
    (waiting / "dropped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dropped))
    (waiting / "part.json").write_text(json.dumps(about, indent=1))
    os.rename(waiting, folder)
    waiting.parent.rmdir()
    return about


def report(parts):
    """The sum of what the parts of a shard say, and how fast it went."""
    total = {key: sum(part[key] for part in parts) for key in ("items", "documents", "hours", "words", "bytes")}
    for key in ("tokens", "dropped", "seconds"):
        total[key] = dict(sum((collections.Counter(part[key]) for part in parts), collections.Counter()))
    assert total["items"] == total["documents"] + sum(total["dropped"].values()), "the counts do not add up"
    seconds, minutes, megabytes = total["seconds"], total["hours"] * 60, total["bytes"] / 1e6
    speeds = {f"{stage}, hours of audio a minute and core": minutes / seconds[stage] for stage in STAGES
              if minutes and seconds.get(stage)}
    if seconds.get("tokens"):
        speeds["tokens, MB a second and core"] = megabytes / seconds["tokens"]
        speeds["all together, MB a second"] = megabytes / seconds["all"]
    elif seconds.get("all"):
        speeds["all together, hours of audio a minute"] = minutes / seconds["all"]
    return total | dict(parts=len(parts), speeds={key: float(f"{value:.4g}") for key, value in speeds.items()})


# ---------------------------------------------------------------------------------------------------------------------
# All of it

def listing_hash(folder, files):
    """16 hex digits over the names, relative to a folder, and the sizes of files."""
    lines = [f"{os.path.relpath(path, folder)} {os.path.getsize(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def check(settings, kinds):
    """(shard, n_shards) of sound settings; SystemExit for others."""
    kind, shard = settings["kind"], re.fullmatch(r"(\d+)/(\d+)", settings["shard"])
    if kind not in kinds:
        raise SystemExit(f"--kind={kind}: this corpus gives {', '.join(kinds)}; write --kind={kinds[0]}")
    needed = ["source", "out", *["units"] * (kind != "text"), *["tokenizer"] * (kind != "speech")]
    for key in needed:
        if not settings[key]:
            raise SystemExit(f"--{key} is missing: a {kind} set needs {', '.join('--' + key for key in needed)}")
    for key in ("source", "tokenizer", "units", "aligner"):
        if settings[key] not in ("", "pocketsphinx") and not os.path.exists(settings[key]):
            raise SystemExit(f"--{key}={settings[key]}: there is no such file or folder")
    if not shard or int(shard[1]) >= int(shard[2]):
        raise SystemExit(f"--shard={settings['shard']}: write i/n, with i from 0 to n - 1")
    return int(shard[1]), int(shard[2])


def load_models(settings):
    """(Models, are these mel units, which the workers make?)."""
    import torch

    device, kind = settings["device"], settings["kind"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer(settings["tokenizer"]) if kind != "speech" else None
    if tokenizer and tokenizer.vocab_size > 1 << 16:
        raise SystemExit(f"{settings['tokenizer']}: {tokenizer.vocab_size} ids, too many for uint16")
    if kind == "text":
        return Models(None, None, tokenizer), False
    folder = settings["units"]
    try:
        mel = read_vocabulary(folder)[0]["kind"] == "mel"
        vocabulary = load_units(folder, device)
        folder = settings["aligner"]
        aligner = load_aligner(folder, device) if folder and kind == "paired" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{folder}: not a folder of units or of an aligner ({error})") from None
    return Models(vocabulary, aligner, tokenizer), mel


def describe(corpus, source, files, n_shards, models, settings):
    """All that decides what the parts hold: a part is only ever followed by others made with the same."""
    kind, aligner = settings["kind"], Path(settings["aligner"])
    aligner_files = sorted(path for path in aligner.rglob("*") if path.is_file())
    own = {key: value for key, value in settings.items() if key not in DEFAULTS}
    return own | dict(
        corpus=corpus, kind=kind, files=listing_hash(source, files), shards=n_shards, block=BLOCK[kind],
        part_tokens=settings["part_tokens"], max_seconds=settings["max_seconds"],
        tokenizer=models.tokenizer and models.tokenizer.hash, units=models.vocabulary and models.vocabulary.hash,
        aligner=models.aligner and (listing_hash(aligner, aligner_files) if aligner_files else str(aligner)))


def make(corpus, find, read, settings, kinds):
    """One shard of a corpus, from where it stands to its end; returns its report."""
    shard, n_shards = check(settings, kinds)
    source, out = Path(settings["source"]), Path(settings["out"])
    files = find(source, settings)
    if not files:
        raise SystemExit(f"{source}: nothing of {corpus} found; the top of corpora/{corpus}.py says what it looks like")
    models, mel = load_models(settings)
    identity = describe(corpus, source, files, n_shards, models, settings)
    out.mkdir(parents=True, exist_ok=True)
    parts = finished_parts(out, shard, n_shards, identity)
    for folder in out.glob(f".unfinished-shard-{shard}-of-{n_shards}-*"):  # of a run that was killed
        shutil.rmtree(folder)
    bar = tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, desc=corpus, disable=None)
    with worker_pool(settings["workers"]) as pool, bar:
        first = parts[-1]["next"] if parts else 0
        items = itertools.islice(read_files(files, read, settings, bar), shard, None, n_shards)
        stream = blocks(itertools.islice(items, first, None), settings | dict(mel=mel), pool)
        while not (parts and parts[-1]["last"]):
            folder = out / f"shard-{shard}-of-{n_shards}-{len(parts):05}"
            parts.append(write_part(folder, first, stream, models, settings, identity))
            first = parts[-1]["next"]
            bar.set_postfix(parts=len(parts), items=first)
    total = dict(corpus=corpus, shard=settings["shard"], kind=settings["kind"]) | report(parts)
    path = out / ("report.json" if n_shards == 1 else f"report-{shard}-of-{n_shards}.json")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(total, indent=1))
    os.replace(temporary, path)
    return total


def main(corpus, find, read, kinds=("paired", "speech", "text"), argv=None, **options):
    """The command line of a corpus. options: its own settings with their defaults, or other defaults of common ones."""
    settings, _ = configure(DEFAULTS | dict(kind=kinds[0]) | options, sys.argv[1:] if argv is None else argv)
    total = make(corpus, find, read, settings, kinds)
    print(json.dumps(total, indent=1))
    if total["documents"] == 0:
        raise SystemExit(f"{settings['out']}: not one document from {total['items']} items; dropped {total['dropped']}")
    return total
