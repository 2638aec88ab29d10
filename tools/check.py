"""
Say whether a training run could start: what is missing, with the command that makes it, and what the run will take.

    python train.py config/train_150m.py --check        the same as: python -m tools.check config/train_150m.py

Everything that is missing is named at once. The exit code is 0 only if training would start. Memory and hours are
arithmetic: 16 bytes for each parameter (weights, gradients and AdamW in float32), and 40% of an H100's 989 TFLOP/s.
"""
import itertools
import os
import re
import sys
from pathlib import Path

import torch

import train
from configurator import ROOT, configure
from data import open_source
from model import Config, SmolTolk, count_parameters, forward_flops, read_config
from runtime import checkpoint
from runtime.datasets import open_set
from runtime.distributed import ALONE, World
from runtime.files import find_files, read_json
from runtime.tokenizer import Tokenizer
from speech.units import read_vocabulary
from tools.bench import SHAPE, SHAPES

H100 = 0.4 * 989e12  # FLOP/s
LLM_FOLDER = re.compile(r"weights/(smollm-[\w.]+)")


def command_for(path):
    """The command that makes a file or folder, or the folder that holds it, as the scripts in runs/ know it, or ""."""
    if match := LLM_FOLDER.match(path):
        return f"MODEL={match[1]} bash runs/train_150m.sh weights"
    for script in sorted((ROOT / "runs").glob("*.sh")):
        step = ""
        for line in script.read_text(encoding="utf-8").splitlines():
            step = match[1] if (match := re.match(r"(\w+)\(\) ", line)) else step
            if re.search(rf"--out={re.escape(path)}(/\$part)?(\s|$)", line):
                return f"bash runs/{script.name} {step}"
    parent = os.path.dirname(path)
    return command_for(parent) if parent not in ("", path) else ""


def try_to_open(what, paths, problems, read):
    """Call `read`, which needs these paths. Add what is missing or wrong to problems. Returns its result or None."""
    missing = [path for path in paths if not str(path).startswith("hf:") and not Path(path).exists()]
    for path in missing:
        command = command_for(str(path))
        problems.append(f"{what}: {path} does not exist" + (f"; make it with: {command}" if command else ""))
    if missing:
        return None
    try:
        return read()
    except (ValueError, SystemExit) as error:
        problems.append(f"{what}: {error}")
        return None


def find_problems(c):
    """(list of problems, {kind: Source} of the training data that can be opened)."""
    problems, sources = [], {}
    tokenizer = try_to_open("tokenizer", [c.tokenizer], problems, lambda: Tokenizer(c.tokenizer))
    units = try_to_open("units", [c.units], problems, lambda: read_vocabulary(c.units)[0]) if c.units else None
    if c.init_from:
        try_to_open("init_from", [c.init_from], problems, lambda: read_config(c.init_from))
    hashes = tokenizer and tokenizer.hash, units and units["hash"]
    c.vocab_size = c.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    c.n_units = c.n_units or (units["n_units"] if units else 0)
    kinds = {kind for stage in c.stages.values() for kind in stage["mixture"]}
    for kind in sorted(kinds):
        folders = getattr(c, kind)
        found = try_to_open(kind, folders, problems, lambda kind=kind, folders=folders: open_source(
            kind, folders, *hashes, c.sequence_length + 1))
        if found:
            sources[kind] = found
    for kind in ("text", "speech", "interleaved"):
        if folders := getattr(c, f"val_{kind}"):
            try_to_open(f"val_{kind}", folders, problems, lambda kind=kind, folders=folders: open_source(
                kind, folders, *hashes, c.sequence_length + 1))
    if c.cloze:
        try_to_open("cloze", [c.cloze], problems, lambda: open_set(c.cloze, *hashes))
    problems += unfinished_sets({folder for kind in kinds for folder in getattr(c, kind)})
    problems += overlaps(c, kinds)
    has_checkpoints = len(checkpoint.checkpoints(c.out_dir)) > 0
    if has_checkpoints and not c.resume:
        problems.append(f"out_dir: {c.out_dir} holds a run already; go on with --resume=true, or set another --out_dir")
    if c.resume and not has_checkpoints:
        problems.append(f"out_dir: {c.out_dir} has no checkpoint to go on from; leave --resume out")
    if not has_checkpoints and (Path(c.out_dir) / "results.json").exists():
        problems.append(f"out_dir: {c.out_dir} holds the results of a run without its checkpoints; set another")
    if not problems:  # now everything is opened and compared as at the start of a run
        data = try_to_open("data", [], problems, lambda: train.open_data(c, ALONE))
        if data and c.init_from:
            try_to_open("init_from", [], problems, lambda: train.build_model(c, data.tokenizer))
    return problems, sources


def part_records(folder):
    """[(path of its part.json, what it holds)] of the parts that corpora/ has written in a data set, at any depth."""
    if str(folder).startswith("hf:") or not Path(folder).is_dir():
        return []
    return [(path, read_json(path)) for path in find_files(folder, ["part.json"])]


