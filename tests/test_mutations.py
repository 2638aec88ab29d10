"""
Damaged files of other people: a reader gives a result or the error that it documents, and nothing else.

Each reader has a few small valid files. A trial damages one of them at random and reads them, in a child process that
may take SECONDS and MEMORY bytes for it.

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
import sys
import types
import warnings
from contextlib import redirect_stderr
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
from data import sample as draw_rows
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
from speech.vocoder import Vocoder, load_vocoder
from speech.word_times import read_ctm, read_textgrid, read_timed_json, read_wrd
from studies.small.whisper import fit_whisper_units, load_whisper, save_whisper_units
from tools import convert

for package in ("soundfile", "transformers", "gguf", "joblib"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[test]'")
if sys.platform != "linux":
    pytest.skip("memory is limited in a way that only Linux has", allow_module_level=True)

TRIALS = int(os.environ.get("SMOLTOLK_TRIALS", 20))  # of each reader
SEED = int(os.environ.get("SMOLTOLK_SEED", 1))
SECONDS, MEMORY = 10, 1 << 30  # limits of a trial; memory is counted beyond what the process has
RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------------------------------------------
# damage

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
    new = rng.choice([b"", rng.choice(INSERTED) + old, old * rng.choice([2, 50]), integer.to_bytes(size, "little"),
                      bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:]])
    return raw[:start] + new + (raw[start + size:] if rng.random() < 0.9 else b"")


def damage_number(rng, raw):
    """Replace a number in digits, half of the time by one that is as long."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", raw[:1 << 16]))
    start, end = rng.choice(found).span() if found else (0, 0)
    as_long = [digit * (end - start) for digit in (b"0", b"1", b"9")]
    return raw[:start] + rng.choice(rng.choice([NUMBERS, as_long])) + raw[end:]


