"""hf:OWNER/NAME is fetched and checked, and a checkpoint is uploaded with its card. The hub is a small local server."""
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model import Config, SmolTolk, from_pretrained, save_pretrained
from runtime.hub import local_folder
from tools import push

hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00002-of-00002.safetensors"
TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            n_units=5, input_adapter_layers=1, output_adapter_layers=1)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small model, as save_pretrained writes it, with a tokenizer."""
    from corpora import demo

    folder = tmp_path_factory.mktemp("model") / "small"
    folder.mkdir()
    demo.train_tokenizer(["Once upon a time there was a fox."] * 9, 270, folder / "tokenizer.json")
    ids = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    torch.manual_seed(1)
    save_pretrained(SmolTolk(Config(vocab_size=ids, **TINY)).start_new_modules("default"), folder)
    return folder


@pytest.fixture
def contents(model_folder):
    return {path.name: path.read_bytes() for path in model_folder.iterdir()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def fill(cache, files, revision="main"):
    """Write a repository me/small into the cache, laid out as huggingface_hub does it -> the folder of the snapshot."""
    storage = cache / "models--me--small"
    snapshot = storage / "snapshots" / COMMIT
    for name, contents in files.items():
        blob, link = storage / "blobs" / hashlib.sha256(contents).hexdigest(), snapshot / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(contents)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (storage / "refs").mkdir()
    (storage / "refs" / revision).write_text(COMMIT)
    return snapshot


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def sharded(contents):
    """The same files with an index of two shards, of which the second one holds nothing that is new."""
    files = dict(contents)
    files["model-00001-of-00002.safetensors"] = files[SHARD] = files.pop("model.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": SHARD}
    return files | {"model.safetensors.index.json": json.dumps(dict(weight_map=shards)).encode()}


# names and the cache

def test_other_names_are_returned_as_they_are_and_need_no_package(tmp_path):
    path = Path("out/hf:x")
    assert local_folder("out/train_tiny") == "out/train_tiny" and local_folder("") == "" and local_folder(path) is path
    code = ("import sys; from runtime.hub import local_folder; assert local_folder('weights/a') == 'weights/a';"
            "assert 'huggingface_hub' not in sys.modules;"
            "sys.modules['huggingface_hub'] = None; local_folder('hf:a/b')")
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert end.stderr == "hf:a/b: huggingface_hub is missing: pip install huggingface_hub\n"


@pytest.mark.parametrize("name", ["hf:small", "hf:", "hf://me/small", "hf:me/small@", "hf:me/small/../x", "hf:a/b//c"])
def test_names_that_cannot_be_on_the_hub(name, cache):
    with pytest.raises(SystemExit, match=f"^{re.escape(name)}: not a name on the hub; write hf:OWNER/NAME"):
        local_folder(name)


def test_a_cached_model_loads_without_a_network(cache, contents, model_folder):
    snapshot = fill(cache, contents)
    found = local_folder("hf:me/small")
    assert found == hub.snapshot_download("me/small", local_files_only=True) == str(snapshot)
    ours, theirs = from_pretrained(found).state_dict(), from_pretrained(model_folder).state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert local_folder(f"hf:me/small@{COMMIT}") == local_folder("hf:me/small/") == found
    assert local_folder("hf:me/small/tokenizer.json") == str(snapshot / "tokenizer.json")
    with pytest.raises(SystemExit, match="the folder is missing in the cache.*`hf download me/small --revision v2`"):
        local_folder("hf:me/small@v2")


def test_parts_of_a_repository_and_other_kinds_of_folders(cache, contents):
    units = json.dumps(dict(kind="mel", n_units=3)).encode()
    text = dict(format=1, kind="text", documents=1, text=dict(tokens=2, vocab_size=9, eos=0, tokenizer="x"))
    files = {f"tolk/{name}": data for name, data in contents.items()}
    files |= {"units/units.json": units, "units/centroids.npy": npy(np.ones((3, 2), np.float32)),
              "set/meta.json": json.dumps(text).encode(), "set/documents.npy": npy(np.array([0, 2]))}
    snapshot = fill(cache, files, revision="v2")
    assert from_pretrained(local_folder("hf:me/small@v2/tolk")).config.n_units == 5
    assert local_folder("hf:me/small@v2/units") == str(snapshot / "units")
    for name, missing in (("set", "text.npy is missing"), ("", "config.json is missing"), ("x", "folder is missing")):
        with pytest.raises(SystemExit, match=missing):
            local_folder(f"hf:me/small@v2/{name}")
    with pytest.raises(SystemExit, match="`hf download me/small --include 'set/\\*' --revision v2`"):
        local_folder("hf:me/small@v2/set")


def drop(name):
    return lambda snapshot: (snapshot / name).unlink()


def replace(name, change):
    """Replace a file's contents in the cache."""
    def damage(snapshot):
        blob = (snapshot / name).resolve()
        blob.write_bytes(change(blob.read_bytes()))
    return damage


