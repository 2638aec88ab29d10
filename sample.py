"""
Talk to a checkpoint: text or speech in, text or speech out.

    python sample.py --checkpoint=out/train_tiny --prompt="Last week, Anna" --to=speech --out=answer.wav
    python sample.py --checkpoint=out/train_tiny --prompt=answer.wav --to=text
    python sample.py --checkpoint=out/train_tiny --to=speech:60,text:20,speech:60       # no prompt, back and forth
    python sample.py --checkpoint=weights/smollm2-135m --prompt="Once" --prompt="Twice" # a text LM, a batch of two

A prompt is text, a sound file, or a file of units (.json or .npy; a unit that repeats is taken once, as in training).
Text is printed as it is made. Speech goes to a sound file, with its units in a .json beside it that can be a prompt
again. In a batch, or with several parts, the names get the numbers of row and part: answer-2-1.wav.

The model never chooses the modality: --to does. Each part asks one head only, so it cannot contain a symbol of the
other modality or a switch token. A part ends with the EOS of its modality, which is not kept, or when it is long
enough. Then a switch token is read, and the other head takes over.
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

from configurator import configure
from data import prompt_sequence
from evaluate import newest_checkpoint
from model import TEXT_ONLY, from_pretrained, new_cache
from runtime.checkpoint import made_with
from runtime.devices import pick_device
from runtime.tokenizer import Tokenizer

checkpoint = "out/train_tiny"  # folder of a run (its newest checkpoint is taken) or of a model, SmolLM's too
prompt = []                    # text, a sound file or a file of units; give it several times for a batch, or not at all
to = "text"                    # what to make: text, speech, or several parts, text:30,speech:100 with their lengths
max_new = 128                  # at most so many symbols in a part without a length
temperature = 0.8              # 0: always the likeliest symbol
top_k = 0                      # draw among the k likeliest symbols only; 0: among all
top_p = 1.0                    # draw among the fewest likeliest symbols whose probabilities sum up to this
seed = 1                       # of the draws
units = "data/demo/units"      # folder of the unit vocabulary, the one that the checkpoint was trained with
vocoder = ""                   # folder of a vocoder, for HuBERT units
out = "answer.wav"             # sound file for speech, .wav or .flac
device = "auto"                # "cuda", "cpu", "mps", or the best there is
dtype = "float32"              # "bfloat16": half the memory, faster where the hardware has it
compile = False                # torch.compile, on CUDA with CUDA graphs: minutes to start, then faster

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (int, float, str, list)) and not k.startswith("_")}
SOUND = (".wav", ".flac", ".ogg", ".mp3", ".sph", ".g722", ".m4a", ".mp4", ".webm")
SILENCE = 1e-3                 # of full scale, -60 dB: below it a recording counts as silent


# ---------------------------------------------------------------------------------------------------------------------
# generation

def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw a symbol of each row: logits [B, n] -> int64 [B].

    temperature   divides the logits; 0: the likeliest symbol, nothing is drawn
    top_k         only the k likeliest; 0: all
    top_p         of those, renormalised, the fewest likeliest whose probabilities sum up to this or more
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, index = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))
    p = logits.softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < top_p)  # keep a symbol if those before it do not suffice; the first always stays
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if index is None else index.gather(-1, drawn))[:, 0]


def step(model, ids, cache, modality, speaks):
    """Read ids [B, T] after what the cache holds -> logits [B, n] of the next symbol. speaks: see SmolTolk.read."""
    output = model(ids, layout=None if speaks else TEXT_ONLY, cache=cache)
    if modality == "text":
        return model.text_logits(output.text[:, -1])
    return model.speech_logits(output.speech[:, -1])


def read_prompts(model, rows, modality, length):
    """Read rows of ids, padded on the left -> (logits [B, n] of the next symbol, a Cache of so many slots)."""
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows])
    cache = new_cache(model, torch.tensor([longest - len(ids) for ids in rows]), length)
    speaks = modality == "speech" or bool((padded >= model.config.vocab_size).any())
    return step(model, padded.to(cache.slot.device), cache, modality, speaks), cache


def compile_step(cache):
    """The step compiled for one symbol at a time; on CUDA it is recorded as a CUDA graph."""
    for tensor in (*cache[3:], *(t for stack in cache[:3] for pair in stack for t in pair)):
        torch._dynamo.mark_static_address(tensor)  # CUDA graphs may write into it
    return torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")


@torch.inference_mode()
def generate(model, openings, plan, pick, compiled=False):
    """Yield the symbols as they are made: (number of the part, [B] ids, None in rows whose part is over).

    openings   a list of ids for each row, none empty, in the model's id space, a switch token at the end if it is due
    plan       (modality, most symbols) of each part, modalities taking turns
    pick       logits [B, n] -> ids [B], as draw() does
    Ids count from 0 in both modalities, as in a tokenizer or a unit vocabulary. EOS is not among them.
    """
    config, rows = model.config, [list(ids) for ids in openings]
    length = positions_needed(openings, plan)  # the same for all parts, so that compiled steps fit all of them
    for part, (modality, most) in enumerate(plan):
        # Among a head's symbols EOS has this number; in the id space that all share, the first symbol has that one.
        eos, first_id = (config.eos_token_id, 0) if modality == "text" else (config.n_units, config.vocab_size)
        if part:
            rows = [[*ids, config.switch] for ids in rows]
        logits, cache = read_prompts(model, rows, modality, length)
        next_step = compile_step(cache) if compiled else step
        going = [True] * len(rows)
        for made in range(1, most + 1):
            drawn = pick(logits)
            symbols = drawn.tolist()
            going = [goes and symbol != eos for goes, symbol in zip(going, symbols)]
            yield part, [symbol if goes else None for goes, symbol in zip(going, symbols)]
            for ids, goes, symbol in zip(rows, going, symbols):
                if goes:
                    ids.append(first_id + symbol)
            if made == most or not any(going):
                break
            # A row whose part is over goes on, but its further symbols are dropped: the next part reads rows anew.
            logits = next_step(model, drawn[:, None] + first_id, cache, modality, modality == "speech")


def positions_needed(openings, plan):
    """How many symbols the longest row may come to read."""
    # Between parts a switch token is read too. The last symbol that is made is not read.
    return max(map(len, openings)) + sum(most for _, most in plan) + len(plan) - 2


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
    from speech.units import collapse, read_ids

    try:
        ids = read_ids(path)
    except ValueError as error:
        raise ValueError(f"unreadable units: {error}") from None
    if ids.size == 0:
        raise ValueError(f"empty prompt: {path} holds no units; leave --prompt out to begin without one")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"unreadable units: {path} holds {ids.dtype} {list(ids.shape)}, not a list of integers")
    if ids.min() < 0 or ids.max() >= n_units:
        wrong = ids[(ids < 0) | (ids >= n_units)][0]
        raise ValueError(f"units out of range: {path} has a {wrong}, the model's are 0 to {n_units - 1}")
    return collapse(ids)[0].tolist()


def read_sound(path, vocabulary):
    """The units of a sound file; ValueError."""
    from speech.audio import read_audio

    waveform = read_audio(path)
    if np.abs(waveform - waveform.mean()).max() < SILENCE:
        raise ValueError(f"silent audio: {path} stays below -60 dB of full scale, all {len(waveform)} samples of it")
    [(ids, _)] = vocabulary.encode([waveform])
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
        return prompt_sequence([], [], (first, first), config)[0]
    if not prompt.strip():
        raise ValueError("empty prompt: --prompt has no text in it; leave it out to begin without one")
    kind = kind_of(prompt)
    if kind == "text":
        return prompt_sequence(tokenizer.encode(prompt), [], ("text", first), config)[0]
    ids = read_sound(prompt, vocabulary) if kind == "sound" else read_units(prompt, config.n_units)
    return prompt_sequence([config.vocab_size + i for i in ids], [], ("speech", first), config)[0]


def check_room(openings, plan, config):
    """ValueError if the longest row does not fit the model's positions."""
    needed, there = positions_needed(openings, plan), config.max_position_embeddings
    if needed > there:
        row = int(np.argmax([len(ids) for ids in openings]))
        raise ValueError(f"prompt too long: prompt {row + 1} has {len(openings[row])} symbols, with what --to and"
                         f" --max_new add {needed}; the model has {there} positions")


