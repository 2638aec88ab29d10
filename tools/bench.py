"""
How fast is it on this machine? Measures training steps, scoring, generation and the data path.

    python -m tools.bench config/train_150m.py --sequence_length=1024 --micro_batch=1          a CPU: a step of one sequence
    python -m tools.bench config/train_150m.py --what=train --micro_batches=4                  a GPU: a step of 4 x 16
    python -m tools.bench config/train_150m.py --what=train --pair="residual=false beta=0.1"   compare with other settings

The settings are those of train.py and the ones below. No data and no weights are needed: both are random, the weights
in the shape that the config names. The parts are:

    train       A step is forward, backward, clipping and AdamW, as in train.py. It is timed for each kind of sequence,
                for the mixture of the last stage, and for stage 1, where the backbone is frozen.
    score       Log-likelihoods of pairs of sentences that begin alike, in batches and one sentence at a time.
    generate    100 text tokens after a prompt of 100, with a KV cache, and with a full forward pass for each token.
                Each token needs all weights of the backbone, so memory bandwidth sets an upper bound.
    data        Making batches, in one thread, and opening a set of 10 billion tokens.

--pair adds a model with other settings. --reference=true adds transformers' Llama of the same shape on the same ids,
with a vocabulary that holds them all. In one process the two or three models take turns, A B A B.

Times are medians over --steps repetitions after --warmup. FLOPs are counted by model.forward_flops. `of peak` is the
share of what large matrix products reach in the same run, `mfu` the share of what a known GPU's data sheet says. With
torchrun, tokens/s counts all processes, and FLOPs and memory are those of one. Progress goes to standard error. The
results are a table and bench.json.
"""
import copy
import importlib
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
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
from model import LLAMA, Config, is_new, selector_entropy
from runtime.datasets import FORMAT, write_set
from runtime.devices import pick_dtype, reuse_memory
from runtime.distributed import ALONE, all_sum, distribute, join_world, leave_world
from runtime.log import utilisation
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


