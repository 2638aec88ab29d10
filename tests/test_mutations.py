"""
Damaged files of other people: a reader gives a result or the error that it documents, and nothing else.

Each reader has a few small valid files. A trial damages one of them at random and reads them again, in a child process
that may take SECONDS for it and MEMORY bytes.

    python -m pytest tests/test_mutations.py                         # a few trials of each reader
    SMOLTOLK_TRIALS=3000 python -m pytest tests/test_mutations.py    # 100,000 in all; SMOLTOLK_SEED=2 makes others
"""
import faulthandler
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import types
import warnings
from contextlib import redirect_stderr
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_units import CONFIG, vocabulary_folder
from test_words import SWC, textgrid

from benchmarks import blimp, mmlu, sblimp, storycloze
from corpora.swc import read_swc
from data import open_source
from data import sample as sample_rows
from model import Config, SmolTolk, from_pretrained, save_pretrained
from runtime import checkpoint
from runtime.datasets import open_set, write_set
from runtime.files import read_array
from runtime.tokenizer import Tokenizer, byte_alphabet
from sample import read_units
from speech.align import load_aligner
from speech.audio import read_audio
from speech.mel import fit_mel_units, mel_frames, save_mel_units, voice
from speech.units import load_units
from speech.vocoder import load_vocoder, vocoder_shapes
from speech.word_times import read_ctm, read_textgrid, read_timed_json, read_wrd
from studies.small.whisper import fit_whisper_units, load_whisper, save_whisper_units
from tools import convert

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install -e '.[speech]'")
if sys.platform != "linux":
    pytest.skip("memory is limited in a way that only Linux has", allow_module_level=True)

TRIALS = int(os.environ.get("SMOLTOLK_TRIALS", 20))  # of each reader
SEED = int(os.environ.get("SMOLTOLK_SEED", 1))
SECONDS, MEMORY = 10, 1 << 30  # limits of a trial; memory is counted beyond what the process has


# ---------------------------------------------------------------------------------------------------------------------
# damage

INSERTED = [b"\0", b"\xff", b"\xed\xa0\x80", b"\r\n", b'"', b"\\", b"{", b"]", b",", b"<", b"&", b"x" * 5000,
            b" " * 3000, b"[" * 100_000, b"<a>" * 20_000, b"NaN"]
