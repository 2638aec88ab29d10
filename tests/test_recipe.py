"""runs/*.sh and train.py --check: from an empty folder to a training step, on toy files in the real layouts.

Stand-ins for hf, curl and pip copy what a folder "hub" holds under the names that the scripts ask for. Because this
starts many processes, SMOLTOLK_RECIPE=part python -m pytest tests/test_recipe.py runs three steps of train_150m.sh, as
.ci/run does, and SMOLTOLK_RECIPE=all runs all of them.
"""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_convert import dump
from test_corpora import SENTENCES, WORD, record, write
from test_units import vocabulary_folder

import train
from configurator import configure
from model import Config, SmolTolk, save_pretrained
from tools import python_edu
from tools.check import command_for

soundfile = pytest.importorskip("soundfile")
arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parent.parent
RECIPE = os.environ.get("SMOLTOLK_RECIPE")
WHOLE = RECIPE == "all"
MORE = ["fineweb_edu", "aligner", "cosmopedia", "finemath", "librispeech", "librilight", "tedlium", "peoples_speech",
        "voxpopuli", "stinystories", "libriheavy"]
STEPS = ["weights", "units", "swc", *(MORE if WHOLE else [])]
LINKED = "benchmarks config corpora runtime speech studies tools".split()
HF = """#!/bin/bash
# hf download OWNER/NAME [files] [--repo-type dataset] --local-dir FOLDER [--include PATTERNS | --exclude PATTERN]
repository=$2; while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2" && cp -r "$HUB/$repository/." "$2"
"""
CURL = """#!/bin/bash
# curl [options] [-o FILE] URL
for last in "$@"; do :; done
while [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done
if [ "$1" = -o ]; then cp "$HUB/$(basename "$last")" "$2"; else cat "$HUB/$(basename "$last")"; fi
"""
TORCHRUN = """#!/bin/bash
# one process in the place of torchrun, which takes five seconds to start
shift && exec python "$@"
"""


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)


def pack(path, folder, mode):
    """Pack a folder into a tar file, with the name of the folder inside, and remove the folder."""
    with tarfile.open(path, f"w:{mode}") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)


def write_models(hub):
    """A small SmolLM, a HuBERT of twelve layers, a pickled k-means."""
    from corpora import demo
    llm = hub / "HuggingFaceTB/SmolLM-135M"
    save_pretrained(SmolTolk(Config(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=2, num_key_value_heads=1, rope_theta=10_000.0)), llm)
    (llm / "speech.safetensors").unlink()
    config = json.loads((llm / "config.json").read_text())
    del config["smoltolk"]
    (llm / "config.json").write_text(json.dumps(config))
    demo.train_tokenizer(SENTENCES * 3, 300, llm / "tokenizer.json")
    vocabulary_folder(hub, layer=11, num_hidden_layers=12)
    (hub / "slprl").mkdir()
    (hub / "hubert").rename(hub / "slprl/mhubert-base-25hz")
    dump(hub / "mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin", pytest.MonkeyPatch(),
         cluster_centers_=np.load(hub / "km.npy"))
    # with random weights, in the layout of the converted aligner of MMS
    from test_words import write_aligner
    (hub / "MahmoudAshraf").mkdir()
    write_aligner(hub / "MahmoudAshraf/mms-300m-1130-forced-aligner")