def tell(world, text):
    """Print a line of progress, with the seconds since the start."""
    if world.rank == 0:
        print(f"{time.perf_counter() - START:7.1f} s  {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the machine

def now(device):
    """The time in seconds, once the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(run, device, times):
    """Median time of run(), after one call that does not count."""
    spent = []
    for _ in range(1 + times):
        began = now(device)
        run()
        spent.append(now(device) - began)
    return statistics.median(spent[1:])


def matmul_rate(device, dtype):
    """FLOP/s of products of large square matrices, the best of three medians."""
    n = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / min(median_seconds(lambda: a @ b, device, 3) for _ in range(3))


def read_rate(device):
    """Bytes a second that are read from memory: the sum of an array far larger than any cache."""
    n_bytes = 1 << 31 if device.type == "cuda" else 1 << 29
    x = torch.ones(n_bytes // 4, device=device)
    return n_bytes / median_seconds(x.sum, device, 5)


def measure_machine(c, world):
    """What the numbers are measured on, and how fast it multiplies matrices and reads memory."""
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    rates = {dtype: matmul_rate(world.device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    return dict(device=name, processes=world.size, threads=torch.get_num_threads(), torch=torch.__version__,
                compile=c.compile, dtype=str(pick_dtype(c.dtype, world.device)).removeprefix("torch."),
                matmul_flops=rates, read_bytes=read_rate(world.device))


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
            raise SystemExit(f"{c.init_from}: no such folder, and no shape known for it; name one that is there, or set"
                             f" --init_from= and --hidden_size and the like; known: {', '.join(SHAPES)}")
        vars(c).update(zip(SHAPE, SHAPES[size]), init_from="")
    return c


def make_model(c, world):
    model = train.build_model(c, SimpleNamespace(eos=0))
    model.apply(lambda module: setattr(module, "recompute", c.recompute))
    if c.compile:
        model.compiled_read = torch.compile(model.read)
    return model.to(world.device)


def make_autocast(c, world):
    is_half = pick_dtype(c.dtype, world.device) == torch.bfloat16
    return torch.autocast(world.device.type, torch.bfloat16) if is_half else nullcontext()


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

class Side(NamedTuple):
    """One side of a comparison of training steps."""
    run: Callable      # takes the list of micro-batches of one step
    steps: list        # the micro-batches of each step
    flops: float = 0   # of one step in this process; 0: not known


def choose_stages(c):
    """{row of the table: stage}: each kind of sequence and their mixture as in the last stage, and the frozen stage."""
    last = list(c.stages.values())[-1]
    rows = {kind: last | dict(mixture={kind: 1}) for kind in last["mixture"]}
    if len(rows) > 1:
        rows["mixed"] = last
    for stage in c.stages.values():
        if stage["train"] == "new":
            rows.setdefault("stage 1", stage)
    return rows


def draw_steps(c, world, stage, config, folder):
    """The micro-batches of one step, or of as many steps as it takes for each kind to come up in its share."""
    sources = dict.fromkeys(stage["mixture"], open_source("interleaved", [folder]))
    parts = sum(stage["mixture"].values())
    n_steps = 1 if c.batch_tokens // c.sequence_length % parts == 0 else parts
    return [make_micro_batches(step, sources, stage, 0, c, config, world) for step in range(n_steps)]


def smoltolk_side(c, world, stage, model, folder):
    """Training steps of our model, as in the loop of train.py."""
    train.set_trainable(model, stage["train"])
    optimizer, autocast = train.make_optimizer(model, c), make_autocast(c, world)
    net = distribute(model, world)

    def run(batches):
        n_text, n_speech = all_sum(train.count_targets(batches), world).tolist()
        for i, batch in enumerate(batches):
            net.require_backward_grad_sync = i == len(batches) - 1
            batch = batch.apply(lambda tensor: tensor.to(world.device, non_blocking=True))
            with autocast:
                out = net(batch.ids, batch.targets, batch.layout)
            loss = (out.text_nll.sum() + out.speech_nll.sum()) / (n_text + n_speech)
            if out.log_omega is not None:
                loss = loss - c.beta * selector_entropy(out.log_omega, batch.layout.speech) / max(1, n_speech)
            (loss * world.size).backward()
            del out, loss
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.grad_clip)
        norm.item()  # train.py checks it in every step, for which a GPU has to finish its work
        optimizer.step()
        optimizer.zero_grad(set_to_none=world.size == 1)

    steps_to_time = draw_steps(c, world, stage, model.config, folder)
    flops = [train.step_flops(model.config, batches, stage) for batches in steps_to_time]
    return Side(run, steps_to_time, statistics.mean(flops))


def llama_step(c, world, config):
    """A function that takes one training step of transformers' Llama on the same ids, compiled if ours is."""
    transformers = importlib.import_module("transformers")
    shape = {key: getattr(config, key) for key in LLAMA} | dict(vocab_size=config.switch + 1)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)).to(world.device)
    optimizer = torch.optim.AdamW(llama.parameters(), betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)
    net, autocast = torch.compile(llama) if c.compile else llama, make_autocast(c, world)

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


def time_side(side, device):
    """Take all steps of a side once -> (seconds a step, highest use of memory in bytes; 0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    for batches in side.steps:
        side.run(batches)
    seconds = (now(device) - began) / len(side.steps)
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def compare_sides(row, sides, c, world):
    """{side: result}. The sides take turns, so that a change in the machine's speed meets all of them."""
    timed = {name: [] for name in sides}
    for repetition in range(-c.warmup, c.steps):
        latest = {name: time_side(side, world.device) for name, side in sides.items()}
        if repetition >= 0:
            for name, times in timed.items():
                times.append(latest[name])
        shown = ", ".join(f"{name} {seconds:.3f} s" for name, (seconds, _) in latest.items())
        tell(world, f"train: {row}, {'warm-up' if repetition < 0 else 'timed'}: {shown}")

    results = {}
    for name, side in sides.items():
        all_seconds, peak_bytes = zip(*timed[name])
        seconds = statistics.median(all_seconds)
        tokens = sum(batch.ids.numel() for batches in side.steps for batch in batches) / len(side.steps) * world.size
        rate = side.flops / seconds
        results[name] = dict(seconds=seconds, spread=[min(all_seconds), max(all_seconds)], peak_bytes=max(peak_bytes),
                             tokens_per_second=tokens / seconds, flops=side.flops, flops_per_second=rate,
                             mfu=utilisation(rate, world.device))
    return results


def profile_side(side, c, world):
    """Write a trace of the steps to c.profile, and print the ten costliest operations."""
    with torch.profiler.profile() as profiler:
        time_side(side, world.device)
    if world.rank == 0:
        profiler.export_chrome_trace(c.profile)
        cost = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        print(profiler.key_averages().table(cost, row_limit=10, max_name_column_width=50), file=sys.stderr)