def interrupt(name):
    """Let a link point to an unfinished download."""
    def damage(snapshot):
        blob = (snapshot / name).resolve()
        blob.rename(f"{blob}.incomplete")
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(f"{blob}.incomplete")
    return damage


@pytest.mark.parametrize("damage, message", [
    (drop("config.json"), "config.json is missing"),
    (drop(SHARD), f"{SHARD} is missing"),
    (drop("speech.safetensors"), "speech.safetensors is missing"),
    (drop("tokenizer.json"), "tokenizer.json is missing"),
    (lambda snapshot: (snapshot / SHARD).resolve().unlink(), "safetensors is a link to a file that is missing"),
    (interrupt("speech.safetensors"), "speech.safetensors is a download that was interrupted"),
    (replace("speech.safetensors", lambda data: b""), "speech.safetensors is empty"),
    (replace("speech.safetensors", lambda data: data[:-1]), "speech.safetensors is damaged: cannot be read (Safe"),
    (replace("speech.safetensors", lambda data: data[:9]), "speech.safetensors is damaged: cannot be read"),
    (replace("config.json", lambda data: data[:-1]), "config.json is damaged: no readable json"),
    (replace("model.safetensors.index.json", lambda data: b"{}"), "index.json is damaged: lists no shards"),
    (replace("model.safetensors.index.json", lambda data: b'{"weight_map": {"a": [1]}}'), "damaged: lists no shards"),
])
def test_a_snapshot_that_is_not_complete_is_refused(cache, contents, damage, message):
    snapshot = fill(cache, sharded(contents))
    assert local_folder("hf:me/small") == str(snapshot)
    damage(snapshot)
    assert hub.snapshot_download("me/small") == str(snapshot)  # returned as if it were complete
    with pytest.raises(SystemExit) as end:
        local_folder("hf:me/small")
    assert str(end.value).startswith("hf:me/small: ") and "\n" not in str(end.value) and message in str(end.value)
    assert "(HF_HUB_OFFLINE is set); on a machine with a network run `hf download me/small`" in str(end.value)


def test_offline_and_not_in_the_cache(cache):
    with pytest.raises(SystemExit) as end:
        local_folder("hf:me/small")
    assert str(end.value) == (
        "hf:me/small: the folder is missing in the cache, and cannot be fetched here (HF_HUB_OFFLINE is set); on a"
        " machine with a network run `hf download me/small`, then copy models--me--small with its links from the cache"
        f" there, usually ~/.cache/huggingface/hub, to {cache} here")


# downloads, from a server that answers as the hub does

