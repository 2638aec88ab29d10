"""checkpoint.py and what train.py makes of them: runs that are killed, stopped, cut off or fed nonsense.

SMOLTOLK_KILLS=200 python -m pytest tests/test_crash.py -k again      more kills than the suite has time for
"""
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ROOT, arguments

import checkpoint
import data
import log
import train

os.environ["PYTHONPATH"] = str(ROOT)  # for the server below, which imports train once and forks from there
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "matplotlib.pyplot"])
KILLS = int(os.environ.get("SMOLTOLK_KILLS", 6))
TIMES = {"seconds", "training_seconds", "tokens_per_second", "mfu"}
# where a run can be hit, and how often the function there is called at most in a whole run
POINTS = {"train.train_step": 17, "train.make_optimizer": 3, "evaluate.heldout_nll": 6, "evaluate.topic_cloze": 6,
          "train.save_checkpoint": 5, "train.write_state": 5, "checkpoint.digest": 60, "checkpoint.to_disk": 90,
          "os.rename": 3, "checkpoint.prune": 6, "shutil.rmtree": 5, "checkpoint.replace_file": 3, "os.replace": 8,
          "log.Log.write": 22, "train.finish": 1, "train.plot_loss": 1}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child(argv, said, hits, environment, ids):
    """A process of a run. hits {point: (n, what)}: at the n-th call there, what is a signal, or an error to raise."""
    os.environ.update(environment)
    with open(said, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    train.plot_loss = lambda out: None  # half of the time
    for point, (n, what) in hits.items():
        *path, name = point.split(".")
        owner = functools.reduce(getattr, path[1:], sys.modules[path[0]])
        setattr(owner, name, hit(getattr(owner, name), n, what))
    if ids:
        make = train.data.sample

        def sample(sources, mixture, seed, stage, index, *more):
            rows, text_rows = make(sources, mixture, seed, stage, index, *more)
            with open(ids, "a") as file:
                for row, i in zip(rows, np.asarray(index)[np.argsort(data.kinds_of(mixture, index) != "text",
                                                                     kind="stable")]):
                    file.write(f"{stage} {i} {hashlib.sha256(row.tobytes()).hexdigest()}\n")
            return rows, text_rows
        train.data.sample = sample
    train.main(argv)


def hit(function, n, what):
    calls = []

    def instead(*args, **kwargs):
        calls.append(0)
        if len(calls) == n:
            if isinstance(what, OSError):
                raise what
            os.kill(os.getpid(), what)
        return function(*args, **kwargs)
    return instead


class Started:
    """The processes of a run."""

    def __init__(self, argv, said, hits=None, processes=1, ids="", **more):
        hits = hits if isinstance(hits, list) else [hits or {}] * processes
        port, self.said = str(free_port()), Path(said)
        self.said.touch()  # a process may be killed before it opens it
        self.began = self.said.stat().st_size
        self.all = []
        for rank in range(processes):
            env = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port, **more) if processes > 1 else {}
            args = argv[rank] if isinstance(argv[0], list) else argv
            self.all.append(FORK.Process(target=child, args=(args, str(said), hits[rank], env, ids), daemon=True))
            self.all[-1].start()

    def kill(self):
        for process in self.all:
            process.kill()
        return self.end()

    def end(self, limit=100):
        """(exit codes, what was said)"""
        for process in self.all:
            process.join(limit)
            assert process.exitcode is not None, "it hangs: " + self.said.read_text()[self.began:]
        return [process.exitcode for process in self.all], self.said.read_text(errors="replace")[self.began:]


def start(demo_folder, out, hits=None, processes=1, ids="", **more):
    usual = dict(log_interval=2, keep_checkpoints=2, eval_cloze_items=2)  # all items are most of a run's time
    argv = arguments(demo_folder, out, **usual | {"resume": len(checkpoint.checkpoints(out)) > 0} | more)
    return Started(argv, out.with_suffix(".said"), hits, processes, ids)