def check_settings(c):
    """ValueError for settings that make no sense."""
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
    if (folder / "speech.safetensors").exists():
        return from_pretrained(folder)
    if needs_speech:
        raise ValueError(f"{folder}: a text model, it has no speech.safetensors; prompt it with text, and --to=text")
    return from_pretrained(folder, input_adapter_layers=0, output_adapter_layers=0, layer_pooling="last",
                           residual=False)


def load_vocabulary(folder, wanted, device):
    """The unit vocabulary of a folder. ValueError if its hash is not the wanted one (None: any)."""
    from speech.units import load_units

    vocabulary = load_units(folder, device)
    if wanted not in (None, vocabulary.hash):
        raise ValueError(f"{folder}: not the units that the checkpoint was trained with; give their folder as --units")
    return vocabulary


# ---------------------------------------------------------------------------------------------------------------------
# what comes out

def write_speech(ids, path, vocabulary, vocoder):
    """Speak units into a sound file, with a .json of them beside it. Says so on standard error."""
    from speech.audio import SAMPLE_RATE, write_audio
    from speech.units import resynthesise

    waveform = resynthesise(np.array(ids, np.int64), vocabulary, vocoder)
    write_audio(path, waveform)
    path.with_suffix(".json").write_text(json.dumps(ids))
    print(f"{path}: {len(waveform) / SAMPLE_RATE:.2f} s, {len(ids)} units in {path.with_suffix('.json').name}",
          file=sys.stderr)


