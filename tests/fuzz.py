"""
Files of strangers, mutated: every reader gives a clear error or a right result, and nothing else.

    python tests/fuzz.py --trials=100000 --seed=1               a table of all targets; exits 1 if there is a finding
    python tests/fuzz.py --only=sphere --first=512 --trials=1   that one trial again, here without --seed=1, the default

Each target has seeds, small valid files by the project's own writers or by hand, a function that reads them, and an
oracle. A trial changes one file of one seed a few times: bits, lengths, numbers, brackets, structure. Then

    clear error     ValueError or SystemExit, one line that names the file (a corpus: a Bad item, one line)
    right result    what the oracle finds valid, by a second reader or by invariants; and equal to the seed's own if the
                    mutation changed only what has no meaning (white space, the order of keys)
    finding         anything else: other exceptions, a result that cannot be, over 5 s, over 1 GiB more, a dead process

Trials run in a child process with limits; the parent goes on behind one that kills it.
"""
import collections
import contextlib
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import wave
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from mutations import (
    BYTES,
    JSON,
    NPY,
    SAFETENSORS,
    TEXT,
    csv_fields,
    cut,
    dump,
    exchange_words,
    flip,
    insert,
    integer,
    lines,
    other_number,
    path_in,
    reformat,
    repeat,
    tensor_padding,
)
from safetensors.torch import save_file

import benchmarks
import convert
import data
import foreign
import model as smoltolk
import sample
import speech
import words
from configurator import configure
from corpora import common

SECONDS, MEMORY, STUCK = 5, 1 << 30, 30  # of one trial; beyond what the process has; until the parent kills it


GREEDY = re.compile("MemoryError|allocate memory|bad_alloc|out of memory")  # a reader may have caught it


class Finding(BaseException):
    """Not an Exception, so that no reader takes it for a fault of the file."""


def demand(true, what):
    if not true:
        raise Finding(f"wrong result: {what}")


# ---------------------------------------------------------------------------------------------------------------------
# targets

class Target(NamedTuple):
    seeds: list  # of {file name: bytes}: what a folder holds
    read: object  # folder -> result
    check: object  # (result, folder, {file: bytes} as written, the seed's files, the seed's result): demand()s
    mutations: dict  # {ending of a file's name: [mutation]}; others stay as they are
    harmless: dict = {}  # {ending: mutation that changes nothing of what is meant}
    equal: object = None  # (result, the seed's result): is it the same?


BUILD = {}  # {name: (share of the trials, function that makes the Target)}


def target(share):
    def register(build):
        BUILD[build.__name__] = share, build
        return build
    return register


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not path.is_symlink()}


def built(write, *args):
    """{file: bytes} that a writer leaves in a folder that it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "new", *args)
        return files_of(Path(folder) / "new")


def tokenizer_json():
    """Every byte, and some merges of the words of a sentence."""
    alphabet = {byte: char for char, byte in data.byte_alphabet().items()}
    tokens = ["<|endoftext|>", "<|im_start|>", *(alphabet[byte] for byte in range(256))]
    merges = [["t", "h"], ["th", "e"], ["Ġ", "the"], ["Ġ", "a"], ["i", "n"], ["in", "g"], ["Ġ", "Ġ"]]
    tokens += ["".join(pair) for pair in merges]
    special = [dict(id=i, content=tokens[i], lstrip=False, rstrip=False, normalized=False, single_word=False,
                    special=True) for i in range(2)]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None, pre_tokenizer=dict(
        type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), level]), post_processor=None,
        decoder=level, model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                                  end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                                  vocab={token: i for i, token in enumerate(tokens)}, merges=merges))


TEXT_SAID = "the  thing, 42 naïve\n\n \t<|endoftext|> a 漢"


@target(8)
def tokenizer():
    try:
        import tokenizers
    except ImportError:
        tokenizers = None

    def check(ours, folder, files, seed, result):
        ids = ours.encode(TEXT_SAID)
        demand(0 <= ours.eos < ours.vocab_size and max(ids) < ours.vocab_size, "ids outside the vocabulary")
        if tokenizers and files != seed:
            try:
                hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except BaseException:  # the Rust side panics on some
                return
            hf.no_truncation()
            hf.no_padding()
            hf.encode_special_tokens = True
            demand(hf.encode(TEXT_SAID, add_special_tokens=False).ids == ids, "other ids than HF tokenizers")
            demand(hf.get_vocab_size() == ours.vocab_size, "another size of the vocabulary than HF tokenizers")

    return Target([{"tokenizer.json": dump(tokenizer_json())}], lambda f: data.Tokenizer(f / "tokenizer.json"), check,
                  {"json": JSON}, {"json": reformat}, lambda a, b: a.hash == b.hash)


def tiny_model():
    torch.manual_seed(0)
    return smoltolk.SmolTolk(smoltolk.Config(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, n_units=5,
        num_key_value_heads=1, input_adapter_layers=1, output_adapter_layers=1, max_position_embeddings=16))


def plain_tensors(raw):
    """{name: float32 array} of a safetensors file, read as the format's page describes it."""
    size = int.from_bytes(raw[:8], "little")
    found = {}
    for name, about in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__":
            part = raw[8 + size:][slice(*about["data_offsets"])]
            kind = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}[about["dtype"]]
            array = np.frombuffer(part, kind).reshape(about["shape"])
            found[name] = array if kind != "<u2" else (array.astype(np.uint32) << 16).view(np.float32)
    return found


