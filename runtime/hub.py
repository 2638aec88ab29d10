"""
Folders on the Hugging Face hub: a setting that names a folder of weights or units may also be hf:OWNER/NAME.

    hf:OWNER/NAME                   the files at the top of a model repository
    hf:OWNER/NAME/sub/folder        the files of one folder in it, or one file, such as hf:OWNER/NAME/tokenizer.json
    hf:OWNER/NAME@REVISION          a branch, tag or commit; write %2F for a / in its name

huggingface_hub downloads the files, and is imported only for such names. A complete copy in its cache is used without a
network, and without asking whether the hub has a newer one; `hf download OWNER/NAME` fetches that.
"""
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from runtime.datasets import expected_arrays
from runtime.files import DataError, one_line, read_array, read_json, reading

NAME = re.compile(r"hf:([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(?:@([^/@]+))?(?:/(.+?))?/?")
ENDINGS = (".json", ".safetensors", ".npy")  # of the files that this project reads; nothing that is a pickle
INDEX = ".safetensors.index.json"
READ_HERE = ("config.json", "tokenizer.json", "units.json", "meta.json", "train.json")  # must be readable json


class Source(NamedTuple):
    """A name that begins with hf:, taken apart."""
    name: str
    repo: str      # OWNER/NAME
    revision: str
    inside: str    # a folder or file in the repository; "": its top


def local_folder(name):
    """The path of the folder or file that a setting names. hf:OWNER/NAME is downloaded if it is not in the cache.

    A name without hf: is returned as it is. DataError if the files cannot be had, or are not complete.
    Under torchrun, call on_first(lambda: local_folder(name), world) first, so that only one process downloads. Then
    every process may call local_folder(name), which finds the files in the cache.
    """
    if not str(name).startswith("hf:"):
        return name
    source = parse_name(str(name))
    try:
        import huggingface_hub as hub
        import huggingface_hub.constants
        import huggingface_hub.errors  # noqa: F401
    except ImportError:
        raise DataError(f"{name}: huggingface_hub is missing: pip install huggingface_hub") from None

    cache = hub.constants.HF_HUB_CACHE
    fault = find_fault(cached_path(source, cache))
    if fault:
        listed = download(source, hub, fault)
        fault = find_fault(cached_path(source, cache))
    if fault:
        file, problem = fault
        raise DataError(f"{name}: {file} {problem}; {remedy(source, file, listed)}")
    return str(cached_path(source, cache))


def parse_name(name):
    """hf:OWNER/NAME@REVISION/sub/folder -> Source. DataError."""
    match = NAME.fullmatch(name)
    if not match or {"..", ""} & set((match[3] or "top").split("/")):
        raise DataError(f"{name}: not a name on the hub; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or"
                        f" hf:OWNER/NAME/sub/folder")
    return Source(name, match[1], unquote(match[2] or "main"), match[3] or "")


# ---------------------------------------------------------------------------------------------------------------------
# the cache, and whether a folder is complete

def cached_path(source, cache):
    """The path at which huggingface_hub's cache keeps a Source, whether it is there or not.

    Layout of the cache (huggingface.co/docs/huggingface_hub/guides/manage-cache): in models--OWNER--NAME, refs/REVISION
    holds the hash of a commit, and snapshots/COMMIT its files, as links to blobs/.
    """
    storage = Path(cache) / storage_name(source)
    reference = storage / "refs" / source.revision
    commit = reference.read_text().strip() if reference.is_file() else source.revision
    return storage / "snapshots" / commit / source.inside


def storage_name(source):
    return f"models--{source.repo.replace('/', '--')}"


def find_fault(path):
    """(file, problem) of a folder that is not complete, or of one file; None if nothing is wrong.

    An interrupted download leaves a snapshot that lacks files. Without a network, huggingface_hub may return it as if
    it were complete. transformers leaves a snapshot without speech.safetensors, because it fetches only what it reads.
    """
    path = Path(path)
    if path.name.endswith(ENDINGS):
        return find_fault_in_file(path)
    if not path.is_dir():
        return "the folder", "is missing"
    for file in sorted(path.iterdir()):
        if file.name.endswith(ENDINGS) and (fault := find_fault_in_file(file)):
            return fault
    try:
        missing = [name for name in needed_files(path) if not (path / name).exists()]
    except ValueError as error:  # "PATH: reason"
        file, _, reason = str(error).partition(": ")
        return Path(file).name, f"is damaged: {reason}"
    return (missing[0], "is missing") if missing else None


