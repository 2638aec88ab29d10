"""
Generate text or speech with a checkpoint, after a prompt of text or speech.

    python sample.py --checkpoint=out/train_tiny --prompt="Last week, Anna" --to=speech --out=answer.wav
    python sample.py --checkpoint=out/train_tiny --prompt=answer.wav --to=text
    python sample.py --checkpoint=out/train_tiny --to=speech:60,text:20,speech:60       # no prompt, three parts
    python sample.py --checkpoint=weights/smollm2-135m --prompt="Once" --prompt="Twice" # a text LM, a batch of two

A prompt is text, a sound file, or a file of units (.json or .npy; repeated units count once, as in training). Text is
printed as it is made. Speech is written to a sound file, and its units to a .json file with the same name, which can
serve as a prompt. With several prompts or parts, file names get the numbers of prompt and part: answer-2-1.wav.

The modality is chosen by --to, never by the model. Each part uses one head only, so it cannot contain a symbol of the
other modality or a switch token. A part ends at the EOS of its modality, which is dropped, or at its maximum length.
Then the model reads a switch token, and the next part uses the other head.
"""
import codecs
import itertools
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.hear import check_units
from configurator import configure
from data import prompt_sequence
from evaluate import newest_checkpoint
from model import TEXT_ONLY, from_pretrained, new_cache
from runtime.checkpoint import demo_of
from runtime.devices import pick_device
from runtime.packing import pack_weights
from runtime.threads import share_cores
from runtime.tokenizer import Tokenizer

checkpoint = "assets/tiny/smoltolk"  # folder of a run (its newest checkpoint is used) or of a model
prompt = []                    # text, a sound file or a file of units; optional; repeat --prompt for a batch
to = "text"                    # what to make: text, speech, or several parts with lengths, as in text:30,speech:100
max_new = 128                  # maximum number of symbols in a part without a length
temperature = 0.8              # 0: always the most likely symbol
top_k = 0                      # draw only from the k most likely symbols; 0: from all
top_p = 1.0                    # draw only from the smallest set of most likely symbols with this total probability
seed = 1                       # for drawing symbols
units = ""                     # folder of the unit vocabulary that the checkpoint was trained with; "": the demo's
vocoder = ""                   # folder of a vocoder, for HuBERT units
out = "answer.wav"             # sound file for speech, .wav or .flac
device = "auto"                # "cuda", "cpu", "mps", or "auto" for the best one available
dtype = "float32"              # or "bfloat16", "float16", "int8" (8-bit weights, on a CPU): less memory, and faster
compile = False                # torch.compile: starts up to a minute later, then is faster; on a CPU for one prompt

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, float, str, list)) and not k.startswith("_")}


# ---------------------------------------------------------------------------------------------------------------------
# generation

def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a symbol for each row: logits [B, n] -> int64 [B].

    temperature   divides the logits; 0: take the most likely symbol
    top_k         draw only from the k most likely symbols; 0: from all
    top_p         of these, renormalised, draw only from the smallest set of most likely ones that reaches this sum
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, index = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # sorted
    p = logits.softmax(-1)
    if top_p < 1:
        # A symbol stays if the more likely ones have less than top_p. The first always stays.
        p = p * (p.cumsum(-1) - p < top_p)
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if index is None else index.gather(-1, drawn))[:, 0]


def step(model, ids, cache, modality, speaks):
    """Read ids [B, T] after those in the cache -> logits [B, n] of the next symbol. speaks: see SmolTolk.read."""
    output = model(ids, layout=None if speaks else TEXT_ONLY, cache=cache)
    if modality == "text":
        return model.text_logits(output.text[:, -1])
    return model.speech_logits(output.speech[:, -1])


def read_prompts(model, rows, modality, length):
    """Read rows of ids, padded on the left -> (logits [B, n] of the next symbol, a Cache with `length` slots)."""
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows])
    cache = new_cache(model, torch.tensor([longest - len(ids) for ids in rows]), length)
    speaks = modality == "speech" or bool((padded >= model.config.vocab_size).any())
    return step(model, padded.to(cache.slot.device), cache, modality, speaks), cache


