"""Turn sound files into speech units, and store the units for the next checkpoint."""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime.checkpoint import made_with
from runtime.distributed import all_sum
from runtime.files import digest, read_array


def fingerprint(files):
    """{number, sha256} of a set of files: their number, and one hash over their names and contents."""
    lines = sorted(f"{digest(path)} {path.name}" for path in set(files))
    return dict(number=len(lines), sha256=hashlib.sha256("\n".join(lines).encode()).hexdigest())


def check_units(units, folder):
    """ValueError if the checkpoint in `folder` was trained with other units than those in the folder `units`."""
    from speech.units import read_vocabulary

    wanted = made_with(folder)[1]
    if wanted not in (None, read_vocabulary(units)[0]["hash"]):
        raise ValueError(f"{units}: not the units that {folder} was trained with ({wanted}); set --units=FOLDER")


def hear_files(evaluator, files):
    """The units of sound files in the model's id space, one list of ids per file.

    They are stored in settings.cache as one array, in which n_units marks the end of each file. The array's name comes
    from the hashes of the files and of the units. The processes share the work. ValueError names an unusable file.
    """
    world, config = evaluator.world, evaluator.model.config
    evaluator.used += files
    digests = {file: digest(file) for file in set(files)}
    in_order = sorted(digests, key=digests.get)  # an order that does not depend on where the files lie
    name = f"{fingerprint(in_order)['sha256'][:16]}-{str(evaluator.made_with[1])[:16]}.npy"
    kept = Path(evaluator.settings.cache) / name
    if all_sum(float(kept.exists()), world) == world.size:
        units = np.array(read_array(kept))
    else:
        units = listen(evaluator, in_order)
        if world.rank == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            unfinished = kept.with_suffix(f".{os.getpid()}.npy")  # another evaluation may be writing the same file
            np.save(unfinished, units)
            os.replace(unfinished, kept)
    ends = np.flatnonzero(units == config.n_units)
    if units.dtype != np.uint16 or units.max() > units[-1] or len(ends) != len(in_order):
        raise ValueError(f"{kept}: not the units of these files; remove it, they will be made again")
    by_file = dict(zip(in_order, np.split(units.astype(np.int64) + config.vocab_size, ends + 1)))
    for file, ids in by_file.items():
        if len(ids) == 1:
            raise ValueError(f"{file}: too short for a single unit")
    return [by_file[file][:-1].tolist() for file in files]


def listen(evaluator, files):
    """The units of all files in one array, uint16, with n_units after each file."""
    from speech.audio import read_audio
    from speech.units import load_units

    world, end = evaluator.world, evaluator.model.config.n_units
    if not evaluator.settings.units:
        raise ValueError("units: the folder of speech units is needed for wavs; set --units=FOLDER")
    vocabulary = load_units(evaluator.settings.units, str(world.device))
    if vocabulary.hash != evaluator.made_with[1]:
        raise ValueError(f"{evaluator.settings.units}: units {vocabulary.hash}, the model has {evaluator.made_with[1]}")
    heard, sizes, mine = {}, np.zeros(len(files)), range(world.rank, len(files), world.size)
    for start in tqdm(range(0, len(mine), 32), "hearing", leave=False, disable=None if world.rank == 0 else True):
        batch = mine[start:start + 32]
        waves = [read_audio(files[i]) for i in batch]
        with torch.autocast(world.device.type, enabled=False):  # units are made in fp32, as in the data
            for i, (units, _) in zip(batch, vocabulary.encode(waves)):
                heard[i] = [*units, end]
                sizes[i] = len(heard[i])

    # Each process fills in the units of its files and leaves zeros elsewhere. The sum is the full array.
    ends = np.cumsum(all_sum(sizes, world).numpy()).astype(np.int64)
    flat = np.zeros(ends[-1])
    for i, units in heard.items():
        flat[ends[i] - len(units):ends[i]] = units
    return all_sum(flat, world).numpy().astype(np.uint16)