def left(out):
    """All that a finished run has left and that does not depend on the clock, to the bit."""
    def still(x):
        return {k: still(v) for k, v in x.items() if k not in TIMES} if isinstance(x, dict) else x
    found = {f"{folder.name}/{name}": hashlib.sha256((folder / name).read_bytes()).hexdigest()
             for folder in checkpoint.checkpoints(out) for name in ("model.safetensors", "speech.safetensors",
                                                                    "optimizer.safetensors", "config.json")}
    places = [json.loads((f / "train.json").read_text())["place"] for f in checkpoint.checkpoints(out)]
    found["places"] = [still(p) for p in places]
    found["log"] = [still(line) for line in log.read_log(out)]
    found["results"] = still(json.loads((out / "results.json").read_text()) | dict(config=""))
    return found


@pytest.fixture(scope="module")
def whole(demo_folder, tmp_path_factory):
    """(the folder of one undisturbed run, what it has left, seconds that it took)"""
    out, began = tmp_path_factory.mktemp("crash") / "whole", time.monotonic()
    codes, said = start(demo_folder, out).end()
    assert codes == [0], said
    return out, left(out), time.monotonic() - began


def copy_until(whole, out, step):
    """A run that has come to a checkpoint, with what came after it in the log, as a crash leaves it."""
    shutil.copytree(whole, out)
    (out / "results.json").unlink()
    for folder in checkpoint.checkpoints(out):
        if int(folder.name[11:]) > step:
            shutil.rmtree(folder)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# killed

def test_killed_again_and_again(whole, demo_folder, tmp_path):
    """Three kinds of moments: any; at the n-th call of a function; and again at once when it goes on."""
    draw, kills, runs = random.Random(int(os.environ.get("SMOLTOLK_SEED", 0))), 0, 0
    while kills < KILLS:
        out, runs = tmp_path / f"run{runs}", runs + 1
        for _ in range(draw.randint(3, 9)):
            if draw.random() < 0.3:
                process = start(demo_folder, out)
                time.sleep(draw.random() * whole[2])
                codes, said = process.kill()
            else:
                point = draw.choice(list(POINTS))
                n = draw.randint(1, POINTS[point])
                codes, said = start(demo_folder, out, {point: (n, signal.SIGKILL)}).end()
            assert codes in ([0], [-signal.SIGKILL]), said
            kills += codes == [-signal.SIGKILL]
            if codes == [0]:
                break
        codes, said = start(demo_folder, out).end()
        assert codes == [0], said
        assert left(out) == whole[1], said
        assert not list(out.glob(".*.[0-9]*")), "nothing half written is left"
        print(f"{kills} kills in {runs} runs", flush=True)


def test_killed_on_two_processes_goes_on_on_one_and_on_four(whole, demo_folder, tmp_path):
    def ids(path):
        return set(path.read_text().splitlines())

    codes, said = start(demo_folder, tmp_path / "all", ids=str(tmp_path / "all.ids")).end()
    assert codes == [0], said
    first = start(demo_folder, tmp_path / "two", {"train.write_state": (3, signal.SIGKILL)}, 2,
                  str(tmp_path / "two.ids"), micro_batch=4)
    assert first.end()[0] == [-signal.SIGKILL, 1]
    assert [f.name for f in checkpoint.checkpoints(tmp_path / "two")] == ["checkpoint-00000004", "checkpoint-00000005"]
    for n in (1, 4):
        out = tmp_path / f"on{n}"
        shutil.copytree(tmp_path / "two", out)
        codes, said = start(demo_folder, out, None, n, str(tmp_path / f"{n}.ids")).end()
        assert codes == [0] * n, said
        assert ids(tmp_path / "two.ids") | ids(tmp_path / f"{n}.ids") == ids(tmp_path / "all.ids")
        lines = [x for x in log.read_log(out) if "changed" not in x]
        assert [x["changed"]["processes"] for x in log.read_log(out) if "changed" in x] == [[2, n]]
        assert [(x["step"], x["stage"]) for x in lines] == [(x["step"], x["stage"]) for x in whole[1]["log"]]
        for ours, theirs in zip(lines, whole[1]["log"]):
            for key in ("text_nll", "speech_nll", "entropy", "grad_norm", "nll", "tokens"):
                assert log.flat({key: ours.get(key)}) == pytest.approx(log.flat({key: theirs.get(key)}), rel=1e-4), key


