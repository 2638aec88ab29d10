"""
Upload a checkpoint to the Hugging Face hub, with a model card made from its settings and results.

    python -m tools.push --checkpoint=out/train_150m --repo=OWNER/NAME --dry_run=true       print the card and the files
    python -m tools.push --checkpoint=out/train_150m --repo=OWNER/NAME --private=true --license=apache-2.0

`pip install huggingface_hub` and `hf auth login` come first. Uploaded are the weights, tokenizer.json, units.json,
train.json (the settings), results.json and evaluation.json; never the state of the optimizer. train.json and
evaluation.json hold the paths of data on this machine. All files go up in one commit, and files of an earlier upload
that this checkpoint does not have are removed from the repository.

The upload was tested with a stand-in for huggingface_hub's HfApi. It has not been run against the hub.
"""
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

from benchmarks import report
from configurator import configure
from evaluate import newest_checkpoint
from model import count_parameters, from_pretrained
from runtime.files import digest, one_line, read_json, reading
from runtime.hub import find_fault, parse_name

checkpoint = ""     # folder of a run (its newest checkpoint is uploaded) or of a model
repo = ""           # OWNER/NAME on the hub; made if it does not exist
private = False     # make a private repository; one that exists must be private already
license = ""        # of the weights, as the hub spells it, such as apache-2.0; empty: the card does not state one
base_model = ""     # OWNER/NAME of the text model that training started from; empty: init_from, if it begins with hf:
code = ""           # web address of this code, for the card
dry_run = False     # only print the card and the list of files

DEFAULTS = {k: v for k, v in globals().items() if isinstance(v, (bool, str)) and not k.startswith("_")}
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "speech.safetensors")
OTHERS = ("config.json", "tokenizer.json", "units.json", "train.json", "results.json", "evaluation.json")


# ---------------------------------------------------------------------------------------------------------------------
# the files

def is_ours(name):
    """Whether a file of this name belongs to an upload."""
    return any(fnmatch(name, pattern) for pattern in WEIGHTS + OTHERS)


def choose_files(folder):
    """({name in the repository: path}, {name: why it is left out}) of a checkpoint. ValueError for an unusable one."""
    folder = Path(folder)
    if fault := find_fault(folder):
        raise ValueError(f"{folder}: {' '.join(fault)}; give another --checkpoint")
    if not (folder / "speech.safetensors").exists():
        raise ValueError(f"{folder}: a text model without speech.safetensors; give a --checkpoint that train.py wrote")
    files = {path.name: path for path in sorted(folder.iterdir()) if is_ours(path.name)}
    left_out = {path.name: "not part of the model" for path in sorted(folder.iterdir()) if path.name not in files}
    results = folder.parent / "results.json"
    if "train.json" in files and results.exists():
        with reading(folder / "train.json", "not what train.py writes"):
            own = read_json(folder / "train.json")["place"]["total"]
        steps = read_json(results).get("steps")
        if steps == own:
            files["results.json"] = results
        else:
            left_out["results.json"] = f"scores of step {steps}, and this checkpoint is of step {own}"
    if "evaluation.json" in files:
        scored = read_json(folder / "evaluation.json").get("sha256")
        if scored != {name: digest(path) for name, path in files.items() if name.endswith(".safetensors")}:
            left_out["evaluation.json"] = "scores of other weights"
            del files["evaluation.json"]
    return files, left_out


# ---------------------------------------------------------------------------------------------------------------------
# the card

def make_card(model, files, c):
    """The text of README.md for the repository c.repo. files: as choose_files() returns them. ValueError."""
    training = read_json(files["train.json"]) if "train.json" in files else {}
    with reading(files.get("train.json", "train.json"), "not what train.py writes"):
        parts = [front_matter(training, c), introduction(model, c), numbers(model, files, training),
                 training_data(training)]
    parts += [scores(files, c), usage(c)]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(training, c):
    """The YAML at the beginning, which the hub's search reads (huggingface.co/docs/hub/model-cards)."""
    lines = ["library_name: smoltolk"]
    if c.license:
        lines.append(f"license: {c.license}")
    init_from = training.get("settings", {}).get("init_from", "")
    base = c.base_model or (parse_name(init_from).repo if init_from.startswith("hf:") else "")
    if base:
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- smoltolk", "- speech-language-model", "- speech-units"]
    return "\n".join(["---", *lines, "---"])