def damage_json(rng, raw):
    """Remove or replace a value in a json file, in a line of one, or in the header of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    if raw[8:9] == b"{" and 8 + size <= len(raw):
        header = damage_json(rng, raw[8:8 + size])
        return len(header).to_bytes(8, "little") + header + raw[8 + size:]
    lines = raw.split(b"\n") if b"\n{" in raw else [raw]
    i = rng.randrange(len(lines))
    try:
        inside = value = json.loads(lines[i])
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        while inside[key] and isinstance(inside[key], dict | list) and rng.random() < 0.7:
            inside = inside[key]
            key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if rng.random() < 0.2:
            del inside[key]
        else:
            inside[key] = rng.choice(VALUES)
    except (ValueError, TypeError, IndexError, RecursionError):  # no json, or nothing in it
        return damage_bytes(rng, raw)
    lines[i] = json.dumps(value).encode()
    return b"\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# valid files: functions that write them into a folder

def texts(contents):
    """A function that writes {name: bytes, text, or a value that becomes json}."""
    def write(folder):
        for name, content in contents.items():
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return write


TIMED = [("she", 0.0, 0.1), ("had", 0.1, 0.2)]
ROWS = [dict(word=word, start=start, end=end) for word, start, end in TIMED]
BLIMP = json.dumps(dict(sentence_good="A dog runs.", sentence_bad="A dog run.", field="f", linguistics_term="t",
                        UID="u")) + "\n"
MMLU = 'subject,question,A,B,C,D,answer\nanatomy,"Where ""is"" it,\nthen?",knee,one,two,a foot,C\nlaw,Why?,1,2,3,4,0\n'
GOLD = "id,filename,voice,type,subtype,correct\n" + "".join(f"{i // 2},f{i},v,agr,sub,{i % 2}\n" for i in range(6))
LETTERS = ["<|endoftext|>", *byte_alphabet(), "th", "the", "Ġthe"]
VOCABULARY = {"tokenizer.ggml.tokens": LETTERS, "tokenizer.ggml.token_type": [3] + [1] * (len(LETTERS) - 1),
              "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"]}
TOKENIZER = convert.tokenizer_json(VOCABULARY)


def sound(kind):
    import soundfile
    soundfile.write(file := io.BytesIO(), np.sin(np.arange(4000) / 8) / 4, 16000, format=kind)
    return texts({"a.sound": file.getvalue()})


def data_set(kind):
    documents = [RNG.integers(1, 20, n) for n in (9, 30, 4)]
    if kind == "paired":
        documents = [([[3, 4], [5]], [[1, 2], []]), ([[6]] * 9, [[7]] * 9)]
    return lambda folder: write_set(folder / "set", kind, documents, SimpleNamespace(vocab_size=300, eos=0, hash="t"),
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
    texts({"model.safetensors.index.json": index})(folder)


def write_checkpoint(folder):
    write_model(new := folder / "checkpoint-00000001")
    save_file(dict(a=torch.ones(3)), new / "optimizer.safetensors")
    texts({"train.json": dict(place=dict(step=1), settings=dict(seed=1), data={})})(new)


def write_mel_units(folder):
    waves = [RNG.standard_normal(16000)]
    save_mel_units(folder, fit_mel_units([mel_frames(wave) for wave in waves], 6, 0, voices=[voice(waves[0])]))


def write_whisper_units(folder):
    from test_whisper import small_encoder
    texts({"config.json": dict(d_model=64, encoder_layers=1, encoder_attention_heads=1, num_mel_bins=80)})(folder)
    save_file(small_encoder(d=64, layers=1).state_dict(), folder / "model.safetensors")
    frames = torch.from_numpy(RNG.standard_normal((50, 64)).astype("f4"))
    fitted = fit_whisper_units([frames], [np.ones(32000, np.float32)], 4, 0, load_whisper(folder, 1))
    save_whisper_units(folder / "units", folder, fitted)


def write_ctranslate2(folder):
    from test_whisper import ct2, ct2_of, small_encoder
    texts({"model.bin": ct2(ct2_of(small_encoder(d=64, layers=1)))})(folder)


def write_aligner(folder):
    import transformers
    transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=[4] * 7, vocab_size=4,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer")).save_pretrained(folder)
    texts({"vocab.json": {"<blank>": 0, "a": 1, "b": 2, "'": 3}})(folder)


def write_vocoder(folder):
    weights = Vocoder(CONFIG).state_dict()
    texts({"config.json": CONFIG})(folder)
    save_file(weights, folder / "model.safetensors")
    torch.save(dict(generator=weights), folder / "g.pt")


def write_gguf(folder):
    import gguf
    writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    for key, value in VOCABULARY.items():
        writer.add_array(key, value)
    for key, value in {"context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "block_count": 1,
                       "attention.head_count": 2, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    for key in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", 0)
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
    import joblib
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
    config = SimpleNamespace(vocab_size=1 << 16, n_units=1 << 16, switch=1 << 18)
    sources = {kind: open_source(kind, [folder / "set"])}
    rows = draw_rows(sources, {kind: 1}, 1, 1, np.arange(3), 4, config, (1, 2), (1, 2))
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


STORY = {"tokenizer.json": TOKENIZER, "a_mutual.txt": "A fox ran.", "a_correct.txt": "It got away.",
         "a_incorrect.txt": "It is 7."}
LONG_GRID, SHORT_GRID = textgrid(TIMED, 0.25), textgrid(TIMED, 0.25, long=False)
MFA = dict(tiers=dict(words=dict(entries=[[0, 0.1, "she"]])))
CTM = ";; a comment\na 1 0.25 0.25 she 0.9\na 1 0.50 0.25 had 0.9\n"

# {name: (writes valid files into a folder, reads the folder or the file named, the error that is fine)}
READERS = {
    "npy": (lambda folder: np.save(folder / "a.npy", np.ones((3, 4))), read_array, ValueError, "a.npy"),
    "text set": (data_set("text"), read_data, SystemExit),
    "speech set": (data_set("speech"), read_data, SystemExit),
    "paired set": (data_set("paired"), read_data, SystemExit),
    "tokenizer": (texts({"tokenizer.json": TOKENIZER}), Tokenizer, SystemExit, "tokenizer.json"),
    "model": (write_model, from_pretrained, ValueError),
    "model in shards": (write_shards, from_pretrained, ValueError),
    "checkpoint": (write_checkpoint, read_checkpoint, ValueError),
    "unit list": (texts({"a.json": [1, 2, 3, 3, 11, 0]}), lambda path: read_units(path, 12), ValueError, "a.json"),
    "BLiMP": (texts({"a.jsonl": BLIMP * 3}), blimp.read, ValueError),
    "MMLU": (texts({"mmlu.csv": MMLU}), mmlu.read, ValueError, "mmlu.csv"),
    "MMLU in xz": (texts({"mmlu.csv.xz": lzma.compress(MMLU.encode())}), mmlu.read, ValueError, "mmlu.csv.xz"),
    "sBLIMP": (texts({"gold.csv": GOLD}), sblimp.read, ValueError, "gold.csv"),
    "stories": (texts(STORY), read_stories, (ValueError, SystemExit)),
    "mel units": (write_mel_units, load_units, ValueError),
    "HuBERT units": (lambda folder: vocabulary_folder(folder, k=5), load_units, ValueError, "units"),
    "Whisper units": (write_whisper_units, load_units, ValueError, "units"),
    "vocoder": (write_vocoder, load_vocoder, ValueError),
    "WAV": (sound("WAV"), read_audio, ValueError, "a.sound"),
    "FLAC": (sound("FLAC"), read_audio, ValueError, "a.sound"),
    "OGG": (sound("OGG"), read_audio, ValueError, "a.sound"),
    "MP3": (sound("MP3"), read_audio, ValueError, "a.sound"),
    "NIST": (sound("NIST"), read_audio, ValueError, "a.sound"),
    "WRD": (texts({"a.WRD": "0 1600 she\n1600 3200 had\n"}), read_wrd, ValueError, "a.WRD"),
    "TextGrid": (texts({"a.TextGrid": LONG_GRID}), read_textgrid, ValueError, "a.TextGrid"),
    "short TextGrid": (texts({"a.TextGrid": SHORT_GRID}), read_textgrid, ValueError, "a.TextGrid"),
    "ctm": (texts({"a.ctm": CTM}), read_ctm, ValueError, "a.ctm"),
    "json of words": (texts({"a.json": dict(segments=[dict(words=ROWS)] * 2)}), read_timed_json, ValueError, "a.json"),
    "json of MFA": (texts({"a.json": MFA}), read_timed_json, ValueError, "a.json"),
    "swc": (texts({"aligned.swc": SWC}), read_swc, ValueError, "aligned.swc"),
    "aligner": (write_aligner, load_aligner, ValueError),
    "k-means": (write_kmeans, read_kmeans, ValueError),
    "GGUF": (write_gguf, lambda folder: convert.smollm2(folder / "out", folder / "a.gguf"), SystemExit),
    "CTranslate2": (write_ctranslate2, lambda folder: convert.whisper(folder / "out", folder / "model.bin"),
                    SystemExit),
    "textlesslib": (write_vocoder, lambda folder: convert.vocoder(folder / "out", folder / "g.pt",
                                                                  folder / "config.json"), SystemExit)}


# ---------------------------------------------------------------------------------------------------------------------
# trials

def run_trials(name, folder, number, refused):
    """Run all trials of a reader, in a child process.

    number, refused   shared with the parent: the trial in progress, and how many have ended with an error
    """
    write, read, error, *inside = READERS[name]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the parent's other threads do not exist here, and torch would wait for them
    write(folder)
    valid = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    for trial in range(-1, TRIALS):  # the first reads the valid files
        number.value, rng, contents = trial, random.Random(f"{name} {SEED} {trial}"), dict(valid)
        for _ in range(rng.choice([1, 1, 1, 2, 4]) if trial >= 0 else 0):
            damaged = rng.choice(list(valid))
            contents[damaged] = rng.choice([damage_bytes, damage_number, damage_json])(rng, contents[damaged])
        shutil.rmtree(folder)
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
        try:
            with redirect_stderr(io.StringIO()):  # progress bars
                read(folder.joinpath(*inside))
        except error as fault:
            message = str(fault)
            assert trial >= 0, f"the valid files are refused: {message}"
            assert "\n" not in message and str(folder) in message, f"not one line that names the file: {message!r}"
            refused.value += 1
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("name", READERS)
def test_a_result_or_the_documented_error(name, tmp_path):
    """If a trial fails, the message has its number, and its files stay in tmp_path."""
    folder = tmp_path / "files"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    number, refused = context.Value("q", -1), context.Value("q", 0)
    child = context.Process(target=run_trials, args=(name, folder, number, refused))
    child.start()
    child.join()
    assert child.exitcode == 0, f"{name}, SMOLTOLK_SEED={SEED}, trial {number.value}: see below; files in {folder}"
    assert refused.value or TRIALS < 20, f"{name}: no damage was noticed in {TRIALS} trials"
