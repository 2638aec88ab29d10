"""
Damaged files of other people: a reader gives a result, or ValueError or SystemExit with one line that names the file.

    SMOLTOLK_TRIALS=3000 python -m pytest tests/test_mutations.py    # 70,000 in all; SMOLTOLK_SEED=2 makes others
"""
import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_audio import with_ffmpeg
from test_convert import dump
from test_model import make
from test_units import CONFIG, vocabulary_folder
from test_words import SWC, textgrid, write_aligner

from benchmarks import blimp, mmlu, sblimp, storycloze
from corpora.swc import read_swc
from model import from_pretrained, save_pretrained
from runtime.tokenizer import Tokenizer, byte_alphabet
from speech.align import load_aligner
from speech.audio import read_audio
from speech.units import load_units
from speech.vocoder import Vocoder, load_vocoder
from speech.word_times import read_ctm, read_textgrid, read_timed_json, read_wrd
from studies.small.whisper import load_whisper
from tools import convert

soundfile, gguf = pytest.importorskip("soundfile"), pytest.importorskip("gguf")
if sys.platform != "linux":
    pytest.skip("memory is limited in a way that only Linux has", allow_module_level=True)

TRIALS = int(os.environ.get("SMOLTOLK_TRIALS", 20))  # of each reader
SEED = int(os.environ.get("SMOLTOLK_SEED", 1))
SECONDS, MEMORY = 10, 1 << 30  # limits of a trial, which is read in a child process
INSERTED = [b"\0", b"\xff", b"\xed\xa0\x80", b"\r\n", b'"', b"\\", b"{", b"]", b",", b"<", b"x" * 5000, b" " * 3000,
            b"[" * 100_000, b"<a>" * 20_000, b"NaN"]
