"""
How fast is it here? Training steps, scoring, generation, the data path, on whatever machine this is.

    python bench.py config/train_150m.py --sequence_length=1024 --micro_batch=1          a CPU: a step of one sequence
    python bench.py config/train_150m.py --what=train --micro_batches=4                  a GPU: 4 x 16 sequences a step
    python bench.py config/train_150m.py --what=train --pair="residual=false beta=0.1"   A B A B, and B's rate over A's
    python bench.py config/train_2b.py --what=memory --micro_batch=8                     does it fit? By arithmetic
    torchrun --nproc_per_node=2 bench.py config/train_150m.py --what=train,ddp           the processes of a real run

Settings: train.py's (the config file's, --key=value) and the ones below. Nothing need be on disk: data is a random
paired set of natural shape (1.3 tokens and 5 units a word), weights are random in the shape that the config names.

    train       a step is forward, backward, clipping and AdamW, by train.train_step on batches of train.step_batches:
                for each kind of sequence, mixed as in the last stage, and for stage 1 (frozen backbone)
    ddp         under torchrun, for each stage: steps with and without the sum of gradients over processes, what is sent
    score       pairs of sentences with a common beginning: together, and one sequence at a time
    generate    100 tokens after a prompt of 100, greedy: over caches, and reading all again for each; the bound is
                the backbone's weights read once a token at the memory's measured rate
    data        batches of interleaved sequences and of the mixture, one process; opening a set of 10 billion tokens
                (a sparse file: zeros that take no room, so this times maps and checks, not a disk)
    memory      what a training step needs: weights, gradients, AdamW, and what the forward pass saves for backward

FLOPs are counted by model.forward_flops. Shares of the peak are of matrix products measured in the same run, and (mfu)
of a known GPU's data sheet. --reference=true also trains transformers' Llama of the same shape, its vocabulary widened
by units and switch, on the same tokens (of several processes each by itself). --hook=FILE.py trains anything else:

    def build(config, device):    # model.Config -> whatever step wants: model, optimizer, ...
    def step(state, tokens):      # one training step on int64 [B, T + 1] ids, on that device

Times are medians over --steps repetitions after --warmup. Results: a table here and bench.json.
"""
import copy
import importlib
import json
import platform
import runpy
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import evaluate
import model as smoltolk
import sample
import train
from configurator import apply_override, configure

what = "train,score,generate,data"  # and ddp, memory
steps = 3                    # timed repetitions
warmup = 1                   # untimed ones before
micro_batches = 1            # forward passes of a process in one step; batch_tokens follows
pair = ""                    # settings of the other side of a comparison, as key=value key=value
reference = False            # compare with transformers' Llama too
hook = ""                    # and with the code in this file
profile = False              # trace of a mixed step (bench.trace.json), the ten costliest operations
out = "bench.json"           # results

OWN = {k: v for k, v in globals().items() if isinstance(v, (bool, int, str)) and not k.startswith("_")}
SHAPES = {  # of the backbones that configs name, where their folders are missing: d, FFN, layers, heads, kv heads
    "smollm-135m": (576, 1536, 30, 9, 3),
    "smollm-360m": (960, 2560, 32, 15, 5),
    "smollm-1.7b": (2048, 8192, 24, 32, 32)}
SHAPE = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
PROMPT, NEW = 100, 100       # tokens of generation
NO_TOKENIZER = SimpleNamespace(eos=0)  # what a model needs of one
BIG = 10_000_000_000         # tokens of the set that is opened


# ---------------------------------------------------------------------------------------------------------------------
# the machine

def now(device):
    """Seconds, once the device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(run, device, times, untimed=1):
    """Median time of run()."""
    spent = []
    for _ in range(untimed + times):
        began = now(device)
        run()
        spent.append(now(device) - began)
    return statistics.median(spent[untimed:])


def matmul_rate(device, dtype):
    """FLOP/s of square matrix products, the largest seen."""
    n = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / min(median_seconds(lambda: a @ b, device, 3) for _ in range(3))


def read_rate(device):
    """Bytes a second that come out of memory: the sum of an array far larger than any cache."""
    x = torch.ones((1 << 31 if device.type == "cuda" else 1 << 29) // 4, device=device)
    return 4 * len(x) / median_seconds(x.sum, device, 5)


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size so far


def peak_bytes(device):
    """Highest use of memory since reset_peak: the allocator's on CUDA, this process's resident size on Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = [line.split() for line in status.read_text().splitlines()] if status.exists() else []
    return next((1024 * int(line[1]) for line in lines if line[0] == "VmHWM:"), None)