def bench_train(c, world, folder, other=None):
    """{row: {side: result}}. Side "this" has the settings c, side "pair" the settings `other`, unless that is None."""
    settings = {"this": c} if other is None else {"this": c, "pair": other}
    models = {name: make_model(its_settings, world) for name, its_settings in settings.items()}
    run_llama = llama_step(c, world, models["this"].config) if c.reference else None
    table, stages = {}, choose_stages(c)
    for row, stage in stages.items():
        sides = {name: smoltolk_side(settings[name], world, stage, model, folder) for name, model in models.items()}
        if run_llama and stage["train"] == "all":
            sides["transformers"] = Side(run_llama, sides["this"].steps)
        table[row] = compare_sides(row, sides, c, world)
        if c.profile and row == ("mixed" if "mixed" in stages else list(stages)[0]):
            profile_side(sides["this"], c, world)
    return table


# ---------------------------------------------------------------------------------------------------------------------
# the other parts

def bench_score(c, world, folder):
    """Sentences a second, of pairs of 12 tokens that differ in their last third, as in BLiMP."""
    model, rng = make_model(c, world).eval(), np.random.default_rng(0)
    sentences = rng.integers(1, c.vocab_size, (64, 12))
    sentences[1::2, :8] = sentences[::2, :8]
    sequences, spans = [[0, *sentence] for sentence in sentences.tolist()], [(1, 13)] * 64
    batch_tokens = 512 if world.device.type == "cpu" else 16384  # the defaults of evaluate.py

    def in_batches():
        log_likelihood(model, sequences, spans, batch_tokens, candidates=2)

    def one_at_a_time():
        for sequence, span in zip(sequences[:16], spans):
            log_likelihood(model, [sequence], [span])

    batched = 64 / median_seconds(in_batches, world.device, c.steps)
    alone = 16 / median_seconds(one_at_a_time, world.device, c.steps)
    return dict(batched_per_second=batched, one_at_a_time_per_second=alone, ratio=batched / alone)


@torch.inference_mode()
def bench_generate(c, world, folder):
    """Text tokens a second in one row. The time of reading the prompt counts, except in decode_per_second."""
    device = world.device
    model = make_model(c, world).to(pick_dtype(c.dtype, device)).eval()
    ids = torch.randint(1, c.vocab_size, (1, PROMPT + NEW), device=device)

    def pick(logits):
        return 1 + logits[:, 1:].argmax(-1)  # never EOS, whose id is 0

    def time_cached():
        """Seconds to the first token, and from there to the last one."""
        began = now(device)
        tokens = sample.generate(model, ids[:, :PROMPT].tolist(), [("text", NEW)], pick, c.compile)
        next(tokens)
        first = now(device)
        for _ in tokens:
            pass
        return first - began, now(device) - first

    def predict_uncached(length):
        pick(sample.step(model, ids[:, :length], cache=None, modality="text", speaks=False))

    times = [time_cached() for _ in range(1 + c.steps)][1:]
    first, rest = (statistics.median(seconds) for seconds in zip(*times))
    rate, decode = NEW / (first + rest), (NEW - 1) / rest
    lengths = PROMPT, PROMPT + NEW // 2, PROMPT + NEW
    uncached = 1 / statistics.mean(median_seconds(partial(predict_uncached, n), device, c.steps) for n in lengths)
    weight_bytes = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if not is_new(name))
    bound = read_rate(device) / weight_bytes
    return dict(tokens_per_second=rate, uncached_per_second=uncached, ratio=rate / uncached, decode_per_second=decode,
                bound_per_second=bound, share_of_bound=decode / bound, weight_bytes=weight_bytes)


