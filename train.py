"""
Train a text-speech language model, stage by stage.

    python train.py config/train_tiny.py                          a tiny run, which first makes its data: four minutes
    torchrun --nproc_per_node=4 train.py config/train_150m.py     four GPUs
    python train.py config/train_tiny.py --seed=2 --stages.stage2.steps=100 --out_dir=out/mine
    python train.py config/train_tiny.py --resume=true            continue exactly from the newest checkpoint
    python train.py config/train_150m.py --check                  what is missing, and how long the run will take

The settings below are changed first by the config file and then by --key=value. The folder of a run holds
settings.json, log.jsonl (one line per logged step), checkpoint-* and, at the end, results.json and loss.png. After
SIGTERM, SIGUSR1 or Ctrl-C a run finishes its present step, writes a checkpoint and ends. If a loss or gradient is not
finite, the run names the sequences that caused it and ends without changing a weight.
"""
import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record

from benchmarks import report
from configurator import configure, fit, nearest
from data import Source, describe, loader, micro_batches, open_source
from evaluate import check_spans, heldout_nll, topic_cloze
from model import (
    LLAMA,
    NEW_MODULES,
    Config,
    SmolTolk,
    count_parameters,
    forward_flops,
    from_pretrained,
    is_new,
    read_config,
    save_pretrained,
    selector_entropy,
)
from runtime import checkpoint
from runtime.datasets import DataSet, open_set
from runtime.devices import make_autocast, reuse_memory
from runtime.distributed import ALONE, World, all_sum, distribute, join_world, leave_world, on_first
from runtime.files import DataError, read_json, replace_file, whole_folder
from runtime.hub import local_folder
from runtime.log import Log
from runtime.threads import share_cores
from runtime.tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# the run
out_dir = ""                # default: out/<name of the config file>
resume = False              # continue from the newest checkpoint in out_dir
seed = 1                    # for the new weights and all data
log_interval = 10           # steps between lines of the log
eval_interval = 500         # steps between held-out scores
eval_sequences = 64         # held-out sequences of each kind; the final table uses four times as many
eval_cloze_items = 100      # Topic-Cloze items during training; the final table uses all
checkpoint_interval = 500   # steps between checkpoints
keep_checkpoints = 2        # number of newest checkpoints to keep
keep_every = 0              # also keep checkpoints at multiples of this step; 0: none
wandb_project = ""          # also log to this wandb project
tensorboard = False         # also log to TensorBoard, in out_dir

# the data. A list of folders is sampled in proportion to size, a dict {folder: weight} in proportion to weight.
demo = ""                   # folder of the demo corpus: made if it is missing, and used for all data not named below
tokenizer = ""              # a SmolLM-style tokenizer.json
units = ""                  # folder of the speech units (units.json)
text = []                   # data sets with text; data.py says what a data set is
speech = []                 # data sets with speech
interleaved = []            # paired data sets
val_text = []               # held-out data sets with text
val_speech = []             # held-out data sets with speech
val_interleaved = []        # held-out paired data sets
cloze = ""                  # Topic-Cloze set
text_span = [10, 30]        # fewest and most words of a text span in interleaved sequences
speech_span = [5, 15]       # fewest and most words of a speech span
sequence_length = 2048      # tokens in a sequence
batch_tokens = 2**20        # tokens in one optimizer step, over all processes
micro_batch = 8             # sequences in one forward pass

# the model
init_from = ""              # a SmolLM folder to start from; the backbone's shape is then read from it, not set below
vocab_size = 0              # 0: the tokenizer's
hidden_size = 576           # of the backbone and the adapters
intermediate_size = 1536    # of the MLPs in both
num_hidden_layers = 30      # of the backbone
num_attention_heads = 9     # of each layer
num_key_value_heads = 3     # a divisor of num_attention_heads
rope_theta = 0.0            # base of the rotary position embeddings; 0: as in init_from, or 100,000 for new weights
n_units = 0                 # 0: as many as the units folder has
input_adapter_layers = 2    # 0: none
output_adapter_layers = 2   # 0: none
layer_pooling = "dynamic"   # or "fixed", "last"
residual = True             # add the embeddings to the pooled layers (Eq. 5)
new_modules = "release"     # how the modules that SmolTolk adds start: "release", "default" or "identity"; see model.py
beta = 0.0                  # weight of a bonus for the entropy of the layer selector (Eq. 6)

