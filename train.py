"""
Train a text-speech language model, stage by stage.

    python train.py config/train_tiny.py                                  the embedded default, ten minutes on a laptop
    torchrun --nproc_per_node=4 train.py config/train_150m.py             four GPUs
    python train.py config/train_tiny.py --seed=2 --stages.stage2.steps=100 --out_dir=out/mine

Settings: the values below, then the config file's, then those of --key=value. A run's folder holds settings.json (all
of them), log.jsonl (a line per logged step), checkpoint-* (model, optimizer, place in the run), and at the end
results.json and loss.png. `--resume=true` goes on from the newest checkpoint, exactly. SIGTERM, SIGUSR1 and Ctrl-C end
a run after the step at hand, with a checkpoint. A step whose loss or gradient is not finite ends it too: the sequences
are named, and no weight is changed.
"""
import ctypes
import dataclasses
import importlib
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import evaluate
import model as smoltolk
import report
from configurator import configure, fit, nearest
from evaluate import all_sum, join_world, on_first, start_sum
from log import Log, plot_loss

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = ""                # default: out/<name of the config file>
resume = False              # go on from the newest checkpoint in out_dir
seed = 1                    # of the new weights and of all data
log_interval = 10           # steps
eval_interval = 500         # steps between held-out scores
eval_sequences = 64         # held-out sequences of each kind
eval_cloze_items = 100      # Topic-Cloze items scored along the way; the final table has all, and 4 x eval_sequences
checkpoint_interval = 500   # steps
keep_checkpoints = 2        # the newest ones stay
keep_every = 0              # and those of every so many steps, 0: none
wandb_project = ""          # log there too
tensorboard = False         # and there, under out_dir

# the data (data.py says what a set is); a list of folders is drawn by size, a dict of folder -> weight by weight
demo = ""                   # folder of the embedded default: made if it isn't there, and used for all not named below
tokenizer = ""              # a SmolLM-style tokenizer.json
units = ""                  # folder of the speech units (units.json)
text = []
speech = []
interleaved = []
val_text = []
val_speech = []
val_interleaved = []
cloze = ""                  # Topic-Cloze set for the final table
text_span = [10, 30]        # words of a text span in interleaved sequences, least and most
speech_span = [5, 15]
sequence_length = 2048
batch_tokens = 2**20        # tokens of one optimizer step, over all processes
micro_batch = 8             # sequences of one forward pass

# the model. init_from names a SmolLM folder: the shape of the backbone is then that folder's, not the one below
init_from = ""
vocab_size = 0              # 0: the tokenizer's
hidden_size = 576
intermediate_size = 1536
num_hidden_layers = 30
num_attention_heads = 9
num_key_value_heads = 3
rope_theta = 100_000.0
n_units = 0                 # 0: as many as the units folder says
input_adapter_layers = 2
output_adapter_layers = 2
layer_pooling = "dynamic"   # or "fixed", "last"
residual = True
beta = 0.0                  # weight of the layer selector's entropy, Eq. 6

# the stages: one after the other, each with a fresh optimizer
#   mixture        parts of each kind of sequence, whole numbers
#   train          "all", "new" (what SmolTolk adds; the backbone is frozen) or "text" (the backbone alone)
#   learning_rate  of the backbone; speech_learning_rate of what is added (0: the same)
#   warmup         steps of linear rise; decay: last share of the steps, falling linearly to 0
stages = dict(
    stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", speech_learning_rate=3e-3, warmup=100, decay=0.2),
    stage2=dict(steps=15000, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4),
)
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1          # on matrices
grad_clip = 1.0

# the machine
device = "auto"             # "cuda", "cpu", "mps", or the best there is
dtype = "auto"              # "bfloat16" (autocast) or "float32"; auto: bfloat16 where the hardware multiplies in it
compile = False             # torch.compile
recompute = False           # the MLPs' activations again in backward instead of keeping them: for large models
# ---------------------------------------------------------------------------------------------------------------------
DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, float, str, list, dict))
            and not k.startswith("_")}
STAGE = dict(steps=0, mixture={}, train="all", learning_rate=3e-4, speech_learning_rate=0.0, warmup=0, decay=0.0)
DEMO = dict(tokenizer="tokenizer.json", units="units", text="text", speech="paired", interleaved="paired",
            val_text="val", val_speech="val", val_interleaved="val", cloze="cloze")  # what lies where in that folder
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense, FLOP/s


