"""
Checkpoints: finding the newest that can be opened, removing old ones, comparing runs; and the signals that end a run.

Nothing here knows what a model is: train.py says what a checkpoint holds.
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
from safetensors import SafetensorError, safe_open

from runtime.files import one_line, read_json
from runtime.tokenizer import Tokenizer


def checkpoints(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted(Path(out_dir).glob("checkpoint-*[0-9]"))


def fault(folder, to_train=True):
    """What is wrong with a checkpoint, or "": a file that is missing, cut short, or not what its name says.

    to_train: is it to be trained further, or are the weights all that is needed?
    """
    for name in ("config", "train") if to_train else ("config",):
        try:
            read_json(folder / f"{name}.json")
        except ValueError as error:
            return str(error)
    for name in ("model", "speech", "optimizer") if to_train else ("model", "speech"):
        try:
            with safe_open(folder / f"{name}.safetensors", "pt"):  # reads the header, and compares the file's size
                pass
        except (OSError, SafetensorError) as error:
            return f"{name}.safetensors: {one_line(error)}"
    return ""


def newest(out_dir, to_train=True):
    """(the newest checkpoint of a run that can be opened, or None; the newer ones that cannot). Names the latter."""
    bad = []
    for folder in reversed(checkpoints(out_dir)):
        wrong = fault(folder, to_train)
        if not wrong:
            return folder, bad
        print(f"{folder}: cannot be opened ({wrong}); the checkpoint before it is used", file=sys.stderr)
        bad.append(folder)
    return None, bad


def prune(out_dir, keep, every):
    """Remove all but the newest `keep` checkpoints and those of steps that `every` divides (0: none of them)."""
    for old in checkpoints(out_dir)[:-keep]:
        if not every or int(old.name.rpartition("-")[2]) % every:
            gone = old.rename(old.with_name(f".{old.name}.{os.getpid()}"))  # at once; removing may take a while
            shutil.rmtree(gone)


def clean(out_dir):
    """Remove what a run that was killed was writing or removing."""
    for path in Path(out_dir).glob(".*.[0-9]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_aside(bad):
    """Rename checkpoints that cannot be opened, so that good ones can take their places."""
    for folder in bad:
        aside = folder.with_name(f"bad-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def made_with(folder):
    """(hash of the tokenizer, hash of the units) that a checkpoint was trained with; None where it does not say."""
    tokenizer, units_json = folder / "tokenizer.json", folder / "units.json"
    return (Tokenizer(tokenizer).hash if tokenizer.exists() else None,
            read_json(units_json).get("hash") if units_json.exists() else None)


def identify(sources, tokenizer, units):
    """{what: [hash, share of it, folder]}. The hash is over a set's meta.json and four pieces of each array.

    sources: {name: data.Source}. tokenizer, units: hashes
    """
    found = dict(tokenizer=[tokenizer], units=[units])
    for key, source in sources.items():
        for i, (shard, share) in enumerate(zip(source.shards, np.diff(source.cumulated, prepend=0))):
            contents = hashlib.sha256(json.dumps(shard.meta, sort_keys=True).encode())
            for array in (x for x in shard if isinstance(x, np.ndarray)):
                for start in np.linspace(0, max(0, len(array) - 4096), 4).astype(int):
                    contents.update(array[start:start + 4096].tobytes())
            found[f"{key}[{i}]"] = [contents.hexdigest()[:16], round(float(share), 9), str(shard.folder)]
    return found


def differences(saved, now, may_change):
    """Where two runs differ: two dicts {what: [was, is]}, of what must be the same and of what may change.

    saved, now   dict(settings={name: value}, data={what: [hash, share of it, folder]})
    may_change   names of settings. So may held-out data, since training stays the same, and where any data lies.
    """
    refused, changed = {}, {}
    for name in sorted((saved["settings"].keys() | now["settings"].keys()) - {"resume", "replay", "out_dir"}):
        was, is_ = saved["settings"].get(name), now["settings"].get(name)
        if was != is_:
            (changed if name in may_change else refused)[name] = [was, is_]
    for name in sorted(saved["data"].keys() | now["data"].keys()):
        was, is_ = saved["data"].get(name), now["data"].get(name)
        if (was or [])[:2] != (is_ or [])[:2]:
            (changed if name.startswith(("val_", "cloze")) else refused)[name] = [was, is_]
    return refused, changed


def resume_command(argv):
    """What to type to go on with a run that was started with argv."""
    words = [sys.argv[0], *(arg for arg in argv if not arg.startswith("--resume=")), "--resume=true"]
    local, nodes = (os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    start = f"{os.environ.get('LAUNCHER', 'torchrun')} --nproc_per_node={local}" if local else "python"
    if nodes not in ("", "1"):
        start += f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return " ".join([start, *map(shlex.quote, words)])


@contextmanager
def listen():
    """A list that the names of SIGTERM, SIGUSR1 and SIGINT are added to when they come; the training loop looks at it.

    A second Ctrl-C, two seconds or more after the first, ends the process at once. (torchrun hands on the first one
    that the terminal has sent already, so that it comes twice.)
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
