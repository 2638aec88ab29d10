"""
Train a text-speech language model, stage by stage.

    python train.py config/train_tiny.py                                  the embedded default, ten minutes on a laptop
    torchrun --nproc_per_node=4 train.py config/train_150m.py             four GPUs
    python train.py config/train_tiny.py --seed=2 --stages.stage2.steps=100 --out_dir=out/mine

Settings: the values below, then the config file's, then those of --key=value. A run's folder holds settings.json (all
of them), log.jsonl (a line per logged step), checkpoint-* (model, optimizer, place in the run), and at the end
results.json and loss.png. `--resume=true` goes on from the newest checkpoint.
"""
import ctypes
import dataclasses
import importlib
import json
import math
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
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import model as smoltolk
import report
from configurator import configure, fit, nearest
from evaluate import all_sum, join_world

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
        return torch.bfloat16
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
    for key in ("input_adapter_layers", "output_adapter_layers", "eval_cloze_items", "beta", "weight_decay"):
        if getattr(c, key) < 0:
            raise SystemExit(f"{key}={getattr(c, key)}: give 0 or more")
    if c.grad_clip <= 0:
        raise SystemExit(f"grad_clip={c.grad_clip}: give a positive norm, 1e9 for none")
    for key in ("text_span", "speech_span"):
        span = getattr(c, key)
        if not (isinstance(span, list) and len(span) == 2 and 1 <= span[0] <= span[1]):
            raise SystemExit(f"{key}={span}: give the least and the most words of a span, like [5, 15]")
    sequences, rest = divmod(c.batch_tokens, c.sequence_length)
    if rest or sequences % world.size or sequences == 0:
        raise SystemExit(f"batch_tokens={c.batch_tokens} is not a whole number of sequences of {c.sequence_length} for"
                         f" each of {world.size} processes; set --batch_tokens to a multiple of"
                         f" {c.sequence_length * world.size}")
    if c.dtype not in ("auto", "bfloat16", "float32"):
        raise SystemExit(f"dtype={c.dtype}: choose auto, bfloat16 or float32")
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
    if stage["steps"] < 1 or stage["warmup"] < 0 or not 0 <= stage["decay"] <= 1 or stage["learning_rate"] < 0:
        raise SystemExit(f"stages.{name}: give steps of 1 or more, warmup and learning_rate of 0 or more, decay 0..1")
    stage["speech_learning_rate"] = stage["speech_learning_rate"] or stage["learning_rate"]


class Data(NamedTuple):
    """All that a run reads, opened and checked."""
    tokenizer: data.Tokenizer
    train: dict               # {kind: data.Source}
    held: dict                # the same, held out
    cloze: data.DataSet | None


def open_data(c, world):
    """Open all data; derives vocab_size and n_units, and makes the demo corpus if it is asked for."""
    if c.demo:
        if world.rank == 0:
            importlib.import_module("corpora.demo").make(c.demo)  # returns at once if it is there
        if dist.is_initialized():
            dist.barrier()
    tokenizer = data.Tokenizer(c.tokenizer)
    try:
        described = dict(json.loads((Path(c.units) / "units.json").read_text())) if c.units else {}
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
    return Data(tokenizer, train, held, data.open_set(c.cloze, *made_with) if c.cloze else None)


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
    return torch.optim.AdamW(groups, betas=(c.beta1, c.beta2), fused=device.type in ("cuda", "cpu"))


def make_runner(model, c, world):
    """The model as training steps call it: compiled if asked for, and with gradients summed over processes."""
    model.head_piece = torch.compile(smoltolk.head_piece) if c.compile else smoltolk.head_piece
    runner = torch.compile(model) if c.compile else model
    if dist.is_initialized():
        runner = DistributedDataParallel(runner, device_ids=[world.local_rank] if world.device.type == "cuda" else None,
                                         gradient_as_bucket_view=True, broadcast_buffers=False)
    return runner


def schedule(step, stage):
    """Share of the learning rate at a step of the stage: linear warm-up, constant, linear decay to 0 at the end."""
    rise = (step + 1) / max(1, stage["warmup"])
    fall = (stage["steps"] - step) / max(1.0, stage["decay"] * stage["steps"])
    return min(1.0, rise, fall if stage["decay"] else 1.0)


