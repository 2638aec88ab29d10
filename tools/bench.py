"""
How fast is it on this machine? Measures training steps, scoring, generation and the making of batches.

    python -m tools.bench                                              prints this page and measures nothing
    python -m tools.bench config/train_150m.py --sequence_length=1024 --micro_batch=1     a CPU: one sequence a step
    python -m tools.bench config/train_150m.py --what=train --micro_batches=4             a GPU: a step of 4 x 16
    python -m tools.bench config/train_150m.py --what=train --pair="residual=false beta=0.1"     two settings in turn

Name the config of a run, and add any setting of train.py or of those below. Weights and data are random, so that no
files are needed. The parts are:

    train       a training step for each kind of sequence, for the mixture of the last stage, and for stage 1, where the
                backbone is frozen
    score       log-likelihoods of pairs of sentences that begin alike, in batches and one sentence at a time
    generate    100 text tokens after a prompt of 100, with a KV cache and without. Each token needs all weights of the
                backbone, so memory bandwidth sets an upper bound.
    data        making batches in one thread; opening a set of 10 billion tokens that is not in memory, with the memory
                that this takes and how much the disk reads ahead

On two CPU cores --what=train takes two minutes for train_150m, and more with torch.compile. The other parts take less.

--pair adds a model with other settings, and --reference=true transformers' Llama of the same shape on the same ids, in
training steps and generation. The models take turns. Times are medians over --steps repetitions after --warmup. FLOPs
are counted by model.forward_flops. `of peak` is the share of what large matrix products reach in the same run, `mfu`
the share of what a known GPU's data sheet says. With torchrun, tokens/s counts all processes, and FLOPs and memory are
those of one. The results are a table and bench.json.
"""
import copy
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import sample
import train
from configurator import apply_override, configure
from data import micro_batches as make_micro_batches
from data import open_source
from evaluate import log_likelihood
from model import LLAMA, Config, is_new
from runtime.datasets import FORMAT, write_set
from runtime.devices import make_autocast, reuse_memory
from runtime.distributed import ALONE, distribute, join_world, leave_world
from runtime.log import utilisation
from runtime.packing import pack_weights
from runtime.tokenizer import Tokenizer

what = "train,score,generate,data"  # the parts to measure
steps = 3                    # timed repetitions
warmup = 1                   # untimed repetitions before them, in which torch.compile does its work
micro_batches = 1            # forward passes of a process in one step; batch_tokens follows from it
pair = ""                    # other settings to compare with, as "key=value key=value"
reference = False            # compare with transformers' Llama too
profile = ""                 # file for a trace of mixed training steps, for chrome://tracing or Perfetto
out = "bench.json"           # file for the results
DEFAULTS = train.DEFAULTS | dict(what=what, steps=steps, warmup=warmup, micro_batches=micro_batches, pair=pair,
                                 reference=reference, profile=profile, out=out)

# Shapes of the backbones that the configs name, for machines where their folders are missing.
SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SHAPES = {"smollm-135m": (576, 1536, 30, 9, 3),
          "smollm-360m": (960, 2560, 32, 15, 5),
          "smollm-1.7b": (2048, 8192, 24, 32, 32)}
PROMPT, NEW = 100, 100       # tokens that are read and made in generation
LARGE = 10_000_000_000       # tokens of the large set
START = time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# measuring

class Case(NamedTuple):
    """Something to time."""
    calls: list        # functions that are called one after the other; times are means over them
    amount: float      # tokens, sentences or sequences of one call
    flops: float = 0   # of one call in this process; 0: not known