def introduction(model, c):
    written = f"[smoltolk]({c.code})" if c.code else "smoltolk"
    licence = "" if c.license else "\n\nThe license of the weights is not stated."
    return f"""# {c.repo.partition("/")[2]}

A text-speech language model of the SmolTolk family ([Cuervo et al., 2025](https://arxiv.org/abs/2503.06211)),
made with {written}. A Llama text decoder reads and predicts text tokens. The modules that SmolTolk adds to it also
read and predict {model.config.n_units} discrete speech units. The model continues text or speech in either modality.
It is a base model: it has not been trained to follow instructions or to be safe.{licence}"""


def numbers(model, files, training):
    """A table of sizes and of the course of training."""
    config, (n_text, n_speech) = model.config, count_parameters(model)
    rows = [["parameters of the text backbone", f"{n_text:,}"], ["parameters added for speech", f"{n_speech:,}"],
            ["layers, width", f"{config.num_hidden_layers}, {config.hidden_size}"],
            ["layers of the input adapter, of the output adapter",
             f"{config.input_adapter_layers}, {config.output_adapter_layers}"],
            ["layer pooling, residual", f"{config.layer_pooling}, {'yes' if config.residual else 'no'}"],
            ["positions", f"{config.max_position_embeddings:,}"]]
    if "units.json" in files:
        units = read_json(files["units.json"])
        about = f"{units.get('n_units')} of kind {units.get('kind')}, {units.get('rate')} a second"
        rows.append(["speech units", f"{about}, hash {str(units.get('hash'))[:16]}"])
    if training:
        settings, place = training["settings"], training["place"]
        rows += [["training started from", shown(settings["init_from"]) or "new weights"],
                 ["training steps", f"{place['total']:,}"], ["training tokens", f"{place['tokens']:,}"],
                 ["tokens in a step, in a sequence", f"{settings['batch_tokens']:,}, {settings['sequence_length']:,}"],
                 ["optimizer, precision", f"{settings['optimizer']}, {place.get('dtype', settings['dtype'])}"]]
    return "\n".join(["## The model", "", *report.markdown_table(["what", "value"], *rows)]).rstrip()


def shown(path):
    """A path as the card shows it: without the folders of this machine above it."""
    parts = Path(path).parts
    return Path(path).name if Path(path).is_absolute() or ".." in parts else str(path)


def training_data(training):
    """Tables of the stages and of the data sets; "" if the checkpoint has no train.json."""
    if not training:
        return ""
    settings, stages, sets = training["settings"], [], []
    for name, stage in settings["stages"].items():
        mixture = ", ".join(f"{parts} {kind}" for kind, parts in stage["mixture"].items())
        stages.append([name, f"{stage['steps']:,}", mixture, stage["train"], f"{stage['learning_rate']:g}",
                       f"{stage['speech_learning_rate']:g}"])
    used = {kind for stage in settings["stages"].values() for kind in stage["mixture"]}
    for kind in ("text", "speech", "interleaved"):
        folders = settings[kind] if kind in used else []
        for folder in folders:
            weight = f"{folders[folder]:g}" if isinstance(folders, dict) else "by size"
            sets.append([kind, shown(folder), weight])
    header = ["stage", "steps", "mixture", "trained weights", "learning rate", "of the speech modules"]
    return "\n".join(["## Training", "", *report.markdown_table(header, *stages),
                      *report.markdown_table(["kind", "data set", "weight"], *sets)]).rstrip()