def unfinished_sets(folders):
    """The problems of data sets of which shards are missing or not finished."""
    problems = []
    for folder in sorted(folders):
        shards = {}  # {(folder of the parts, number of shards): {shard: [tokens, whether it has its last part]}}
        for path, record in part_records(folder):
            number, n_shards = map(int, re.match(r"shard-(\d+)-of-(\d+)-", path.parent.name).groups())
            state = shards.setdefault((path.parent.parent, n_shards), {}).setdefault(number, [0, False])
            state[0] += sum(record["tokens"].values())
            most = record["identity"].get("max_tokens")
            state[1] = state[1] or record["last"] or bool(most and state[0] >= most / n_shards)
        for (place, n_shards), states in shards.items():
            missing = [i for i in range(n_shards) if i not in states or not states[i][1]]
            if missing:
                numbers = ", ".join(map(str, missing[:9]))
                problems.append(f"{place}: shards {numbers} of {n_shards} are not finished; give the command that makes"
                                " them again")
    return problems


def overlaps(c, kinds):
    """The problems of held-out sets that may hold documents of the training sets, because they are from the same files.
    """
    problems = []
    trained = {folder for kind in kinds for folder in getattr(c, kind)}
    for kind in ("val_text", "val_speech", "val_interleaved"):
        for held_out in getattr(c, kind):
            for folder in sorted(trained):
                for (_, one), (_, other) in itertools.product(part_records(folder)[:1], part_records(held_out)[:1]):
                    one, other = one["identity"], other["identity"]
                    same = all(one.get(key) == other.get(key) for key in ("corpus", "files"))
                    share, split = one.get("val_share", 0), (one.get("split", "train"), other.get("split", "train"))
                    if same and not (share and share == other.get("val_share") and split == ("train", "val")):
                        problems.append(f"{kind}: {held_out} and {folder} are from the same files and may share"
                                        " documents; make both with one --val_share, the first with --split=val")
    return problems


def model_config(c):
    """The Config of the run, or None if it is not known yet."""
    ours = dict(n_units=c.n_units or 500, input_adapter_layers=c.input_adapter_layers, residual=c.residual,
                output_adapter_layers=c.output_adapter_layers, layer_pooling=c.layer_pooling)
    if c.init_from:
        try:
            return read_config(c.init_from, **ours)
        except (ValueError, SystemExit):
            shape = SHAPES.get(Path(c.init_from).name.replace("smollm2", "smollm"))
            return shape and Config(**dict(zip(SHAPE, shape)), **ours)
    if not c.vocab_size:
        return None
    return Config(vocab_size=c.vocab_size, **{name: getattr(c, name) for name in SHAPE}, **ours)


def print_costs(c, config):
    """Print parameters, tokens, memory, hours and disk of a run."""
    with torch.device("meta"):
        text, new = count_parameters(SmolTolk(config))
    length, rows, flops, tokens = c.sequence_length, c.batch_tokens // c.sequence_length, 0, 0
    for stage in c.stages.values():
        backbone, added = forward_flops(config, rows, length, n_text=c.batch_tokens // 2, n_speech=c.batch_tokens // 2)
        step = backbone * (2 if stage["train"] == "new" else 3) + added * 3
        flops, tokens = flops + step * stage["steps"], tokens + c.batch_tokens * stage["steps"]
    hours, size = flops / H100 / 3600, 4 * (text + new)
    print(f"parameters: {text / 1e6:.1f}M text + {new / 1e6:.1f}M speech; tokens: {tokens / 1e6:,.1f} million")
    print(f"time: {flops:.1e} FLOPs, about {hours:.2g} hours of one H100 at 40% of its peak, {hours / 4:.2g} of four")
    print(f"memory: {4 * size / 1e9:.2g} GB a GPU for weights, gradients and AdamW, and the activations of "
          f"{c.micro_batch} x {length} tokens (--micro_batch)")
    print(f"disk: {3 * size / 1e9:.2g} GB for each of {c.keep_checkpoints} checkpoints in {c.out_dir}")


def print_data(c, sources):
    """Print how many tokens each kind of sequence can draw from, and how often the run reads them."""
    drawn = dict.fromkeys(sources, 0)
    for stage in c.stages.values():
        parts = sum(stage["mixture"].values())
        for kind, share in stage["mixture"].items():
            if kind in drawn:
                drawn[kind] += stage["steps"] * c.batch_tokens * share / parts
    for kind, source in sources.items():
        streams = ("text", "speech") if kind == "interleaved" else (kind,)
        size = sum(len(getattr(shard, stream)) for shard in source.shards for stream in streams)
        print(f"{kind}: {size / 1e6:.1f}M tokens in {len(source.shards)} sets, read {drawn[kind] / size:.2g} times")


def main(argv):
    settings, name = configure(train.DEFAULTS, argv, train.complete_stages, described_in=[train.__file__])
    if not settings["tokenizer"] and not settings["demo"]:
        raise SystemExit("tokenizer: not set; name a config, for example: python train.py config/train_tiny.py --check")
    c = train.check_settings(settings, name, World(size=int(os.environ.get("WORLD_SIZE", 1))))
    problems, sources = find_problems(c)
    if c.demo and not Path(c.demo).exists():
        problems = [problem for problem in problems if f"{c.demo}/" not in problem]
        print(f"demo: {c.demo} does not exist yet; training makes it first, in under a minute on two cores")
    if config := model_config(c):
        print_costs(c, config)
    print_data(c, sources)
    for problem in problems:
        print(f"missing  {problem}" if "does not exist" in problem else f"wrong    {problem}")
    print(f"problems: {len(problems)}" if problems else "training would start")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