def compile_step(cache):
    """step(), compiled for one symbol at a time. On CUDA it is recorded as a CUDA graph."""
    for tensor in (*cache[3:], *(t for stack in cache[:3] for pair in stack for t in pair)):
        torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write into it
    return torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")


@torch.inference_mode()
def generate(model, openings, plan, pick, compiled=False, n_tokens=None):
    """Yield (number of the part, list of B ids) at each step. The id is None in a row whose part is over.

    openings   a nonempty list of ids for each row, in the model's id space, with a switch token before the first part
               if it has another modality
    plan       (modality, maximum number of symbols) of each part; modalities alternate
    pick       function from logits [B, n] to ids [B], such as draw()
    n_tokens   number of tokens that the tokenizer has; the vocabulary of a model may be padded with further ids
    The ids yielded count from 0 in both modalities, as in a tokenizer or a unit vocabulary. EOS is never yielded.
    """
    config, rows = model.config, [list(ids) for ids in openings]
    length = positions_needed(openings, plan)  # the same for all parts, so that compiled steps fit all of them
    for part, (modality, most) in enumerate(plan):
        # eos is an index into the logits of the head. Logit 0 belongs to first_id in the shared id space.
        eos, first_id = (config.eos_token_id, 0) if modality == "text" else (config.n_units, config.vocab_size)
        if part:
            rows = [[*ids, config.switch] for ids in rows]
        logits, cache = read_prompts(model, rows, modality, length)
        next_step = compile_step(cache) if compiled else step
        going = [True] * len(rows)
        for made in range(1, most + 1):
            drawn = pick(logits[:, :n_tokens] if modality == "text" else logits)
            symbols = [symbol if goes and symbol != eos else None for goes, symbol in zip(going, drawn.tolist())]
            yield part, symbols
            for ids, symbol in zip(rows, symbols):
                ids += [] if symbol is None else [first_id + symbol]
            going = [symbol is not None for symbol in symbols]
            if made == most or not any(going):
                break
            # A row whose part is over is still computed, but its symbols are dropped. The next part rereads all rows.
            logits = next_step(model, drawn[:, None] + first_id, cache, modality, modality == "speech")


def positions_needed(openings, plan):
    """The maximum number of symbols that the longest row can read."""
    # The model reads a switch token between two parts. It does not read the last symbol.
    return max(map(len, openings)) + sum(most for _, most in plan) + len(plan) - 2


# ---------------------------------------------------------------------------------------------------------------------
# input: the plan and the prompts

def read_plan(to, max_new):
    """The plan in --to: "speech:60,text" -> [("speech", 60), ("text", max_new)]. ValueError."""
    plan = []
    for part in to.split(","):
        modality, colon, n = part.strip().partition(":")
        if modality not in ("text", "speech") or (colon and not n.isdecimal()) or int(n or max_new) < 1:
            raise ValueError(f"--to={to}: {part.strip()!r} is not text, speech, text:N or speech:N with N at least 1")
        if plan and plan[-1][0] == modality:
            raise ValueError(f"--to={to}: two parts of {modality} in a row; make it one, {modality}:N")
        plan.append((modality, int(n or max_new)))
    return plan


def read_units(path, n_units):
    """The units in a .json (a list) or .npy file, each run of equal units reduced to one. ValueError."""
    from speech.units import collapse, read_ids

    ids = read_ids(path)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0 or ids.min() < 0 or ids.max() >= n_units:
        raise ValueError(f"{path}: not a list of units; it needs one integer or more, each from 0 to {n_units - 1}")
    return collapse(ids)[0].tolist()


def read_sound(path, vocabulary):
    """The units of a sound file. ValueError."""
    from speech.audio import SUFFIXES, read_audio

    try:
        waveform = read_audio(path)
    except ValueError as error:
        if Path(path).suffix.lower() in SUFFIXES:
            raise
        raise ValueError(f"{error}; for the text in this file write --prompt=\"$(cat '{path}')\"") from None
    [(ids, _)] = vocabulary.encode([waveform])
    if len(ids) == 0:
        raise ValueError(f"audio too short: {path} has {len(waveform)} samples at 16 kHz, fewer than one unit takes")
    return ids.tolist()