def scores(files, c):
    """The results of the run and of evaluate.py; "" if there are none. ValueError for a damaged file."""
    parts = []
    if "results.json" in files:
        with reading(files["results.json"], "not the results of a run"):
            table = report.as_text(read_json(files["results.json"]))
        parts.append(f"At the end of training, on held-out data (± is the standard error):\n\n```\n{table}\n```")
    if "evaluation.json" in files:
        with reading(files["evaluation.json"], "not what evaluate.py writes"):
            results = read_json(files["evaluation.json"]) | dict(checkpoint=c.repo, versus=None)
            parts.append(report.as_markdown(results).strip())
    return "\n\n".join(["## Results", *parts]) if parts else ""


def usage(c):
    """How to load the model, with commands that can be copied."""
    return f"""## Use

With the code of smoltolk, in its folder:

```sh
python sample.py --checkpoint=hf:{c.repo} --prompt="Once upon a time" --to=text
python sample.py --checkpoint=hf:{c.repo} --prompt=question.wav --to=speech --units=UNITS --out=answer.wav
python evaluate.py --checkpoint=hf:{c.repo} --blimp=blimp/data --out=evaluation.json
```

```python
from model import from_pretrained
from runtime.hub import local_folder

model = from_pretrained(local_folder("hf:{c.repo}")).eval()
```

UNITS is a folder of the speech units with which the model was trained; `units.json` describes them. `config.json` and
`model.safetensors` are a plain Llama, which transformers opens. It gets the text backbone alone, without the modules in
`speech.safetensors`:

```python
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

backbone = AutoModelForCausalLM.from_pretrained("{c.repo}")
tokenizer = PreTrainedTokenizerFast.from_pretrained("{c.repo}")
```"""


# ---------------------------------------------------------------------------------------------------------------------
# the upload

def upload(files, card, c):
    """Upload everything in one commit -> its address. SystemExit."""
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError:
        raise SystemExit("huggingface_hub is missing: pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(c.repo, private=c.private or None, exist_ok=True)
        info = api.model_info(c.repo)
        if c.private and not info.private:
            raise SystemExit(f"{c.repo}: exists and is public; make it private on the hub, or leave --private out")
        operations = [CommitOperationAdd("README.md", card.encode())]
        operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        there = [file.rfilename for file in info.siblings or []]
        operations += [CommitOperationDelete(name) for name in there if is_ours(name) and name not in files]
        return api.create_commit(c.repo, operations, commit_message="Upload a checkpoint of smoltolk").commit_url
    except Exception as error:  # of many types: of huggingface_hub, of the http library, of the disk
        raise SystemExit(f"{c.repo}: cannot be uploaded ({one_line(error)}); check the name, and run `hf auth login`"
                         f" with a token that may write there") from None


def check_settings(c):
    """SystemExit for invalid settings."""
    for key, example in (("checkpoint", "out/train_tiny"), ("repo", "OWNER/NAME")):
        if not getattr(c, key):
            raise SystemExit(f"{key}: not set; give --{key}={example}")
    for key in ("repo", "base_model"):
        value = getattr(c, key)
        if value and not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", value):
            raise SystemExit(f"{key}={value}: not a name on the hub; give --{key}=OWNER/NAME")
    if not re.fullmatch(r"[a-z0-9.+-]*", c.license):
        raise SystemExit(f"license={c.license}: not one of the hub's names, which huggingface.co/docs/hub/"
                         f"repositories-licenses lists; give for example --license=apache-2.0")


def main(argv):
    settings, _ = configure(DEFAULTS, argv)
    c = SimpleNamespace(**settings)
    check_settings(c)
    try:
        folder = newest_checkpoint(c.checkpoint)
        files, left_out = choose_files(folder)
        card = make_card(from_pretrained(folder), files, c)
    except ValueError as error:  # its message names the file and the fault
        raise SystemExit(str(error)) from None
    if c.dry_run:
        print(card)
    print(f"{folder}: to {c.repo}")
    print(f"  {len(card.encode()) / 1e6:10.3f} MB  README.md")
    for name, path in files.items():
        print(f"  {path.stat().st_size / 1e6:10.3f} MB  {name}")
    for name, reason in left_out.items():
        print(f"  left out: {name} ({reason})")
    if not c.dry_run:
        print(f"uploaded: {upload(files, card, c)}")


if __name__ == "__main__":
    main(sys.argv[1:])
