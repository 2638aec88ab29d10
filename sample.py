"""
Talk to a checkpoint: text or speech in, text or speech out.

    python sample.py --checkpoint=out/train_tiny --prompt="Last week, Anna" --to=speech --out=answer.wav
    python sample.py --checkpoint=out/train_tiny --prompt=answer.wav --to=text
    python sample.py --checkpoint=out/train_tiny --to=speech:60,text:20,speech:60       # no prompt, back and forth
    python sample.py --checkpoint=weights/smollm2-135m --prompt="Once" --prompt="Twice" # a text LM, a batch of two

A prompt is text, a sound file, or a file of units (.json, .npy; runs of one unit are collapsed, as in training). Text
goes to standard output as it is made, speech to a sound file with its units in a .json beside it, which can be a prompt
again; of a batch or several parts in speech, row and part are added to the names: answer-2-1.wav.

The model never chooses the modality: --to does. Each part asks one head only, so no symbol of the other modality and
no switch token can come out. A part ends with the EOS of its modality, which is neither kept nor read, or when it is
long enough; then a switch token is read and the other head takes over.

The prompts are read in one pass, each symbol made is read in one pass more, over caches (model.Cache) of fixed length:
every step has the same shapes, whatever stands in the rows and however long they are.
"""
import codecs
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import speech
from configurator import configure
from evaluate import cloze_sequence, made_with, newest_checkpoint, pick_device
from model import from_pretrained, new_cache

checkpoint = "out/train_tiny"  # folder of a run (its newest checkpoint is taken) or of a model, SmolLM's too
prompt = []                    # text, a sound file or a file of units; give it several times for a batch, or not at all
to = "text"                    # what to make: text, speech, or several parts, text:30,speech:100 with their lengths
max_new = 128                  # symbols in a part that names no length, at most
temperature = 0.8              # 0: always the likeliest symbol
top_k = 0                      # draw among the k likeliest symbols only; 0: among all
top_p = 1.0                    # draw among the likeliest symbols that together have this probability
seed = 1                       # of the draws
units = "data/demo/units"      # folder of the unit vocabulary, the one that the checkpoint was trained with
vocoder = ""                   # folder of a vocoder, for HuBERT units
out = "answer.wav"             # sound file for speech, .wav or .flac
device = "auto"                # "cuda", "cpu", "mps", or the best there is
dtype = "float32"              # "bfloat16": half the memory, faster where the hardware has it
compile = False                # torch.compile, on CUDA with CUDA graphs: minutes to start, then faster

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, float, str, list)) and not k.startswith("_")}
SOUND = (".wav", ".flac", ".ogg", ".mp3", ".sph", *speech.AV_SUFFIXES)
SILENCE = 1e-3                 # of full scale, -60 dB: below it a recording counts as silent
TEXT_ONLY = dict(input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last", residual=False)


# ---------------------------------------------------------------------------------------------------------------------
# from logits to symbols

def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a symbol of each row: logits [B, n] -> int64 [B].

    temperature   divides the logits; 0: the likeliest symbol, nothing is drawn
    top_k         only the k likeliest; 0: all
    top_p         of those, renormalised, the fewest likeliest that have at least this probability together
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, index = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    p = logits.softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # is there too little before it? The first one always stays
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if index is None else index.gather(-1, drawn))[:, 0]


def step(model, ids, cache, alive, modality, text_rows=0):
    """Read one symbol of each row, ids [B, 1] -> logits [B, n] of the next. Rows that are not alive [B] stay put."""
    out = model(ids, text_rows=text_rows, logits=slice(None), heads=(modality,), cache=cache)
    cache.position.add_(alive)
    return (out.text_logits if modality == "text" else out.speech_logits)[:, -1]