def kind_of(prompt):
    """The kind of a --prompt: "units", "sound" or "text". The name of an existing file is never text."""
    from speech.audio import SUFFIXES

    name = prompt.strip()
    suffix, is_file = Path(name).suffix.lower(), os.path.exists(name) and not os.path.isdir(name)
    if suffix in (".json", ".npy"):
        return "units"
    return "sound" if suffix in SUFFIXES or is_file else "text"


def opening(prompt, first, config, tokenizer, vocabulary):
    """The ids at the beginning of a row: EOS, the prompt if any, and a switch token if the first part needs one."""
    if prompt is None:
        return prompt_sequence([], [], (first, first), config)[0]
    if not prompt.strip():
        raise ValueError("empty prompt: --prompt has no text in it; leave it out to begin without one")
    kind = kind_of(prompt)
    if kind == "text":
        return prompt_sequence(tokenizer.encode(prompt), [], ("text", first), config)[0]
    prompt = prompt.strip()
    if not os.path.exists(prompt):
        raise ValueError(f"{prompt}: no such file; a prompt with this ending names a file of {kind}")
    ids = read_sound(prompt, vocabulary) if kind == "sound" else read_units(prompt, config.n_units)
    return prompt_sequence([config.vocab_size + i for i in ids], [], ("speech", first), config)[0]


def check_settings(c):
    """ValueError for invalid settings."""
    if c.temperature < 0 or c.top_k < 0 or not 0 < c.top_p <= 1:
        raise ValueError(f"temperature={c.temperature}, top_k={c.top_k}, top_p={c.top_p}: the first two must not be"
                         f" negative, and top_p must be more than 0 and at most 1")
    if c.dtype not in ("float32", "bfloat16", "float16", "int8"):
        raise ValueError(f"dtype={c.dtype}: choose float32, bfloat16, float16 or int8")
    if c.dtype == "int8" and pick_device(c.device) != "cpu":
        raise ValueError("dtype=int8: only on a CPU; choose float32, bfloat16 or float16")
    if c.compile and pick_device(c.device) == "cpu":
        compilers = os.environ.get("CXX", "g++"), "clang++", "cl"  # of Linux, macOS and Windows
        if not any(map(shutil.which, compilers)):
            raise ValueError("compile=true: on a CPU it needs a C++ compiler; install g++, or leave it out")
    if Path(c.out).suffix.lower() not in (".wav", ".flac") or not Path(c.out).parent.is_dir():
        raise ValueError(f"out={c.out}: give a name that ends in .wav or .flac, in an existing folder")


# ---------------------------------------------------------------------------------------------------------------------
# output: text and sound files

def write_speech(ids, path, vocabulary, vocoder):
    """Synthesise units to a sound file, and write them to a .json file with the same name."""
    from speech.audio import SAMPLE_RATE, write_audio
    from speech.units import resynthesise

    waveform = resynthesise(np.array(ids, np.int64), vocabulary, vocoder)
    write_audio(path, waveform)
    path.with_suffix(".json").write_text(json.dumps(ids))
    print(f"{path}: {len(waveform) / SAMPLE_RATE:.2f} s, {len(ids)} units in {path.with_suffix('.json').name}",
          file=sys.stderr)


def show(rows, modality, part, parts, c, tokenizer, vocabulary, vocoder):
    """Print the texts of a part, or write its speech. rows: a list of ids for each row."""
    for row, ids in enumerate(rows):
        if not ids:
            print(f"prompt {row + 1}: no {modality}, EOS came first", file=sys.stderr)
        elif modality == "speech":
            numbers = [f"-{number + 1}" for number, count in ((row, len(rows)), (part, parts)) if count > 1]
            path = Path(c.out)
            write_speech(ids, path.with_stem(path.stem + "".join(numbers)), vocabulary, vocoder)
        if modality == "text" and len(rows) > 1:  # a single row's text was printed as it was made
            print(f"[{row + 1}] {tokenizer.decode(ids)}")