def pick_dtype(name, device):
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else torch.float32


def reuse_memory():
    """Have glibc keep freed memory: otherwise tensors come as new pages, mapped and cleared again in every CPU step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD: never give back; M_MMAP_MAX: all from the heap
            getattr(libc, "mallopt", lambda *_: 0)(option, value)


# ---------------------------------------------------------------------------------------------------------------------
# settings, data and model, all checked before the first step

def check_settings(c, name, world):
    """Complete derived values and refuse what cannot work. Returns the settings as a namespace."""
    c = SimpleNamespace(**c)
    c.out_dir = c.out_dir or f"out/{name}"
    for key, place in DEMO.items() if c.demo else ():
        path = f"{c.demo}/{place}"
        setattr(c, key, getattr(c, key) or ([path] if isinstance(getattr(c, key), list) else path))
    for s, stage in c.stages.items():
        check_stage(s, stage)
    if not c.stages:
        raise SystemExit("stages: empty; name at least one")
    for key in ("sequence_length micro_batch batch_tokens log_interval eval_interval checkpoint_interval eval_sequences"
                " keep_checkpoints num_hidden_layers num_attention_heads num_key_value_heads").split():
        if getattr(c, key) < 1:
            raise SystemExit(f"{key}={getattr(c, key)}: give 1 or more")
    for key in "input_adapter_layers output_adapter_layers eval_cloze_items beta weight_decay keep_every".split():
        if getattr(c, key) < 0:
            raise SystemExit(f"{key}={getattr(c, key)}: give 0 or more")
    if c.grad_clip <= 0:
        raise SystemExit(f"grad_clip={c.grad_clip}: give a positive norm, 1e9 for none")
    evaluate.check_spans(c)
    sequences, rest = divmod(c.batch_tokens, c.sequence_length)
    if rest or sequences % world.size or sequences == 0:
        raise SystemExit(f"batch_tokens={c.batch_tokens} is not a whole number of sequences of {c.sequence_length} for"
                         f" each of {world.size} processes; set --batch_tokens to a multiple of"
                         f" {c.sequence_length * world.size}")
    if c.dtype not in ("auto", "bfloat16", "float32"):
        raise SystemExit(f"dtype={c.dtype}: choose auto, bfloat16 or float32")
    for key, value in vars(c).items():
        if isinstance(value, float) and not np.isfinite(value):
            raise SystemExit(f"{key}={value}: give a finite number")
    if not (0 <= c.beta1 < 1 and 0 <= c.beta2 < 1 and 0 <= c.seed < 1 << 63):
        raise SystemExit(f"beta1={c.beta1}, beta2={c.beta2}, seed={c.seed}: from 0 to less than 1; a seed of 0 or more")
    for asked, package in ((c.wandb_project, "wandb"), (c.tensorboard, "tensorboard")):
        if asked and not importlib.util.find_spec(package):
            raise SystemExit(f"{package} is not installed: pip install {package}, or leave it out")
    return c


def complete_stages(settings):
    """Fill in what a stage leaves out, and refuse what no stage knows or takes."""
    for name, stage in settings["stages"].items():
        if not isinstance(stage, dict):
            raise SystemExit(f"stages.{name}={stage!r}: a stage is a dict of {', '.join(STAGE)}")
        for key in stage:
            if key not in STAGE:
                raise SystemExit(f"stages.{name}.{key}: no such setting; did you mean {nearest(key, STAGE)}?")
        settings["stages"][name] = {key: fit(stage.get(key, default), default, f"stages.{name}.{key}")
                                    for key, default in STAGE.items()}


def check_stage(name, stage):
    for kind, parts in stage["mixture"].items():
        if kind not in ("text", "speech", "interleaved") or not isinstance(parts, int) or parts < 1:
            raise SystemExit(f"stages.{name}.mixture: {kind}={parts!r}; give text, speech, interleaved in whole parts")
    if not stage["mixture"] or stage["train"] not in ("all", "new", "text"):
        raise SystemExit(f"stages.{name}: needs a mixture, and train is 'all', 'new' or 'text', not {stage['train']!r}")
    if stage["steps"] < 1 or stage["warmup"] < 0 or not 0 <= stage["decay"] <= 1 or not (
            0 <= stage["learning_rate"] < np.inf and 0 <= stage["speech_learning_rate"] < np.inf):
        raise SystemExit(f"stages.{name}: give steps of 1 or more, warmup and learning rates of 0 or more, decay 0..1")
    stage["speech_learning_rate"] = stage["speech_learning_rate"] or stage["learning_rate"]


class Data(NamedTuple):
    """All that a run reads, opened and checked."""
    tokenizer: data.Tokenizer
    train: dict               # {kind: data.Source}
    held: dict                # the same, held out
    cloze: data.DataSet | None
    units: str | None         # the hash of the speech units
    beside: dict              # {name: contents} of tokenizer.json and units.json, as they were read


def open_data(c, world):
    """Open all data; derives vocab_size and n_units, and makes the demo corpus if it is asked for."""
    if c.demo:
        if world.rank == 0:
            importlib.import_module("corpora.demo").make(c.demo)  # returns at once if it is there
        if dist.is_initialized():
            dist.barrier()
    tokenizer, beside = data.Tokenizer(c.tokenizer), {"tokenizer.json": Path(c.tokenizer).read_bytes()}
    try:
        beside |= {"units.json": (Path(c.units) / "units.json").read_bytes()} if c.units else {}
        described = dict(json.loads(beside["units.json"])) if c.units else {}
    except (OSError, ValueError, TypeError) as e:
        raise SystemExit(f"{c.units}/units.json: cannot be read ({e}); set --units to the units' folder") from None
    c.vocab_size, c.n_units = c.vocab_size or tokenizer.vocab_size, c.n_units or described.get("n_units", 0)
    if not c.n_units:
        raise SystemExit("n_units: not known; set --units to the folder of the speech units, or --n_units")
    if described.get("n_units", c.n_units) != c.n_units:
        raise SystemExit(f"n_units={c.n_units}: {c.units}/units.json has {described['n_units']}; leave --n_units out")
    if tokenizer.vocab_size > c.vocab_size:
        raise SystemExit(f"{c.tokenizer}: {tokenizer.vocab_size} ids, vocab_size={c.vocab_size} cannot hold them")
    kinds = {kind for stage in c.stages.values() for kind in stage["mixture"]}
    made_with, length = (tokenizer.hash, described.get("hash")), c.sequence_length + 1
    train = {k: data.open_source(k, getattr(c, k), *made_with, length) for k in sorted(kinds)}
    held = {k: data.open_source(k, getattr(c, f"val_{k}"), *made_with, length)
            for k in ("text", "speech", "interleaved") if getattr(c, f"val_{k}")}
    cloze = data.open_set(c.cloze, *made_with) if c.cloze else None
    shards = [shard for source in [*train.values(), *held.values()] for shard in source.shards]
    for shard in [*shards, cloze] if cloze else shards:
        if shard.meta.get("speech", {}).get("n_units", c.n_units) != c.n_units:
            raise data.DataError(f"{shard.folder}: {shard.meta['speech']['n_units']} units, the model has {c.n_units}; "
                                 "set --units to those that it was made with")
    if cloze:
        try:
            positions = smoltolk.read_config(c.init_from).max_position_embeddings if c.init_from else 2048
        except ValueError as e:  # says which file and what
            raise SystemExit(str(e)) from None
        check_cloze(cloze, max(positions, c.sequence_length))
    return Data(tokenizer, train, held, cloze, described.get("hash"), beside)


def check_cloze(cloze, positions):
    """DataError for a Topic-Cloze set that could not be scored, which would else be found after the training."""
    if cloze.meta["kind"] != "paired" or cloze.meta["documents"] % 3:
        raise data.DataError(f"{cloze.folder}: a cloze set is a paired set with its documents in threes")
    sizes = [np.diff(words[cloze.documents]) - 1 for words in (cloze.text_words, cloze.speech_words)]  # without EOS
    opening, true, false = np.maximum(*sizes).reshape(-1, 3).T
    if np.min(sizes) < 1 or (opening + np.maximum(true, false)).max() + 1 > positions:  # with EOS and switch
        raise data.DataError(f"{cloze.folder}: a document is empty, or longer with its ending than the {positions} "
                             "positions of the model")


def build_model(c, tokenizer):
    """A fresh model: new, or on top of the SmolLM weights in init_from."""
    torch.manual_seed(c.seed)
    fields = {f.name for f in dataclasses.fields(smoltolk.Config)} & vars(c).keys()
    if not c.init_from:
        shape = {k: getattr(c, k) for k in fields}
        return smoltolk.SmolTolk(smoltolk.Config(**shape, eos_token_id=tokenizer.eos,
                                                 max_position_embeddings=max(2048, c.sequence_length),
                                                 initializer_range=c.hidden_size ** -0.5))
    new = {k: getattr(c, k) for k in fields if k == "rope_theta" or k not in smoltolk.LLAMA}
    model = smoltolk.from_pretrained(c.init_from, **new, eos_token_id=tokenizer.eos)
    if model.config.vocab_size != c.vocab_size:
        raise SystemExit(f"{c.init_from}: vocab_size {model.config.vocab_size}, the tokenizer has {c.vocab_size}")
    if model.config.max_position_embeddings < c.sequence_length:
        raise SystemExit(f"{c.init_from}: max_position_embeddings {model.config.max_position_embeddings}; set"
                         f" --sequence_length={model.config.max_position_embeddings} or less")
    return model


# ---------------------------------------------------------------------------------------------------------------------
# one stage

def set_trainable(model, what):
    for name, p in model.named_parameters():
        p.requires_grad_(what == "all" or smoltolk.is_new(name) == (what == "new"))


def make_optimizer(model, c, device):
    """Fresh AdamW over what is trainable, in four groups: backbone or new; matrices, with weight decay, or the rest."""
    groups = []
    for new in (False, True):
        for matrix in (True, False):
            params = [p for n, p in model.named_parameters()
                      if p.requires_grad and smoltolk.is_new(n) == new and (p.dim() >= 2) == matrix]
            if params:
                groups.append(dict(params=params, weight_decay=c.weight_decay if matrix else 0.0, new=new))
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), fused=True)


def make_runner(model, c, world):
    """The model as training steps call it: compiled if asked for, and with gradients summed over processes."""
    model.apply(lambda module: setattr(module, "recompute", c.recompute))  # MLPs look at it
    model.head_piece = torch.compile(smoltolk.head_piece) if c.compile else smoltolk.head_piece
    runner = torch.compile(model) if c.compile else model
    if dist.is_initialized():
        for p in model.parameters():  # these become its buckets; gradients made later would lie beside them until sent
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        runner = DistributedDataParallel(runner, device_ids=[world.local_rank] if world.device.type == "cuda" else None,
                                         gradient_as_bucket_view=True, broadcast_buffers=False)
    return runner


def schedule(step, stage):
    """Share of the learning rate at a step of the stage: linear warm-up, constant, linear decay to 0 at the end."""
    rise = (step + 1) / max(1, stage["warmup"])
    fall = (stage["steps"] - step) / max(1.0, stage["decay"] * stage["steps"])
    return min(1.0, rise, fall if stage["decay"] else 1.0)


def step_sequences(c, step, world):
    """The sequences of a step that are this process's, by micro-batch: arrays of numbers within the stage."""
    sequences = c.batch_tokens // c.sequence_length // world.size
    mine = (step * world.size + world.rank) * sequences + np.arange(sequences)  # of the same global batch always
    return np.array_split(mine, -(-sequences // c.micro_batch))


def step_batches(c, model_config, sources, stage, number, world):
    """A function: step -> this process's micro-batches (data.Batch) of that step of stage `number`."""
    def make(step):
        batches = []
        for index in step_sequences(c, step, world):
            rows, text_rows = data.sample(sources, stage["mixture"], c.seed, number, index, c.sequence_length + 1,
                                          model_config, c.text_span, c.speech_span)
            if c.compile:  # as many in each batch, for one graph: a row of text may pass through the speech modules
                text_rows = len(index) // sum(stage["mixture"].values()) * stage["mixture"].get("text", 0)
            batches.append(data.make_batch(rows, text_rows, model_config, pin=world.device.type == "cuda"))
        return batches
    return make


def train_step(model, optimizer, batches, c, world, autocast, stopping=0):
    """Forward, backward and update of one step.

    Returns this process's summed losses (float32 [3] on the device: text nll, speech nll, -entropy); the numbers of
    text and speech targets and the sum of `stopping` over all processes (float64 [3]); and the gradient norm before
    clipping. If that or a loss is not finite on any process, the norm is nan and nothing is updated.
    """
    counted = start_sum([sum(b.n_text for b in batches), sum(b.n_speech for b in batches), stopping], world)
    sums = torch.zeros(3, device=world.device)
    for i, batch in enumerate(batches):
        if dist.is_initialized():
            model.require_backward_grad_sync = i == len(batches) - 1
        tokens = batch.tokens.to(world.device, non_blocking=True)
        with autocast:
            out = model(tokens[:, :-1], tokens[:, 1:], batch.text_rows, counts=batch[2:])
        if i == 0:  # counts of the whole step make the loss one mean, however the step is cut up
            counts = counted()
            n_text, n_speech, _ = counts.tolist()
        loss = smoltolk.mean_loss(out, c.beta, n_text + n_speech, n_speech)
        # DistributedDataParallel averages over processes, this makes it a sum; and a loss of inf shows on all of them
        loss.backward(torch.where(loss.isfinite(), float(world.size), torch.nan).to(loss))
        sums += torch.stack([out.text_nll, out.speech_nll, out.negative_entropy]).detach()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.grad_clip)
    if all_sum([not bool(norm.isfinite() & sums.isfinite().all())], world).any():
        return sums, counts, torch.full_like(norm, torch.nan)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not dist.is_initialized())  # see make_runner
    return sums, counts, norm