class Hub(BaseHTTPRequestHandler):
    """The three requests of a download: the commit of a revision, the files of a commit, one file."""

    def reply(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        files, path = self.server.files, self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        if not path.removeprefix("/api/models").startswith(("/me/small", "/me/gated", "/me/closed")):
            return self.reply(status=404, X_Error_Code="RepoNotFound")
        if path.endswith("/revision/v9"):
            return self.reply(status=404, X_Error_Code="RevisionNotFound")
        if "/resolve/" in path and "gated" in path:
            return self.reply(status=403, X_Error_Code="GatedRepo")
        if "/resolve/" in path and "closed" in path:
            return self.reply(status=403)
        if "/resolve/" in path:
            body = files[path.partition("/resolve/")[2].partition("/")[2]]
            return self.reply(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=self.server.commit)
        tree = [dict(type="file", path=name, size=len(body), oid=hashlib.sha1(body).hexdigest())
                for name, body in files.items()]
        about = dict(id="me/small", sha=self.server.commit, siblings=[dict(rfilename=name) for name in files])
        self.reply(json.dumps(tree if "/tree/" in path else about).encode())

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(cache, contents, monkeypatch):
    """A hub with the repository me/small. Its files can be changed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.commit, server.requests = dict(contents), COMMIT, []
    Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in dict(ENDPOINT=address, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(constants, name, value, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    server.shutdown()
    server.server_close()


def test_only_what_is_read_is_downloaded_and_only_once(server, cache, model_folder):
    server.files |= {"pytorch_model.bin": b"pickle", "flax_model.msgpack": b"x", "README.md": b"x", "a.pkl": b"x",
                     "old/model.safetensors": b"x", "units/units.json": b'{"n_units": 5}', "units/deep/a.json": b"x",
                     "units/centroids.npy": npy(np.ones((5, 2), np.float32))}
    found = Path(local_folder("hf:me/small"))
    assert {path.name for path in found.iterdir()} == {path.name for path in model_folder.iterdir()}
    assert all((found / path.name).read_bytes() == path.read_bytes() for path in model_folder.iterdir())
    units = Path(local_folder("hf:me/small/units"))
    assert {path.name for path in units.iterdir()} == {"units.json", "centroids.npy"}
    asked = len(server.requests)
    assert asked and local_folder("hf:me/small") == str(found) and len(server.requests) == asked


def test_an_incomplete_snapshot_is_completed(server, cache, contents):
    snapshot = fill(cache, contents)
    (snapshot / "speech.safetensors").unlink()
    (snapshot / "config.json").resolve().unlink()
    assert from_pretrained(local_folder("hf:me/small")).config.n_units == 5
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])  # huggingface_hub does not look into files that it has
    with pytest.raises(SystemExit, match="model.safetensors is damaged: .*; fetch it again with `hf download me/small"
                                         " model.safetensors --force-download`$"):
        local_folder("hf:me/small")


def test_repositories_that_cannot_be_had(server, cache):
    address = constants.ENDPOINT
    for name, message in {
            "hf:me/smal": "no such repository, or a private one; check the spelling, or run `hf auth login` to read"
                          " your own",
            "hf:me/small@v9": f"no branch, tag or commit v9; choose one at {address}/me/small, or leave @v9 out",
            "hf:me/gated": f"its owner gives access on request; ask for it at {address}/me/gated, then run `hf auth"
                           " login` here",
            "hf:me/closed": f"the hub refuses access (403); run `hf auth login` with a token that may read {address}",
            "hf:me/sm--all": "not a name that the hub allows",
            "hf:me/small/units": "the folder is missing; the repository has no units; give another name"}.items():
        with pytest.raises(SystemExit, match=f"^{re.escape(name)}: {re.escape(message)}") as end:
            local_folder(name)
        assert "\n" not in str(end.value)
    server.files["pytorch_model.bin"], server.commit = server.files.pop("model.safetensors"), "1" * 40
    with pytest.raises(SystemExit, match="model.safetensors is missing; the repository has pickles instead"):
        local_folder("hf:me/small")
    server.files, server.commit = {"README.md": b"x"}, "2" * 40
    with pytest.raises(SystemExit, match="the folder is missing; the repository has no file that ends in .json"):
        local_folder("hf:me/small")


def test_a_hub_that_does_not_answer(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match=r"cannot be fetched here \(ConnectError.*`hf download me/small`"):
        local_folder("hf:me/small")


# uploads

STAGES = dict(stage1=dict(steps=1000, mixture=dict(interleaved=1), train="new", learning_rate=3e-4,
                          speech_learning_rate=3e-3),
              stage2=dict(steps=14259, mixture=dict(speech=1, interleaved=2), train="all", learning_rate=3e-4,
                          speech_learning_rate=3e-4))
SETTINGS = dict(init_from="hf:HuggingFaceTB/SmolLM-135M@v1", text=["data/not-used"], speech=["/mnt/me/librispeech"],
                interleaved={"data/libriheavy": 0.4, "../x/swc": 0.1}, stages=STAGES, batch_tokens=2**20,
                sequence_length=2048, optimizer="adamw", dtype="auto")
RESULTS = dict(steps=15259, nll=dict(text=dict(text=2.125)))


@pytest.fixture
def run(tmp_path, contents):
    """The folder of a run with one checkpoint, its results, and its scores on a benchmark."""
    folder = tmp_path / "run" / "checkpoint-00015259"
    folder.mkdir(parents=True)
    units = dict(kind="hubert", n_units=5, rate=25, hash="abcdef0123456789" * 4)
    place = dict(total=15259, tokens=16_000_221_184, dtype="bfloat16")
    evaluation = dict(checkpoint="/home/me/run", parameters=1000, tokens=16_000_221_184, versus=dict(checkpoint="/"),
                      sha256={name: hashlib.sha256(contents[name]).hexdigest() for name in contents if "safe" in name},
                      made=dict(blimp=dict(protocol=dict(score="sum"))),
                      blimp=dict(accuracy=81.25, stderr=0.5, items=67000))
    texts = {"units.json": units, "train.json": dict(place=place, settings=SETTINGS), "evaluation.json": evaluation,
             "../results.json": RESULTS}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "optimizer.safetensors").write_bytes(contents["speech.safetensors"])
    (folder / "evaluation.items").mkdir()
    return folder.parent


COMMIT_URL = "https://huggingface.co/me/small/commit/1234567"
UPLOADED = {"config.json", "model.safetensors", "speech.safetensors", "tokenizer.json", "units.json", "train.json",
            "results.json", "evaluation.json"}


def test_a_dry_run_prints_the_card_and_the_files(run, capsys, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)
    push.main([f"--checkpoint={run}", "--repo=me/small", "--license=apache-2.0", "--dry_run=true",
               "--code=https://example.org/code"])
    printed = capsys.readouterr().out
    card, _, listed = printed.partition(f"{run}/checkpoint-00015259: to me/small\n")
    data = hub.ModelCard(card).data.to_dict()
    assert data.pop("tags") and data == dict(library_name="smoltolk", license="apache-2.0",
                                             base_model="HuggingFaceTB/SmolLM-135M")
    weights = [load_file(run / "checkpoint-00015259" / f"{stem}.safetensors") for stem in ("model", "speech")]
    sizes = [int(number.replace(",", "")) for number in re.findall(r"\| parameters .* \| (.*) \|", card)]
    assert sizes == [sum(tensor.numel() for tensor in part.values()) for part in weights]
    for part in ("5 of kind hubert, 25 a second, hash abcdef0123456789 |", "| training tokens | 16,000,221,184 |",
                 "| training started from | hf:HuggingFaceTB/SmolLM-135M@v1 |", "| adamw, bfloat16 |",
                 "| stage2 | 14,259 | 1 speech, 2 interleaved | all | 0.0003 | 0.0003 |",
                 "| speech | librispeech | by size |", "| interleaved | data/libriheavy | 0.4 |", "2.125",
                 "| interleaved | swc | 0.1 |", "| blimp | 81.25 ± 0.5 | 67000 items | score=sum |",
                 "[smoltolk](https://example.org/code)", "sample.py --checkpoint=hf:me/small"):
        assert part in card, part
    for part in ("not-used", "/mnt", "/home", "is not stated"):
        assert part not in card, part
    assert set(re.findall(r"MB  (.*)", listed)) == UPLOADED | {"README.md"}
    assert "left out: optimizer.safetensors (not part of the model)" in listed
    assert "left out: evaluation.items (not part of the model)" in listed


def test_the_python_in_a_card_runs(run, cache, contents, capsys, model_folder):
    pytest.importorskip("transformers")
    push.main([f"--checkpoint={run}", "--repo=me/small", "--dry_run=true"])
    fill(cache, contents)
    code = "\n".join(re.findall(r"```python\n(.*?)```", capsys.readouterr().out, re.DOTALL))
    names = {}
    exec(code, names)
    ids = torch.tensor([names["tokenizer"].encode("Once upon a time")])
    with torch.no_grad():
        theirs, out = names["backbone"](ids).logits, names["model"](ids)
    torch.testing.assert_close(theirs, names["model"].text_logits(out.text))


class Api:
    """Records the calls that push makes to huggingface_hub's HfApi."""
    calls = []
    private = True

    def create_repo(self, repo, **options):
        self.calls.append(("create_repo", repo, options))

    def model_info(self, repo):
        there = ("README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.json")
        return hub.ModelInfo(id=repo, private=self.private, siblings=[dict(rfilename=name) for name in there], tags=[])

    def create_commit(self, repo, operations, commit_message):
        self.calls.append(("create_commit", repo, operations))
        return hub.CommitInfo(commit_url=COMMIT_URL, commit_message="", commit_description="", oid="")


@pytest.fixture
def api(monkeypatch):
    class Recorder(Api):
        calls = []
    monkeypatch.setattr(hub, "HfApi", Recorder)
    return Recorder


def test_an_upload_is_one_commit(run, api, capsys):
    push.main([f"--checkpoint={run}", "--repo=me/small", "--private=true"])
    (_, *created), (_, repo, operations) = api.calls
    assert created == ["me/small", dict(private=True, exist_ok=True)] and repo == "me/small"
    added = {op.path_in_repo: op.path_or_fileobj for op in operations if isinstance(op, hub.CommitOperationAdd)}
    gone = {op.path_in_repo for op in operations if isinstance(op, hub.CommitOperationDelete)}
    assert added.keys() == UPLOADED | {"README.md"} and b"# small\n" in added["README.md"]
    assert added["results.json"] == f"{run}/results.json"
    assert gone == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}  # they would be read first
    assert f"uploaded: {COMMIT_URL}" in capsys.readouterr().out