def find_fault_in_file(path):
    """(name, problem) of a file that is missing or damaged, or None. Weights are not read, only their header."""
    if path.is_symlink() and not path.exists():
        return path.name, "is a link to a file that is missing"
    if not path.is_file():
        return path.name, "is missing"
    if path.resolve().name.endswith(".incomplete"):
        return path.name, "is a download that was interrupted"
    if path.stat().st_size == 0:
        return path.name, "is empty"
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            with reading(path), safe_open(path, "np"):  # compares the header with the size of the file
                pass
        elif path.suffix == ".npy":
            read_array(path)
        elif path.name in READ_HERE or path.name.endswith(INDEX):
            read_json(path)
    except ValueError as error:
        return path.name, f"is damaged: {str(error).removeprefix(f'{path}: ')}"
    return None


def needed_files(folder):
    """The names of the files that a folder must hold to be complete. ValueError for a description that is damaged."""
    names = sorted(path.name for path in folder.iterdir())
    needed = []
    for index in [name for name in names if name.endswith(INDEX)]:
        with reading(folder / index, "lists no shards"):
            needed += sorted(set(read_json(folder / index)["weight_map"].values()))
    if "config.json" in names:
        config = read_json(folder / "config.json")
        if f"model{INDEX}" not in names:
            needed.append("model.safetensors")
        if "smoltolk" in config:
            needed.append("speech.safetensors")
        if config.get("model_type") == "llama":
            needed.append("tokenizer.json")
    elif "units.json" in names:
        needed.append("centroids.npy")
    elif "meta.json" in names:
        with reading(folder / "meta.json", "not a data set's description"):
            needed += [f"{name}.npy" for name in expected_arrays(read_json(folder / "meta.json"))]
    else:
        needed.append("config.json")
    return needed


# ---------------------------------------------------------------------------------------------------------------------
# the hub

def download(source, hub, fault):
    """Fetch the files of a Source into the cache -> the names of all files in the repository. DataError.

    fault: (file, problem) of what is in the cache now, for the message
    """
    is_file = source.inside.endswith(ENDINGS)
    below = f"{source.inside}/" if source.inside else ""
    # In these patterns * also matches a /, so the second kind leaves out deeper folders.
    wanted = [source.inside] if is_file else [f"{below}*{ending}" for ending in ENDINGS]
    try:
        # This fails without a network or permission. snapshot_download would then return what the cache has.
        info = hub.HfApi().model_info(source.repo, revision=source.revision)
        hub.snapshot_download(source.repo, revision=source.revision, allow_patterns=wanted,
                              ignore_patterns=None if is_file else [f"{below}*/*"])
    except Exception as error:  # of many types: of huggingface_hub, of the http library, of the disk
        raise DataError(f"{source.name}: {explain(error, source, hub, fault)}") from None
    return [file.rfilename for file in info.siblings]


def explain(error, source, hub, fault):
    """What went wrong in a download, and what to do about it."""
    if isinstance(error, hub.errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # it only says that the file is not in the cache either
    page = f"{hub.constants.ENDPOINT}/{source.repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.errors.GatedRepoError):
        return f"its owner gives access on request; ask for it at {page}, then run `hf auth login` here"
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return "no such repository, or a private one; check the spelling, or run `hf auth login` to read your own"
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return f"no branch, tag or commit {source.revision}; choose one at {page}, or leave @{source.revision} out"
    if isinstance(error, hub.errors.HFValidationError):
        return f"not a name that the hub allows ({one_line(error)}); write hf:OWNER/NAME"
    if status in (401, 403):
        return f"the hub refuses access ({status}); run `hf auth login` with a token that may read {page}"
    file, problem = fault
    storage, cache = storage_name(source), hub.constants.HF_HUB_CACHE
    is_offline = isinstance(error, hub.errors.OfflineModeIsEnabled)
    reason = "HF_HUB_OFFLINE is set" if is_offline else one_line(error)
    return (f"{file} {problem} in the cache, and cannot be fetched here ({reason}); on a machine with a network run"
            f" `{command(source)}`, then copy {storage} with its links from the cache there, usually"
            f" ~/.cache/huggingface/hub, to {cache} here")


def remedy(source, file, listed):
    """What to do about a file that is missing or damaged after a download. listed: all files in the repository."""
    is_whole = source.inside.endswith(ENDINGS) or file == "the folder"
    path = source.inside if is_whole else f"{source.inside}/{file}".lstrip("/")
    if path in listed:
        return f"fetch it again with `{command(source, path)} --force-download`"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in listed) and file.endswith(".safetensors"):
        return ("the repository has pickles instead, which are not read here; open it with transformers, and write it"
                " as safetensors with save_pretrained(FOLDER)")
    what = path or f"file that ends in {', '.join(ENDINGS)}"
    return f"the repository has no {what}; give another name, or a folder in it as hf:{source.repo}/FOLDER"


def command(source, path=""):
    """The command that fetches a Source, or one file of its repository, into the cache."""
    words = ["hf download", source.repo]
    if path or source.inside.endswith(ENDINGS):
        words.append(path or source.inside)
    elif source.inside:
        words.append(f"--include '{source.inside}/*'")
    if source.revision != "main":
        words.append(f"--revision {source.revision}")
    return " ".join(words)