def step_flops(config, batches, stage, length):
    """FLOPs of this process's share of one step: forward and backward; frozen weights need no gradient of their own."""
    total = 0
    for b in batches:
        backbone, new = smoltolk.forward_flops(config, len(b.tokens), length, b.text_rows, b.n_text, b.n_speech)
        total += backbone * (2 if stage["train"] == "new" else 3) + new * (2 if stage["train"] == "text" else 3)
    return total


class Run(NamedTuple):
    """What stays the same from the first step to the last."""
    c: SimpleNamespace
    world: evaluate.World
    opened: Data
    about: dict               # settings, identity of the data, and what else a checkpoint says about its run
    log: "Log"
    unsaved: list             # why the last checkpoint could not be written, if so
    heard: list               # signals that ask to stop
    resumed: Path | None      # the checkpoint that this process has gone on from


def train_stage(name, model, place, run):
    """Train one stage from place["step"] on, in place; place = {stage, step, total, tokens, flops, seconds}.

    Returns whether the run is to stop here, because a signal came.
    """
    c, world = run.c, run.world
    stage, number = c.stages[name], list(c.stages).index(name)
    set_trainable(model, stage["train"])
    optimizer = make_optimizer(model, c, world.device)
    if place["step"]:
        load_optimizer(optimizer, model, run.resumed)
    runner = make_runner(model, c, world)
    half = pick_dtype(c.dtype, world.device) == torch.bfloat16
    autocast = torch.autocast(world.device.type, torch.bfloat16) if half else nullcontext()

    def due(interval):
        return place["total"] % interval == 0 or place["step"] == stage["steps"]

    def score():  # False: a signal cut it short
        with autocast:
            scores = held_out(model, run, c.eval_sequences, c.eval_cloze_items)
        if scores is not None:
            run.log.held_out(dict(step=place["total"], stage=name, **scores))
        return scores is not None

    def save():
        if world.rank == 0:
            save_checkpoint(model, optimizer, place, c, run.opened.beside, run.about, run.unsaved)

    since = start_since(world)
    stop = all_sum([len(run.heard)], world).item() > 0
    if stop:
        save()
    make = step_batches(c, model.config, run.opened.train, stage, number, world)
    for batches in data.prefetch(make, range(place["step"], 0 if stop else stage["steps"])):
        factor = schedule(place["step"], stage)
        for group in optimizer.param_groups:
            group["lr"] = factor * stage["speech_learning_rate" if group["new"] else "learning_rate"]
        sums, counts, norm = train_step(runner, optimizer, batches, c, world, autocast, len(run.heard))
        flops = step_flops(model.config, batches, stage, c.sequence_length) * world.size
        if norm.isnan():
            stop_not_finite(model, batches, sums, stage, number, place, run, autocast)
        since = since._replace(sums=since.sums + sums, counts=since.counts + counts[:2], flops=since.flops + flops,
                               steps=since.steps + 1, norm=torch.maximum(since.norm, norm))
        for key, more in (("step", 1), ("total", 1), ("tokens", c.batch_tokens), ("flops", flops)):
            place[key] += more
        stop = counts[2] > 0 or world.size == 1 and len(run.heard) > 0

        if due(c.log_interval):
            run.log.step(log_line(name, stage, factor, place, since, c, world))
            since = start_since(world)
        paused = time.perf_counter()
        if due(c.eval_interval) and not stop:
            stop = not score()
        if due(c.checkpoint_interval) or stop:  # after the scores: what a checkpoint has behind it is in the log
            save()
        since = since._replace(began=since.began + time.perf_counter() - paused)
        if stop:
            break
    return stop