def talk(c, model, openings, plan, tokenizer, vocabulary, vocoder):
    """Generate all parts of all rows, and print or write them. The text of a single row is printed as it is made."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(c.seed)
    pick = partial(draw, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, generator=generator)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # prints a character once it has all its bytes
    symbols, seconds = 0, 0.0
    generated = generate(model, openings, plan, pick, c.compile, tokenizer and tokenizer.vocab_size)
    for part, steps in itertools.groupby(generated, lambda step: step[0]):
        rows, began = [[] for _ in openings], time.perf_counter()
        streams = plan[part][0] == "text" and len(openings) == 1
        for _, row_symbols in steps:
            for ids, symbol in zip(rows, row_symbols):
                if symbol is not None:
                    ids.append(symbol)
                    symbols += 1
                    if streams:
                        print(decoder.decode(tokenizer.decode_bytes([symbol])), end="", flush=True)
        if streams:
            print(decoder.decode(b"", final=True), flush=True)
        seconds += time.perf_counter() - began
        show(rows, plan[part][0], part, len(plan), c, tokenizer, vocabulary, vocoder)
    print(f"{symbols} symbols, {symbols / seconds:.0f} a second", file=sys.stderr)


def main(argv):
    # --prompt may occur several times, which configure() does not support.
    prompts = [arg.removeprefix("--prompt=") for arg in argv if arg.startswith("--prompt=")]
    settings, _ = configure(DEFAULTS, [arg for arg in argv if not arg.startswith("--prompt=")])
    c = SimpleNamespace(**settings)
    prompts = prompts or c.prompt or [None]
    folder, device = newest_checkpoint(c.checkpoint), pick_device(c.device)
    tokenizer = vocabulary = vocoder = None
    try:
        check_settings(c)
        plan = read_plan(c.to, c.max_new)
        kinds = {kind_of(prompt) for prompt in prompts if prompt} | dict(plan).keys()
        if kinds != {"text"} and not (folder / "speech.safetensors").exists():
            raise ValueError(f"{folder}: a text model without speech.safetensors; give a prompt of text, and --to=text")
        model = from_pretrained(folder)
        if "text" in kinds:
            tokenizer = Tokenizer(folder / "tokenizer.json")
        if kinds & {"speech", "sound"}:
            from speech.units import load_units
            c.units = c.units or f"{demo_of(folder)}/units"
            check_units(c.units, folder)
            vocabulary = load_units(c.units, device)
        openings = [opening(prompt, plan[0][0], model.config, tokenizer, vocabulary) for prompt in prompts]
        needed, most = positions_needed(openings, plan), model.config.max_position_embeddings
        if needed > most:
            raise ValueError(f"prompt too long: {max(map(len, openings))} symbols, {needed} with those that --to and"
                             f" --max_new add; the model has {most} positions")
        if "speech" in kinds:  # synthesise one unit, so that a missing file or package is noticed at once
            from speech.units import resynthesise
            from speech.vocoder import load_vocoder
            vocoder = load_vocoder(c.vocoder, device) if c.vocoder else None
            resynthesise(np.zeros(1, np.int64), vocabulary, vocoder)
    except (ValueError, RuntimeError) as error:  # RuntimeError: a package is missing
        raise SystemExit(str(error)) from None
    model = model.to(device, torch.bfloat16 if c.dtype == "int8" else getattr(torch, c.dtype)).eval()
    if c.compile and device == "cpu" and len(openings) > 1:
        print("compile: on a CPU it only speeds up a single prompt; going on without it", file=sys.stderr)
        c.compile = False
    pack_weights(model, rows=len(openings), bits=8 if c.dtype == "int8" else None, compiled=c.compile)
    if not c.compile:  # torch.compile cannot trace the hook that looks for busy cores
        share_cores(model)
    talk(c, model, openings, plan, tokenizer, vocabulary, vocoder)


if __name__ == "__main__":
    main(sys.argv[1:])