def machine(c, world):
    """What the numbers were measured on, and its own rates."""
    gpu, dtype = world.device.type == "cuda", train.pick_dtype(c.dtype, world.device)
    rates = {t: matmul_rate(world.device, getattr(torch, t)) for t in ("float32", "bfloat16")}
    return dict(device=torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
                processes=world.size, threads=torch.get_num_threads(), torch=torch.__version__, compile=c.compile,
                dtype=str(dtype).removeprefix("torch."), matmul_flops=rates, read_bytes=read_rate(world.device))


# ---------------------------------------------------------------------------------------------------------------------
# what is measured: a model, data and settings out of nothing

def prepare(settings, name, world):
    """Settings as train.py has them, with batch_tokens of the step that is timed, and the shape of the model."""
    rows = settings["micro_batch"] * settings["micro_batches"] * world.size
    settings |= dict(batch_tokens=settings["sequence_length"] * rows)
    c = train.check_settings(settings, name, world)
    known = Path(c.tokenizer).is_file()
    c.vocab_size = c.vocab_size or (data.Tokenizer(c.tokenizer).vocab_size if known else 49152)
    c.n_units = c.n_units or 500
    if c.init_from and not Path(c.init_from).is_dir():
        stem = Path(c.init_from).name.lower().replace("smollm2", "smollm")
        if stem not in SHAPES:
            raise SystemExit(f"{c.init_from}: no such folder, and no shape known for it; name one that is there, or set"
                             f" --init_from= and --hidden_size and the like; known: {', '.join(SHAPES)}")
        vars(c).update(zip(SHAPE, SHAPES[stem]), init_from="")
    return c


def random_set(folder, config, words=500_000):
    """A paired set of random ids: 1.3 tokens and 5 units a word, documents of 250 words. Returns its folder."""
    rng, size = np.random.default_rng(0), {}
    size["text"] = rng.choice(3, words, p=[0.78, 0.14, 0.08]) + 1
    size["speech"] = rng.integers(2, 9, words)
    ends = np.append(np.arange(249, words - 1, 250), words - 1)  # where a document's EOS stands
    eos = dict(text=config.eos_token_id, speech=config.n_units)
    limit = dict(text=config.vocab_size, speech=config.n_units)
    arrays, folder = {"documents": np.append(0, ends + 1)}, Path(folder)
    for s in size:
        size[s][ends] = 1
        arrays[f"{s}_words"] = np.append(0, np.cumsum(size[s]))
        arrays[s] = rng.integers(0, limit[s], arrays[f"{s}_words"][-1]).astype(np.uint16)
        arrays[s][arrays[f"{s}_words"][ends]] = eos[s]
    meta = dict(format=data.FORMAT, kind="paired", source="random", documents=len(ends), words=words,
                text=dict(tokens=len(arrays["text"]), vocab_size=config.vocab_size, eos=eos["text"], tokenizer=""),
                speech=dict(tokens=len(arrays["speech"]), n_units=config.n_units, rate=25, vocabulary=""))
    write_arrays(folder, meta, arrays)
    return folder


def write_arrays(folder, meta, arrays):
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps(meta))


def build_model(c, world):
    model = train.build_model(c, NO_TOKENIZER)
    for layer in [*model.input_adapter, *model.output_adapter]:  # zeros at the start, which would be no work for some
        for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            torch.nn.init.normal_(matrix, std=0.02)
    return model.to(world.device)


# ---------------------------------------------------------------------------------------------------------------------
# training steps

def ours(c, world, stage):
    """(model, optimizer, what a step calls, a function that takes one step on a list of data.Batch)."""
    model = build_model(c, world)
    train.set_trainable(model, stage["train"])
    optimizer, runner = train.make_optimizer(model, c, world.device), train.make_runner(model, c, world)
    autocast = half(c, world)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    return model, optimizer, runner, lambda batches, runner=runner: train.train_step(runner, optimizer, batches, c,
                                                                                      world, autocast)


def half(c, world):
    is_half = train.pick_dtype(c.dtype, world.device) == torch.bfloat16
    return torch.autocast(world.device.type, torch.bfloat16) if is_half else nullcontext()