def read_openings(model, openings, length):
    """(a cache that holds all of the openings but their last symbols, these symbols [B, 1])."""
    cache, lengths = new_cache(model, len(openings), length), torch.tensor([len(ids) for ids in openings])
    padded = torch.zeros(len(openings), int(lengths.max()), dtype=torch.long)
    for row, ids in zip(padded, openings):
        row[:len(ids)] = torch.tensor(ids)
    if padded.size(1) > 1:
        model(padded[:, :-1].to(cache.position.device), cache=cache)
    cache.position.copy_(lengths - 1)  # what the padding left behind them is never seen
    return cache, padded.gather(1, lengths[:, None] - 1).to(cache.position.device)


def room(openings, plan):
    """Symbols that the longest row can come to read. The last one made is not read; between parts stands a switch."""
    return max(map(len, openings)) + sum(n + 1 for _, n in plan) - 2


@torch.inference_mode()
def generate(model, openings, plan, pick, compiled=False):
    """Yield the symbols as they are made: (number of the part, [B] ids, None in rows whose part is over).

    openings   a list of ids for each row, none empty, in the model's id space, a switch token at the end if it is due
    plan       (modality, most symbols) of each part, modalities taking turns
    pick       logits [B, n] -> ids [B], as draw() does
    Ids count from 0 in both modalities, as in a tokenizer or a unit vocabulary. EOS is not among them.
    """
    config, one = model.config, step
    cache, pending = read_openings(model, openings, room(openings, plan))
    if compiled:
        one = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")
        for tensor in (*cache[3:], *(t for stack in cache[:3] for pair in stack for t in pair)):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write into it
    alive = torch.ones_like(cache.position, dtype=torch.bool)  # rows that go on; `going` is the same as a list
    for part, (modality, n) in enumerate(plan):
        if part:  # a row that did not end the part before with EOS has its last symbol still to read
            one(model, pending, cache, alive, plan[part - 1][0])
            pending = torch.full_like(pending, config.switch)
        eos, first_id = (config.eos_token_id, 0) if modality == "text" else (config.n_units, config.vocab_size)
        alive, going = torch.ones_like(alive), [True] * len(openings)
        text_rows = 0  # in a last part of text, once its opening is read, the speech modules have nothing more to do
        for _ in range(n):
            drawn = pick(one(model, pending, cache, alive, modality, text_rows))
            text_rows = len(openings) if modality == "text" and part == len(plan) - 1 else 0
            alive = alive & (drawn != eos)
            pending = torch.where(alive[:, None], drawn[:, None] + first_id, pending)
            symbols = drawn.tolist()
            going = [goes and symbol != eos for goes, symbol in zip(going, symbols)]
            yield part, [symbol if goes else None for goes, symbol in zip(going, symbols)]
            if not any(going):
                break


# ---------------------------------------------------------------------------------------------------------------------
# what goes in

def read_plan(to, max_new):
    """"speech:60,text" -> [("speech", 60), ("text", max_new)]; ValueError."""
    plan = []
    for part in to.split(","):
        modality, colon, n = part.strip().partition(":")
        if modality not in ("text", "speech") or (colon and not n.isdecimal()) or int(n or max_new) < 1:
            raise ValueError(f"--to={to}: {part.strip()!r} is none of text, speech, text:N, speech:N, N at least 1")
        if plan and plan[-1][0] == modality:
            raise ValueError(f"--to={to}: two parts of {modality} in a row; make it one, {modality}:N")
        plan.append((modality, int(n or max_new)))
    return plan