def part_path(out, row, rows, part, parts):
    """answer.wav, with the numbers of row and part, counted from 1, where there are several: answer-2-1.wav."""
    numbers = [f"-{number + 1}" for number, count in ((row, rows), (part, parts)) if count > 1]
    return Path(out).with_stem(Path(out).stem + "".join(numbers))


def show(made, modality, part, parts, c, tokenizer, vocabulary, vocoder):
    """Show a part that is made, a list of ids for each row: texts of a batch are printed, speech is written."""
    for row, ids in enumerate(made):
        if modality == "text" and len(made) > 1:  # the text of a single row is printed already, as it is made
            print(f"[{row + 1}] {tokenizer.decode(ids)}")
        if modality == "speech" and ids:
            write_speech(ids, part_path(c.out, row, len(made), part, parts), vocabulary, vocoder)
        if not ids:
            print(f"prompt {row + 1}: no {modality}, EOS came first", file=sys.stderr)


def talk(c, model, openings, plan, tokenizer, vocabulary, vocoder):
    """Make all parts of all rows, and show them. The text of a single row is printed as it is made."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(c.seed)
    pick = partial(draw, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, generator=generator)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # prints a character as soon as all its bytes are there
    symbols, seconds = 0, 0.0
    for part, steps in itertools.groupby(generate(model, openings, plan, pick, c.compile), lambda step: step[0]):
        made, began = [[] for _ in openings], time.perf_counter()
        streams = plan[part][0] == "text" and len(openings) == 1
        for _, row_symbols in steps:
            for ids, symbol in zip(made, row_symbols):
                if symbol is None:
                    continue
                ids.append(symbol)
                if streams:
                    print(decoder.decode(tokenizer.decode_bytes([symbol])), end="", flush=True)
        if streams:
            print(decoder.decode(b"", final=True), flush=True)
        seconds, symbols = seconds + time.perf_counter() - began, symbols + sum(map(len, made))
        show(made, plan[part][0], part, len(plan), c, tokenizer, vocabulary, vocoder)
    print(f"{symbols} symbols, {symbols / seconds:.0f} a second", file=sys.stderr)


def main(argv):
    # --prompt can be given several times, which configure() does not know.
    prompts = [arg.removeprefix("--prompt=") for arg in argv if arg.startswith("--prompt=")]
    settings, _ = configure(DEFAULTS, [arg for arg in argv if not arg.startswith("--prompt=")])
    c = SimpleNamespace(**settings)
    prompts = prompts or c.prompt or [None]
    folder, device = newest_checkpoint(c.checkpoint), pick_device(c.device)
    try:
        check_settings(c)
        plan = read_plan(c.to, c.max_new)
        kinds = {kind_of(prompt) for prompt in prompts if prompt} | dict(plan).keys()
        model = load(folder, needs_speech=kinds != {"text"})
        tokenizer = Tokenizer(folder / "tokenizer.json") if "text" in kinds else None
        vocabulary = load_vocabulary(c.units, made_with(folder)[1], device) if kinds & {"speech", "sound"} else None
        openings = [opening(prompt, plan[0][0], model.config, tokenizer, vocabulary) for prompt in prompts]
        check_room(openings, plan, model.config)
        vocoder = None
        if "speech" in kinds:  # speak one unit first, so that what is missing for it shows before anything is made
            from speech.units import resynthesise
            from speech.vocoder import load_vocoder
            vocoder = load_vocoder(c.vocoder, device) if c.vocoder else None
            resynthesise(np.zeros(1, np.int64), vocabulary, vocoder)
    except (ValueError, RuntimeError) as error:  # says what and where; RuntimeError: a package that is missing
        raise SystemExit(str(error)) from None
    talk(c, model.to(device, getattr(torch, c.dtype)).eval(), openings, plan, tokenizer, vocabulary, vocoder)


if __name__ == "__main__":
    main(sys.argv[1:])