def llama(c, world, config):
    """A step of transformers' Llama on the same ids, in eager mode or compiled as ours."""
    transformers = importlib.import_module("transformers")
    shape = {key: getattr(config, key) for key in smoltolk.LLAMA} | dict(vocab_size=config.switch + 1)
    their = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, tie_word_embeddings=True)).to(world.device)
    optimizer = torch.optim.AdamW(their.parameters(), 1e-4, (c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)
    runner, autocast = torch.compile(their) if c.compile else their, half(c, world)

    def step(batches):
        for batch in batches:
            ids = batch.tokens.to(world.device, non_blocking=True)
            with autocast:
                loss = runner(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(their.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def hooked(c, world, config):
    """A step of the user's own code."""
    try:
        code = runpy.run_path(c.hook)
        build, step = code["build"], code["step"]
    except (OSError, SyntaxError, KeyError) as e:
        raise SystemExit(f"{c.hook}: cannot be used ({type(e).__name__}: {e}); give a file with build(config, device)"
                         f" and step(state, tokens)") from None
    state = build(config, world.device)
    return lambda batches: [step(state, batch.tokens.to(world.device)) for batch in batches]


def stages_of(c):
    """{row of the table: stage}: each kind alone and all mixed as in the last stage, and the frozen stage if any."""
    last, frozen = list(c.stages.values())[-1], [s for s in c.stages.values() if s["train"] == "new"]
    rows = {kind: last | dict(mixture={kind: 1}) for kind in last["mixture"]}
    if len(rows) > 1:
        rows["mixed"] = last
    return rows | ({"stage 1": frozen[0]} if frozen else {})


def draw_batches(c, world, stage, config, sources):
    """Steps' batches: as many steps as it takes for each kind to come up in its share."""
    make = train.step_batches(c, config, sources, stage, 0, world)
    parts, rows = sum(stage["mixture"].values()), c.batch_tokens // c.sequence_length
    return [make(step) for step in range(1 if rows % parts == 0 else parts)]


def time_steps(sides, c, world):
    """{side: result} of sides {name: (step, [batches of each step], FLOPs)}: A B A B ..., in one process."""
    spent, peak = {name: [] for name in sides}, dict.fromkeys(sides, 0)
    for repetition in range(c.warmup + c.steps):
        for name, (step, batches, _) in sides.items():
            reset_peak(world.device)
            began = now(world.device)
            for one in batches:
                step(one)
            spent[name] += [(now(world.device) - began) / len(batches)] * (repetition >= c.warmup)
            peak[name] = max(peak[name], peak_bytes(world.device) or 0)
    results = {}
    for name, (_, batches, flops) in sides.items():
        seconds = statistics.median(spent[name])
        tokens = sum(b.tokens.numel() - len(b.tokens) for one in batches for b in one) * world.size / len(batches)
        results[name] = dict(seconds=seconds, spread=[min(spent[name]), max(spent[name])], peak_bytes=peak[name],
                             tokens_per_second=tokens / seconds, flops=flops, flops_per_second=flops / seconds,
                             mfu=train.utilisation(flops / seconds, world.device))
    return results


def bench_train(c, world, folder, other=None):
    """{row: {side: result}}; side "this" has the settings given."""
    table, models = {}, {}
    stages = stages_of(c)
    for row, stage in stages.items():
        sides = {}
        for name, settings in (("this", c), ("pair", other)):
            if settings is None:
                continue
            key = name, stage["train"]
            if key not in models:
                models = {k: m for k, m in models.items() if k[0] != name}  # one model of a side at a time
                models[key] = ours(settings, world, stage)
            model, *_, step = models[key]
            config = model.config
            sources = dict.fromkeys(stage["mixture"], data.open_source("interleaved", [folder], length=0))
            batches = draw_batches(settings, world, stage, config, sources)
            flops = [train.step_flops(config, one, stage, settings.sequence_length) for one in batches]
            sides[name] = step, batches, sum(flops) / len(flops)
        if stage["train"] == "all":
            for name, build in (("transformers", llama if c.reference else None), ("hook", hooked if c.hook else None)):
                if build and name not in models:
                    models[name] = build(c, world, config)
                if build:  # of its own FLOPs nothing is known: rates only
                    sides[name] = models[name], sides["this"][1], 0
        table[row] = time_steps(sides, c, world)
        if c.profile and row == ("mixed" if "mixed" in stages else list(stages)[-1]):
            table[row]["top ten"] = trace(sides["this"], c, world)
    return table


def trace(side, c, world):
    """Profile one round of steps: bench.trace.json for chrome://tracing or Perfetto; [operation, ms] of the top ten."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (world.device.type == "cuda")
    step, batches, _ = side
    with torch.profiler.profile(activities=activities) as profiled:
        for one in batches:
            step(one)
        now(world.device)
    if world.rank == 0:
        profiled.export_chrome_trace(str(Path(c.out).with_suffix(".trace.json")))
    cost = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda e: -getattr(e, cost))[:10]
    return [[e.key, getattr(e, cost) / 1e3] for e in events]


def bench_ddp(c, world, folder):
    """Of each stage: what DistributedDataParallel sends in a step, seen by its communication hook, and what it costs.

    Timed in turn: a step; the sums alone, of the same buckets; a step without them. The share of the sums' time by
    which a step does not get longer is hidden behind the backward pass, in which the first starts so long before the
    last.
    """
    table, sent = {}, []

    def note(group, bucket):
        sent.append((time.perf_counter(), bucket.index(), bucket.buffer(), sum(p.numel() for p in bucket.parameters())))
        return allreduce_hook(group, bucket)

    def sums_alone(_):
        for work in [dist.all_reduce(buffer, async_op=True) for *_, buffer, _ in sent]:
            work.wait()

    for name, stage in c.stages.items():
        model, _, runner, step = ours(c, world, stage)
        runner.register_comm_hook(None, note)
        sources = dict.fromkeys(stage["mixture"], data.open_source("interleaved", [folder], length=0))
        steps = draw_batches(c, world, stage, model.config, sources)[:1], 0
        runs = dict(step=lambda batches, step=step: (sent.clear(), step(batches)), sums_alone=sums_alone,
                    step_unsummed=lambda batches, step=step, runner=runner: step(batches, runner.module))
        seconds = {key: r["seconds"] for key, r in
                   time_steps({key: (run, *steps) for key, run in runs.items()}, c, world).items()}
        hidden = 1 - (seconds["step"] - seconds["step_unsummed"]) / seconds["sums_alone"]
        began, indices, buffers, sizes = zip(*sent)
        table |= {f"{name}_{key}_seconds": value for key, value in seconds.items()}
        table |= {f"{name}_first_before_last_seconds": began[-1] - began[0], f"{name}_hidden": hidden,
                  f"{name}_sent_bytes": sum(b.nbytes for b in buffers),
                  f"{name}_all_reduces": len(sent), f"{name}_buckets": len(set(indices)),
                  f"{name}_parameters": sum(sizes)}
    return table


# ---------------------------------------------------------------------------------------------------------------------
# the other parts

def bench_score(c, world, folder):
    """Sequences a second of pairs of 12-token sentences that differ in their last third, as in BLiMP."""
    model, rng = build_model(c, world).eval(), np.random.default_rng(0)
    sentences = rng.integers(1, c.vocab_size, (64, 12))
    sentences[1::2, :8] = sentences[::2, :8]
    sequences, spans = [[0, *s] for s in sentences.tolist()], [(1, 13)] * 64
    batch = 512 if world.device.type == "cpu" else 16384  # as evaluate.py has it

    def alone():
        for sequence, span in zip(sequences[:16], spans):
            evaluate.log_likelihood(model, [sequence], [span])
    together = median_seconds(lambda: evaluate.log_likelihood(model, sequences, spans, batch), world.device, c.steps)
    rates = 64 / together, 16 / median_seconds(alone, world.device, c.steps)
    return dict(batched_per_second=rates[0], one_at_a_time_per_second=rates[1], ratio=rates[0] / rates[1])


@torch.inference_mode()
def bench_generate(c, world, folder):
    """Tokens a second of one row, the prompt's pass included; without caches from passes at three lengths."""
    dtype = train.pick_dtype(c.dtype, world.device)
    model = build_model(c, world).to(dtype).eval()
    prompt = torch.arange(17, 17 + PROMPT).tolist()

    def make(n):
        for _ in sample.generate(model, [prompt], [("text", n)], lambda x: x[:, 1:].argmax(-1) + 1, c.compile):
            pass  # EOS, id 0, is never chosen

    def again(n):
        ids = torch.arange(17, 17 + n, device=world.device)[None]
        return lambda: model(ids, logits=slice(-1, None), heads=("text",)).text_logits.argmax().item()
    whole, first = (median_seconds(lambda n=n: make(n), world.device, c.steps) for n in (NEW, 1))
    lengths = (PROMPT, PROMPT + NEW // 2, PROMPT + NEW)
    uncached = statistics.mean(median_seconds(again(n), world.device, c.steps) for n in lengths)
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if not smoltolk.is_new(n))
    bound = read_rate(world.device) / weights
    decode = (NEW - 1) / (whole - first)
    return dict(tokens_per_second=NEW / whole, uncached_per_second=1 / uncached, ratio=NEW / whole * uncached,
                decode_per_second=decode, bound_per_second=bound, share_of_bound=decode / bound, weight_bytes=weights)


def bench_data(c, world, folder):
    """Sequences a second as the training loop draws them; seconds to open a large set and draw from it."""
    config, length = smoltolk.Config(vocab_size=c.vocab_size, n_units=c.n_units), c.sequence_length + 1
    source, result = data.open_source("interleaved", [folder]), {}
    for name, mixture, n in (("interleaved", ["interleaved"], 32), ("interleaved, one by one", ["interleaved"], 1),
                             ("mixed", ["text", "speech", "interleaved"], 48)):
        sources, at = dict.fromkeys(mixture, source), iter(range(1 << 60))

        def draw(n=n, mixture=mixture, sources=sources, at=at):
            rows, text_rows = data.sample(sources, dict.fromkeys(mixture, 1), c.seed, 0, n * next(at) + np.arange(n),
                                          length, config, c.text_span, c.speech_span)
            data.make_batch(rows, text_rows, config)
        result[name] = n / median_seconds(draw, torch.device("cpu"), 20 * c.steps)
    result["tokens_per_second"] = result["interleaved"] * length
    with tempfile.TemporaryDirectory(dir=folder.parent) as big:
        ends = np.linspace(0, BIG, 1_000_001).astype(np.int64)
        meta = dict(format=data.FORMAT, kind="text", source="zeros", documents=len(ends) - 1,
                    text=dict(tokens=BIG, vocab_size=config.vocab_size, eos=0, tokenizer=""))
        write_arrays(Path(big) / "set", meta, {"documents": ends})
        np.lib.format.open_memmap(Path(big) / "set" / "text.npy", "w+", np.uint16, (BIG,))
        began = time.perf_counter()
        sources = {"text": data.open_source("text", [Path(big) / "set"], length=length)}
        data.sample(sources, {"text": 1}, 0, 0, np.arange(32), length, config)
        result["open_10_billion_seconds"] = time.perf_counter() - began
    return result


def bench_memory(c, world, folder=None):
    """Bytes of one process in training all weights on a micro-batch of the mixture, by arithmetic. No memory is used.

    16 a parameter: weight, gradient and AdamW's two moments in fp32. Activations: what the forward pass saves for
    backward, each storage once, counted on fake tensors. Logits: 12 bytes each of those that are there at one time.
    """
    own, saved = set(), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    rows, positions = c.micro_batch, c.micro_batch * c.sequence_length
    with FakeTensorMode(), half(c, evaluate.ALONE), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        model = train.build_model(c, NO_TOKENIZER)
        own |= {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
        model.apply(lambda module: setattr(module, "recompute", c.recompute))
        runner = torch.compile(model, backend="aot_eager_decomp_partition") if c.compile else model
        ids = torch.zeros(rows, c.sequence_length + 1, dtype=torch.long)
        text = positions * 4 // 9  # all of a third, and a third of the interleaved third
        runner(ids[:, :-1], ids[:, 1:], rows // 3, counts=(text, positions - text, positions // 32))
    parameters = sum(p.numel() for p in model.parameters())
    parts = dict(states=16 * parameters, activations=sum(storage.nbytes() for storage in saved.values()),
                 logits=12 * min(smoltolk.LOGITS_AT_ONCE, text * c.vocab_size))
    return dict(parameters=parameters, **parts, total=sum(parts.values()), fits_80_gb=sum(parts.values()) < 80e9)


# ---------------------------------------------------------------------------------------------------------------------

PARTS = dict(train=bench_train, score=bench_score, generate=bench_generate, data=bench_data,
             ddp=bench_ddp, memory=bench_memory)
UNITS = (("_bytes", 1e9, "GB"), ("bytes", 1e9, "GB"), ("states", 1e9, "GB"), ("activations", 1e9, "GB"),
         ("logits", 1e9, "GB"), ("total", 1e9, "GB"), ("parameters", 1e6, "M"), ("seconds", 1, "s"))


def as_table(report):
    """The page that is printed."""
    m = report["machine"]
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in m["matmul_flops"].items())
    lines = [f"{m['device']}, {m['processes']} process(es) of {m['threads']} threads, torch {m['torch']}, {m['dtype']}"
             + (", compiled" if m["compile"] else ""),
             f"matrix products, GFLOP/s: {peaks}; memory read at {m['read_bytes'] / 1e9:,.1f} GB/s", ""]
    if "train" in report:
        heads = (("training step", -28), ("s", 9), ("tokens/s", 12), ("GFLOP/s", 11), ("of peak", 9), ("mfu", 7),
                 ("GB", 7), ("ratio", 8))
        lines.append("".join(head.ljust(-n) if n < 0 else head.rjust(n) for head, n in heads))
    for row, sides in report.get("train", {}).items():
        first = sides["this"]["tokens_per_second"]
        for side, r in sides.items():
            if side == "top ten":
                lines += [f"    {ms:10.1f} ms  {name}" for name, ms in r]
                continue
            share = r["flops_per_second"] / m["matmul_flops"][m["dtype"]]
            rates = f"{r['flops_per_second'] / 1e9:11,.0f}{share:9.1%}" if r["flops"] else f"{'':20}"
            mfu = f"{r['mfu']:7.1%}" if r["mfu"] and r["flops"] else " " * 7
            ratio = "" if side == "this" else f"{r['tokens_per_second'] / first:8.2f}"
            lines.append(f"{row + (', ' + side if side != 'this' else ''):28}{r['seconds']:9.3f}"
                         f"{r['tokens_per_second']:12,.0f}{rates}{mfu}{r['peak_bytes'] / 1e9:7.1f}{ratio}")
    if "hours" in report:
        hours = ", ".join(f"{key} {value:.1f}" for key, value in report["hours"].items())
        lines += ["", f"hours, if every GPU goes on as these did: {hours}"]
    for part in [part for part in PARTS if part in report and part != "train"]:
        lines += ["", part]
        for key, value in report[part].items():
            scale, unit = next(((s, u) for end, s, u in UNITS if key.endswith(end)), (1, ""))
            shown = f"{value / scale:14,.3f} {unit}" if value is not None else f"{'-':>14}"
            lines.append(f"    {key.replace('_', ' '):28}{shown}")
    return "\n".join(lines)


def main(argv):
    settings, name = configure(train.DEFAULTS | OWN, argv, train.complete_stages)
    parts, changed = settings["what"].split(","), copy.deepcopy(settings)
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f"what={settings['what']}: {part!r} is none of {', '.join(PARTS)}")
    if settings["steps"] < 1 or settings["warmup"] < 0 or settings["micro_batches"] < 1:
        raise SystemExit("steps, micro_batches: give 1 or more; warmup: 0 or more")
    out = Path(settings["out"])
    if not out.parent.is_dir() or out.is_dir():
        raise SystemExit(f"out={out}: give the name of a file in a folder that is there")
    for change in settings["pair"].split():
        apply_override(changed, train.DEFAULTS | OWN, f"--{change}")
    train.reuse_memory()
    world = evaluate.join_world(settings["device"])
    if "ddp" in parts and not dist.is_initialized():
        raise SystemExit("what=ddp: one process sends nothing; start bench.py by torchrun --nproc_per_node=2")
    c = prepare(settings, name, world)
    other = prepare(changed, name, world) if settings["pair"] else None
    report = dict(settings=vars(c), machine=machine(c, world))
    with tempfile.TemporaryDirectory() as temporary:
        symbols = smoltolk.Config(vocab_size=c.vocab_size, n_units=c.n_units)
        folder = random_set(Path(temporary) / "set", symbols)  # each process has its own, the same
        for part in parts:
            report[part] = bench_train(c, world, folder, other) if part == "train" else PARTS[part](c, world, folder)
            if world.rank == 0:  # should the next one fail
                out.write_text(json.dumps(report, indent=1))
    if "train" in report and world.device.type == "cuda" and "mixed" in report["train"]:
        rate = report["train"]["mixed"]["this"]["tokens_per_second"] / world.size * 3600
        report["hours"] = {f"{tokens // 10**9}B tokens on {n} GPUs": tokens / rate / n
                           for tokens in (16 * 10**9, 32 * 10**9) for n in (4, 64)}
    if world.rank == 0:
        out.write_text(json.dumps(report, indent=1))
        print(as_table(report))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