def step_batches(c, model_config, sources, stage, number, world):
    """A function: step -> this process's micro-batches (data.Batch) of that step of stage `number`."""
    sequences = c.batch_tokens // c.sequence_length // world.size

    def make(step):
        mine = (step * world.size + world.rank) * sequences + np.arange(sequences)  # of the same global batch always
        batches = []
        for index in np.array_split(mine, -(-sequences // c.micro_batch)):
            rows, text_rows = data.sample(sources, stage["mixture"], c.seed, number, index, c.sequence_length + 1,
                                          model_config, c.text_span, c.speech_span)
            if c.compile:  # as many in each batch, for one graph: a row of text may pass through the speech modules
                text_rows = len(index) // sum(stage["mixture"].values()) * stage["mixture"].get("text", 0)
            batches.append(data.make_batch(rows, text_rows, model_config, pin=world.device.type == "cuda"))
        return batches
    return make


def train_step(model, optimizer, batches, c, world, autocast):
    """Forward, backward and update of one step.

    Returns this process's summed losses (float32 [3] on the device: text nll, speech nll, -entropy), the numbers of
    text and speech targets over all processes (float64 [2]), and the gradient norm before clipping.
    """
    counts = all_sum([sum(b.n_text for b in batches), sum(b.n_speech for b in batches)], world)
    n_text, n_speech = counts.tolist()  # of the whole step, so that the loss is one mean, however the step is cut up
    sums = torch.zeros(3, device=world.device)
    for i, batch in enumerate(batches):
        if dist.is_initialized():
            model.require_backward_grad_sync = i == len(batches) - 1
        tokens = batch.tokens.to(world.device, non_blocking=True)
        with autocast:
            out = model(tokens[:, :-1], tokens[:, 1:], batch.text_rows, counts=batch[2:])
        loss = smoltolk.mean_loss(out, c.beta, n_text + n_speech, n_speech)
        (loss * world.size).backward()  # DistributedDataParallel averages over processes, this makes it a sum
        sums += torch.stack([out.text_nll, out.speech_nll, out.negative_entropy]).detach()
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, counts, norm


def step_flops(config, batches, stage, length):
    """FLOPs of this process's share of one step: forward and backward; frozen weights need no gradient of their own."""
    total = 0
    for b in batches:
        backbone, new = smoltolk.forward_flops(config, len(b.tokens), length, b.text_rows, b.n_text, b.n_speech)
        total += backbone * (2 if stage["train"] == "new" else 3) + new * (2 if stage["train"] == "text" else 3)
    return total


def train_stage(name, model, place, c, world, opened, log):
    """Train one stage from place["step"] on, in place; place = {stage, step, total, tokens, flops, seconds}."""
    stage, number = c.stages[name], list(c.stages).index(name)
    set_trainable(model, stage["train"])
    optimizer = make_optimizer(model, c, world.device)
    if place["step"]:
        load_optimizer(optimizer, model, evaluate.newest_checkpoint(c.out_dir))
    runner = make_runner(model, c, world)
    half = pick_dtype(c.dtype, world.device) == torch.bfloat16
    autocast = torch.autocast(world.device.type, torch.bfloat16) if half else nullcontext()

    make = step_batches(c, model.config, opened.train, stage, number, world)
    since = Since(time.perf_counter())
    for batches in data.prefetch(make, range(place["step"], stage["steps"])):
        factor = schedule(place["step"], stage)
        for group in optimizer.param_groups:
            group["lr"] = factor * stage["speech_learning_rate" if group["new"] else "learning_rate"]
        sums, counts, norm = train_step(runner, optimizer, batches, c, world, autocast)
        flops = step_flops(model.config, batches, stage, c.sequence_length) * world.size
        since = since._replace(sums=since.sums + sums, counts=since.counts + counts, flops=since.flops + flops,
                               steps=since.steps + 1)
        for key, more in (("step", 1), ("total", 1), ("tokens", c.batch_tokens), ("flops", flops)):
            place[key] += more
        last = place["step"] == stage["steps"]

        if place["total"] % c.log_interval == 0 or last:
            line = log_line(name, stage, factor, place, since, norm, c, world)
            log.step(line)
            if not math.isfinite((line["text_nll"] or 0) + (line["speech_nll"] or 0) + line["grad_norm"]):
                raise SystemExit(f"step {place['total']}: the loss or its gradient is not finite; go on from the last"
                                 f" checkpoint with --resume=true and a lower learning rate")
            since = Since(time.perf_counter())
        paused = time.perf_counter()
        if (place["total"] % c.checkpoint_interval == 0 or last) and world.rank == 0:
            save_checkpoint(model, optimizer, place, c)
        if place["total"] % c.eval_interval == 0 or last:
            with autocast:
                scores = held_out(model, opened, c, world, c.eval_sequences, c.eval_cloze_items)
            log.held_out(dict(step=place["total"], stage=name, **scores))
        since = since._replace(began=since.began + time.perf_counter() - paused)


class Since(NamedTuple):
    """What has been added up since the last logged step."""
    began: float                            # time.perf_counter(), moved on by what evaluations and checkpoints take
    sums: torch.Tensor | float = 0.0        # of this process: text nll, speech nll, -entropy
    counts: torch.Tensor | float = 0.0      # of all: text and speech targets
    flops: int = 0
    steps: int = 0


def log_line(name, stage, factor, place, since, norm, c, world):
    """One line of log.jsonl: means over the steps since the last one."""
    text_nll, speech_nll, negative_entropy = all_sum(since.sums, world).tolist()
    n_text, n_speech = since.counts.tolist()
    seconds = time.perf_counter() - since.began
    place["seconds"] += seconds
    return dict(
        step=place["total"], stage=name, stage_step=place["step"], tokens=place["tokens"], flops=place["flops"],
        seconds=round(place["seconds"], 3), grad_norm=float(norm),
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


def held_out(model, opened, c, world, n_sequences, cloze_items=None):
    """Held-out scores, shared among processes: mean NLL in nats by kind; Topic-Cloze on cloze_items (None: all)."""
    scores, batch_tokens = {}, c.micro_batch * c.sequence_length
    model.eval()
    if opened.held:
        sums = evaluate.heldout_nll(model, opened.held, c.seed, n_sequences, c.sequence_length,
                                    (c.text_span, c.speech_span), batch_tokens, world.rank, world.size)
        scores["nll"] = report.nll_table(dict(zip(sums, all_sum(np.stack(list(sums.values())), world).numpy())))
    if opened.cloze and cloze_items != 0:
        items = opened.cloze.meta["documents"] // 3
        mine = range(world.rank, min(cloze_items or items, items), world.size)
        sums = report.cloze_sums(evaluate.topic_cloze(model, opened.cloze, batch_tokens, mine))
        scores["topic_cloze"] = report.cloze_table(dict(zip(sums, all_sum(list(sums.values()), world).tolist())))
    model.train()
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: a folder each, written under another name and renamed when whole

def save_checkpoint(model, optimizer, place, c):
    """checkpoint-<step>: the model's folder, tokenizer.json, optimizer.safetensors and train.json (place, settings)."""
    folder = Path(c.out_dir) / f"checkpoint-{place['total']:08d}"
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    smoltolk.save_pretrained(model, temporary)
    shutil.copy(c.tokenizer, temporary / "tokenizer.json")
    if c.units:
        shutil.copy(f"{c.units}/units.json", temporary / "units.json")
    names = {p: n for n, p in model.named_parameters()}
    save_file({f"{names[p]}.{key}": value.contiguous() for p, state in optimizer.state.items()
               for key, value in state.items()}, temporary / "optimizer.safetensors")
    (temporary / "train.json").write_text(json.dumps(dict(place=place, settings=vars(c)), indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    for old in sorted(Path(c.out_dir).glob("checkpoint-*[0-9]"))[:-c.keep_checkpoints]:
        shutil.rmtree(old)


def load_optimizer(optimizer, model, folder):
    saved = load_file(folder / "optimizer.safetensors")
    for name, p in model.named_parameters():
        if p.requires_grad:
            optimizer.state[p] = {k: saved[f"{name}.{k}"].to(p.device) for k in ("step", "exp_avg", "exp_avg_sq")}


# ---------------------------------------------------------------------------------------------------------------------
# what the user sees

class Log:
    """log.jsonl, lines and a bar on the terminal, wandb or TensorBoard if asked. Silent on all ranks but the first."""

    def __init__(self, c, world, place):
        self.on, self.bar, self.out = world.rank == 0, None, []
        if not self.on:
            return
        self.path, steps = Path(c.out_dir) / "log.jsonl", sum(s["steps"] for s in c.stages.values())
        kept = [line for line in read_log(c.out_dir) if line["step"] <= place["total"]]  # later ones come again
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.bar = tqdm(total=steps, initial=place["total"], disable=None, unit="step")
        self.steps = steps
        if c.wandb_project:
            wandb = importlib.import_module("wandb")
            wandb.init(project=c.wandb_project, name=Path(c.out_dir).name, config=vars(c))
            self.out.append(lambda line: wandb.log(flat(line), step=line["step"]))
        if c.tensorboard:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(c.out_dir)
            self.out.append(lambda line: [writer.add_scalar(k, v, line["step"]) for k, v in flat(line).items()])

    def write(self, line, text):
        with open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
        for out in self.out:
            out(line)
        tqdm.write(text)

    def step(self, line):
        if not self.on:
            return
        self.bar.update(line["step"] - self.bar.n)
        left = (self.steps - line["step"]) * line["seconds"] / line["step"]
        losses = "  ".join(f"{k} {line[k + '_nll']:.3f}" for k in ("text", "speech") if line[k + "_nll"] is not None)
        rates = "  ".join(f"{k} {line[k]:.1e}" for k in ("learning_rate", "speech_learning_rate") if line[k])
        mfu = f"  mfu {100 * line['mfu']:.1f}%" if line["mfu"] else ""
        self.write(line, f"{line['stage']} {line['stage_step']:5d}  {losses}  {rates}  "
                         f"{line['tokens_per_second']:,.0f} tokens/s{mfu}  {left / 60:.1f} min left")

    def held_out(self, line):
        if self.on:
            text = "   held out"
            for kind, nll in line.get("nll", {}).items():
                text += f"  {kind}: " + " ".join(f"{m} {v:.3f}" for m, v in nll.items())
            if "topic_cloze" in line:
                text += "  cloze: " + " ".join(f"{k} {v['accuracy']:.0f}" for k, v in line["topic_cloze"].items())
            self.write(line, text)


def flat(line, prefix=""):
    """Nested numbers as one dict with names like held_out/text/speech."""
    found = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def read_log(out_dir):
    path = Path(out_dir) / "log.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # what follows the last line end is empty, or torn by a crash


def plot_loss(out_dir):
    """loss.png from log.jsonl: training loss by kind of target, held-out NLL by kind of sequence, Topic-Cloze."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    lines = read_log(out_dir)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), sharex=True, layout="constrained")
    colours = {"text": "#0072B2", "speech": "#D55E00"}  # Okabe and Ito's, told apart by colour-blind readers

    def curve(axis, value, *style, **options):
        points = [(x["step"], value(x)) for x in lines if value(x) is not None]
        if points:
            axis.plot(*zip(*points), *style, **options)

    for name, colour in colours.items():
        curve(axes[0], lambda x, k=f"{name}_nll": x.get(k), color=colour, label=f"{name} targets")
        curve(axes[1], lambda x, k=name: x.get("nll", {}).get(k, {}).get(k), "o-", color=colour, markersize=4,
              label=f"{name} sequences")
        curve(axes[1], lambda x, k=name: x.get("nll", {}).get("interleaved", {}).get(k), "s--", color=colour,
              markersize=4, label=f"{name} in interleaved sequences")
    for (name, (_, after)), style in zip(evaluate.SETTINGS.items(), ("o-", "o-", "s--", "s--")):
        curve(axes[2], lambda x, k=name: x.get("topic_cloze", {}).get(k, {}).get("accuracy"), style,
              color=colours[after], markersize=4, label=name)
    stages = [(b["step"], b["stage"]) for a, b in zip([{}, *lines], lines) if a.get("stage") != b["stage"]]
    for axis, title, unit in zip(axes, ("training loss", "held-out loss", "Topic-Cloze along the way"),
                                 ("nats per target", "nats per target", "% right (chance: 50)")):
        for step, stage in stages:
            axis.axvline(step, color="0.8", linewidth=1, zorder=0)
            axis.text(step, 1, f" {stage}", color="0.4", fontsize=8, va="top", transform=axis.get_xaxis_transform())
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(Path(out_dir) / "loss.png", dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------

FREE = set("resume out_dir device dtype compile micro_batch log_interval eval_interval eval_sequences eval_cloze_items "
           "checkpoint_interval keep_checkpoints wandb_project tensorboard".split())  # may change when a run goes on


def begin(c, world, tokenizer):
    """(model, place): a fresh run, or the newest checkpoint's. A run that is already there is never overwritten."""
    there = sorted(Path(c.out_dir).glob("checkpoint-*[0-9]"))
    if there and not c.resume:
        raise SystemExit(f"{c.out_dir}: holds a run already; go on with --resume=true, or set another --out_dir")
    if c.resume and not there:
        raise SystemExit(f"{c.out_dir}: no checkpoint to go on from; leave --resume out")
    place = dict(stage=0, step=0, total=0, tokens=0, flops=0, seconds=0.0)
    try:
        if not there:
            return build_model(c, tokenizer).to(world.device), place
        saved = json.loads((there[-1] / "train.json").read_text())
        for key, was in saved["settings"].items():
            if key not in FREE and getattr(c, key, None) != was:
                raise SystemExit(f"{c.out_dir}: was trained with {key}={was!r}, not {getattr(c, key, None)!r}; resume"
                                 f" with the same, or set another --out_dir")
        return smoltolk.from_pretrained(there[-1]).to(world.device), saved["place"]
    except ValueError as e:  # says which file and what
        raise SystemExit(str(e)) from None


def main(argv):
    settings, name = configure(DEFAULTS, argv, complete_stages)
    reuse_memory()
    world = join_world(settings["device"])
    started = time.perf_counter()
    c = check_settings(settings, name, world)
    opened = open_data(c, world)
    model, place = begin(c, world, opened.tokenizer)
    if world.rank == 0:
        Path(c.out_dir).mkdir(parents=True, exist_ok=True)
        (Path(c.out_dir) / "settings.json").write_text(json.dumps(vars(c), indent=1))
        text_size, new_size = smoltolk.count_parameters(model)
        print(f"{c.out_dir}: {text_size / 1e6:.2f}M text + {new_size / 1e6:.2f}M speech parameters on {world.size} x"
              f" {world.device.type} in {str(pick_dtype(c.dtype, world.device)).removeprefix('torch.')}")
    log = Log(c, world, place)
    for number, stage in list(enumerate(c.stages))[place["stage"]:]:
        if place["stage"] != number:
            place |= dict(stage=number, step=0)
        train_stage(stage, model, place, c, world, opened, log)
    finish(model, opened, place, c, world, log, started)
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(model, opened, place, c, world, log, started):
    """The final table, in fp32: results.json, and on the terminal; the curves."""
    scores = held_out(model, opened, c, world, 4 * c.eval_sequences)
    if world.rank != 0:
        return
    log.bar.close()
    results = dict(config=Path(c.out_dir).name, seed=c.seed, steps=place["total"], tokens=place["tokens"],
                   flops=place["flops"], training_seconds=place["seconds"], **scores,
                   seconds=time.perf_counter() - started)
    (Path(c.out_dir) / "results.json").write_text(json.dumps(results, indent=1))
    plot_loss(c.out_dir)
    print(report.as_text(results))
    print(f"{results['seconds'] / 60:.1f} minutes; {c.out_dir}/results.json, loss.png, log.jsonl")


if __name__ == "__main__":
    main(sys.argv[1:])