# the stages, one after the other, each with a fresh optimizer
#   mixture        parts of each kind of sequence, whole numbers
#   train          "all", "new" (what SmolTolk adds; the backbone is frozen) or "text" (the backbone alone)
#   learning_rate  of the backbone; speech_learning_rate is for what SmolTolk adds (0: the same rate)
#   warmup         number of steps over which the learning rate rises linearly
#   decay          share of the steps, at the end, over which it falls linearly to 0; 0: it stays constant
stages = dict(              # steps, mixture, train, learning rates, warm-up and decay of each stage; see train.py
    stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", speech_learning_rate=3e-3, warmup=100, decay=0.2),
    stage2=dict(steps=15000, mixture=dict(text=1, speech=1, interleaved=1), train="all", learning_rate=3e-4),
)
optimizer = "adamw"         # or "muon": Muon for the matrices of all layers, AdamW for the other weights
beta1 = 0.9                 # of AdamW
beta2 = 0.95                # of AdamW
weight_decay = 0.1          # of matrices
grad_clip = 1.0             # largest norm of the gradient; 1e9: no clipping

# the machine
device = "auto"             # "cuda", "cpu", "mps", or "auto" for the best one available
dtype = "auto"              # "bfloat16" (autocast) or "float32"; "auto": on a GPU bfloat16, on a CPU the faster one
compile = False             # torch.compile
recompute = False           # compute the MLPs' activations again in backward, which saves memory
# ---------------------------------------------------------------------------------------------------------------------
DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, int, float, str, list, dict))
            and not k.startswith("_")}
# The defaults of a stage, and the files and folders inside the demo corpus:
STAGE = dict(steps=0, mixture={}, train="all", learning_rate=3e-4, speech_learning_rate=0.0, warmup=0, decay=0.0)
DEMO = dict(tokenizer="tokenizer.json", units="units", text="text", speech="paired", interleaved="paired",
            val_text="val", val_speech="val", val_interleaved="val", cloze="cloze")
# Settings that may change when a run is resumed. Paths of data may change, but the training data itself is compared.
MAY_CHANGE = {*DEMO, *("demo init_from device dtype compile recompute micro_batch log_interval "
              "eval_interval eval_sequences eval_cloze_items checkpoint_interval keep_checkpoints keep_every "
              "wandb_project tensorboard").split()}


class Data(NamedTuple):
    """All data of a run, opened and checked."""
    tokenizer: Tokenizer
    train: dict               # {kind: data.Source}
    held: dict                # {kind: data.Source}, held out
    cloze: DataSet | None
    identity: dict            # {name of a set: [hash, share in its source, folder]}
    files: dict               # {name: contents} of tokenizer.json and units.json, for checkpoints


class Run(NamedTuple):
    """The objects that a run uses from its first step to its last."""
    c: SimpleNamespace        # the settings
    world: World
    data: Data
    about: dict               # settings and identity of the data, for train.json
    log: Log
    autocast: object
    heard: list               # names of the signals received, which ask the run to stop
    resumed: Path             # the checkpoint from which the run continues
    unsaved: list             # the error message, if the last checkpoint could not be written


# ---------------------------------------------------------------------------------------------------------------------
# the loop

def train(run, model, progress):
    """Train all stages from `progress` on. Returns whether a signal ended the run.

    progress: {stage, step, total, tokens, flops, seconds, dtype}, updated in place. `step` counts within the stage,
    `total` over all stages.
    """
    c, world, log = run.c, run.world, run.log
    for number, (name, stage) in list(enumerate(c.stages.items()))[progress["stage"]:]:
        if number > progress["stage"]:
            progress |= dict(stage=number, step=0)
        set_trainable(model, stage["train"])
        optimizers = make_optimizers(model, c)
        if progress["step"]:
            load_optimizers(optimizers, model, run.resumed)
        net = distribute(model, world)

        for step, batches in loader(run.data.train, stage, number, progress["step"], c, model.config, world):
            factor = schedule(step, stage)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = factor * stage["speech_learning_rate" if group["new"] else "learning_rate"]
            beta = 0.0 if stage["train"] == "text" else c.beta  # a text LM has no layer selector
            sums, n_targets = add_gradients(net, batches, beta, run.autocast, world)
            norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], c.grad_clip)

            norm, *sums = torch.stack([norm, *sums]).tolist()  # here the CPU waits for the GPU, once a step
            finite = bool(np.isfinite([norm, *sums]).all())
            broken, stop = (all_sum([not finite, len(run.heard)], world) > 0).tolist()
            if broken:
                stop_not_finite(run, model, stage, number, progress, [] if finite else batches)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=net is model)  # DDP keeps gradients in its buckets

            flops = step_flops(model.config, batches, stage) * world.size
            progress |= dict(step=step + 1, total=progress["total"] + 1, tokens=progress["tokens"] + c.batch_tokens,
                             flops=progress["flops"] + flops)
            log.add(sums, (*n_targets, c.batch_tokens), norm, flops)
            if is_due(c.log_interval, progress, stage):
                log.step(progress, name, shown_rates(stage, factor))
            paused = time.perf_counter()
            if is_due(c.eval_interval, progress, stage) and not stop:
                with run.autocast:
                    scores = held_out(model, run, c.eval_sequences, c.eval_cloze_items)
                stop = scores is None  # a signal came
                if not stop:
                    log.held_out(dict(step=progress["total"], stage=name, **scores))
            if is_due(c.checkpoint_interval, progress, stage) or stop:
                save_checkpoint(run, model, optimizers, progress)
            log.leave_out(time.perf_counter() - paused)
            if stop:
                return True
    return False