class Since(NamedTuple):
    """What has been added up since the last logged step."""
    began: float              # time.perf_counter(), moved on by what evaluations and checkpoints take
    sums: torch.Tensor        # of this process: text nll, speech nll, -entropy
    counts: torch.Tensor      # of all: text and speech targets
    flops: int
    steps: int
    norm: torch.Tensor        # the largest of the gradient


def start_since(world):
    """Nothing yet."""
    return Since(time.perf_counter(), torch.zeros(3, device=world.device), torch.zeros(2, dtype=torch.float64), 0, 0,
                 torch.zeros((), device=world.device))


def log_line(name, stage, factor, place, since, c, world):
    """One line of log.jsonl: means over the steps since the last one, and the largest gradient norm among them."""
    text_nll, speech_nll, negative_entropy = all_sum(since.sums, world).tolist()
    n_text, n_speech = since.counts.tolist()
    seconds = time.perf_counter() - since.began
    place["seconds"] += seconds
    return dict(
        step=place["total"], stage=name, stage_step=place["step"], tokens=place["tokens"], flops=place["flops"],
        seconds=round(place["seconds"], 3), grad_norm=float(since.norm),
        text_nll=text_nll / n_text if n_text else None, speech_nll=speech_nll / n_speech if n_speech else None,
        entropy=-negative_entropy / n_speech if n_speech else None,
        learning_rate=factor * stage["learning_rate"] if stage["train"] != "new" else 0.0,
        speech_learning_rate=factor * stage["speech_learning_rate"] if stage["train"] != "text" else 0.0,
        tokens_per_second=since.steps * c.batch_tokens / seconds,
        mfu=utilisation(since.flops / seconds / world.size, world.device))