def write_text(hub):
    texts = [dict(text=" ".join([SENTENCES[i % 4], SENTENCES[i // 4 % 4], str(i)])) for i in range(3000)]
    for folder in ("smollm-corpus/fineweb-edu-dedup", "smollm-corpus/cosmopedia-v2", "finemath/finemath-4plus"):
        write_parquet(hub / f"HuggingFaceTB/{folder}/train-00000-of-00001.parquet", texts)


def write_swc(hub):
    """An article of 24 sentences, each read aloud and aligned."""
    article, first, sentences = hub / "english/Anarchism", 0, []
    texts = SENTENCES * 6
    record(article / "audio.ogg", " ".join(texts))
    for text in texts:
        tokens = []
        for word in text.split():
            tokens.append(f'<t>{word}<n pronunciation="{word}" start="{first}" end="{first + 1000 * WORD:.0f}"/></t>')
            first += round(1000 * WORD)
        sentences.append(f"<s>{' '.join(tokens)}</s>")
    write(article / "aligned.swc", f"<article><d><p>{' '.join(sentences)}</p></d></article>")
    pack(hub / "SWC_English.tar", hub / "english", "")


def write_speech(hub):
    """LibriSpeech, Libri-Light, TED-LIUM, People's Speech, VoxPopuli, sTinyStories and Libriheavy."""
    for part in ("dev-clean", "train-clean-100", "train-clean-360", "train-other-500"):
        folder = hub / "LibriSpeech" / part / "1/2"
        for i in range(4):
            record(folder / f"1-2-000{i}.flac", " ".join(SENTENCES))
        write(folder / "1-2.trans.txt", *(f"1-2-000{i} {' '.join(SENTENCES).upper()}" for i in range(4)))
        pack(hub / f"{part}.tar.gz", hub / "LibriSpeech", "gz")
    cuts = []
    for part in ("small", "medium", "large"):
        record(hub / part / "100/sea_fairies/01_baum.flac", " ".join(SENTENCES * 3))
        pack(hub / f"{part}.tar", hub / part, "")
        name, text = f"{part}/100/sea_fairies/01_baum", " ".join(SENTENCES)
        supervision = dict(custom=dict(texts=[text, text.upper()]))
        cut = dict(id=f"{name}_0", start=0, duration=WORD * len(text.split()), supervisions=[supervision],
                   recording=dict(id=name))
        cuts.append(json.dumps(cut))
    write(hub / "pkufool/libriheavy/libriheavy_cuts_small.jsonl", *cuts)
    for year in range(2009, 2021):
        for part in ("", "_2"):
            record(hub / f"en/{year}{part}/{year}0112-0900-PLENARY_en.ogg", " ".join(SENTENCES))
            pack(hub / f"en_{year}{part}.tar", hub / "en", "")
    talk = hub / "TEDLIUM_release-3/legacy/train"
    record(talk / "sph/AlGore_2009.sph", " ".join(SENTENCES))
    write(talk / "stm/AlGore_2009.stm", "AlGore_2009 1 AlGore 0.00 5.50 <o,f0,male> she had your dark suit")
    pack(hub / "TEDLIUM_release-3.tgz", hub / "TEDLIUM_release-3", "gz")
    wav = hub / "x.flac"
    timed = record(wav, " ".join(SENTENCES))
    sound = dict(bytes=wav.read_bytes(), path="x.flac")
    write_parquet(hub / "MLCommons/peoples_speech/clean/train-00000-of-00001.parquet",
                  [dict(id=str(i), audio=sound, text="she had", duration_ms=1) for i in range(4)])
    words = [dict(word=word, start_time=start, end_time=end) for word, start, end in timed]
    stories = [dict(audio=sound, text=" ".join(SENTENCES), aligned_text=words) for _ in range(2000)]
    write_parquet(hub / "slprl/sTinyStories/data/data-00000-of-00001.parquet", stories)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(an empty checkout, environment): the code is linked into it, and the stand-ins come first in PATH."""
    folder = tmp_path_factory.mktemp("recipe")
    root, hub, tools = folder / "smoltolk", folder / "hub", folder / "bin"
    for path in (root, hub, tools):
        path.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in LINKED:
            (root / path.name).symlink_to(path)
    shutil.copytree(ROOT / "runs", root / "runs")
    for name, script in dict(hf=HF, curl=CURL, torchrun=TORCHRUN, pip="#!/bin/bash\n").items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    write_models(hub)
    write_text(hub)
    write_swc(hub)
    if WHOLE:
        write_speech(hub)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return root, os.environ | dict(PATH=path, HUB=str(hub), GPUS="1", OPTIONS="--workers=0 --device=cpu")


def run(place, *command):
    root, environment = place
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def check(capsys, *options):
    """(exit code, output) of train.py --check."""
    code = 0  # torch's decorator of main() keeps SystemExit(0)
    try:
        train.main(["config/train_150m.py", "--check", *options])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


@pytest.mark.skipif(not RECIPE, reason="takes half a minute: set SMOLTOLK_RECIPE=part")
def test_the_recipe(place, monkeypatch, capsys):
    root, _ = place
    monkeypatch.chdir(root)
    code, said = check(capsys)
    assert code == 1 and said.endswith("problems: 20\n")
    for step in STEPS:
        done = run(place, "bash", "runs/train_150m.sh", step)
        assert done.returncode == 0, f"{step}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    code, said = check(capsys)
    missing = re.findall(r"^missing +\w+: (\S+) does not", said, re.MULTILINE)
    made = ("data/swc", "data/swc-speech", "units/mhubert", "weights/smollm-135m")
    assert code == 1 and not set(made) & set(missing), said
    if WHOLE:
        assert missing == ["data/python-edu"]  # another test has a server for it
        again = run(place, "bash", "runs/train_150m.sh", *STEPS)  # what is done is skipped
        assert again.returncode == 0, again.stderr
    options = [
        "--text=['data/swc']", "--speech=['data/swc-speech']", "--interleaved=['data/swc']",
        "--val_text=[]", "--val_speech=[]", "--val_interleaved=[]",
        "--sequence_length=32", "--batch_tokens=192", "--micro_batch=2", "--compile=false", "--device=cpu",
        "--stages.stage1.steps=1", "--stages.stage2.steps=1", "--eval_sequences=2", "--text_span=[1,3]"]
    code, said = check(capsys, *options)
    assert code == 0 and said.endswith("training would start\n"), said
    train.main(["config/train_150m.py", *options])
    assert "rope_theta: 10000.0 -> 100000.0" in capsys.readouterr().out and Path("out/train_150m/results.json").exists()
    code, said = check(capsys, *options)
    assert code == 1 and "out_dir: out/train_150m holds a run already" in said
    code, said = check(capsys, *options, "--out_dir=out/x", "--val_text=['data/swc']", "--resume=true")
    assert "data/swc and data/swc are from the same files" in said and "out/x has no checkpoint to go on from" in said
    (root / "data/swc").joinpath("shard-0-of-1-00000").rename(root / "data/swc/shard-0-of-2-00000")
    code, said = check(capsys, *options, "--out_dir=out/x")
    assert code == 1 and "data/swc: shards 1 of 2 are not finished" in said


def test_every_folder_of_the_configs_has_a_command():
    """train.py --check finds the step of a script for whatever the paper's configs need."""
    for config in sorted((ROOT / "config").glob("*.py")):
        settings, _ = configure(train.DEFAULTS, [str(config)], train.complete_stages)
        if settings["demo"] or "smollm2" in config.stem:
            continue
        named = [settings[key] for key in ("tokenizer", "units", "init_from")]
        for kind in ("text", "speech", "interleaved", "val_text", "val_speech", "val_interleaved"):
            named += settings[kind]
        for path in named:
            script, step = re.fullmatch(r"(?:MODEL=\S+ )?bash (runs/\w+\.sh) (\w+)", command_for(path)).groups()
            assert re.search(rf"^{step}\(\)", (ROOT / script).read_text(), re.MULTILINE), path


def test_the_files_of_python_edu(tmp_path, capsys, monkeypatch):
    """A server in the place of Software Heritage, which lacks a file, has one that is cut, and one that is no UTF-8."""
    monkeypatch.setattr(python_edu.time, "sleep", lambda seconds: None)
    files = {f"id{i}": gzip.compress(f"print({i})\n".encode()) for i in range(7)}
    files |= dict(id1=files["id1"][:-5], id2=gzip.compress(b"# caf\xe9\n"))

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path.removeprefix("/content/")) if self.path != "/content/id5" else None
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_):
            pass

    write_parquet(tmp_path / "list/python-edu-0.parquet", [dict(blob_id=f"id{i}", repo_name="x") for i in range(7)])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = [f"--source={tmp_path / 'list'}", f"--out={tmp_path / 'out'}", "--files_a_part=3", "--connections=2",
                 f"--url=http://127.0.0.1:{server.server_port}/content"]
    python_edu.main(arguments)
    assert "3 parts; 2 files could not be had" in capsys.readouterr().out
    lines = [json.loads(line) for path in sorted((tmp_path / "out").glob("*.jsonl.gz")) for line in gzip.open(path)]
    assert {line["blob_id"]: line["text"] for line in lines} == {
        "id0": "print(0)\n", "id2": "# caf\n", "id3": "print(3)\n", "id4": "print(4)\n", "id6": "print(6)\n"}
    assert list(json.loads((tmp_path / "out/00001.missing.json").read_text())) == ["id5"]
    (tmp_path / "out/00001.jsonl.gz").unlink()
    files.clear()  # only the part that is missing is fetched again, and now nothing of it can be had
    with pytest.raises(SystemExit, match="/content: not one of 3 files could be had"):
        python_edu.main(arguments)
    server.shutdown()