def add_gradients(net, batches, beta, autocast, world):
    """Compute the loss of one optimizer step, and add its gradients to the parameters' .grad.

    net        the model, or the DistributedDataParallel around it
    batches    the step's micro-batches of this process, on the CPU
    beta       weight of the entropy bonus
    Returns (sums, n_targets). sums [3]: text NLL and speech NLL of all targets and the entropy of the layer selector at
    all positions, in nats, summed over this process. n_targets: the numbers of text and speech targets of the step,
    over all processes.
    """
    # The loss is the mean over all targets of the step, no matter how processes and micro-batches divide them.
    n_text, n_speech, n = all_sum([*count_targets(batches), sum(b.ids.numel() for b in batches)], world).tolist()
    sums = torch.zeros(3, device=world.device)
    for i, batch in enumerate(batches):
        net.require_backward_grad_sync = i == len(batches) - 1  # DDP sends gradients once a step
        batch = batch.apply(lambda tensor: tensor.to(world.device, non_blocking=True))
        with autocast:
            out = net(batch.ids, batch.targets, batch.layout)
        text_nll, speech_nll = out.text_nll.sum(), out.speech_nll.sum()
        entropy = torch.zeros_like(text_nll)  # for a model without a layer selector
        if out.log_omega is not None:
            entropy = selector_entropy(out.log_omega)
        loss = (text_nll + speech_nll) / (n_text + n_speech) - beta * entropy / n  # Eqs. 2 and 6
        (loss * world.size).backward()  # DDP averages gradients over processes, but we want their sum
        sums += torch.stack([text_nll, speech_nll, entropy]).detach()
        del out, loss  # otherwise the hidden states would stay in memory during the next forward pass
    return sums, (n_text, n_speech)


def schedule(step, stage):
    """Factor for the learning rate at a step of the stage: linear warm-up, constant, linear decay to 0 at the end."""
    rise = (step + 1) / max(1, stage["warmup"])
    fall = (stage["steps"] - step) / max(1.0, stage["decay"] * stage["steps"])
    return min(1.0, rise, fall if stage["decay"] else 1.0)


def shown_rates(stage, factor):
    """(learning rate of the backbone, of the new modules); 0 if frozen."""
    return (factor * stage["learning_rate"] if stage["train"] != "new" else 0.0,
            factor * stage["speech_learning_rate"] if stage["train"] != "text" else 0.0)


def is_due(interval, progress, stage):
    """True at multiples of an interval, and at the end of a stage."""
    return progress["total"] % interval == 0 or progress["step"] == stage["steps"]


def count_targets(batches):
    """(text, speech): the numbers of targets in some micro-batches."""
    return (sum(len(batch.layout.text) for batch in batches),
            sum(len(batch.layout.speech) for batch in batches if batch.layout.speech is not None))


def step_flops(config, batches, stage):
    """FLOPs of forward and backward in this process: 3 x forward, or 2 x where frozen weights need no gradients."""
    total = 0
    for batch in batches:
        n_text, n_speech = count_targets([batch])
        backbone, new = forward_flops(config, *batch.ids.shape, batch.layout.speech is not None, n_text, n_speech)
        total += backbone * (2 if stage["train"] == "new" else 3) + new * (2 if stage["train"] == "text" else 3)
    return total