def utilisation(flops_per_second, device):
    """Share of the peak bf16 rate of a known GPU, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_BF16.items() if key in name), None)
    return flops_per_second / peak if peak else None


def held_out(model, run, n_sequences, cloze_items=None):
    """Held-out scores, shared among processes: mean NLL in nats by kind; Topic-Cloze on cloze_items (None: all).

    None if a signal has come to any process meanwhile: what was left is left out.
    """
    c, world, opened, stop = run.c, run.world, run.opened, run.heard
    scores, batch_tokens = {}, c.micro_batch * c.sequence_length
    model.eval()
    if opened.held:
        sums = evaluate.heldout_nll(model, opened.held, c.seed, n_sequences, c.sequence_length,
                                    (c.text_span, c.speech_span), batch_tokens, world.rank, world.size, stop)
        scores["nll"] = report.nll_table(dict(zip(sums, all_sum(np.stack(list(sums.values())), world).numpy())))
    if opened.cloze and cloze_items != 0:
        items = opened.cloze.meta["documents"] // 3
        mine = range(world.rank, min(cloze_items or items, items), world.size)
        right = evaluate.topic_cloze(model, opened.cloze, batch_tokens, mine, stop)
        if not all_sum([len(stop)], world).item():  # otherwise not all have all of it
            sums = report.cloze_sums(right)
            scores["topic_cloze"] = report.cloze_table(dict(zip(sums, all_sum(list(sums.values()), world).tolist())))
    model.train()
    return None if all_sum([len(stop)], world).item() else scores


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints

def save_checkpoint(model, optimizer, place, c, beside, about, unsaved):
    """Write checkpoint-<step>. Where it cannot be written training goes on, and unsaved, a list, says why."""
    folder = Path(c.out_dir) / f"checkpoint-{place['total']:08d}"
    unsaved.clear()
    try:
        with checkpoint.whole_folder(folder) as new:
            write_state(new, model, model.state_dict(), optimizer_state(optimizer, model), beside,
                        dict(place=place, **about))
        checkpoint.prune(c.out_dir, c.keep_checkpoints, c.keep_every)
    except (OSError, SafetensorError) as error:
        unsaved.append(f"{folder}: could not be written ({error}); the checkpoint before it is whole; make room")
        print(f"{unsaved[0]}. Training goes on, the next one is tried as usual", file=sys.stderr)


def write_state(folder, model, weights, moments, beside, about):
    """The model's folder, tokenizer.json, units.json, optimizer.safetensors and train.json (about)."""
    smoltolk.save_pretrained(model, folder, state=weights)
    for name, contents in beside.items():
        (folder / name).write_bytes(contents)
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "train.json").write_text(json.dumps(about, indent=1))