def tell(text):
    """Print a line of progress with the seconds since the start, on the first process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"{time.perf_counter() - START:7.1f} s  {text}", file=sys.stderr, flush=True)


def seconds_of(call, device):
    """How long a call takes until the device has finished all its work."""
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure(label, cases, c, device):
    """{name: result} of cases {name: Case}. They take turns, so that a change in the machine's speed meets all."""
    times, peak_bytes = {name: [] for name in cases}, dict.fromkeys(cases, 0)
    for repetition in range(-c.warmup, c.steps):
        state = "timed" if repetition >= 0 else "warm-up"
        for name, case in cases.items():
            tell(f"{label}, {name}, {state}")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = statistics.mean(seconds_of(call, device) for call in case.calls)
            if repetition >= 0:
                times[name].append(seconds)
            if device.type == "cuda":
                peak_bytes[name] = torch.cuda.max_memory_allocated(device)
    results = {}
    for name, case in cases.items():
        seconds = statistics.median(times[name])
        rate = case.flops / seconds
        results[name] = dict(seconds=seconds, spread=[min(times[name]), max(times[name])],
                             per_second=case.amount / seconds, flops=case.flops, flops_per_second=rate,
                             mfu=utilisation(rate, device), peak_bytes=peak_bytes[name])
    return results


def measure_machine(c, device):
    """How fast the machine multiplies large matrices, and reads an array from memory that no cache can hold."""
    large, cases = device.type == "cuda", {}
    for dtype, n in (("float32", 8192 if large else 2048), ("bfloat16", 8192 if large else 1024)):
        x = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        cases[dtype] = Case([partial(torch.matmul, x, x)], n * n, flops=2 * n ** 3)
    x = torch.ones(1 << (29 if large else 27), device=device)
    cases["memory"] = Case([x.sum], x.nbytes)
    return measure("machine", cases, c, device)


# ---------------------------------------------------------------------------------------------------------------------
# settings, model and data, without any file

def prepare(settings, name, world):
    """Check the settings as train.py does, and fill in what it would read from files. Returns a namespace."""
    sequences = settings["micro_batch"] * settings["micro_batches"] * world.size
    c = train.check_settings(settings | dict(batch_tokens=sequences * settings["sequence_length"]), name, world)
    if not c.vocab_size:
        c.vocab_size = Tokenizer(c.tokenizer).vocab_size if Path(c.tokenizer).is_file() else 49152
    c.n_units = c.n_units or 500
    if c.init_from and not Path(c.init_from).is_dir():
        size = Path(c.init_from).name.lower().replace("smollm2", "smollm")
        if size not in SHAPES:
            raise SystemExit(f"{c.init_from}: no such folder, and no shape known for it, only for {', '.join(SHAPES)}")
        vars(c).update(zip(SHAPE, SHAPES[size]), init_from="", rope_theta=c.rope_theta or 100_000.0)
    return c


def make_model(c, world):
    with world.device:  # random weights, made on a GPU in no time
        model = train.build_model(c, SimpleNamespace(eos=0))
    return train.place_model(model, c, world)


def choose_dtype(c, world, folder):
    """The name of the dtype that train.py chooses for these settings."""
    if c.dtype != "auto":
        return c.dtype
    if c.what == "data":  # nothing is multiplied, so there is nothing to choose
        return "float32"
    sources = dict.fromkeys(("text", "speech", "interleaved"), open_source("interleaved", [folder]))
    dtype = train.choose_dtype(c, make_model(c, world), SimpleNamespace(train=sources), world)
    return str(dtype).removeprefix("torch.")


def write_random_set(folder, vocab_size, n_units, n_documents=400):
    """A paired data set of random ids: documents of 250 words, 1.3 text tokens and 5 units a word on average."""
    rng = np.random.default_rng(0)

    def random_words(sizes, n_ids):
        return np.split(rng.integers(n_ids, size=sizes.sum()), np.cumsum(sizes)[:-1])

    documents = []
    for _ in range(n_documents):
        text_sizes, speech_sizes = rng.choice([1, 2, 3], 250, p=[0.78, 0.14, 0.08]), rng.integers(2, 9, 250)
        documents.append((random_words(text_sizes, vocab_size), random_words(speech_sizes, n_units)))
    write_set(folder, "paired", documents, SimpleNamespace(vocab_size=vocab_size, eos=0, hash=""),
              dict(n_units=n_units, rate=25, hash=""), source="random")


# ---------------------------------------------------------------------------------------------------------------------
# training steps