@target(16)
def model():
    whole = built(lambda folder: smoltolk.save_pretrained(tiny_model(), folder))
    names = list(plain_tensors(whole["model.safetensors"]))
    state = {name: tensor for name, tensor in tiny_model().state_dict().items() if name in names}

    def shards(folder):
        folder.mkdir()
        for i in range(2):
            save_file({name: state[name] for name in names[i::2]}, folder / f"m-{i}.safetensors")
        where = {name: f"m-{names.index(name) % 2}.safetensors" for name in names}
        (folder / "model.safetensors.index.json").write_bytes(dump(dict(metadata={}, weight_map=where)))

    split = {name: raw for name, raw in whole.items() if name != "model.safetensors"} | built(shards)

    def check(net, folder, files, seed, result):
        there = net.state_dict()
        for name, raw in files.items():
            for tensor, array in plain_tensors(raw).items() if name.endswith(".safetensors") else ():
                demand(np.array_equal(there[tensor].numpy(), array.astype(np.float32)), f"{tensor} of {name}")
        demand(files["config.json"] != seed["config.json"] or net.config == result.config, "another config")
        with torch.no_grad():
            out = net(torch.arange(min(4, net.config.max_position_embeddings))[None], logits=slice(-1, None))
        tame = max(tensor.abs().max() for tensor in there.values()) < 100  # else they may overflow, as they say
        demand(not tame or out.text_logits.isfinite().all() and out.speech_logits.isfinite().all(), "logits")

    def equal(a, b):
        return a.config == b.config and all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))

    return Target([whole, split], smoltolk.from_pretrained, check, {"json": JSON, "safetensors": SAFETENSORS},
                  {"json": reformat, "safetensors": tensor_padding}, equal)


def write_sets(folder, kind):
    rng = np.random.default_rng(3)
    its = SimpleNamespace(vocab_size=300, eos=0, hash="t")
    units = dict(n_units=20, rate=25, hash="u")
    if kind == "paired":
        documents = [([rng.integers(1, 300, rng.integers(1, 4)).tolist() for _ in range(n)],
                      [rng.integers(0, 20, rng.integers(0, 5)).tolist() for _ in range(n)]) for n in (3, 7, 1)]
    else:
        documents = [rng.integers(1, 20, n) for n in (9, 30, 4)]
    data.write_set(folder, kind, documents, its, units)


@target(20)
def data_set():
    def check(opened, folder, files, seed, result):
        meta, kind = opened.meta, opened.meta["kind"]
        for stream in data.STREAMS[kind]:
            tokens = np.load(folder / f"{stream}.npy")
            demand(np.array_equal(tokens, getattr(opened, stream)), f"{stream} is not what numpy reads")
            said = meta[stream]
            demand(tokens.max() < (said["vocab_size"] if stream == "text" else said["n_units"] + 1), "ids")
        tables = {"documents": meta["words"] if kind == "paired" else meta[kind]["tokens"]}
        tables |= {f"{s}_words": meta[s]["tokens"] for s in data.STREAMS[kind] if kind == "paired"}
        for name, end in tables.items():
            table = np.load(folder / f"{name}.npy").tolist()
            demand(table[0] == 0 and table[-1] == end and table == sorted(table), name)
        vocab = SimpleNamespace(vocab_size=1 << 16, n_units=1 << 16, switch=1 << 18)
        for what in {"paired": ("text", "speech", "interleaved")}.get(kind, (kind,)):
            source = data.open_source(what, [folder])
            length = min(4, len(opened.speech if what == "speech" else opened.text))
            rows, _ = data.sample({what: source}, {what: 1}, 1, 1, np.arange(3), length, vocab, (1, 2), (1, 2))
            demand(rows.min() >= 0 and rows.max() <= vocab.switch, "sampled ids")
        changed = any(files[name] != seed[name] for name in files if name != "meta.json")
        changed |= json.loads(files["meta.json"]) != json.loads(seed["meta.json"])
        try:
            data.open_set(folder, full=True)
        except data.DataError:
            demand(changed, "data.py FOLDER refuses what is whole")
        else:
            demand(not changed or "sha256" not in meta, "data.py FOLDER does not notice")

    seeds = [built(write_sets, kind) for kind in ("text", "speech", "paired", "paired")]
    return Target(seeds, data.open_set, check, {"npy": NPY, "json": JSON}, {"json": reformat},
                  lambda a, b: a.meta == b.meta)


@target(4)
def array():
    arrays = (np.arange(7, dtype=np.int64), np.ones((3, 4), np.float32).T, np.zeros(0, np.uint16), np.float64(3),
              np.arange(5, dtype=np.uint16), np.eye(2, dtype=">f4"))

    def check(found, folder, files, seed, result):
        demand(found.dtype.kind in "biuf" and found.nbytes <= len(files["a.npy"]), "more than is there")
        numpys = np.load(folder / "a.npy")
        demand(np.array_equal(found, numpys, equal_nan=found.dtype.kind == "f"), "not what numpy reads")

    seeds = [{"a.npy": npy(array)} for array in arrays]
    return Target(seeds, lambda f: foreign.read_array(f / "a.npy"), check, {"npy": NPY})


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@target(3)
def unit_ids():
    def check(ids, folder, files, seed, result):
        demand(ids and all(type(i) is int and 0 <= i < 12 for i in ids), "units outside the vocabulary")
        demand(all(a != b for a, b in zip(ids, ids[1:])), "repeats")

    def read(folder):
        return sample.read_units(str(next(folder.iterdir())), 12)

    return Target([{"a.json": b"[1, 2, 3, 3, 11, 0]"}, {"a.npy": npy(np.array([1, 5, 5, 0]))}], read, check,
                  {"json": JSON, "npy": NPY}, {"json": reformat}, list.__eq__)


@target(4)
def unit_folder():
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((6, 2 * speech.N_CEPSTRUM)).astype(np.float32)
    book = speech.Codebook(centroids, 6.0, speech.vocabulary_hash(centroids), (2.0,) * 6, (0.5,) * speech.N_MEL)
    sound = rng.standard_normal(8000).astype(np.float32) * 0.1

    def check(found, folder, files, seed, result):
        demand(np.array_equal(found.centroids, centroids) and found.hash == book.hash, "other centroids")
        [(ids, _)] = speech.units([sound], found)
        demand(ids.max(initial=0) < 6, "units outside the vocabulary")
        with contextlib.suppress(ValueError):  # it may have nothing to speak with, and then says so
            demand(np.isfinite(speech.resynthesise([0, 5], found, durations=[1, 2])).all(), "not finite")

    return Target([built(speech.save_mel_units, book)], lambda f: speech.load_units(str(f)), check,
                  {"json": JSON, "npy": NPY}, {"json": reformat}, lambda a, b: a[1:] == b[1:])


