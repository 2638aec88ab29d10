"""
Checkpoints and signals: find the newest good checkpoint, remove old ones, compare runs, and end a run on a signal.
"""
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open

from runtime.files import read_json, reading
from runtime.tokenizer import Tokenizer

DEMOS = "data/demo", "assets/tiny"  # folders of the demo corpus; the second holds a part of it, in this repository


def checkpoints(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted(Path(out_dir).glob("checkpoint-*[0-9]"))


def fault(folder, to_train=True):
    """The fault of a checkpoint, or "". to_train: check all files that training needs, otherwise only the model."""
    try:
        for name in ("config", "train") if to_train else ("config",):
            read_json(folder / f"{name}.json")
        for name in ("model", "speech", "optimizer") if to_train else ("model", "speech"):
            path = folder / f"{name}.safetensors"
            with reading(path), safe_open(path, "pt"):  # reads the header and compares it with the file's size
                pass
    except ValueError as error:
        return str(error)
    return ""


def newest(out_dir, to_train=True):
    """(the newest good checkpoint of a run or None, newer ones that cannot be opened). Prints the faults of these."""
    bad = []
    for folder in reversed(checkpoints(out_dir)):
        wrong = fault(folder, to_train)
        if not wrong:
            return folder, bad
        print(f"{folder}: cannot be opened ({wrong}); the checkpoint before it is used", file=sys.stderr)
        bad.append(folder)
    return None, bad


def prune(out_dir, keep, every):
    """Remove all checkpoints except the newest `keep` and those at multiples of step `every` (0: none)."""
    for old in checkpoints(out_dir)[:-keep]:
        if not every or int(old.name.rpartition("-")[2]) % every:
            gone = old.rename(old.with_name(f".{old.name}.{os.getpid()}"))  # done at once; removing takes longer
            shutil.rmtree(gone)


def clean(out_dir, bad=()):
    """Remove unfinished files and folders of a killed run. Rename bad checkpoints, because new ones need these names.
    """
    for path in Path(out_dir).glob(".*.[0-9]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in bad:
        aside = folder.with_name(f"bad-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def made_with(folder):
    """(hash of the tokenizer, hash of the units) that a checkpoint was trained with; None for a missing file."""
    tokenizer, units_json = folder / "tokenizer.json", folder / "units.json"
    return (Tokenizer(tokenizer).hash if tokenizer.exists() else None,
            read_json(units_json).get("hash") if units_json.exists() else None)


def demo_of(folder):
    """The demo corpus that a checkpoint was trained on: data/demo, or the part of it in assets/tiny."""
    for demo in DEMOS:
        units_json = Path(demo, "units/units.json")
        if units_json.exists() and read_json(units_json).get("hash") == made_with(folder)[1]:
            return demo
    return DEMOS[0]


def identify(sources, tokenizer, units):
    """{name of a set: [hash, share in its source, folder]}. The hash covers meta.json and four pieces of each array.

    sources: {name: data.Source}. tokenizer, units: hashes
    """
    found = dict(tokenizer=[tokenizer], units=[units])
    for key, source in sources.items():
        for i, (shard, share) in enumerate(zip(source.shards, np.diff(source.cumulated, prepend=0))):
            contents = hashlib.sha256(json.dumps(shard.meta, sort_keys=True).encode())
            for array in shard:
                if isinstance(array, np.ndarray):
                    for start in np.linspace(0, max(0, len(array) - 4096), 4).astype(int):
                        contents.update(array[start:start + 4096].tobytes())
            found[f"{key}[{i}]"] = [contents.hexdigest()[:16], round(float(share), 9), str(shard.folder)]
    return found


def differences(saved, now, may_change):
    """(refused, changed): the forbidden and the permitted differences between two runs, as dicts {name: [was, is]}.

    saved, now   dict(settings={name: value}, data={name: [hash, share, folder]})
    may_change   names of settings that may change. Held-out data may change too, because it does not affect training.
                 Any data may be moved to another folder.
    """
    refused, changed = {}, {}
    for name in sorted((saved["settings"].keys() | now["settings"].keys()) - {"resume", "out_dir"}):
        was, is_ = saved["settings"].get(name), now["settings"].get(name)
        if was != is_:
            (changed if name in may_change else refused)[name] = [was, is_]
    for name in sorted(saved["data"].keys() | now["data"].keys()):
        was, is_ = saved["data"].get(name), now["data"].get(name)
        if (was or [])[:2] != (is_ or [])[:2]:
            (changed if name.startswith(("val_", "cloze")) else refused)[name] = [was, is_]
    return refused, changed


def resume_command(argv):
    """The command that resumes a run that was started with argv."""
    words = [sys.argv[0], *(arg for arg in argv if not arg.startswith("--resume=")), "--resume=true"]
    local, nodes = (os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    start = f"{os.environ.get('LAUNCHER', 'torchrun')} --nproc_per_node={local}" if local else "python"
    if nodes not in ("", "1"):
        start += f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return " ".join([start, *map(shlex.quote, words)])


@contextmanager
def listen():
    """Give a list to which the name of each SIGTERM, SIGUSR1 or SIGINT is appended. The training loop checks the list.

    A Ctrl-C more than two seconds after the first signal ends the process at once. An earlier Ctrl-C may be the copy
    that torchrun sends to each process, so it does not.
    """
    heard, times = [], []

    def hear(number, _):
        times.append(time.monotonic())
        if number == signal.SIGINT and heard and times[-1] - times[0] > 2:
            raise KeyboardInterrupt
        heard.append(signal.Signals(number).name)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