# ---------------------------------------------------------------------------------------------------------------------
# stopped

@pytest.mark.parametrize("point, n, step, number", [
    ("train.make_optimizer", 1, 0, signal.SIGTERM),      # before the first step
    ("train.train_step", 7, 7, signal.SIGUSR1),          # amid a stage, between two lines of the log
    ("evaluate.heldout_nll", 2, 5, signal.SIGINT),       # in a validation
    ("evaluate.topic_cloze", 6, 17, signal.SIGTERM)])    # in the final table
def test_a_signal_stops_with_a_checkpoint(whole, demo_folder, tmp_path, point, n, step, number):
    out = tmp_path / "out"
    codes, said = start(demo_folder, out, {point: (n, number)}).end()
    assert codes == [0] and f"{number.name}: stopped after step {step}; go on with\n  python " in said, said
    assert "--hidden_size=32" in said and said.split()[-1] == "--resume=true"
    assert checkpoint.checkpoints(out)[-1].name == f"checkpoint-{step:08d}" and not (out / "results.json").exists()
    again = start(demo_folder, out, {"train.make_optimizer": (1, number)}).end()  # and at once when it goes on
    assert again[0] == [0] and f"stopped after step {step};" in again[1] or step == 17
    codes, said = start(demo_folder, out).end()
    assert codes == [0], said
    ours = left(out)
    assert ours.pop("places")[-1] == whole[1]["places"][-1]  # the one before it may be of the step where it stopped
    assert {key: ours[key] for key in whole[1] if key in ours} == {k: x for k, x in whole[1].items() if k in ours}
    assert {"log", "results", "checkpoint-00000017/model.safetensors"} <= ours.keys()


def test_one_process_hears_a_signal_and_all_stop(demo_folder, tmp_path):
    for hits, steps in (({"train.train_step": (7, signal.SIGTERM)}, (7, 8)),
                        ({"evaluate.heldout_nll": (1, signal.SIGTERM)}, (4, 4))):
        out = tmp_path / str(steps[0])
        codes, said = start(demo_folder, out, [{}, hits], 2).end()
        assert codes == [0, 0] and said.count("go on with") == 1, said
        assert steps[0] <= int(checkpoint.checkpoints(out)[-1].name[11:]) <= steps[1]


# ---------------------------------------------------------------------------------------------------------------------
# files that are not as they should be

def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, harm, message", [
    ("optimizer.safetensors", cut, "optimizer.safetensors has .* bytes, not"),
    ("speech.safetensors", flip, "speech.safetensors is not as it was written"),
    ("train.json", Path.unlink, "train.json: No such file"),
    ("files.json", flip, "it is not used"),
    ("files.json", Path.unlink, "files.json: No such file")])
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capsys, name, harm, message):
    out = shutil.copytree(whole[0], tmp_path / "out")
    harm(out / "checkpoint-00000017" / name)
    folder, bad = checkpoint.newest(out)
    assert folder.name == "checkpoint-00000015" and [b.name for b in bad] == ["checkpoint-00000017"]
    assert re.search(message, capsys.readouterr().err)


def test_going_on_from_the_checkpoint_before_a_bad_one(whole, demo_folder, tmp_path):
    out = copy_until(whole[0], tmp_path / "out", 17)
    flip(out / "checkpoint-00000017" / "model.safetensors")
    codes, said = start(demo_folder, out).end()
    assert codes == [0] and "model.safetensors is not as it was written; it is not used" in said, said
    assert left(out) == whole[1] and (out / "bad-checkpoint-00000017").is_dir()
    for folder in checkpoint.checkpoints(out):
        cut(folder / "config.json")
    codes, said = start(demo_folder, out).end()
    assert codes == [1] and "no checkpoint is whole" in said