def bench_data(c, world, folder):
    """Sequences a second as the loader's thread makes them; seconds to open a large set and draw 32 from it."""
    config, source = Config(vocab_size=c.vocab_size, n_units=c.n_units), open_source("interleaved", [folder])

    def draw(step, kinds, n, source):
        """Make the batches of a step of n sequences."""
        settings = SimpleNamespace(**vars(c) | dict(batch_tokens=n * c.sequence_length, micro_batch=n))
        stage = dict(mixture=dict.fromkeys(kinds, 1), train="all")
        make_micro_batches(step, dict.fromkeys(kinds, source), stage, 0, settings, config, ALONE)

    def sequences_per_second(kinds, n):
        numbers = itertools.count()
        return n / median_seconds(lambda: draw(next(numbers), kinds, n, source), ALONE.device, 20 * c.steps)

    rates = {"interleaved": sequences_per_second(["interleaved"], 32),
             "interleaved, one by one": sequences_per_second(["interleaved"], 1),
             "mixed": sequences_per_second(["text", "speech", "interleaved"], 48)}

    large = folder.parent / "large"  # its tokens are a sparse file: zeros, which take no room on the disk
    large.mkdir()
    documents = np.linspace(0, LARGE, 1_000_001).astype(np.int64)
    np.save(large / "documents.npy", documents)
    np.lib.format.open_memmap(large / "text.npy", "w+", np.uint16, (LARGE,))
    text = dict(tokens=LARGE, vocab_size=c.vocab_size, eos=0)
    meta = dict(format=FORMAT, kind="text", documents=len(documents) - 1, text=text)
    (large / "meta.json").write_text(json.dumps(meta))
    began = time.perf_counter()
    draw(0, ["text"], 32, open_source("text", [large]))
    return rates | dict(tokens_per_second=rates["interleaved"] * c.sequence_length,
                        open_10_billion_seconds=time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------

PARTS = dict(train=bench_train, score=bench_score, generate=bench_generate, data=bench_data)


def as_table(report):
    """The page that is printed."""
    machine = report["machine"]
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in machine["matmul_flops"].items())
    lines = [f"{machine['device']}, {machine['processes']} process(es) of {machine['threads']} threads, torch"
             f" {machine['torch']}, {machine['dtype']}{', compiled' if machine['compile'] else ''}",
             f"matrix products, GFLOP/s: {rates}; memory read at {machine['read_bytes'] / 1e9:,.1f} GB/s"]
    for part in [part for part in PARTS if part in report]:
        lines += ["", *(train_lines(report) if part == "train" else [part])]
        if part != "train":
            lines += [f"    {key.replace('_', ' '):28}{value:18,.3f}" for key, value in report[part].items()]
    return "\n".join(lines)


def train_lines(report):
    """The table of training steps, a line for each side of each row."""
    peak = report["machine"]["matmul_flops"][report["machine"]["dtype"]]
    lines = [f"{'training step':28}{'s':>9}{'tokens/s':>12}{'ratio':>8}{'GFLOP/s':>11}{'of peak':>9}"]
    for row, sides in report["train"].items():
        for side, result in sides.items():
            name, rate = row if side == "this" else f"{row}, {side}", result["flops_per_second"]
            ratio = result["tokens_per_second"] / sides["this"]["tokens_per_second"]
            line = f"{name:28}{result['seconds']:9.3f}{result['tokens_per_second']:12,.0f}{ratio:8.2f}"
            line += f"{rate / 1e9:11,.0f}{rate / peak:9.1%}" if rate else " " * 20
            line += f"  mfu {result['mfu']:.1%}" if result["mfu"] else ""
            line += f"  {result['peak_bytes'] / 1e9:.1f} GB" if result["peak_bytes"] else ""
            lines.append(line)
    return lines


def check(settings):
    """Refuse what cannot work, before anything is measured. SystemExit."""
    parts = settings["what"].split(",")
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"what={settings['what']}: {part!r} is none of {', '.join(PARTS)}")
    if settings["steps"] < 1 or settings["warmup"] < 0 or settings["micro_batches"] < 1:
        raise SystemExit("steps, micro_batches: give 1 or more; warmup: 0 or more")
    if settings["profile"] and "train" not in parts:
        raise SystemExit(f"profile={settings['profile']}: only training steps are profiled; add train to --what")
    for key in ("out", "profile"):
        path = Path(settings[key])
        if not path.parent.is_dir() or path.is_dir() and settings[key]:
            raise SystemExit(f"{key}={path}: give the name of a file in a folder that is there")


def main(argv):
    settings, name = configure(DEFAULTS, argv, train.complete_stages)
    check(settings)
    changed = copy.deepcopy(settings)
    for change in settings["pair"].split():
        apply_override(changed, DEFAULTS, f"--{change}")
    reuse_memory()
    world = join_world(settings["device"])
    c = prepare(settings, name, world)
    other = prepare(changed, name, world) if c.pair else None

    tell(world, "machine: matrix products and memory")
    report = dict(settings=vars(c), machine=measure_machine(c, world))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "set"  # each process writes its own, and all are the same
        write_random_set(folder, c.vocab_size, c.n_units)
        for part in c.what.split(","):
            tell(world, part)
            report[part] = bench_train(c, world, folder, other) if part == "train" else PARTS[part](c, world, folder)
            if world.rank == 0:  # after each part, because the next one may fail
                Path(c.out).write_text(json.dumps(report, indent=1))
    if world.rank == 0:
        print(as_table(report))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