INTEGERS = [0, 1, 127, 255, 65535, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
NUMBERS = [b"-1", b"0", b"1.5", b"nan", b"-inf", b"1e999", b"65536", b"4294967296", b"9" * 20, b"9" * 5000, b""]
VALUES = [None, True, -1, 0, 1.5, 1e308, 10**30, "", "a\nb", "\0", "\ud800", "../x", "x" * 5000, [], {}, [[]], {"a": 1}]


def damage_bytes(rng, raw):
    """Replace a few bytes, aligned as the numbers of an array are, or end the file there."""
    size = rng.choice([1, 2, 4, 8, 512])
    start = size * rng.randrange(1 + min(len(raw), rng.choice([64, 1 << 30])) // size)  # often within a header
    old, integer = raw[start:start + size] or b"\0", rng.choice(INTEGERS) % (1 << 8 * size)
    new = rng.choice([b"", rng.choice(INSERTED) + old, old * 50, integer.to_bytes(size, "little"),
                      bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:]])
    return raw[:start] + new + (raw[start + size:] if rng.random() < 0.9 else b"")


def damage_number(rng, raw):
    """Replace a number in digits, also by one that is as long."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", raw[:1 << 16]))
    start, end = rng.choice(found).span() if found else (0, 0)
    return raw[:start] + rng.choice([*NUMBERS, b"1" * (end - start), b"9" * (end - start)]) + raw[end:]


def damage_json(rng, raw):
    """Replace or remove a value in a json file, at any depth."""
    try:
        inside = whole = [json.loads(raw)]
        key = 0
        while inside[key] and isinstance(inside[key], dict | list) and (inside is whole or rng.random() < 0.7):
            inside = inside[key]
            key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside[key] = rng.choice(VALUES)
        if inside is not whole and rng.random() < 0.2:
            del inside[key]
        return json.dumps(whole[0]).encode()
    except (ValueError, RecursionError):  # no json
        return damage_bytes(rng, raw)


def texts(contents):
    """A function that writes files, each with a text or with a value that becomes json."""
    def write(folder):
        for name, content in contents.items():
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return write


def write_hubert(folder):
    vocabulary_folder(folder, k=5)
    dump(folder / "km.bin", pytest.MonkeyPatch(), cluster_centers_=np.load(folder / "km.npy"))


def write_whisper(folder):
    from test_whisper import ct2, ct2_of, small_encoder
    encoder = small_encoder(d=64, layers=1)
    texts({"config.json": dict(d_model=64, encoder_layers=1, encoder_attention_heads=1, num_mel_bins=80)})(folder)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "model.bin").write_bytes(ct2(ct2_of(encoder)))


def write_vocoder(folder):
    weights = Vocoder(CONFIG).state_dict()
    texts({"config.json": CONFIG})(folder)
    save_file(weights, folder / "model.safetensors")
    torch.save(dict(generator=weights), folder / "g.pt")


def write_gguf(folder):
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    for key, value in FIELDS.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name in convert.GGUF_NAMES:
        shape = (8,) if "norm" in name else (len(LETTERS), 8) if "embd" in name else (8, 8)
        writer.add_tensor(name if "." in name else f"blk.0.{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_stories(folder):
    _, cross = storycloze.read(folder)
    storycloze.encode_cross(SimpleNamespace(tokenizer=Tokenizer(folder / "tokenizer.json"), used=[]), cross)


LETTERS = ["<|endoftext|>", *byte_alphabet(), "th", "the", "Ġthe"]
FIELDS = {"tokenizer.ggml.tokens": LETTERS, "tokenizer.ggml.token_type": [3] + [1] * (len(LETTERS) - 1),
          "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"], "tokenizer.ggml.pre": "smollm",
          "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "llama.context_length": 64,
          "llama.embedding_length": 8, "llama.feed_forward_length": 8, "llama.block_count": 1,
          "llama.attention.head_count": 2, "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 1e4,
          "llama.attention.layer_norm_rms_epsilon": 1e-5}
STORY = {"tokenizer.json": convert.tokenizer_json(FIELDS), "a_mutual.txt": "A fox ran.", "a_correct.txt": "It got off.",
         "a_incorrect.txt": "It is 7."}
BLIMP = dict(sentence_good="A dog runs.", sentence_bad="A dog run.", field="f", linguistics_term="t", UID="u")
MMLU = 'subject,question,A,B,C,D,answer\nanatomy,"Where ""is"" it,\nthen?",knee,one,two,a foot,C\nlaw,Why?,1,2,3,4,0\n'
GOLD = "id,filename,voice,type,subtype,correct\n0,a,v,agr,sub,1\n0,b,v,agr,sub,0\n1,c,v,agr,sub,1\n1,d,v,agr,sub,0\n"
LONG, SHORT = [textgrid([("she", 0.0, 0.1), ("had", 0.1, 0.2)], 0.25, long) for long in (True, False)]
WORDS = dict(words=[dict(word="she", start=0.0, end=0.1), dict(word="had", start=0.1, end=0.2)])
MFA = dict(tiers=dict(words=dict(entries=[[0, 0.1, "she"]])))
# {name: (writes valid files into a folder, reads the folder or the file named)}
READERS = {
    "tokenizer": (texts({"tokenizer.json": convert.tokenizer_json(FIELDS)}), Tokenizer, "tokenizer.json"),
    "model": (lambda folder: save_pretrained(make(num_hidden_layers=1), folder), from_pretrained),
    "BLiMP": (texts({"a.jsonl": BLIMP}), blimp.read),
    "MMLU": (texts({"mmlu.csv": MMLU}), mmlu.read, "mmlu.csv"),
    "sBLIMP": (texts({"gold.csv": GOLD}), sblimp.read, "gold.csv"),
    "stories": (texts(STORY), read_stories),
    "HuBERT": (write_hubert, load_units, "units"),
    "Whisper": (write_whisper, lambda folder: load_whisper(folder, 1)),
    "vocoder": (write_vocoder, load_vocoder),
    "WRD": (texts({"a.WRD": "0 1600 she\n1600 3200 had\n"}), read_wrd, "a.WRD"),
    "TextGrid": (texts({"a.TextGrid": LONG}), read_textgrid, "a.TextGrid"),
    "short TextGrid": (texts({"a.TextGrid": SHORT}), read_textgrid, "a.TextGrid"),
    "ctm": (texts({"a.ctm": ";; a comment\na 1 0.25 0.25 she 0.9\na 1 0.50 0.25 had 0.9\n"}), read_ctm, "a.ctm"),
    "json": (texts({"a.json": dict(segments=[WORDS] * 2)}), read_timed_json, "a.json"),
    "json of MFA": (texts({"a.json": MFA}), read_timed_json, "a.json"),
    "swc": (texts({"aligned.swc": SWC}), read_swc, "aligned.swc"),
    "aligner": (write_aligner, load_aligner),
    "k-means": (write_hubert, lambda at: convert.units(at / "out", at / "km.bin", at / "hubert", 3)),
    "GGUF": (write_gguf, lambda at: convert.smollm2(at / "out", at / "a.gguf")),
    "CTranslate2": (write_whisper, lambda at: convert.whisper(at / "out", at / "model.bin")),
    "textlesslib": (write_vocoder, lambda at: convert.vocoder(at / "out", at / "g.pt", at / "config.json"))}
RAMP = np.linspace(-1, 1, 4000)
for form in ("WAV", "FLAC", "OGG", "MP3", "NIST", "AIFF"):
    READERS[form] = (lambda at, form=form: soundfile.write(at / "a", RAMP, 16000, format=form), read_audio, "a")
for form, codec in (("ipod", "aac"), ("webm", "libopus")):
    content = with_ffmpeg(RAMP, form, codec)
    READERS[form] = (lambda at, content=content: (at / "a").write_bytes(content), read_audio, "a")


def run_trials(name, folder):
    """Run all trials of a reader, in a child process. If one fails, it is the last of those that are printed."""
    write, read, *inside = READERS[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the parent's other threads do not exist here, and torch would wait for them
    write(folder)
    valid, refused = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}, 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    for trial in range(-1, TRIALS):  # the first reads the valid files
        print(f"{name}, SMOLTOLK_SEED={SEED}, trial {trial}", flush=True)
        rng, contents = random.Random(f"{name} {SEED} {trial}"), dict(valid)
        for _ in range(rng.choice([1, 1, 1, 2, 4]) if trial >= 0 else 0):
            damaged = rng.choice(list(valid))
            contents[damaged] = rng.choice([damage_bytes, damage_number, damage_json])(rng, contents[damaged])
        shutil.rmtree(folder)
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
        try:
            read(folder.joinpath(*inside))
        except (ValueError, SystemExit) as fault:
            assert trial >= 0 and "\n" not in str(fault) and str(folder) in str(fault), repr(fault)
            refused += 1
        faulthandler.cancel_dump_traceback_later()
    assert refused or TRIALS < 20, f"no damage was noticed in {TRIALS} trials"


@pytest.mark.parametrize("name", READERS)
def test_a_result_or_the_documented_error(name, tmp_path):
    (tmp_path / "files").mkdir()
    child = multiprocessing.get_context("fork").Process(target=run_trials, args=(name, tmp_path / "files"))
    child.start()
    child.join()
    assert child.exitcode == 0, f"{name}: the last trial below failed; its files are in {tmp_path}/files"