def test_a_full_disk(whole, demo_folder, tmp_path):
    """Once: training goes on, and the next checkpoint comes. At the end: the exit code says so."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    codes, said = start(demo_folder, tmp_path / "once", {"train.save_file": (3, full)}).end()
    assert codes == [0] and "checkpoint-00000010: could not be written ([Errno 28] No space left on device)" in said
    assert left(tmp_path / "once") == whole[1]
    codes, said = start(demo_folder, tmp_path / "end", {"checkpoint.prune": (6, full)}).end()
    assert codes == [1] and "checkpoint-00000017: could not be written" in said.splitlines()[-1]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(SystemExit, match="^/proc/x: cannot be written to .*; set another --out_dir$"):
        checkpoint.lock("/proc/x")
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(SystemExit, match="settings.json: cannot be written .Is a directory.; make room there$"):
        checkpoint.replace_file(tmp_path / "settings.json", "{}")


def test_going_on_with_other_data(whole, demo_folder, tmp_path):
    """The same sets elsewhere are the same; another set in the same place is not."""
    def edit(path, change):
        array = np.load(path)
        change(array)
        np.save(path, array)

    moved = tmp_path / "moved"
    shutil.copytree(demo_folder, moved)
    out = copy_until(whole[0], tmp_path / "out", 15)
    codes, said = start(moved, out, eval_cloze_items=50).end()
    assert codes == [0], said
    changed = [x["changed"] for x in log.read_log(out) if "changed" in x]
    assert len(changed) == 1 and changed[0]["eval_cloze_items"] == [2, 50] and "text" in changed[0]
    assert left(out)["checkpoint-00000017/model.safetensors"] == whole[1]["checkpoint-00000017/model.safetensors"]

    out = copy_until(whole[0], tmp_path / "other", 15)
    before = sorted(p.name for p in out.iterdir())
    edit(moved / "text" / "text.npy", lambda array: array.__setitem__(7, array[7] ^ 1))
    codes, said = start(moved, out).end()
    assert codes == [1] and "text[0]=" in said and "resume with the same, or set another --out_dir" in said
    codes, said = start(demo_folder, out, num_hidden_layers=1, seed=2).end()
    assert codes == [1] and "trained with num_hidden_layers=2, not 1; seed=1, not 2; resume with" in said
    assert sorted(p.name for p in out.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# numbers

def test_spikes_are_found():
    draw = np.random.default_rng(0)
    lines = [dict(stage="a", step=i, tokens=i, text_nll=3 - i / 100 + 0.05 * draw.normal(), speech_nll=None,
                  grad_norm=1 + 0.1 * draw.normal()) for i in range(100)]
    assert not any(log.spikes(line, lines[:i]) for i, line in enumerate(lines))
    assert log.spikes(lines[99] | dict(grad_norm=3.0), lines[:99]).keys() == {"grad_norm"}
    assert log.spikes(lines[99] | dict(text_nll=4.0), lines[:99]).keys() == {"text_nll"}
    assert not log.spikes(lines[99] | dict(text_nll=4.0, stage="b"), lines[:99])  # another stage, another level
    assert not log.spikes(lines[99] | dict(text_nll=1.0), lines[:99])  # better is no spike


# ---------------------------------------------------------------------------------------------------------------------
# several processes

def test_a_process_that_dies_ends_all(demo_folder, tmp_path):
    began = time.monotonic()
    codes, said = start(demo_folder, tmp_path / "out", [{}, {"train.train_step": (7, signal.SIGKILL)}], 2).end(60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None) and time.monotonic() - began < 60
    codes, said = start(demo_folder, tmp_path / "err", [{}, {"train.train_step": (7, OSError("here"))}], 2).end(60)
    assert codes == [1, 1] and "OSError: here" in said


@pytest.mark.parametrize("number, all_of_them", [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_a_signal_to_the_launcher(demo_folder, tmp_path, number, all_of_them):
    """To it alone, as Slurm does; or to its process group and all that it has started, as a machine that shuts down."""
    out, port = tmp_path / "out", free_port()
    stages = dict(s=dict(steps=9999, mixture=dict(text=1), train="all", learning_rate=1e-3))
    start = [ROOT / "launch.py", "--nproc_per_node=2", f"--master_port={port}", ROOT / "train.py"]
    argv = arguments(demo_folder, out, stages=stages, cloze="", eval_interval=9999, checkpoint_interval=9999)
    deadline, children = time.monotonic() + 100, []
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen([sys.executable, *start, *argv], stdout=said, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            while (not (out / "log.jsonl").exists() or len(log.read_log(out)) < 3) and time.monotonic() < deadline:
                time.sleep(0.02)
            [listed] = Path(f"/proc/{process.pid}/task").glob(f"{process.pid}/children")
            children = [int(pid) for pid in listed.read_text().split()]
            os.killpg(process.pid, number) if all_of_them else os.kill(process.pid, number)
            for pid in children if all_of_them else ():
                os.kill(pid, number)
            code = process.wait(60)
        finally:
            for pid in [process.pid, *children] if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
        said.seek(0)
        said = said.read()
    last = checkpoint.checkpoints(out)[-1]
    assert code == 0 and f"{number.name}: stopped after step {int(last.name[11:])}; go on with\n" in said, said
    assert said.split("\n  ")[-1].startswith(f"python {ROOT}/launch.py --nproc_per_node=2 {ROOT}/train.py --out_dir=")
    assert len(children) == 2 and not checkpoint.fault(last)
    checkpoint.lock(out).close()  # none of them trains on


def test_two_nodes_and_a_restart_by_torchrun(demo_folder, tmp_path):
    """Two torchruns; the process that holds the lock is killed; they start all again, which goes on by itself."""
    out, port = tmp_path / "out", free_port()
    stages = dict(s=dict(steps=60, mixture=dict(text=1, speech=1), train="all", learning_rate=1e-3))
    argv = arguments(demo_folder, out, stages=stages, eval_interval=1000, log_interval=60)
    command = [sys.executable, str(ROOT / "launch.py"), "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=x",
               "--rdzv_conf=join_timeout=60", "--local_addr=127.0.0.1",
               str(ROOT / "train.py"), *argv]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
             for _ in range(2)]  # without the latter torchrun's nodes may meet in two different stores after a restart
    try:
        deadline = time.monotonic() + 60
        while len(checkpoint.checkpoints(out)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(int((out / ".lock").read_text().split()[0]), signal.SIGKILL)
        said = "".join(node.communicate(timeout=100)[0] for node in nodes)
    finally:
        for node in nodes:
            node.terminate()  # which ends its workers too
    assert [node.returncode for node in nodes] == [0, 0], said[-3000:]
    assert (out / "results.json").exists() and checkpoint.checkpoints(out)[-1].name == "checkpoint-00000060"
    assert said.count("text + ") == 2, "it began twice"


# ---------------------------------------------------------------------------------------------------------------------
# the parts

def test_a_folder_is_whole_or_not_there(tmp_path):
    with checkpoint.whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert checkpoint.fault(tmp_path / "a" / "b") == "" and [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    (tmp_path / "a" / "b" / "more").write_text("of no account")
    assert checkpoint.fault(tmp_path / "a" / "b") == ""
    with pytest.raises(ZeroDivisionError), checkpoint.whole_folder(tmp_path / "c") as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    with pytest.raises(OSError), checkpoint.whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "y").write_text("y")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "files.json", "more", "x"]


def test_which_checkpoints_stay(tmp_path):
    for step in range(5, 101, 5):
        (tmp_path / f"checkpoint-{step:08d}").mkdir()
        checkpoint.prune(tmp_path, 2, 30)
    assert [int(f.name[11:]) for f in checkpoint.checkpoints(tmp_path)] == [30, 60, 90, 95, 100]