def choose_stages(c):
    """{row of the table: stage}: each kind of sequence and their mixture as in the last stage, and the frozen stage."""
    *earlier, last = c.stages.values()
    rows = {kind: last | dict(mixture={kind: 1}) for kind in last["mixture"]}
    if len(rows) > 1:
        rows["mixed"] = last
    for stage in earlier:
        if stage["train"] == "new":
            rows["stage 1"] = stage
    return rows


def draw_steps(c, world, stage, config, folder):
    """The micro-batches of one step, or of as many steps as it takes for each kind to come up in its share."""
    sources = dict.fromkeys(stage["mixture"], open_source("interleaved", [folder]))
    parts = sum(stage["mixture"].values())
    n_steps = 1 if c.batch_tokens // c.sequence_length % parts == 0 else parts
    return [make_micro_batches(step, sources, stage, 0, c, config, world) for step in range(n_steps)]


def step_of_smoltolk(c, world, model, stage):
    """A function that takes one training step of our model, as the loop of train.py does."""
    train.set_trainable(model, stage["train"])
    optimizers = train.make_optimizers(model, c)
    autocast = make_autocast(getattr(torch, c.dtype), world.device)
    net = distribute(model, world)

    def run(batches):
        train.add_gradients(net, batches, c.beta, autocast, world)
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.grad_clip)
        norm.item()  # train.py checks it in every step, and for that a GPU has to finish its work
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=world.size == 1)

    return run