def test_what_is_not_uploaded(run, api, capsys, monkeypatch):
    folder = run / "checkpoint-00015259"
    (run / "results.json").write_text(json.dumps(RESULTS | dict(steps=20000)))
    scores = json.loads((folder / "evaluation.json").read_text()) | dict(sha256={"model.safetensors": "0"})
    (folder / "evaluation.json").write_text(json.dumps(scores))
    push.main([f"--checkpoint={run}", "--repo=me/small", "--dry_run=true"])
    printed = capsys.readouterr().out
    assert "results.json (scores of step 20000, and this checkpoint is of step 15259)" in printed
    assert "evaluation.json (scores of other weights)" in printed and "## Results" not in printed
    monkeypatch.setattr(api, "private", False)
    with pytest.raises(SystemExit, match="me/small: exists and is public"):
        push.main([f"--checkpoint={folder}", "--repo=me/small", "--private=true"])
    monkeypatch.setattr(api, "model_info", lambda self, repo: 1 / 0)
    with pytest.raises(SystemExit, match=r"me/small: cannot be uploaded \(ZeroDivisionError.*hf auth login"):
        push.main([f"--checkpoint={folder}", "--repo=me/small"])
    assert [call[0] for call in api.calls] == ["create_repo", "create_repo"]


@pytest.mark.parametrize("change, arguments, message", [
    (None, ["--repo="], "repo: not set; give --repo=OWNER/NAME"),
    (None, ["--checkpoint="], "checkpoint: not set; give --checkpoint=out/train_tiny"),
    (None, ["--repo=small"], "repo=small: not a name on the hub; give --repo=OWNER/NAME"),
    (None, ["--license=MIT license"], "license=MIT license: not one of the hub's names"),
    (None, ["--checkpoint=nowhere"], "nowhere: no checkpoint here"),
    (drop("tokenizer.json"), [], "tokenizer.json is missing; give another --checkpoint"),
    (replace("speech.safetensors", lambda data: data[:-1]), ["--checkpoint=checkpoint-00015259"], "is damaged"),
    (replace("train.json", lambda data: b'{"place": {"total": 15259}}'), [], "train.json: not what train.py writes"),
    (replace("train.json", lambda data: b"{}"), [], "train.json: not what train.py writes"),
])
def test_bad_checkpoints_and_settings(run, api, monkeypatch, change, arguments, message):
    monkeypatch.chdir(run)
    if change:
        change(run / "checkpoint-00015259")
    with pytest.raises(SystemExit, match=re.escape(message)) as end:
        push.main([f"--checkpoint={run}", "--repo=me/small", *arguments])
    assert "\n" not in str(end.value) and not api.calls
