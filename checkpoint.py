"""
Folders that are whole or not there, and what else a run needs to be killed at any moment and go on.

A folder is written under a hidden name, forced to the disk, and renamed: under its own name nobody ever sees a part of
it. A checkpoint that cannot be opened is named, and the one before it is used. Nothing here knows what a model is.
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

# ---------------------------------------------------------------------------------------------------------------------
# writing

@contextmanager
def whole_folder(out):
    """A new folder to write into, which becomes `out` when all has gone well, and otherwise leaves nothing.

    OSError if there is something at `out`, or no room.
    """
    out = Path(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in [*folder.rglob("*"), folder]:
            to_disk(path)
        os.replace(folder, out)
        to_disk(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def replace_file(path, text):
    """Write a text file that is the old one or the new one, never a part of either. SystemExit if it cannot be done."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written ({error.strerror}); make room there") from None


def to_disk(path):
    """Return when a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# finding

def checkpoints(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted(Path(out_dir).glob("checkpoint-*[0-9]"))


def fault(folder, skip=()):
    """What is wrong with a checkpoint, or "": a file that is missing, cut short, or not what its name says."""
    try:
        json.loads((folder / "config.json").read_text())
        for name in {"model.safetensors", "speech.safetensors", "optimizer.safetensors"} - set(skip):
            with safe_open(folder / name, "pt"):  # reads the header, and compares the file's size
                pass
        if not skip:
            json.loads((folder / "train.json").read_text())
    except (ValueError, OSError, SafetensorError) as error:
        return str(error)
    return ""


def newest(out_dir, skip=()):
    """(the newest good checkpoint of a run or None, the bad ones that are newer). Says what is wrong with these."""
    bad = []
    for folder in reversed(checkpoints(out_dir)):
        wrong = fault(folder, skip)
        if not wrong:
            return folder, bad
        print(f"{folder}: {wrong}; it is not used", file=sys.stderr)
        bad.append(folder)
    return None, bad


def prune(out_dir, keep, every):
    """Remove all but the newest `keep` checkpoints and those of steps that `every` divides (0: none of them)."""
    for old in checkpoints(out_dir)[:-keep]:
        if not every or int(old.name.rpartition("-")[2]) % every:
            gone = old.rename(old.with_name(f".{old.name}.{os.getpid()}"))  # at once; the rest may take a while
            shutil.rmtree(gone)


def clean(out_dir):
    """Remove what a run that was killed had begun to write or to remove."""
    for path in Path(out_dir).glob(".*.[0-9]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# is it the same run?

def identify(sources, **known):
    """{what: [hash, share of it, where it lies]} of all that a run reads; the first two are the same wherever it lies.

    sources   {name: data.Source}. The hash of a data set is over its meta.json and four pieces of each array: it takes
              no time at any size
    known     hashes of other things
    """
    found = {key: [value] for key, value in known.items()}
    for key, source in sources.items():
        for i, (shard, share) in enumerate(zip(source.shards, np.diff(source.cumulated, prepend=0))):
            read = hashlib.sha256(json.dumps(shard.meta, sort_keys=True).encode())
            for array in (x for x in shard if isinstance(x, np.ndarray)):
                for start in np.linspace(0, max(0, len(array) - 4096), 4).astype(int):
                    read.update(array[start:start + 4096].tobytes())
            found[f"{key}[{i}]"] = [read.hexdigest()[:16], round(float(share), 9), str(shard.folder)]
    return found


def differences(saved, about, free):
    """What may not and what may differ between a checkpoint's run and this one: two dicts {name: [was, is]}.

    saved, about: dict(settings, data, made); free: settings that may change, as all of `made` may
    """
    refused, changed = {}, {}
    for part in ("settings", "data", "made"):
        for key in sorted((saved[part].keys() | about[part].keys()) - {"resume", "out_dir"}):
            was, now = saved[part].get(key), about[part].get(key)
            if was and now and part == "data":
                was, now = was[:2] + now[2:], now  # wherever it lay
            if was != now:
                judged = part == "data" and key.startswith(("val_", "cloze"))  # only looked at: training stays the same
                may = part == "made" or judged or part == "settings" and key in free
                (changed if may else refused)[key] = [was, now]
    return refused, changed


def resume_command(argv):
    """What to type to go on with a run that was started with argv."""
    words = [sys.argv[0], *(arg for arg in argv if not arg.startswith("--resume=")), "--resume=true"]
    local, nodes = (os.environ.get(key, "") for key in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    start = f"{os.environ.get('LAUNCHER', 'torchrun')} --nproc_per_node={local}" if local else "python"
    if nodes not in ("", "1"):
        start += f" --nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    return " ".join([start, *map(shlex.quote, words)])


# ---------------------------------------------------------------------------------------------------------------------
# the end of a run

@contextmanager
def listen():
    """A list that the names of SIGTERM, SIGUSR1 and SIGINT are added to when they come; the training loop looks at it.

    A second SIGINT ends the process at once, if it does not come with the first (torchrun hands on what the terminal
    has sent already).
    """
    heard, first = [], []

    def hear(number, _):
        first.append(time.monotonic())
        if number == signal.SIGINT and heard and time.monotonic() - first[0] > 2:
            raise KeyboardInterrupt
        heard.append(signal.Signals(number).name)
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