def step_of_llama(c, world, config):
    """The same for transformers' Llama on the same ids, compiled if ours is."""
    llama = make_llama(config, config.switch + 1).to(world.device)
    optimizer = torch.optim.AdamW(llama.parameters(), betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)
    net = torch.compile(llama) if c.compile else llama
    autocast = make_autocast(getattr(torch, c.dtype), world.device)

    def run(batches):
        for batch in batches:
            ids = batch.ids.to(world.device, non_blocking=True)
            with autocast:
                loss = net(input_ids=ids, labels=ids, use_cache=False).loss  # it shifts the labels itself
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def make_llama(config, vocab_size):
    """transformers' Llama of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM  # only --reference needs it

    shape = {key: getattr(config, key) for key in LLAMA} | dict(vocab_size=vocab_size)
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


def bench_train(c, other, world, folder):
    """Rows of training steps: "this" with the settings c, "pair" with the settings `other`, unless that is None."""
    settings = {"this": c} if other is None else {"this": c, "pair": other}
    models = {name: make_model(its_settings, world) for name, its_settings in settings.items()}
    llama = step_of_llama(c, world, models["this"].config) if c.reference else None
    rows, stages = {}, choose_stages(c)
    for row, stage in stages.items():
        cases = {}
        for name, model in models.items():
            drawn = draw_steps(settings[name], world, stage, model.config, folder)
            step = step_of_smoltolk(settings[name], world, model, stage)
            flops = statistics.mean(train.step_flops(model.config, batches, stage) for batches in drawn)
            calls = [partial(step, batches) for batches in drawn]
            cases[name] = Case(calls, settings[name].batch_tokens, flops)
        if llama and stage["train"] == "all":
            calls = [partial(llama, *call.args) for call in cases["this"].calls]
            cases["transformers"] = Case(calls, c.batch_tokens)
        rows[row] = measure(f"train: {row}", cases, c, world.device)
        if c.profile and row == ("mixed" if "mixed" in stages else next(iter(stages))):
            profile_calls(cases["this"].calls, c.profile, world.device)
    return rows


def profile_calls(calls, path, device):
    """Write a trace of some calls to a file, and print their ten costliest operations."""
    with torch.profiler.profile() as profiler:
        for call in calls:
            call()
    profiler.export_chrome_trace(path)
    cost = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(cost, row_limit=10, max_name_column_width=50), file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# the other parts

def bench_score(c, other, world, folder):
    """Sentences of 12 tokens, in pairs that differ in their last third, as in BLiMP."""
    model, rng = make_model(c, world).eval(), np.random.default_rng(0)
    pack_weights(model, rows=512)  # as evaluate.py does
    sentences = rng.integers(1, c.vocab_size, (64, 12))
    sentences[1::2, :8] = sentences[::2, :8]
    sequences, spans = [[0, *sentence] for sentence in sentences.tolist()], [(1, 13)] * 64
    batch_tokens = 512 if world.device.type == "cpu" else 16384  # the defaults of evaluate.py
    in_batches = partial(log_likelihood, model, sequences, spans, batch_tokens)
    one_at_a_time = [partial(log_likelihood, model, [sequence], spans[:1]) for sequence in sequences[:16]]
    cases = {"in batches": Case([in_batches], 64), "one at a time": Case(one_at_a_time, 1)}
    return dict(sentences=measure("score", cases, c, world.device))


@torch.inference_mode()
def bench_generate(c, other, world, folder):
    """Text tokens in one row, with the reading of the prompt and without, and the bound by memory bandwidth."""
    device, dtype = world.device, getattr(torch, c.dtype)
    model = make_model(c, world).to(dtype).eval()
    backbone = [p for name, p in model.named_parameters() if not is_new(name)]
    weights = torch.ones(sum(p.numel() for p in backbone), device=device, dtype=dtype)
    pack_weights(model, rows=1, compiled=c.compile)  # as sample.py does
    ids = torch.randint(1, c.vocab_size, (1, PROMPT + NEW), device=device)

    def pick(logits):
        return 1 + logits[:, 1:].argmax(-1)  # never EOS, whose id is 0

    def with_cache(model, n):
        tokens = sample.generate(model, ids[:, :PROMPT].tolist(), [("text", NEW)], pick, c.compile)
        list(itertools.islice(tokens, n))

    def without_cache():  # at half of the new tokens, for their mean length
        pick(sample.step(model, ids[:, :PROMPT + NEW // 2], cache=None, modality="text", speaks=False))

    cases = {"bound: all weights read once": Case([weights.sum], 1),
             "with a cache": Case([partial(with_cache, model, NEW)], NEW),
             "the first token": Case([partial(with_cache, model, 1)], 1),
             "without a cache": Case([without_cache], 1)}
    if device.type == "cpu":
        int8 = make_model(c, world).bfloat16().eval()
        pack_weights(int8, rows=1, bits=8)
        cases["8-bit weights"] = Case([partial(with_cache, int8, NEW)], NEW)
    if c.reference:
        llama = make_llama(model.config, model.config.vocab_size).to(device, dtype).eval()
        cases["transformers"] = Case([partial(llama.generate, ids[:, :PROMPT], max_new_tokens=NEW, min_new_tokens=NEW,
                                              do_sample=False)], NEW)
    results = measure("generate", cases, c, device)
    seconds = results["with a cache"]["seconds"] - results["the first token"]["seconds"]
    results["all but the first token"] = dict(seconds=seconds, per_second=(NEW - 1) / seconds)
    return dict(tokens=results)


def bench_data(c, other, world, folder):
    """Sequences as the loader's thread makes them, and the first ones of a very large set."""
    config, numbers = Config(vocab_size=c.vocab_size, n_units=c.n_units), itertools.count()

    def draw(kinds, n, n_steps, kind, folder):
        """Open a set and make the batches of some steps of n sequences."""
        source = open_source(kind, [folder])
        settings = SimpleNamespace(**vars(c) | dict(batch_tokens=n * c.sequence_length, micro_batch=n))
        stage = dict(mixture=dict.fromkeys(kinds, 1), train="all")
        for _ in range(n_steps):
            make_micro_batches(next(numbers), dict.fromkeys(kinds, source), stage, 0, settings, config, ALONE)

    # Each repetition opens a new set, none of which is in memory yet.
    large = iter([write_large_set(folder.parent / f"large-{i}", c.vocab_size) for i in range(c.warmup + c.steps)])
    kinds = ["text", "speech", "interleaved"]
    cases = {"interleaved": Case([partial(draw, kinds[2:], 32, 20, "interleaved", folder)], 32 * 20),
             "mixed": Case([partial(draw, kinds, 48, 20, "interleaved", folder)], 48 * 20)}
    opening = {"open and draw 32": Case([lambda: draw(["text"], 32, 1, "text", next(large))], 32)}
    results, before = {"sequences": measure("data", cases, c, ALONE.device)}, memory_peak()
    row = f"{LARGE:.0e} tokens, read-ahead {read_ahead(folder)}"
    results[row] = measure("data: large sets", opening, c, ALONE.device)
    results[row]["open and draw 32"]["peak_bytes"] = memory_peak() - before
    return results