def optimizer_state(optimizer, model):
    """{parameter.key: tensor}, no key of which is a parameter's name."""
    names = {p: n for n, p in model.named_parameters()}
    return {f"{names[p]}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer(optimizer, model, folder):
    saved = load_file(folder / "optimizer.safetensors")
    for name, p in model.named_parameters():
        if p.requires_grad:
            optimizer.state[p] = {k: saved[f"{name}.{k}"].to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}


def stop_not_finite(model, batches, sums, stage, number, place, run, autocast):
    """End the run at a step whose loss or gradient was not finite: each process names its sequences."""
    c, world, step = run.c, run.world, place["total"] + 1
    index = step_sequences(c, place["step"], world)
    if not sums.isfinite().all():
        for batch, its_index in zip(batches, index):
            order = np.argsort(data.kinds_of(stage["mixture"], its_index) != "text", kind="stable")
            with autocast, torch.no_grad():
                tokens = batch.tokens.to(world.device)
                logp = model(tokens[:, :-1], tokens[:, 1:], batch.text_rows, want=("logp",)).logp
            bad = its_index[order][(~logp.isfinite().all(1)).cpu().numpy()]
            if len(bad):
                print(f"step {step}, rank {world.rank}: the loss of sequences {bad.tolist()} is not finite",
                      file=sys.stderr)
    else:
        print(f"step {step}, rank {world.rank}: the gradient of one of {np.concatenate(index).tolist()} may not be"
              " finite", file=sys.stderr)
    if world.size > 1:
        dist.barrier()
    raise SystemExit(f"step {step}: the loss or its gradient is not finite, and no weight was changed. Go on from the"
                     " checkpoint before it with a lower learning rate or without that data")


# ---------------------------------------------------------------------------------------------------------------------

FREE = set("device dtype compile recompute micro_batch log_interval eval_interval eval_sequences eval_cloze_items "
           "keep_every checkpoint_interval keep_checkpoints wandb_project tensorboard".split())  # may change later
PLACES = {*DEMO, "demo", "init_from"}  # so may these: what lies there is compared instead


def begin(c, world, tokenizer, about):
    """(model, place, the checkpoint gone on from, {what has changed since: [was, is]}).

    A fresh run, or the newest good checkpoint's. A run that is already there is never overwritten; torchrun, when it
    starts all processes again because one has died, goes on from it.
    """
    restarted = all_sum([int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))], world).item() > 0  # each node counts
    def look():
        there = len(checkpoint.checkpoints(c.out_dir)) > 0
        if there and not (c.resume or restarted):
            raise SystemExit(f"{c.out_dir}: holds a run already; go on with --resume=true, or set another --out_dir")
        if c.resume and not there:
            raise SystemExit(f"{c.out_dir}: no checkpoint to go on from; leave --resume out")
        if not there and (Path(c.out_dir) / "results.json").exists():
            raise SystemExit(f"{c.out_dir}: holds the results of a run without its checkpoints; set another --out_dir")
        return there

    def take():
        checkpoint.clean(c.out_dir)
        folder, bad = checkpoint.newest(c.out_dir)
        if bool(folder) != there:
            raise SystemExit(f"{c.out_dir}: {'no checkpoint is whole' if there else 'another run began'}; set another"
                             f" --out_dir")
        saved = json.loads((folder / "train.json").read_text()) if folder else about
        refused, changed = checkpoint.differences(saved, about, FREE | PLACES)
        if refused:
            lines = "; ".join(f"{key}={was!r}, not {now!r}" for key, (was, now) in refused.items())
            raise SystemExit(f"{c.out_dir}: was trained with {lines}; resume with the same, or set another --out_dir")
        for broken in bad:  # out of the way of the good ones to come
            aside = broken.with_name(f"bad-{broken.name}")
            shutil.rmtree(aside, ignore_errors=True)
            broken.rename(aside)
        checkpoint.prune(c.out_dir, c.keep_checkpoints, c.keep_every)
        return str(folder or ""), saved.get("place"), changed

    there = on_first(look, world)
    try:
        model = None if there else build_model(c, tokenizer)
        folder, place, changed = on_first(take, world)
        model = model or smoltolk.from_pretrained(folder)
    except ValueError as e:  # says which file and what
        raise SystemExit(str(e)) from None
    place = place or dict(stage=0, step=0, total=0, tokens=0, flops=0, seconds=0.0)
    return model.to(world.device), place, Path(folder), changed