def held_out(model, run, n_sequences, cloze_items=None):
    """Held-out scores, computed by all processes together: mean NLL in nats, and Topic-Cloze accuracy.

    cloze_items: how many Topic-Cloze items to score (None: all). Returns None if a process has received a signal.
    """
    c, world, heard, scores = run.c, run.world, run.heard, {}
    batch_tokens = c.micro_batch * c.sequence_length
    model.eval()
    if run.data.held:
        sums = heldout_nll(model, run.data.held, c.seed, n_sequences, c.sequence_length, (c.text_span, c.speech_span),
                           batch_tokens, world.rank, world.size, heard)
        scores["nll"] = report.nll_table(dict(zip(sums, all_sum(np.stack(list(sums.values())), world).numpy())))
    if run.data.cloze and cloze_items != 0:
        items = run.data.cloze.meta["documents"] // 3
        mine = range(world.rank, min(cloze_items or items, items), world.size)
        right = topic_cloze(model, run.data.cloze, batch_tokens, mine, heard)
        if not all_sum([len(heard)], world).any():  # otherwise some processes have stopped early
            sums = report.cloze_sums(right)
            scores["topic_cloze"] = report.cloze_table(dict(zip(sums, all_sum(list(sums.values()), world).tolist())))
    model.train()
    return None if all_sum([len(heard)], world).any() else scores


def stop_not_finite(run, model, stage, number, progress, batches):
    """End the run, and name the sequences whose loss is not finite.

    batches: this process's micro-batches; [] if its losses and gradients are finite
    """
    step, bad = progress["total"] + 1, []
    for batch in batches:
        batch = batch.apply(lambda tensor: tensor.to(run.world.device))
        with run.autocast, torch.no_grad():
            out = model(batch.ids, batch.targets, batch.layout)
        for nll, positions in ((out.text_nll, batch.layout.text), (out.speech_nll, batch.layout.speech)):
            if positions is not None:
                rows = positions[~nll.isfinite()] // batch.ids.size(1)
                bad += batch.index[rows.unique().cpu().numpy()].tolist()
    what = "the loss of {} is not finite"
    if all_sum(len(bad), run.world) == 0:
        what = "each loss is finite, but the gradient of one of {} is not finite"
        bad = [i for batch in batches for i in batch.index.tolist()]
    if bad:
        bad = sorted(set(bad))
        names = ", ".join(describe(run.data.train, stage["mixture"], run.c.seed, number, np.array(bad[:8])))
        names += f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        print(f"step {step}, rank {run.world.rank}: {what.format(names)}", file=sys.stderr)
    if run.world.size > 1:
        torch.distributed.barrier()  # let every process print before torchrun ends them
    raise SystemExit(f"step {step}: the loss or its gradient is not finite, and no weight was changed. Go on from the"
                     " checkpoint before it with a lower learning rate or without that data")


# ---------------------------------------------------------------------------------------------------------------------
# model and optimizer

def build_model(c, tokenizer):
    """The model of a new run, with new weights or with a backbone read from init_from. SystemExit or ValueError."""
    torch.manual_seed(c.seed)
    shape = {field.name: getattr(c, field.name) for field in dataclasses.fields(Config) if hasattr(c, field.name)}
    if not c.init_from:
        model = SmolTolk(Config(**shape, eos_token_id=tokenizer.eos, initializer_range=c.hidden_size ** -0.5,
                                max_position_embeddings=max(2048, c.sequence_length)))
        return model.start_new_modules(c.new_modules)
    new = {key: value for key, value in shape.items() if key not in LLAMA}
    if c.rope_theta:
        new["rope_theta"] = c.rope_theta
    model = from_pretrained(c.init_from, **new, eos_token_id=tokenizer.eos, exported_eos=None)
    if model.config.vocab_size != c.vocab_size:
        raise SystemExit(f"{c.init_from}: has {model.config.vocab_size} ids and the tokenizer {c.vocab_size}; set"
                         f" --vocab_size={model.config.vocab_size} if ids without a token are meant")
    if model.config.max_position_embeddings < c.sequence_length:
        raise SystemExit(f"{c.init_from}: max_position_embeddings {model.config.max_position_embeddings}; set"
                         f" --sequence_length={model.config.max_position_embeddings} or less")
    has_speech = (Path(local_folder(c.init_from)) / "speech.safetensors").exists()
    return model if has_speech else model.start_new_modules(c.new_modules)