# word times: (text, start, end) in order of the file, each finite and not ending before it begins

def timed(found, *_):
    demand(all(isinstance(w, str) and 0 <= a <= b < math.inf for w, a, b in found), "times that cannot be")


@target(5)
def wrd():
    def check(found, folder, files, *_):
        timed(found)
        said = files["a.WRD"].decode("utf-8-sig", "replace").splitlines()
        rows = [line.split(maxsplit=2) for line in said if line.strip()]
        demand(files["a.WRD"][:2] in (b"\xff\xfe", b"\xfe\xff") or found == [
            (w.strip(), float(a) / 16000, float(b) / 16000) for a, b, w in rows], "other words than the lines")

    said = "she had your dark suit".split()
    seed = "".join(f"{i * 4000} {i * 4000 + 3900} {word}\n" for i, word in enumerate(said)).encode()
    return Target([{"a.WRD": seed}], lambda f: words.read_wrd(f / "a.WRD"), check, {"WRD": TEXT},
                  {"WRD": lambda rng, raw: raw.replace(b" ", b"  ").replace(b"\n", rng.choice([b"\n\n", b"\r\n"]))},
                  list.__eq__)


def long_textgrid(tiers):
    out = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 9.5", "tiers? <exists>",
           f"size = {len(tiers)}", "item []:"]
    for i, (name, rows) in enumerate(tiers, 1):
        out += [f"item [{i}]:", 'class = "IntervalTier"', f'name = "{name}"', "xmin = 0", "xmax = 9.5",
                f"intervals: size = {len(rows)}"]
        for j, (a, b, word) in enumerate(rows, 1):
            out += [f"intervals [{j}]:", f"xmin = {a}", f"xmax = {b}", f'text = "{word}"']
    return "\n".join(out).encode()


def short_textgrid(rng, raw):
    """The same TextGrid in Praat's short form, or in UTF-16."""
    if rng.random() < 0.5:
        return raw.decode().encode("utf-16")
    kept = [re.sub(rb"^.*? = ", b"", line).replace(b"tiers? ", b"") for line in raw.split(b"\n")]
    return b"\n".join(line for line in kept if line and not line.startswith((b"item", b"intervals [")))


@target(9)
def textgrid():
    rows = [(0, 0.5, ""), (0.5, 1.25, "she"), (1.25, 2, "had"), (2, 2.5, 'a ""big""'), (2.5, 9.5, "suit")]
    seed = long_textgrid([("phones", rows[:2]), ("words", rows), ("notes", [])])

    def check(found, *_):
        timed(found)
        demand(all(a[2] <= b[1] + 0.0011 for a, b in zip(found, found[1:])), "words over one another")

    return Target([{"a.TextGrid": seed}], lambda f: words.read_textgrid(f / "a.TextGrid"), check, {"TextGrid": TEXT},
                  {"TextGrid": short_textgrid}, list.__eq__)