def read_units(path, n_units):
    """The units in a .json (a list) or .npy, without repeats; ValueError."""
    try:
        ids = speech.read_ids(path)
    except ValueError as error:
        raise ValueError(f"unreadable units: {error}") from None
    if ids.size == 0:
        raise ValueError(f"empty prompt: {path} holds no units; leave --prompt out to begin without one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"unreadable units: {path} holds {ids.dtype} {list(ids.shape)}, not a list of integers")
    if ids.min() < 0 or ids.max() >= n_units:
        wrong = ids[(ids < 0) | (ids >= n_units)][0]
        raise ValueError(f"units out of range: {path} has a {wrong}, the model's are 0 to {n_units - 1}")
    return speech.collapse(ids)[0].tolist()


def read_sound(path, vocabulary):
    """The units of a sound file; ValueError."""
    waveform = speech.read_audio(path)
    if np.abs(waveform - waveform.mean()).max() < SILENCE:
        raise ValueError(f"silent audio: {path} stays below -60 dB of full scale, all {len(waveform)} samples of it")
    [(ids, _)] = speech.units([waveform], vocabulary)
    if len(ids) == 0:
        raise ValueError(f"audio too short: {path} has {len(waveform)} samples at 16 kHz, fewer than one unit takes")
    return ids.tolist()


def kind_of(prompt):
    """What a --prompt is, by its ending: "units", "sound" or "text"."""
    suffix = Path(prompt).suffix.lower()
    return "units" if suffix in (".json", ".npy") else "sound" if suffix in SOUND else "text"


def opening(prompt, first, config, tokenizer, vocabulary):
    """The ids that a row begins with: EOS, the prompt if any, a switch token if the first part is of the other kind."""
    if prompt is None:
        return cloze_sequence([], [], (first, first), config)[0]
    if not prompt.strip():
        raise ValueError("empty prompt: --prompt has no text in it; leave it out to begin without one")
    if kind_of(prompt) == "text":
        return cloze_sequence(tokenizer.encode(prompt), [], ("text", first), config)[0]
    is_sound = kind_of(prompt) == "sound"
    ids = read_sound(prompt, vocabulary) if is_sound else read_units(prompt, config.n_units)
    return cloze_sequence([config.vocab_size + i for i in ids], [], ("speech", first), config)[0]


def check_room(openings, plan, config):
    """ValueError if the longest row does not fit the model's positions, and so no cache either."""
    needed, there = room(openings, plan), config.max_position_embeddings
    if needed > there:
        row = int(np.argmax([len(ids) for ids in openings]))
        raise ValueError(f"prompt too long: prompt {row + 1} has {len(openings[row])} symbols, with what --to and"
                         f" --max_new add {needed}; the model has {there} positions")


def check_settings(c):
    """ValueError for a number or a name that no draw, file or tensor can have."""
    for fine, fault in (
            (c.temperature >= 0, f"temperature={c.temperature}: give 0 or more"),
            (c.top_k >= 0, f"top_k={c.top_k}: give 0 (all) or more"),
            (0 < c.top_p <= 1, f"top_p={c.top_p}: give more than 0, up to 1"),
            (c.max_new >= 1, f"max_new={c.max_new}: give 1 or more"),
            (c.dtype in ("float32", "bfloat16", "float16"), f"dtype={c.dtype}: choose float32, bfloat16 or float16"),
            (Path(c.out).suffix in (".wav", ".flac"), f"out={c.out}: give a name that ends in .wav or .flac"),
            (Path(c.out).parent.is_dir(), f"out={c.out}: there is no folder {Path(c.out).parent}")):
        if not fine:
            raise ValueError(fault)


def load(folder, needs_speech):
    """The model of a folder. A plain SmolLM has no speech modules, and gets none."""
    has_speech = (folder / "speech.safetensors").exists()
    if needs_speech and not has_speech:
        raise ValueError(f"{folder}: a text model, it has no speech.safetensors; prompt it with text, and --to=text")
    return from_pretrained(folder, **({} if has_speech else TEXT_ONLY))


def load_vocabulary(folder, wanted, device):
    """The unit vocabulary of a folder, if its hash is the wanted one (None: any)."""
    vocabulary = speech.load_units(folder, device)
    if wanted not in (None, vocabulary.hash):
        raise ValueError(f"{folder}: not the units that the checkpoint was trained with; give their folder as --units")
    return vocabulary


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def write_speech(ids, path, vocabulary, its_vocoder):
    """Speak units into a sound file, with a .json of them beside it; says so on standard error."""
    import soundfile

    waveform = speech.resynthesise(np.array(ids, np.int64), vocabulary, its_vocoder)
    soundfile.write(path, waveform / max(1.0, np.abs(waveform).max(initial=0)), speech.SAMPLE_RATE)
    path.with_suffix(".json").write_text(json.dumps(ids))
    print(f"{path}: {len(waveform) / speech.SAMPLE_RATE:.2f} s, {len(ids)} units in {path.with_suffix('.json').name}",
          file=sys.stderr)


def part_path(out, row, rows, part, parts):
    """answer.wav, with the numbers of row and part, counted from 1, where there are several: answer-2-1.wav."""
    numbers = [f"-{number + 1}" for number, count in ((row, rows), (part, parts)) if count > 1]
    return Path(out).with_stem(Path(out).stem + "".join(numbers))


def show(made, modality, part, parts, c, tokenizer, vocabulary, its_vocoder):
    """A part that is made, a list of ids for each row: texts of a batch are printed, speech is written."""
    for row, ids in enumerate(made):
        if modality == "text" and len(made) > 1:
            print(f"[{row + 1}] {tokenizer.decode(ids)}")
        if modality == "speech" and ids:
            write_speech(ids, part_path(c.out, row, len(made), part, parts), vocabulary, its_vocoder)
        if not ids:
            print(f"prompt {row + 1}: no {modality}, EOS came first", file=sys.stderr)


def talk(c, model, openings, plan, *tools):
    """Make all parts of all rows, and show them; the text of a single row as it is made. tools: as in show()."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(c.seed)
    pick = partial(draw, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, generator=generator)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character appears once all its bytes are there
    symbols, seconds = 0, 0.0
    for part, steps in itertools.groupby(generate(model, openings, plan, pick, c.compile), lambda step: step[0]):
        made, began = [[] for _ in openings], time.perf_counter()
        streams = plan[part][0] == "text" and len(openings) == 1
        for _, row_symbols in steps:
            for ids, symbol in zip(made, row_symbols):
                ids += [] if symbol is None else [symbol]
                if streams and symbol is not None:
                    print(decoder.decode(tools[0].decode_bytes([symbol])), end="", flush=True)
        if streams:
            print(decoder.decode(b"", final=True), flush=True)
        seconds, symbols = seconds + time.perf_counter() - began, symbols + sum(map(len, made))
        show(made, plan[part][0], part, len(plan), c, *tools)
    print(f"{symbols} symbols, {symbols / seconds:.0f} a second", file=sys.stderr)


def main(argv):
    prompts = [arg.removeprefix("--prompt=") for arg in argv if arg.startswith("--prompt=")]
    settings, _ = configure(DEFAULTS, [arg for arg in argv if not arg.startswith("--prompt=")])
    c = SimpleNamespace(**settings)
    folder, device, prompts = newest_checkpoint(c.checkpoint), pick_device(c.device), prompts or c.prompt or [None]
    try:
        check_settings(c)
        plan = read_plan(c.to, c.max_new)
        kinds = {kind_of(prompt) for prompt in prompts if prompt}
        speaks, hears = "speech" in dict(plan), "sound" in kinds
        model = load(folder, speaks or kinds & {"sound", "units"})
        tokenizer = data.Tokenizer(folder / "tokenizer.json") if "text" in kinds or "text" in dict(plan) else None
        vocabulary = load_vocabulary(c.units, made_with(folder)[1], device) if speaks or hears else None
        its_vocoder = speech.load_vocoder(c.vocoder, device) if speaks and c.vocoder else None
        openings = [opening(prompt, plan[0][0], model.config, tokenizer, vocabulary) for prompt in prompts]
        check_room(openings, plan, model.config)
        if speaks:  # one unit first: what is missing for it shows now, not when all is made
            speech.resynthesise(np.zeros(1, np.int64), vocabulary, its_vocoder)
    except (ValueError, RuntimeError) as error:  # says what and where; RuntimeError: a package that is missing
        raise SystemExit(str(error)) from None
    talk(c, model.to(device, getattr(torch, c.dtype)).eval(), openings, plan, tokenizer, vocabulary, its_vocoder)


if __name__ == "__main__":
    main(sys.argv[1:])