def place_model(model, c, world):
    """Move the model to the device, and apply the settings that change its speed or memory. Returns it."""
    model.apply(lambda module: setattr(module, "recompute", c.recompute))  # only MLP uses it
    if c.compile:
        model.compile_training()
    return model.to(world.device)


def choose_dtype(c, model, data, world, before=None):
    """The dtype in which to compute matrix products. For dtype="auto" on a CPU, the faster one in two steps of each.

    before: name of the dtype that the run had before it was resumed. Trying a dtype changes no weight.
    """
    if c.dtype != "auto":
        return getattr(torch, c.dtype)
    if world.device.type != "cpu":
        has_bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if before:
        return getattr(torch, before)
    number, stage = len(c.stages) - 1, list(c.stages.values())[-1]
    batch, seconds = micro_batches(0, data.train, stage, number, c, model.config, world)[-1], {}
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):  # the second time counts, because the first time takes longer
            began = time.perf_counter()
            add_gradients(model, [batch], c.beta, make_autocast(dtype, world.device), ALONE)
            seconds[dtype] = time.perf_counter() - began
    model.zero_grad()
    single, half = (all_sum(list(seconds.values()), world) / world.size).tolist()  # so that all processes agree
    if world.rank == 0:
        print(f"dtype=auto: {single:.2f} s a micro-batch in float32, {half:.2f} s in bfloat16")
    return torch.bfloat16 if half < single else torch.float32


def set_trainable(model, what):
    """Freeze all weights but `what`: "all"; "new", which SmolTolk adds; or "text", the backbone."""
    for name, p in model.named_parameters():
        p.requires_grad_(what in ("all", "new" if is_new(name) else "text"))


def make_optimizers(model, c):
    """New optimizers for the trainable weights: AdamW, and Muon for the matrices of all layers if c.optimizer says so.

    Weights are grouped by module (backbone or new). Only matrices have weight decay. Muon makes all singular values of
    a step about equal. Its steps are scaled to the size of those of AdamW, so both use the same learning rate.
    """
    AdamW, Muon, groups = torch.optim.AdamW, torch.optim.Muon, {}
    options = {AdamW: dict(betas=(c.beta1, c.beta2), fused=True), Muon: dict(adjust_lr_fn="match_rms_adamw")}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = Muon if c.optimizer == "muon" and "_proj." in name else AdamW
            groups.setdefault((kind, is_new(name), p.dim() >= 2), []).append(p)
    of_kind = {}
    for (kind, new, is_matrix), params in groups.items():
        group = dict(params=params, new=new, weight_decay=c.weight_decay if is_matrix else 0.0)
        of_kind.setdefault(kind, []).append(group)
    return [kind(its_groups, **options[kind]) for kind, its_groups in of_kind.items()]


def optimizer_state(optimizers, model):
    """{"<name of a weight>.<name of a moment>": tensor}"""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{names[p]}.{key}": value for optimizer in optimizers for p, state in optimizer.state.items()
            for key, value in state.items()}


def load_optimizers(optimizers, model, folder):
    """Read the state of the optimizers from a checkpoint."""
    saved, names = load_file(folder / "optimizer.safetensors"), {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, torch.optim.Muon)
        keys = ("momentum_buffer",) if is_muon else ("step", "exp_avg", "exp_avg_sq")
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {key: saved[f"{names[p]}.{key}"].to(p.device) for key in keys}


# ---------------------------------------------------------------------------------------------------------------------
# starting a run, checkpoints, and ending it

def save_checkpoint(run, model, optimizers, progress):
    """Write checkpoint-<step>: weights, tokenizer.json, units.json, optimizer.safetensors and train.json.

    If this fails, for example on a full disk, training continues. run.unsaved holds the error message until a later
    checkpoint is written.
    """
    if run.world.rank != 0:
        return
    folder = Path(run.c.out_dir) / f"checkpoint-{progress['total']:08d}"
    run.unsaved.clear()
    try:
        with whole_folder(folder) as new:
            save_pretrained(model, new)
            for name, contents in run.data.files.items():
                (new / name).write_bytes(contents)
            save_file(optimizer_state(optimizers, model), new / "optimizer.safetensors")
            (new / "train.json").write_text(json.dumps(dict(place=progress, **run.about), indent=1))
        checkpoint.prune(run.c.out_dir, run.c.keep_checkpoints, run.c.keep_every)
    except (OSError, SafetensorError) as error:
        run.unsaved.append(f"{folder}: could not be written ({error}); the checkpoint before it is whole; make room")
        print(f"{run.unsaved[0]}. Training goes on, the next one is tried as usual", file=sys.stderr)