@target(3)
def ctm():
    seed = b";; a comment\n" + b"".join(b"talk-%d 1 %.2f 0.25 word%d 0.9\n" % (i // 3, i * 0.3, i) for i in range(6))

    def check(found, *_):
        for rows in found.values():
            timed(rows)

    return Target([{"a.ctm": seed}], lambda f: words.read_ctm(f / "a.ctm"), check, {"ctm": TEXT},
                  {"ctm": lambda rng, raw: raw.replace(b" ", b"\t") + b";; end\n\n"}, dict.__eq__)


@target(4)
def timed_json():
    rows = [dict(word=w, start=i / 2, end=i / 2 + 0.4) for i, w in enumerate("she had a suit".split())]
    seeds = [rows, dict(words=rows), dict(segments=[dict(words=rows[:2]), dict(words=rows[2:])]),
             dict(tiers=dict(words=dict(entries=[[r["start"], r["end"], r["word"]] for r in rows])))]
    return Target([{"a.json": dump(seed)} for seed in seeds], lambda f: words.read_timed_json(f / "a.json"), timed,
                  {"json": JSON}, {"json": reformat}, list.__eq__)


@target(6)
def swc():
    said = "".join(f'<t>{w}<n pronunciation="{w}" start="{i * 400}" end="{i * 400 + 350}"/></t> ' for i, w in
                   enumerate("she had a suit , well".split()))
    parts = "".join(f'<prop key="DC.source.audio.offset" value="{offset}"/>' for offset in (0, 1.2))
    seed = (f"<article><meta>{parts}</meta><d><sectiontitle><t>Suit</t></sectiontitle><p><s>{said}</s><s>{said}</s>"
            f"</p><ignored><s>{said}</s></ignored></d></article>").encode()

    def nest(rng, raw):
        tag, n = rng.choice([b"s", b"ignored", b"t", b"n", b"p"]), rng.choice([50, 3000, 50000])
        return raw.replace(b"<p>", b"<p>" + (b"<%s>" % tag) * n + b"a" + (b"</%s>" % tag) * n, 1)

    def check(found, *_):
        for segment in found:
            timed(segment.words or [])
            demand(segment.part in (0, 1, 2, 3) and isinstance(segment.text, str), "parts")

    return Target([{"a.swc": seed}], lambda f: words.read_swc(f / "a.swc"), check, {"swc": [*TEXT, nest]},
                  {"swc": lambda rng, raw: b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- a -->' + raw}, list.__eq__)


# sound

def pcm(n=4000, channels=1):
    t = np.arange(n * channels) / 16000
    return (np.sin(t * 2000) * 9000 + np.arange(n * channels) % 7).astype("<i2").tobytes()


def wav_file(rate=16000, channels=1, extra=b""):
    raw = pcm(channels=channels)
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    body = b"WAVE" + form + extra + b"data" + struct.pack("<I", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(body)) + body


def sphere_file(**more):
    said = dict(channel_count=1, sample_count=4000, sample_rate=16000, sample_n_bytes=2) | more
    header = "NIST_1A\n   1024\n" + "".join(f"{key} -i {value}\n" for key, value in said.items())
    return (header + "sample_byte_format -s2 01\nsample_sig_bits -i 16\nend_head\n").encode().ljust(1024) + pcm()


def heard(name):
    """A check of a sound: finite, float32, and what the standard library's reader of wavs hears, where that can."""
    def check(found, folder, files, seed, result):
        demand(found.dtype == np.float32 and found.ndim == 1 and len(found) and np.isfinite(found).all(), "no sound")
        demand(len(found) <= 4 * len(files[name]) + 16000 or name == "a.flac", "more sound than there are bytes")
        with contextlib.suppress(wave.Error, EOFError, ValueError, ZeroDivisionError, struct.error, RuntimeError):
            with wave.open(str(folder / name)) as file:
                n, channels, rate = file.getnframes(), file.getnchannels(), file.getframerate()
                whole = int.from_bytes(files[name][4:8], "little") == len(files[name]) - 8  # it reads no further
                if file.getsampwidth() == 2 and rate == 16000 and whole:
                    samples = np.frombuffer(file.readframes(n), "<i2").reshape(-1, channels).mean(1) / 32768
                    demand(len(samples) == len(found) and np.abs(samples - found).max() < 1e-4, "another sound")
    return check


def same_sound(a, b):
    return np.array_equal(a, b)


def header_first(rng, raw):
    """A mutation of the first kilobyte, as text or as bytes."""
    change = rng.choice([other_number, lines, exchange_words, integer, flip, cut, insert, repeat])
    return change(rng, raw[:1024]) + raw[1024:]


@target(6)
def sphere():
    def check(found, folder, files, seed, result):
        heard("a.sph")(found, folder, files, seed, result)
        said = dict(re.findall(rb"(\w+) -i (\d+)", files["a.sph"][:1024]))
        if [said.get(key) for key in (b"sample_rate", b"channel_count", b"sample_n_bytes")] == [b"16000", b"1", b"2"]:
            demand(len(found) >= int(said.get(b"sample_count", 0)), "fewer samples than the header says")

    def more_fields(rng, raw):
        return raw[:1024].replace(b"end_head\n", b"a -s1 b\nend_head\n")[:1024] + raw[1024:]

    seeds = [sphere_file(), sphere_file(channel_count=2, sample_count=2000, sample_rate=8000)]
    return Target([{"a.sph": seed} for seed in seeds], lambda f: speech.read_audio(str(f / "a.sph")), check,
                  {"sph": [header_first] * 6 + BYTES}, {"sph": more_fields}, same_sound)


def more_chunks(rng, raw):
    body = raw[8:36] + b"junk" + struct.pack("<I", 5) + b"abcdef" + raw[36:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


@target(6)
def wav():
    seeds = [wav_file(), wav_file(extra=b"LIST" + struct.pack("<I", 4) + b"abcd"), wav_file(8000, 2)]
    return Target([{"a.wav": seed} for seed in seeds], lambda f: speech.read_audio(str(f / "a.wav")), heard("a.wav"),
                  {"wav": [header_first] * 3 + BYTES},
                  {"wav": more_chunks}, same_sound)


@target(3)
def flac():
    import soundfile
    seeds = []
    for kind in ("FLAC", "OGG", "MP3"):
        out = io.BytesIO()
        soundfile.write(out, np.frombuffer(pcm(), "<i2"), 16000, format=kind)
        seeds.append({"a.flac": out.getvalue()})
    return Target(seeds, lambda f: speech.read_audio(str(f / "a.flac"), 0.01, 0.2), heard("a.flac"),
                  {"flac": [header_first, integer] + BYTES})


# corpora: all items of a source; what has a path must lie in it, what is an item must be one, what is bad says so

def corpus(name, sources, mutations, kind="paired", harmless=None, **settings):
    """A Target out of the files of some sources, as a corpus reads them. settings: its own; "@": the folder."""
    module = __import__(f"corpora.{name}", fromlist=["find"])
    secret = wav_file()

    def read(folder):
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        for name in ("../secret.wav", "secret.wav", "secret.flac", "secret.sph"):
            (outside / name).write_bytes(secret)
        for link, to in (("out", outside), ("link.wav", outside / "secret.wav"), ("loop", ".")):
            (folder / link).symlink_to(to)
        its_tokenizer = folder.parent / "tokenizer.json"
        if not its_tokenizer.exists():
            its_tokenizer.write_bytes(dump(tokenizer_json()))
        c = dict(kind=kind, aligner="x" * (kind == "paired"), max_seconds=300.0, mel=False, units="", **settings,
                 tokenizer=str(its_tokenizer))
        c = {key: str(folder) if value == "@" else value for key, value in c.items()} | dict(source=str(folder))
        found = module.find(folder, c)
        bar = SimpleNamespace(update=lambda n: None)
        items = list(itertools.islice(common.read_files(found, module.read, c, bar), 5000))
        return items, common.work(items, c)[0]

    def check(found, folder, files, seed, result):
        inside = os.path.join(os.path.realpath(folder), "")
        for item, made in zip(*found):
            if isinstance(made, common.Bad):
                reason = str(made.error)
                demand(not GREEDY.search(reason), f"asks for memory: {reason[:300]}")
                demand("\n" not in reason and len(reason) < 2000 and ": " in reason, f"{reason[:300]!r}")
                demand(not re.match(r"unexpected|unreadable file.*\((Type|Key|Index|Attribute)Error", reason), reason)
                json.dumps(dict(id=made.id))
            if isinstance(item, common.Item):
                demand(not isinstance(item.audio, str) or os.path.realpath(item.audio).startswith(inside),
                       f"{item.audio!r} lies outside the source")
            if isinstance(made, common.Heard):
                times = made.times or []
                ends = [end for _, end in times]
                demand(all(0 <= a <= b <= made.n_samples / 16000 for a, b in times), "word times outside")
                demand(ends == sorted(ends), "word times that do not ascend")
                demand(np.isfinite(made.waveform).all(), "a sound that is not finite")
            elif not isinstance(made, common.Bad):
                demand(len(made[0]) and max(made[0]) < 265, "ids")

    def equal(a, b):
        return len(a[0]) == len(b[0]) and [type(x) for x in a[1]] == [type(x) for x in b[1]]

    return Target(sources, read, check, mutations, harmless or {}, equal)


def json_lines(*records):
    return b"".join(dump(record) + b"\n" for record in records)


LINES = [*JSON, *TEXT, path_in, path_in, path_in]
SAID = [["She", 0.0, 0.1], ["had.", 0.1, 0.2]]


@target(6)
def manifest():
    record = dict(audio="a.wav", start=0.0, end=0.25, text="She had.", words=SAID)
    listed = json_lines(record, record | dict(audio="b/c.wav", end=None), dict(audio="a.wav", text="Well."), record)
    source = {"m.jsonl": listed, "a.wav": wav_file(), "b/c.wav": wav_file()}
    return corpus("manifest", [source], {"jsonl": LINES},
                  harmless={"jsonl": lambda rng, raw: raw.replace(b", ", b" ,  ").replace(b"\n", b"\n\n")})


@target(3)
def libriheavy():
    cut = dict(id="a-1", start=0.05, duration=0.15, recording=dict(id="b/c"),
               supervisions=[dict(custom=dict(texts=["She had.", "SHE HAD"]))])
    return corpus("libriheavy", [{"x.jsonl": json_lines(cut, cut | dict(id="a-2")), "b/c.flac": wav_file()}],
                  {"jsonl": LINES}, audio="@")


@target(2)
def peoples_speech():
    record = dict(training_data=dict(name=["a.wav", "b.wav"], label=["she had", "well"], duration_ms=[250, 250]))
    return corpus("peoples_speech", [{"s.json": json_lines(record), "s/a.wav": wav_file(), "s/b.wav": wav_file()}],
                  {"json": LINES})


@target(2)
def voxpopuli():
    listed = b"id\traw_text\tnormalized_text\n2019a\tShe had.\tshe had\n2019b\t\twell\n"
    where = "transcribed_data/en/"
    return corpus("voxpopuli", [{f"{where}asr_train.tsv": listed, f"{where}2019/2019a.ogg": wav_file()}],
                  {"tsv": [*TEXT, path_in]}, lang="en", subset="train", segment=30.0)


@target(2)
def tedlium():
    listed = b"a 1 spk 0.00 0.20 <o,f0,male> she had it 's\n;; a comment\na 1 spk 0.05 0.25 <o,f0,male> <unk> well\n"
    return corpus("tedlium", [{"stm/a.stm": listed, "sph/a.sph": sphere_file()}], {"stm": [*TEXT, path_in]})


@target(4)
def librispeech():
    grid = long_textgrid([("words", [(0, 0.1, "she"), (0.1, 0.2, "had"), (0.2, 0.25, "")])])
    chapter = {"a-1.trans.txt": b"a-1-0 SHE HAD\nb WELL\n", "a-1-0.flac": wav_file(), "b.flac": wav_file()}
    seeds = [chapter | {"a-1-0.TextGrid": grid}, chapter | {"a-1.alignment.txt": b'b ",WELL," "0,0.2,0.25"\n'}]
    return corpus("librispeech", seeds, {"txt": [*TEXT, path_in, path_in], "TextGrid": TEXT}, alignments="")


@target(2)
def librilight():
    active = dump(dict(voice_activity=[[0.0, 0.1], [0.12, 0.25]]))
    return corpus("librilight", [{"a.flac": wav_file(), "a.json": active}], {"json": JSON}, kind="speech",
                  segment=0.2, harmless={"json": reformat})


@target(2)
def timit():
    source = {"a.WRD": b"0 1600 she\n1600 3200 had\n", "a.TXT": b"0 4000 She had.\n", "a.WAV": sphere_file()}
    return corpus("timit", [source], {"WRD": TEXT, "TXT": TEXT}, sa=False)


def inside_gzip(mutations):
    """Mutations of what is compressed."""
    def mutation(rng, raw):
        with contextlib.suppress(EOFError, OSError, zlib.error):
            return gzip.compress(rng.choice(mutations)(rng, gzip.decompress(raw)))
        return raw
    return mutation


@target(1)
def asterisk():
    where = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    return corpus("asterisk", [{where: gzip.compress(b"digits/a: seven\n; no\nb: [tone] well\n" * 3)}],
                  {"gz": BYTES + [inside_gzip(TEXT + [path_in] * 5)]})


@target(2)
def compressed_text():
    listed = json_lines(dict(text=TEXT_SAID), dict(text="the other", more=[1]))

    def bomb(rng, raw):
        return gzip.compress(rng.choice([b" ", b'"', b"["]) * (80 << 20) + b"\n" * (1 << 20), 1)

    seeds = [{"a.jsonl.gz": gzip.compress(listed)}, {"a.jsonl": listed}, {"a.txt": TEXT_SAID.encode()}]
    mutations = {"gz": BYTES + [bomb] + [inside_gzip(LINES)] * 50, "jsonl": LINES, "txt": TEXT}
    return corpus("text", seeds, mutations, kind="text", field="text")


@target(1)
def parquet():
    import pyarrow
    from pyarrow import parquet as file
    out = io.BytesIO()
    rows = [dict(audio=dict(bytes=wav_file(), path="a"), text="She had.", aligned_text=[
        dict(word=w, start_time=a, end_time=b) for w, a, b in SAID])] * 2
    file.write_table(pyarrow.Table.from_pylist(rows), out)
    return corpus("stinystories", [{"a.parquet": out.getvalue()}], {"parquet": BYTES})


# benchmarks

def item_lines(folder):
    return json_lines(*(dict(sentence_good=f"A dog {i} runs.", sentence_bad=f"A dog {i} run.", field="f",
                             linguistics_term="t", UID="u") for i in range(folder)))


@target(2)
def blimp():
    def check(items, *_):
        demand(all(isinstance(v, str) and v.strip() for item in items for v in item.values()), "empty")

    return Target([{"a.jsonl": item_lines(3)}], benchmarks.read_blimp, check, {"jsonl": [*JSON, *TEXT]},
                  {"jsonl": lambda rng, raw: raw.replace(b": ", b" :  ")}, list.__eq__)


@target(3)
def mmlu():
    seed = (b'subject,question,A,B,C,D,answer\nanatomy,"Where ""is"" it,\nthen?",knee,one,two,a foot,C\n'
            b"law,Why?,1,2,3,4,0\n")

    def check(items, folder, files, *_):
        raw = files.get("m.csv") or lzma.decompress(files["m.csv.xz"])
        rows = list(csv.DictReader(io.StringIO(raw.decode(), newline="")))
        demand(all(c.strip() for item in items for c in item["choices"]), "empty choices")
        demand([item["answer"] for item in items] == [dict(zip("ABCD0123", [*range(4)] * 2))[row["answer"].strip()]
                                                      for row in rows], "other answers than the column has")

    seeds = [{"m.csv": seed}, {"m.csv.xz": lzma.compress(seed)}]
    return Target(seeds, lambda f: benchmarks.read_mmlu(next(f.iterdir())), check,
                   {"csv": [*TEXT, csv_fields, csv_fields], "xz": BYTES},
                  {"csv": lambda rng, raw: raw.replace(b"law", b'"law"')}, list.__eq__)


@target(2)
def gold():
    header = "id,filename,voice,type,subtype,correct,transcription\n"
    seed = header + "".join(f"{i // 2},f{i},v,agr,sub,{i % 2},some words\n" for i in range(6))

    def check(rows, *_):
        demand(len({row["filename"] for row in rows}) == len(rows), "names twice")
        demand(sum(row["correct"] == "1" for row in rows) * 2 == len(rows), "no pairs")

    return Target([{"gold.csv": seed.encode()}], lambda f: benchmarks.read_sblimp(f / "gold.csv"), check,
                  {"csv": [*TEXT, csv_fields]}, {"csv": lambda rng, raw: raw.replace(b",v,", b',"v",')}, list.__eq__)


# what convert.py reads

@target(3)
def gguf():
    import gguf as writer

    def write(folder):
        folder.mkdir()
        spec = tokenizer_json()
        tokens = list(spec["model"]["vocab"])
        w = writer.GGUFWriter(folder / "a.gguf", "llama")
        for name, value in dict(embedding_length=32, feed_forward_length=32, block_count=1, context_length=64).items():
            getattr(w, f"add_{name}")(value)
        w.add_head_count(2)
        w.add_head_count_kv(1)
        w.add_rope_freq_base(1e4)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_bos_token_id(0)
        w.add_eos_token_id(0)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list(tokens)
        w.add_token_types([3] * 2 + [1] * (len(tokens) - 2))
        w.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
        rng = np.random.default_rng(0)
        shapes = {"token_embd": (len(tokens), 32)}
        shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (32,))
        shapes |= {f"blk.0.attn_{x}": (16 if x in "kv" else 32, 32) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.0.ffn_{x}": (32, 32) for x in ("gate", "up", "down")}
        for name, shape in shapes.items():
            kind = writer.GGMLQuantizationType.Q8_0 if "ffn_" in name and len(shape) > 1 else None
            weight = rng.standard_normal(shape).astype(np.float32)
            weight = writer.quants.quantize(weight, kind) if kind else weight
            w.add_tensor(f"{name}.weight", weight, raw_dtype=kind)
        for step in ("header", "kv_data", "tensors"):
            getattr(w, f"write_{step}_to_file")()
        w.close()

    def read(folder):
        out = folder / "out"
        convert.smollm2(out, folder / "a.gguf")
        return smoltolk.from_pretrained(out), data.Tokenizer(out / "tokenizer.json")

    def check(found, folder, files, seed, result):
        net, ours = found
        demand(net.config.vocab_size == ours.vocab_size, "two sizes of the vocabulary")
        demand(all(tensor.isfinite().all() for tensor in net.state_dict().values()), "weights that are not finite")

    return Target([built(write)], read, check, {"gguf": [*BYTES, integer, integer, exchange_words]})


@target(3)
def kmeans():
    """As joblib writes a KMeans: an array's bytes stand between the instructions of the pickle."""
    joblib = __import__("joblib")
    module = type(sys)("sklearn_like")
    module.KMeans = type("KMeans", (), {"__module__": "sklearn_like"})
    sys.modules["sklearn_like"] = module
    made = module.KMeans()
    vars(made).update(n_clusters=5, cluster_centers_=np.random.default_rng(0).random((5, 4)).astype(np.float32),
                      labels_=np.arange(7), inertia_=np.float64(3.0), _sklearn_version="1.0.1")
    out = io.BytesIO()
    joblib.dump(made, out)
    raw = out.getvalue().replace(b"sklearn_like", b"sklearn.xxxx")

    def check(found, *_):
        demand(found.dtype.kind in "biuf" and found.size <= 10000, "no centroids")

    def opcode(rng, raw):
        i = rng.randrange(len(raw) + 1)
        codes = [bytes([code]) for code in b"()]}]tlduebR.NKJM0P12aqrcioR\x81\x85\x86\x93\x94\x8a\x8c\x95"]
        names = [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\ndtype\n", b"\x8d" + b"\xff" * 7 + b"\x7f"]
        return raw[:i] + rng.choice(codes + names) + raw[i:]

    def read(folder):
        try:
            return convert.read_kmeans(folder / "km.bin")
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None  # as convert.units does

    return Target([{"km.bin": raw}], read, check, {"bin": [*BYTES, opcode, opcode]})


@target(2)
def whisper_bin():
    """CTranslate2's file of a Whisper with one block, of which speech.py then hears something."""
    from test_whisper import ct2, ct2_of, small_encoder
    raw = ct2(ct2_of(small_encoder(d=64, layers=1)))

    def read(folder):
        out = convert.whisper(folder / "out", folder / "model.bin")
        return speech.load_whisper(out, 1)

    def check(found, *_):
        demand(all(tensor.dtype == torch.float32 for tensor in found.weights.values()), "other types")
        demand(speech.whisper_frames(np.ones(1600, np.float32), found).shape == (2, 64), "other frames")

    return Target([{"model.bin": raw}], read, check, {"bin": [*BYTES, integer]})


@target(2)
def whisper_units():
    from test_whisper import small_encoder
    rng = np.random.default_rng(0)

    def write(folder):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(d_model=64, encoder_layers=1, encoder_attention_heads=1,
                                                            num_mel_bins=80)))
        encoder = {f"encoder.{name}": tensor for name, tensor in small_encoder(d=64, layers=1).state_dict().items()}
        save_file(encoder, folder / "model.safetensors")
        frames = torch.from_numpy(rng.standard_normal((50, 64)).astype("f4"))
        vocabulary = speech.fit_whisper_units([frames], [np.ones(32000, np.float32)], 4, 0,
                                              speech.load_whisper(folder, 1))
        speech.save_whisper_units(folder / "units", folder, vocabulary)

    def check(found, *_):
        [(ids, _)] = speech.units([np.ones(3200, np.float32)], found)
        demand(len(found.centroids) == 4 and ids.max() < 4, "units outside the vocabulary")

    return Target([built(write)], lambda f: speech.load_units(str(f / "units")), check,
                  {"json": JSON, "npy": NPY, "safetensors": SAFETENSORS}, {"json": reformat},
                  lambda a, b: a[1:3] == b[1:3] and a.hash == b.hash)


@target(2)
def book_archives():
    from test_small import r_archive, sword_module

    from corpora import books
    seeds = [{"a.rdb": r_archive(["A book", *["of many words"] * 900])}, sword_module("<w>Of</w> <p/>many " * 1200)]

    def read(folder):
        return books.make(folder, folder / "out")

    def check(counts, folder, *_):
        demand(all(n >= books.SHORTEST and (folder / "out" / f"{name}.txt").is_file() for name, n in counts.items()),
               "no such book")

    return Target(seeds, read, check, {"rdb": [*BYTES, integer], "bzz": BYTES, "bzs": [*BYTES, integer]})


VOCODER = dict(num_embeddings=6, embedding_dim=4, model_in_dim=4, upsample_rates=[40, 16],
               upsample_kernel_sizes=[80, 32], upsample_initial_channel=8, resblock_kernel_sizes=[3],
               resblock_dilation_sizes=[[1, 3]], sampling_rate=16000, code_hop_size=640, dur_predictor_params=dict(
                   encoder_embed_dim=4, var_pred_hidden_dim=4, var_pred_kernel_size=3, var_pred_dropout=0.5))


def vocoder_weights():
    torch.manual_seed(0)
    return {name: 0.1 * torch.randn(shape) for name, shape in speech.vocoder_shapes(VOCODER).items()}


def speaks(found, *_):
    tame = max(tensor.abs().max() for tensor in found.weights.values()) < 100
    sound = speech.vocode(np.array([0, 5]), found, np.array([1, 2]))
    demand(len(sound) == 3 * found.hop and (not tame or np.isfinite(sound).all()), "a sound that is not finite")


@target(2)
def vocoder():
    def write(folder):
        folder.mkdir()
        save_file(vocoder_weights(), folder / "model.safetensors")
        (folder / "config.json").write_bytes(dump(VOCODER))

    return Target([built(write)], speech.load_vocoder, speaks, {"json": JSON, "safetensors": SAFETENSORS},
                  {"json": reformat, "safetensors": tensor_padding}, lambda a, b: a.config == b.config)


@target(1)
def vocoder_checkpoint():
    out = io.BytesIO()
    torch.save({"generator": vocoder_weights()}, out)

    def read(folder):
        convert.vocoder(folder / "out", folder / "g.pt", folder / "c.json")
        return speech.load_vocoder(folder / "out")

    return Target([{"g.pt": out.getvalue(), "c.json": dump(VOCODER)}], read, speaks, {"pt": BYTES, "json": JSON})


@target(0.4)
def hubert():
    import transformers
    shape = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, conv_dim=[4] * 8,
                 conv_kernel=[10, 3, 3, 3, 3, 2, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2, 2], num_conv_pos_embeddings=4,
                 num_conv_pos_embedding_groups=2)

    def write(folder):
        torch.manual_seed(0)
        transformers.HubertModel(transformers.HubertConfig(**shape)).save_pretrained(folder / "hubert")
        np.save(folder / "km.npy", np.random.default_rng(0).random((5, 8), np.float32))
        convert.units(folder / "units", folder / "km.npy", folder / "hubert", 1)

    def check(found, *_):
        [(ids, _)] = speech.units([np.sin(np.arange(16000) / 9).astype(np.float32)], found)
        demand(found.n_units == 5 and ids.max(initial=0) < 5, "units")

    return Target([built(write)], lambda f: speech.load_units(str(f / "units")), check,
                  {"config.json": JSON, "units.json": JSON, "safetensors": SAFETENSORS})


@target(0.4)
def aligner():
    import transformers
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=[4] * 7,
                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=4, feat_extract_norm="layer",
                 pad_token_id=0)

    def write(folder):
        torch.manual_seed(0)
        transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**shape)).save_pretrained(folder)
        (folder / "vocab.json").write_bytes(dump({"<blank>": 0, "a": 1, "b": 2, "'": 3}))

    def check(found, *_):
        [times] = words.align([np.sin(np.arange(16000) / 9).astype(np.float32)], ["ab a"], found)
        demand(isinstance(times, ValueError) or all(0 <= a <= b <= 1 for a, b in times), "times")

    return Target([built(write)], lambda f: words.load_aligner(str(f)), check,
                  {"config.json": JSON, "vocab.json": JSON, "safetensors": SAFETENSORS})