INTEGERS = [0, 1, 127, 255, 65535, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
NUMBERS = [b"-1", b"0", b"1.5", b"nan", b"-inf", b"1e999", b"65536", b"4294967296", b"9" * 20, b"9" * 5000, b""]
VALUES = [None, True, -1, 0, 1.5, 1e308, 10**30, 1 << 63, "", "a", "a\nb", "\0", "\ud800", "../x", "x" * 5000, [], {},
          [[]], {"a": 1}]


def damage_bytes(rng, raw):
    """Replace a few bytes, aligned as the numbers of an array are, or end the file there."""
    size = rng.choice([1, 2, 4, 8, 512])
    start = size * rng.randrange(1 + min(len(raw), rng.choice([64, 1 << 30])) // size)  # often within a header
    other = size * rng.randrange(1 + len(raw) // size)
    old, integer = raw[start:start + size] or b"\0", rng.choice(INTEGERS) % (1 << 8 * size)
    new = rng.choice([b"", rng.choice(INSERTED) + old, old * rng.choice([2, 50]), raw[other:other + size],
                      integer.to_bytes(size, "little"), bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:]])
    return raw[:start] + new + (raw[start + size:] if rng.random() < 0.9 else b"")


def damage_number(rng, raw):
    """Replace a number in digits, half of the time by one that is as long, so that all else stays where it was."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", raw[:1 << 16]))
    start, end = rng.choice(found).span() if found else (0, 0)
    as_long = [digit * (end - start) for digit in (b"0", b"1", b"9")] + [b"-1".ljust(end - start)]
    return raw[:start] + rng.choice(rng.choice([NUMBERS, as_long])) + raw[end:]


def damage_json(rng, raw):
    """Replace a value in a json file, in one of several lines of json, or in the header of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    if raw[8:9] == b"{" and 8 + size <= len(raw):
        header = damage_json(rng, raw[8:8 + size])
        return len(header).to_bytes(8, "little") + header + raw[8 + size:]
    lines = raw.split(b"\n") if b"\n{" in raw else [raw]
    i = rng.randrange(len(lines))
    try:
        value = json.loads(lines[i])
        change_inside(rng, value)
    except (ValueError, TypeError, IndexError, RecursionError):  # no json, or nothing in it
        return damage_bytes(rng, raw)
    lines[i] = json.dumps(value).encode()
    return b"\n".join(lines)


def change_inside(rng, value):
    """Remove or replace one value at any depth of a list or dict."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    if value[key] and isinstance(value[key], dict | list) and rng.random() < 0.7:
        change_inside(rng, value[key])
    elif rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice([*VALUES, value[rng.choice(keys)]])


# ---------------------------------------------------------------------------------------------------------------------
# valid files

TIMED = [("she", 0.0, 0.1), ("had", 0.1, 0.2)]
ROWS = [dict(word=word, start=start, end=end) for word, start, end in TIMED]
BLIMP = dict(sentence_good="A dog runs.", sentence_bad="A dog run.", field="f", linguistics_term="t", UID="u")
MMLU = 'subject,question,A,B,C,D,answer\nanatomy,"Where ""is"" it,\nthen?",knee,one,two,a foot,C\nlaw,Why?,1,2,3,4,0\n'
GOLD = "id,filename,voice,type,subtype,correct\n" + "".join(f"{i // 2},f{i},v,agr,sub,{i % 2}\n" for i in range(6))
LETTERS = ["<|endoftext|>", *byte_alphabet(), "th", "the", "Ġthe"]
VOCABULARY = {"tokenizer.ggml.tokens": LETTERS, "tokenizer.ggml.token_type": [3] + [1] * (len(LETTERS) - 1),
              "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"]}
STORY = {"tokenizer.json": convert.tokenizer_json(VOCABULARY), "a_mutual.txt": "A fox ran.",
         "a_correct.txt": "It got away.", "a_incorrect.txt": "It is 7."}
RNG = np.random.default_rng(0)


def write_files(contents, folder):
    """contents: {name: bytes, text, or what becomes json}"""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        path.write_bytes(content)


def sound(kind):
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(4000) / 8) / 4, 16000, format=kind)
    return file.getvalue()


def write_data(kind, folder):
    documents = [RNG.integers(1, 20, n) for n in (9, 30, 4)]
    if kind == "paired":
        documents = [([[3, 4], [5]], [[1, 2], []]), ([[6]] * 9, [[7]] * 9)]
    write_set(folder / "set", kind, documents, SimpleNamespace(vocab_size=300, eos=0, hash="t"),
              dict(n_units=20, rate=25, hash="u"))


def write_model(folder):
    save_pretrained(SmolTolk(Config(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, n_units=5,
        num_key_value_heads=1, input_adapter_layers=1, output_adapter_layers=1, max_position_embeddings=16)), folder)


def write_shards(folder):
    write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = dict(weight_map={name: f"{name}.safetensors" for name in tensors})
    write_files({"model.safetensors.index.json": index}, folder)


def write_checkpoint(folder):
    new = folder / "checkpoint-00000001"
    write_model(new)
    save_file(dict(a=torch.ones(3)), new / "optimizer.safetensors")
    write_files({"train.json": dict(place=dict(step=1), settings=dict(seed=1), data={})}, new)


def write_mel_units(folder):
    waves = [RNG.standard_normal(16000)]
    frames = [mel_frames(wave) for wave in waves]
    save_mel_units(folder, fit_mel_units(frames, 6, 0, voices=[voice(wave) for wave in waves]))


def write_whisper_units(folder):
    from test_whisper import small_encoder
    write_files({"config.json": dict(d_model=64, encoder_layers=1, encoder_attention_heads=1, num_mel_bins=80)}, folder)
    save_file(small_encoder(d=64, layers=1).state_dict(), folder / "model.safetensors")
    frames = torch.from_numpy(RNG.standard_normal((50, 64)).astype("f4"))
    fitted = fit_whisper_units([frames], [np.ones(32000, np.float32)], 4, 0, load_whisper(folder, 1))
    save_whisper_units(folder / "units", folder, fitted)


def write_ctranslate2(folder):
    from test_whisper import ct2, ct2_of, small_encoder
    (folder / "model.bin").write_bytes(ct2(ct2_of(small_encoder(d=64, layers=1))))


def write_aligner(folder):
    transformers = pytest.importorskip("transformers")
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=[4] * 7, vocab_size=4,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer")).save_pretrained(folder)
    write_files({"vocab.json": {"<blank>": 0, "a": 1, "b": 2, "'": 3}}, folder)


def write_vocoder(folder):
    weights = {name: torch.randn(shape) for name, shape in vocoder_shapes(CONFIG).items()}
    write_files({"config.json": CONFIG}, folder)
    save_file(weights, folder / "model.safetensors")
    torch.save(dict(generator=weights), folder / "g.pt")


def write_gguf(folder):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    for key, value in VOCABULARY.items():
        writer.add_array(key, value)
    for key, value in {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "llama.context_length": 64,
                       "llama.embedding_length": 32, "llama.feed_forward_length": 32, "llama.block_count": 1,
                       "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name in convert.GGUF_NAMES:
        shape = (32,) if "norm" in name else (len(LETTERS), 32) if "embd" in name else (32, 32)
        weight, kind = np.ones(shape, np.float32), gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else None
        weight = gguf.quants.quantize(weight, kind) if kind else weight
        writer.add_tensor(name if "." in name else f"blk.0.{name}.weight", weight, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def write_kmeans(folder):
    joblib = pytest.importorskip("joblib")
    module = sys.modules["sklearn_kmeans"] = types.ModuleType("sklearn_kmeans")
    module.KMeans = type("KMeans", (), {"__module__": module.__name__})
    model = module.KMeans()
    vars(model).update(cluster_centers_=RNG.random((5, 4)).astype("f4"), labels_=np.arange(7), inertia_=np.float64(3.0))
    joblib.dump(model, folder / "km.bin")
    raw = (folder / "km.bin").read_bytes()
    (folder / "km.bin").write_bytes(raw.replace(b"sklearn_kmeans", b"sklearn.kmeans"))


# ---------------------------------------------------------------------------------------------------------------------
# readers

def read_data(folder):
    """Open a data set and draw sequences from it, as training does."""
    kind = open_set(folder / "set").meta["kind"]
    kind = "interleaved" if kind == "paired" else kind
    source = open_source(kind, [folder / "set"])
    config = SimpleNamespace(vocab_size=1 << 16, n_units=1 << 16, switch=1 << 18)
    rows = sample_rows({kind: source}, {kind: 1}, 1, 1, np.arange(3), 4, config, (1, 2), (1, 2))
    assert rows.min() >= 0 and rows.max() <= config.switch


def read_checkpoint(folder):
    found, bad = checkpoint.newest(folder)
    if not found:
        raise ValueError(f"{bad[0]}: {checkpoint.fault(bad[0])}")


def read_stories(folder):
    _, cross = storycloze.read(folder)
    storycloze.encode_cross(SimpleNamespace(tokenizer=Tokenizer(folder / "tokenizer.json"), used=[]), cross)


def read_kmeans(folder):
    try:
        convert.read_kmeans(folder / "km.bin")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None  # as convert.units says it


def one_file(name, content, read, error=ValueError):
    return partial(write_files, {name: content}), lambda folder: read(folder / name), error


# {name: (function that writes valid files into a folder, function that reads the folder, the error that is fine)}
READERS = {
    "npy": (lambda folder: np.save(folder / "a.npy", np.ones((3, 4))), lambda folder: read_array(folder / "a.npy"),
            ValueError),
    **{f"{kind} set": (partial(write_data, kind), read_data, SystemExit) for kind in ("text", "speech", "paired")},
    "tokenizer.json": one_file("tokenizer.json", STORY["tokenizer.json"], Tokenizer, SystemExit),
    "model": (write_model, from_pretrained, ValueError),
    "model in shards": (write_shards, from_pretrained, ValueError),
    "checkpoint": (write_checkpoint, read_checkpoint, ValueError),
    "unit list": one_file("a.json", [1, 2, 3, 3, 11, 0], lambda path: read_units(path, 12)),
    # benchmarks/
    "BLiMP": (partial(write_files, {"a.jsonl": f"{json.dumps(BLIMP)}\n" * 3}), blimp.read, ValueError),
    "MMLU": one_file("mmlu.csv", MMLU, mmlu.read),
    "MMLU, compressed": one_file("mmlu.csv.xz", lzma.compress(MMLU.encode()), mmlu.read),
    "sBLIMP": one_file("gold.csv", GOLD, sblimp.read),
    "stories": (partial(write_files, STORY), read_stories, (ValueError, SystemExit)),
    # speech.py and words.py
    "mel units": (write_mel_units, load_units, ValueError),
    "HuBERT units": (partial(vocabulary_folder, k=5), lambda folder: load_units(folder / "units"), ValueError),
    "Whisper units": (write_whisper_units, lambda folder: load_units(folder / "units"), ValueError),
    "vocoder": (write_vocoder, load_vocoder, ValueError),
    **{f"audio, {kind}": one_file("a.sound", sound(kind), read_audio)
       for kind in ("WAV", "FLAC", "OGG", "MP3", "NIST")},
    "WRD": one_file("a.WRD", "0 1600 she\n1600 3200 had\n", read_wrd),
    "TextGrid": one_file("a.TextGrid", textgrid(TIMED, 0.25), read_textgrid),
    "short TextGrid": one_file("a.TextGrid", textgrid(TIMED, 0.25, long=False), read_textgrid),
    "ctm": one_file("a.ctm", ";; a comment\na 1 0.25 0.25 she 0.9\na 1 0.50 0.25 had 0.9\n", read_ctm),
    "json of words": one_file("a.json", dict(segments=[dict(words=ROWS), dict(words=ROWS)]), read_timed_json),
    "json of MFA": one_file("a.json", dict(tiers=dict(words=dict(entries=[[0, 0.1, "she"]]))), read_timed_json),
    "swc": one_file("aligned.swc", SWC, read_swc),
    "aligner": (write_aligner, load_aligner, ValueError),
    # convert.py
    "GGUF": (write_gguf, lambda folder: convert.smollm2(folder / "out", folder / "a.gguf"), SystemExit),
    "k-means": (write_kmeans, read_kmeans, ValueError),
    "CTranslate2": (write_ctranslate2, lambda folder: convert.whisper(folder / "out", folder / "model.bin"),
                    SystemExit),
    "textlesslib": (write_vocoder, lambda folder: convert.vocoder(
        folder / "out", folder / "g.pt", folder / "config.json"), SystemExit),
}


# ---------------------------------------------------------------------------------------------------------------------
# trials

def run_trials(name, valid, folder, number, refused):
    """Run all trials of a reader, in a child process.

    number, refused   shared with the parent: the trial in progress, and how many have ended with an error
    """
    _, read, error = READERS[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # other threads of the parent do not exist here, and torch would wait for them
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    for trial in range(-1, TRIALS):  # the first reads the valid files
        number.value, rng, contents = trial, random.Random(f"{name} {SEED} {trial}"), dict(valid)
        if trial >= 0:
            damaged = rng.choice(sorted(valid))
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                contents[damaged] = rng.choice([damage_bytes, damage_number, damage_json])(rng, contents[damaged])
        shutil.rmtree(folder)
        write_files(contents, folder)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
        try:
            with redirect_stderr(io.StringIO()):  # progress bars
                read(folder)
        except error as fault:
            message = str(fault)
            assert trial >= 0, f"the valid files are refused: {message}"
            assert "\n" not in message and str(folder) in message, f"not one line that names the file: {message!r}"
            refused.value += 1
        faulthandler.cancel_dump_traceback_later()


def check(name, tmp_path):
    """Run the trials of a reader. If one fails, the message has its number, and its files stay in tmp_path."""
    write, folder = READERS[name][0], tmp_path / "files"
    folder.mkdir()
    write(folder)
    valid = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    context = multiprocessing.get_context("fork")
    number, refused = context.Value("q", -1), context.Value("q", 0)
    child = context.Process(target=run_trials, args=(name, valid, folder, number, refused))
    child.start()
    child.join()
    assert child.exitcode == 0, f"{name}, SMOLTOLK_SEED={SEED}, trial {number.value}: see below; files in {folder}"
    assert refused.value or TRIALS < 20, f"{name}: no damage was noticed in {TRIALS} trials"


@pytest.mark.parametrize("name", READERS)
def test_a_result_or_the_documented_error(name, tmp_path):
    check(name, tmp_path)


def hang():
    while True:
        pass


@pytest.mark.parametrize("fault, sign", [
    (hang, "Timeout"), (lambda: bytearray(4 << 30), "MemoryError"), (lambda: {}["x"], "KeyError"),
    (lambda: int("two\nlines"), "not one line"), (lambda: int("no file"), "that names the file"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "")])
def test_the_trials_notice(fault, sign, tmp_path, monkeypatch, capfd):
    """A reader that hangs, wants too much memory, raises something else, says too much or too little, or is killed."""
    def read(folder):
        if (folder / "a.txt").read_bytes() != b"valid":
            fault()
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    monkeypatch.setitem(READERS, "wrong", (partial(write_files, {"a.txt": "valid"}), read, ValueError))
    with pytest.raises(AssertionError, match=f"wrong, SMOLTOLK_SEED={SEED}, trial [0-9]"):
        check("wrong", tmp_path)
    assert sign in capfd.readouterr().err