def begin(c, world, tokenizer, about):
    """(model, progress, the checkpoint to continue from, {what has changed since then or since init_from: [was, is]}).

    A run continues from its newest good checkpoint with --resume=true, and also when torchrun restarts all processes
    after one has died. Otherwise a new run begins. It never overwrites another run.
    """
    restarted = all_sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), world) > 0

    def choose():
        """Return {folder, progress, changed}. This is called in the first process only."""
        has_checkpoints = len(checkpoint.checkpoints(c.out_dir)) > 0
        if has_checkpoints and not (c.resume or restarted):
            raise SystemExit(f"{c.out_dir}: holds a run already; go on with --resume=true, or set another --out_dir")
        if c.resume and not has_checkpoints:
            raise SystemExit(f"{c.out_dir}: no checkpoint to go on from; leave --resume out")
        if not has_checkpoints and (Path(c.out_dir) / "results.json").exists():
            raise SystemExit(f"{c.out_dir}: holds the results of a run without its checkpoints; set another --out_dir")
        if not has_checkpoints:
            checkpoint.clean(c.out_dir)
            theta = read_config(c.init_from).rope_theta if c.init_from and c.rope_theta else c.rope_theta
            changed = {"rope_theta": [theta, c.rope_theta]} if theta != c.rope_theta else {}
            return dict(folder="", progress=None, changed=changed)
        folder, bad = checkpoint.newest(c.out_dir)
        if folder is None:
            raise SystemExit(f"{c.out_dir}: no checkpoint can be opened; set another --out_dir")
        saved = read_json(folder / "train.json")
        refused, changed = checkpoint.differences(saved, about, MAY_CHANGE)
        if refused:
            lines = "; ".join(f"{key}={was!r}, not {now!r}" for key, (was, now) in refused.items())
            raise SystemExit(f"{c.out_dir}: was trained with {lines}; resume with the same, or set another --out_dir")
        checkpoint.clean(c.out_dir, bad)
        checkpoint.prune(c.out_dir, c.keep_checkpoints, c.keep_every)
        return dict(folder=str(folder), progress=saved["place"], changed=changed)

    chosen = on_first(choose, world)
    model = from_pretrained(chosen["folder"]) if chosen["folder"] else build_model(c, tokenizer)
    progress = chosen["progress"] or dict(stage=0, step=0, total=0, tokens=0, flops=0, seconds=0.0)
    return place_model(model, c, world), progress, Path(chosen["folder"]), chosen["changed"]


def finish(run, model, progress, started):
    """Compute the final scores in fp32, print and write them, and draw the curves. False if a signal came first."""
    c, scores = run.c, held_out(model, run, 4 * run.c.eval_sequences)
    if scores is None or run.world.rank != 0:
        return scores is not None
    run.log.bar.close()
    results = dict(config=Path(c.out_dir).name, seed=c.seed, steps=progress["total"], tokens=progress["tokens"],
                   flops=progress["flops"], training_seconds=progress["seconds"], **scores,
                   seconds=time.perf_counter() - started)
    replace_file(Path(c.out_dir) / "results.json", json.dumps(results, indent=1))
    importlib.import_module("tools.figures").loss_curves(c.out_dir)  # here, because matplotlib is slow to import
    print(report.as_text(results))
    print(f"{results['seconds'] / 60:.1f} minutes; {c.out_dir}/results.json, loss.png, log.jsonl")
    return True