# ---------------------------------------------------------------------------------------------------------------------
# trials

def write_files(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def mutations_of(table, name):
    return next((found for ending, found in table.items() if name.endswith(ending)), None)


def trial(it, name, number, seed, folder, results):
    """"error", "right" or "same"; Finding. results: of the seeds as they are, by their place, filled here."""
    rng = random.Random(f"{seed} {name} {number}")
    which = rng.randrange(len(it.seeds))
    original = it.seeds[which]
    if which not in results:
        write_files(folder, original)
        results[which] = it.read(folder)
        it.check(results[which], folder, original, original, results[which])
    harmless = any(mutations_of(it.harmless, file) for file in original) and rng.random() < 0.1
    table = it.harmless if harmless else it.mutations
    file = rng.choice([file for file in original if mutations_of(table, file)])
    raw = original[file]
    for _ in range(1 if harmless else rng.choice([1, 1, 1, 2, 3, 6])):
        raw = table_choice(rng, mutations_of(table, file))(rng, raw)[:1 << 24]
    files = original | {file: raw}
    write_files(folder, files)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        result = it.read(folder)
    except (ValueError, SystemExit) as error:
        message = str(error)
        demand(not harmless, f"a harmless change was refused: {message}")
        demand("\n" not in message and "\r" not in message and len(message) < 1500, f"not one line: {message[:300]!r}")
        demand(not GREEDY.search(message), f"asks for memory: {message[:300]}")
        demand(str(folder) in message, f"does not name the file: {type(error).__name__} {message[:300]!r}")
        return "error"
    it.check(result, folder, files, original, results[which])
    demand(not harmless or it.equal(result, results[which]), "a harmless change gave another result")
    return "same" if harmless or raw == original[file] else "right"


def table_choice(rng, found):
    return found if callable(found) else rng.choice(found)


def give_up(*_):
    raise Finding(f"took more than {SECONDS} s")


def run(it, name, first, last, seed, folder, place, counts, findings):
    """Trials [first, last) of a target in this, a child process. place, counts: shared with the parent."""
    warnings.simplefilter("ignore")
    if "torch" in sys.modules:  # threads of the parent that were at work do not come along, and would be waited for
        sys.modules["torch"].set_num_threads(1)
    results, errors = {}, open(os.devnull, "w")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, give_up)
    os.dup2(errors.fileno(), 2)
    for number in range(first, last):
        place.value = number
        try:
            counts[("error", "right", "same").index(trial(it, name, number, seed, folder, results))] += 1
        except BaseException as error:
            counts[3] += 1
            findings.send((name, number, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{where(error)}"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    place.value = last


def where(error):
    """The innermost line of the project that an exception came through."""
    import traceback
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fuzz.py" not in frame.filename
              and str(Path(__file__).parent.parent) in frame.filename]
    return f"  [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""


def fuzz(name, trials, seed, first=0):
    """Trials [first, first + trials) of one target: (counts {error, right, same, finding}, [(name, number, what)]).

    ImportError if it needs a package that is not installed.
    """
    context, it = multiprocessing.get_context("fork"), BUILD[name][1]()
    counts, place, found = context.Array("q", 4), context.Value("q", first), []
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    last = first + trials
    while place.value < last:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=run, args=(it, name, place.value, last, seed, folder / "f", place, counts, send))
        child.start()
        send.close()
        seen, since = -1, time.monotonic()
        with contextlib.suppress(EOFError):  # the child has ended
            while True:
                if receive.poll(0.5):
                    found.append(receive.recv())
                if place.value != seen:
                    seen, since = place.value, time.monotonic()
                elif time.monotonic() - since > STUCK:
                    child.kill()
        child.join()
        if place.value < last:
            found.append((name, place.value, f"the process died or was stuck (exit code {child.exitcode})"))
            counts[3] += 1
            place.value += 1
    shutil.rmtree(folder, ignore_errors=True)
    return dict(zip(("error", "right", "same", "finding"), counts)), found