@record  # torchrun then shows the first error of all
def main(argv):
    settings, name = configure(DEFAULTS, argv, complete_stages)
    reuse_memory()
    world = join_world(settings["device"])
    started = time.perf_counter()
    c = check_settings(settings, name, world)
    made = dict(torch=torch.__version__, processes=world.size)
    opened = open_data(c, world)
    sources = opened.train | {f"val_{kind}": source for kind, source in opened.held.items()}
    sources |= {"cloze": data.Source([opened.cloze], np.ones(1))} if opened.cloze else {}
    read = checkpoint.identify(sources, tokenizer=opened.tokenizer.hash, units=opened.units)
    about = json.loads(json.dumps(dict(settings=vars(c), data=read, made=made)))
    model, place, resumed, changed = begin(c, world, opened.tokenizer, about)
    if world.rank == 0:
        Path(c.out_dir).mkdir(parents=True, exist_ok=True)
        checkpoint.replace_file(Path(c.out_dir) / "settings.json", json.dumps(vars(c), indent=1))
        text_size, new_size = smoltolk.count_parameters(model)
        print(f"{c.out_dir}: {text_size / 1e6:.2f}M text + {new_size / 1e6:.2f}M speech parameters on {world.size} x"
              f" {world.device.type} in {str(pick_dtype(c.dtype, world.device)).removeprefix('torch.')}")
    with checkpoint.listen() as heard:
        run = Run(c, world, opened, about, Log(c, world, place), [], heard, resumed)
        run.log.changed(dict(step=place["total"], stage=list(c.stages)[place["stage"]], changed=changed))
        stop = False
        for number, stage in list(enumerate(c.stages))[place["stage"]:]:
            if place["stage"] != number:
                place |= dict(stage=number, step=0)
            stop = train_stage(stage, model, place, run)
            if stop:
                break
        stop = stop or not finish(model, place, run, started)
    if run.unsaved:
        raise SystemExit(run.unsaved[0])
    if stop and world.rank == 0:
        print(f"{', '.join(heard) or 'a signal'}: stopped after step {place['total']}; go on with\n"
              f"  {checkpoint.resume_command(argv)}")
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(model, place, run, started):
    """The final table, in fp32: results.json, and on the terminal; the curves. False if a signal came before."""
    c, scores = run.c, held_out(model, run, 4 * run.c.eval_sequences)
    if scores is None or run.world.rank != 0:
        return scores is not None
    run.log.bar.close()
    results = dict(config=Path(c.out_dir).name, seed=c.seed, steps=place["total"], tokens=place["tokens"],
                   flops=place["flops"], training_seconds=place["seconds"], **scores,
                   seconds=time.perf_counter() - started)
    checkpoint.replace_file(Path(c.out_dir) / "results.json", json.dumps(results, indent=1))
    plot_loss(c.out_dir)
    print(report.as_text(results))
    print(f"{results['seconds'] / 60:.1f} minutes; {c.out_dir}/results.json, loss.png, log.jsonl")
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