@record  # makes torchrun report the process that failed first
def main(argv):
    if "--check" in argv:
        importlib.import_module("tools.check").main([arg for arg in argv if arg != "--check"])
    settings, name = configure(DEFAULTS, argv, complete_stages)
    world, started = join_world(settings["device"]), time.perf_counter()
    reuse_memory(world.device)
    c = check_settings(settings, name, world)
    try:
        data = open_data(c, world)
        about = json.loads(json.dumps(dict(settings=vars(c), data=data.identity)))  # as read back from train.json
        model, progress, resumed, changed = begin(c, world, data.tokenizer, about)
        check_cloze(data.cloze, model.config.max_position_embeddings)
    except ValueError as error:  # its message names the file and the fault
        raise SystemExit(str(error)) from None
    dtype = choose_dtype(c, model, data, world, progress.get("dtype"))
    progress["dtype"], autocast = str(dtype).removeprefix("torch."), make_autocast(dtype, world.device)
    share_cores(model)
    if world.rank == 0:
        replace_file(Path(c.out_dir) / "settings.json", json.dumps(vars(c), indent=1))
        text_size, new_size = count_parameters(model)
        print(f"{c.out_dir}: {text_size / 1e6:.2f}M text + {new_size / 1e6:.2f}M speech parameters on {world.size} x"
              f" {world.device.type} in {progress['dtype']}")
    with checkpoint.listen() as heard:
        run = Run(c, world, data, about, Log(c, world, progress), autocast, heard, resumed, [])
        run.log.changed(dict(step=progress["total"], stage=list(c.stages)[progress["stage"]], changed=changed))
        stopped = train(run, model, progress) or not finish(run, model, progress, started)
    if run.unsaved:
        raise SystemExit(run.unsaved[0])
    if stopped and world.rank == 0:
        print(f"{', '.join(heard) or 'a signal'}: stopped after step {progress['total']}; go on with\n"
              f"  {checkpoint.resume_command(argv)}")
    leave_world()


# ---------------------------------------------------------------------------------------------------------------------
# data and settings, checked before the first step

def open_data(c, world):
    """Open all data -> Data. Fills in c.vocab_size and c.n_units, and makes the demo corpus. SystemExit, ValueError."""
    if not c.tokenizer:  # a demo corpus would have one, but none is set
        raise SystemExit("tokenizer: not set; name a config, for example: python train.py config/train_tiny.py")
    if c.demo:
        on_first(lambda: importlib.import_module("corpora.demo").find_or_make(c.demo), world)
    on_first(lambda: [local_folder(name) for name in (c.tokenizer, c.units, c.init_from)], world)  # one downloads
    tokenizer, units, units_json = Tokenizer(c.tokenizer), {}, Path(local_folder(c.units)) / "units.json"
    files = {"tokenizer.json": Path(local_folder(c.tokenizer)).read_bytes()}
    if c.units:
        units, files["units.json"] = read_json(units_json), units_json.read_bytes()
    c.vocab_size, c.n_units = c.vocab_size or tokenizer.vocab_size, c.n_units or units.get("n_units", 0)
    if not c.n_units:
        raise SystemExit("n_units: not known; set --units to the folder of the speech units, or --n_units")
    if units.get("n_units", c.n_units) != c.n_units:
        raise SystemExit(f"n_units={c.n_units}: {units_json} has {units['n_units']}; leave --n_units out")
    if tokenizer.vocab_size > c.vocab_size:
        raise SystemExit(f"{c.tokenizer}: {tokenizer.vocab_size} ids, vocab_size={c.vocab_size} cannot hold them")

    hashes, length = (tokenizer.hash, units.get("hash")), c.sequence_length + 1
    kinds = {kind for stage in c.stages.values() for kind in stage["mixture"]}
    train = {kind: open_source(kind, getattr(c, kind), *hashes, length) for kind in sorted(kinds)}
    held = {kind: open_source(kind, getattr(c, f"val_{kind}"), *hashes, length)
            for kind in ("text", "speech", "interleaved") if getattr(c, f"val_{kind}")}
    cloze = open_set(c.cloze, *hashes) if c.cloze else None
    sources = train | {f"val_{kind}": source for kind, source in held.items()}
    if cloze:
        sources["cloze"] = Source([cloze], np.ones(1))
    for source in sources.values():
        for shard in source.shards:
            if (n_units := shard.meta.get("speech", {}).get("n_units", c.n_units)) != c.n_units:
                raise DataError(f"{shard.folder}: {n_units} units, the model has {c.n_units}; set --units to those"
                                " that it was made with")
    return Data(tokenizer, train, held, cloze, checkpoint.identify(sources, *hashes), files)