def shares(trials, names):
    """{target: its number of trials}."""
    whole = sum(BUILD[name][0] for name in names)
    return {name: max(1, round(trials * BUILD[name][0] / whole)) for name in names}


def main(argv):
    settings, _ = configure(dict(trials=10000, seed=1, only=[], first=0), argv)
    names = settings["only"] or list(BUILD)
    print(f"{'target':20}{'trials':>8}{'clear error':>13}{'right':>8}{'the same':>10}{'findings':>10}{'seconds':>9}")
    total, bad = collections.Counter(), []
    for name, trials in shares(settings["trials"], names).items():
        began = time.monotonic()
        try:
            counts, found = fuzz(name, trials, settings["seed"], settings["first"])
        except ImportError as error:
            print(f"{name:20}left out: {error}")
            continue
        total.update(counts)
        bad += found
        print(f"{name:20}{sum(counts.values()):8}{counts['error']:13}{counts['right']:8}{counts['same']:10}"
              f"{counts['finding']:10}{time.monotonic() - began:9.1f}", flush=True)
    print(f"{'all':20}{sum(total.values()):8}{total['error']:13}{total['right']:8}{total['same']:10}"
          f"{total['finding']:10}")
    for name, number, what in bad[:100]:
        print(f"{name} {number}: {what}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
