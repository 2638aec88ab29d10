"""Sound files as speech units, which are kept for the next checkpoint."""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime.distributed import all_sum
from runtime.files import digest, read_array


def fingerprint(files):
    """{number, sha256} of many files: how many they are, and one hash over their names and contents."""
    lines = sorted(f"{digest(path)} {path.name}" for path in set(files))
    return dict(number=len(lines), sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())


def hear_files(evaluator, files):
    """The units of sound files in the model's id space, one list of ids per file.

    They are kept in settings.cache, under a name made of the hashes of the units and of all files. The work is shared
    among the processes. ValueError names a file that cannot be used.
    """
    world, config = evaluator.world, evaluator.model.config
    evaluator.used += files
    digests = {file: digest(file) for file in set(files)}
    in_order = sorted(digests, key=digests.get)  # an order that does not depend on where the files lie
    name = f"{fingerprint(in_order)['sha256'][:16]}-{str(evaluator.made_with[1])[:16]}"
    paths = [Path(evaluator.settings.cache) / f"{name}.{part}.npy" for part in ("ids", "offsets")]
    processes_with_both = all_sum(float(all(path.exists() for path in paths)), world)
    if processes_with_both == world.size:
        units, offsets = read_kept(paths, len(in_order), config.n_units)
    else:
        units, offsets = listen(evaluator, in_order)
        if world.rank == 0:
            keep(paths, units, offsets)
    for file, n in zip(in_order, np.diff(offsets)):
        if n == 0:
            raise ValueError(f"{file}: too short for a single unit")
    ids = (units.astype(np.int64) + config.vocab_size).tolist()
    by_file = {file: ids[start:end] for file, start, end in zip(in_order, offsets, offsets[1:])}
    return [by_file[file] for file in files]


def listen(evaluator, files):
    """(units of all files in one array uint16, offsets int64 [files + 1])."""
    from speech.audio import read_audio
    from speech.units import load_units

    world, folder = evaluator.world, evaluator.settings.units
    if not folder:
        raise ValueError("units: the folder of speech units is needed for wavs; set --units=FOLDER")
    vocabulary = load_units(folder, str(world.device))
    if vocabulary.hash != evaluator.made_with[1]:
        raise ValueError(f"{folder}: units {vocabulary.hash}, the model has {evaluator.made_with[1]}")

    heard, mine = {}, range(world.rank, len(files), world.size)
    for start in tqdm(range(0, len(mine), 32), "hearing", leave=False, disable=None if world.rank == 0 else True):
        batch = mine[start:start + 32]
        waves = [read_audio(files[i]) for i in batch]
        with torch.autocast(world.device.type, enabled=False):  # units are made in fp32, as in the data
            for i, (units, _) in zip(batch, vocabulary.encode(waves)):
                heard[i] = units

    # Each process fills in what it has heard and leaves zeros elsewhere. The sum over processes is the whole.
    sizes = np.zeros(len(files))
    for i, units in heard.items():
        sizes[i] = len(units)
    offsets = np.cumsum([0, *all_sum(sizes, world).tolist()]).astype(np.int64)
    flat = np.zeros(offsets[-1])
    for i, units in heard.items():
        flat[offsets[i]:offsets[i + 1]] = units
    return all_sum(flat, world).numpy().astype(np.uint16), offsets


def keep(paths, units, offsets):
    """Write both arrays. Another process may be writing the same files, so each is renamed when it is whole."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, array in zip(paths, (units, offsets)):
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, array)
        os.replace(temporary, path)


def read_kept(paths, n_files, n_units):
    """What `keep` has written. ValueError if these cannot be the units of so many files."""
    units, offsets = (np.array(read_array(path)) for path in paths)
    fits = (units.dtype == np.uint16 and units.max(initial=0) < n_units and offsets.shape == (n_files + 1,) and
            (offsets[0], offsets[-1]) == (0, len(units)) and (np.diff(offsets) >= 0).all())
    if not fits:
        raise ValueError(f"{paths[0]}: not the units of these files; remove it, they will be made again")
    return units, offsets