def check_cloze(cloze, positions):
    """DataError if a model with this many positions could not score the Topic-Cloze set at the end of training."""
    if cloze is None:
        return
    if cloze.meta["kind"] != "paired" or cloze.meta["documents"] % 3:
        raise DataError(f"{cloze.folder}: a cloze set is a paired set with its documents in threes")
    sizes = [np.diff(words[cloze.documents]) - 1 for words in (cloze.text_words, cloze.speech_words)]  # without EOS
    opening, true, false = np.maximum(*sizes).reshape(-1, 3).T
    if np.min(sizes) < 1 or (opening + np.maximum(true, false)).max() + 1 > positions:  # with EOS and switch
        raise DataError(f"{cloze.folder}: a document is empty, or longer with its ending than the {positions} "
                        "positions of the model")


def complete_stages(settings):
    """Fill in the defaults of each stage. SystemExit for unknown keys and wrong types."""
    for name, stage in settings["stages"].items():
        if not isinstance(stage, dict):
            raise SystemExit(f"stages.{name}={stage!r}: a stage is a dict of {', '.join(STAGE)}")
        for key in stage:
            if key not in STAGE:
                raise SystemExit(f"stages.{name}.{key}: no such setting; did you mean {nearest(key, STAGE)}?")
        settings["stages"][name] = {key: fit(stage.get(key, default), default, f"stages.{name}.{key}")
                                    for key, default in STAGE.items()}


def check_settings(settings, name, world):
    """Fill in derived values -> the settings as a namespace. SystemExit for invalid settings."""
    c = SimpleNamespace(**settings)
    c.out_dir = c.out_dir or f"out/{name}"
    if not c.init_from:
        c.rope_theta = c.rope_theta or 100_000.0
    for key, file in DEMO.items() if c.demo else ():
        path = f"{c.demo}/{file}"
        setattr(c, key, getattr(c, key) or ([path] if isinstance(getattr(c, key), list) else path))
    if not c.stages:
        raise SystemExit("stages: empty; name at least one")
    for s, stage in c.stages.items():
        check_stage(s, stage)
        stage["speech_learning_rate"] = stage["speech_learning_rate"] or stage["learning_rate"]
    at_least_one = ("sequence_length", "micro_batch", "batch_tokens", "log_interval", "eval_interval",
                    "eval_sequences", "checkpoint_interval", "keep_checkpoints")
    limits = dict.fromkeys(at_least_one, (1, np.inf)) | dict(
        eval_cloze_items=(0, np.inf), keep_every=(0, np.inf), beta=(0, np.inf), weight_decay=(0, np.inf),
        grad_clip=(1e-9, np.inf), beta1=(0, 1), beta2=(0, 1), seed=(0, 1 << 63))
    for key, (least, end) in limits.items():
        if not least <= getattr(c, key) < end:
            raise SystemExit(f"{key}={getattr(c, key)}: give {least} or more, and less than {end}")
    check_spans(c)
    sequences, rest = divmod(c.batch_tokens, c.sequence_length)
    if rest or sequences % world.size:
        raise SystemExit(f"batch_tokens={c.batch_tokens} is not a whole number of sequences of {c.sequence_length} for"
                         f" each of {world.size} processes; set --batch_tokens to a multiple of"
                         f" {c.sequence_length * world.size}")
    if c.wandb_project and not importlib.util.find_spec("wandb"):
        raise SystemExit("wandb_project: wandb is missing: pip install wandb")
    choices = dict(dtype=("auto", "bfloat16", "float32"), optimizer=("adamw", "muon"), new_modules=NEW_MODULES)
    for key, allowed in choices.items():
        if getattr(c, key) not in allowed:
            raise SystemExit(f"{key}={getattr(c, key)}: choose {', '.join(allowed[:-1])} or {allowed[-1]}")
    return c


def check_stage(name, stage):
    """SystemExit for an invalid stage."""
    for kind, parts in stage["mixture"].items():
        if kind not in ("text", "speech", "interleaved") or not isinstance(parts, int) or parts < 1:
            raise SystemExit(f"stages.{name}.mixture: {kind}={parts!r}; give text, speech, interleaved in whole parts")
    if not stage["mixture"] or stage["train"] not in ("all", "new", "text"):
        raise SystemExit(f"stages.{name}: needs a mixture, and train is 'all', 'new' or 'text', not {stage['train']!r}")
    rates = stage["learning_rate"], stage["speech_learning_rate"]
    if stage["steps"] < 1 or stage["warmup"] < 0 or not 0 <= stage["decay"] <= 1 or not 0 <= min(rates) < np.inf:
        raise SystemExit(f"stages.{name}: give steps of 1 or more, warmup and learning rates of 0 or more, decay 0..1")


if __name__ == "__main__":
    main(sys.argv[1:])