def write_large_set(folder, vocab_size):
    """A text set of LARGE tokens -> its folder. They are a sparse file of zeros, which takes no room on the disk."""
    folder.mkdir()
    documents = np.linspace(0, LARGE, 1_000_001).astype(np.int64)
    np.save(folder / "documents.npy", documents)
    np.lib.format.open_memmap(folder / "text.npy", "w+", np.uint16, (LARGE,))
    text = dict(tokens=LARGE, vocab_size=vocab_size, eos=0)
    meta = dict(format=FORMAT, kind="text", documents=len(documents) - 1, text=text)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def memory_peak():
    """The most memory that this process has had so far, in bytes. It includes pages of mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_ahead(folder):
    """How much the disk of a folder reads at least: "128 kB", or "not known"."""
    device = os.stat(folder).st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return f"{path.read_text().strip()} kB" if path.exists() else "not known"


# ---------------------------------------------------------------------------------------------------------------------

PARTS = dict(train=bench_train, score=bench_score, generate=bench_generate, data=bench_data)


def as_table(report):
    """The page that is printed."""
    about, machine = report["about"], report["machine"]
    peaks = {dtype: machine[dtype]["flops"] / machine[dtype]["spread"][0] for dtype in ("float32", "bfloat16")}
    lines = [", ".join(f"{key} {value}" for key, value in about.items()),
             f"matrix products: {peaks['float32'] / 1e9:,.0f} GFLOP/s in float32, {peaks['bfloat16'] / 1e9:,.0f} in"
             f" bfloat16; memory read at {machine['memory']['per_second'] / 1e9:,.1f} GB/s"]
    for part in [part for part in PARTS if part in report]:
        lines += ["", f"{part:36}{'s':>9}{'1/s':>12}{'ratio':>8}{'GFLOP/s':>11}{'of peak':>9}"]
        for row, results in report[part].items():
            first = next(iter(results.values()))
            for name, result in results.items():
                ratio = result["per_second"] / first["per_second"]
                line = f"{row + ', ' + name:36}{result['seconds']:9.3f}{result['per_second']:12,.1f}{ratio:8.2f}"
                if rate := result.get("flops_per_second"):
                    line += f"{rate / 1e9:11,.0f}{rate / peaks[about['dtype']]:9.1%}"
                line += f"  mfu {result['mfu']:.1%}" if result.get("mfu") else ""
                line += f"  {result['peak_bytes'] / 1e9:.1f} GB" if result.get("peak_bytes") else ""
                lines.append(line)
    return "\n".join(lines)


def main(argv):
    if not argv:
        print(__doc__)
        return
    settings, name = configure(DEFAULTS, argv, train.complete_stages, described_in=[train.__file__])
    for part in settings["what"].split(","):
        if part not in PARTS:
            raise SystemExit(f"what={settings['what']}: {part!r} is none of {', '.join(PARTS)}")
    changed = copy.deepcopy(settings)
    for change in settings["pair"].split():
        apply_override(changed, DEFAULTS, f"--{change}")
    world = join_world(settings["device"])
    reuse_memory(world.device)
    c = prepare(settings, name, world)
    other = prepare(changed, name, world) if c.pair else None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"  # each process writes its own, and all are the same
        write_random_set(folder, c.vocab_size, c.n_units)
        for its_settings in (c, other) if other else (c,):
            its_settings.dtype = choose_dtype(its_settings, world, folder)
        about = dict(device=device, processes=world.size, threads=torch.get_num_threads(), torch=torch.__version__,
                     compile=c.compile, dtype=c.dtype)
        report = dict(settings=vars(c), about=about, machine=measure_machine(c, world.device))
        for part in c.what.split(","):
            report[part] = PARTS[part](c, other, world, folder)
            if world.rank == 0:  # after each part, because the next one may fail
                Path(c.out).write_text(json.dumps(report, indent=1))
    if world.rank == 0:
        print(as_table(report))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
