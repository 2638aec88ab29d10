"""Runs that are killed, stopped, restarted, short of disk space, or fed numbers that are not finite.
SMOLTOLK_SEEDS=100 python -m pytest tests/test_crash.py -k killed      more kills than the suite has time for
"""
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from test_train import ROOT, arguments
from torch.distributed.elastic.utils.distributed import get_free_port

import train
from data import kinds_of
from model import SmolTolk
from runtime.checkpoint import checkpoints, fault, newest
from runtime.log import flat, read_log

LAUNCHER = ROOT / "tools/launch.py"
os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
FORK = multiprocessing.get_context("forkserver")  # a server that imports train once and forks every process
FORK.set_forkserver_preload(["train", "tools.figures", "torch._dynamo"])  # every optimizer imports the last
# {function: how often it is called at most in a whole run of 17 steps}
POINTS = {
    "train.schedule": 17, "torch.nn.utils.clip_grad_norm_": 17, "train.heldout_nll": 6, "train.topic_cloze": 6,
    "train.save_checkpoint": 5, "train.save_pretrained": 5, "train.save_file": 5, "runtime.files.to_disk": 50,
    "os.replace": 8, "runtime.checkpoint.prune": 5, "shutil.rmtree": 5, "runtime.log.Log.write": 22}


def child(argv, output, faults, environment):
    """One process of a run. See start for the faults."""
    os.environ.update(environment)
    with open(output, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *argv]
    sys.modules["tools.figures"].loss_curves = lambda out: None  # drawing would take a third of the time
    if "nan" in faults:
        poison(*faults.pop("nan"))
    for name, details in faults.items():
        path, function = name.rsplit(".", 1)
        owner = pkgutil.resolve_name(path)
        setattr(owner, function, interrupted(getattr(owner, function), *details))
    train.main(argv)


def interrupted(function, n, what):
    """The function, with a signal sent or an exception raised before its n-th call."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        is_due = next(calls) == n
        if is_due and isinstance(what, Exception):
            raise what
        if is_due:
            os.kill(os.getpid(), what)
        return function(*args, **kwargs)
    return replacement


def poison(sequence, what):
    """Make the loss of one sequence with speech, or its gradient, NaN."""
    load, forward = train.loader, SmolTolk.forward

    def numbering_loader(*args):
        for step, batches in load(*args):
            for batch in batches:
                batch.ids.numbers = torch.from_numpy(batch.index)
            yield step, batches

    def poisoned_forward(self, ids, targets=None, layout=None, cache=None):
        out = forward(self, ids, targets, layout, cache)
        if not hasattr(ids, "numbers") or layout.speech is None:
            return out
        factor = torch.where(ids.numbers == sequence, torch.nan, 1.0)[layout.speech // ids.size(1)]
        if what == "loss":
            return out._replace(speech_nll=out.speech_nll * factor)
        if out.speech_nll.requires_grad:
            out.speech_nll.register_hook(lambda gradient: gradient * factor)
        return out
    train.loader, SmolTolk.forward = numbering_loader, poisoned_forward


def start(argv, out, faults=None, processes=1):
    """Start the processes of a run as torchrun does, wait for them -> (exit codes, what they printed).

    faults   {function: (n, what)}: before its n-th call a signal is sent, or an exception raised
             {"nan": (sequence, "loss" or "gradient")}: that sequence has a loss or a gradient of NaN
    """
    port, output, started = get_free_port(), out.with_suffix(".output"), []
    output.write_text("")
    for rank in range(processes):
        environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port)) if processes > 1 else {}
        started.append(FORK.Process(target=child, args=(argv, output, faults or {}, environment), daemon=True))
        started[-1].start()
    for process in started:
        process.join(100)
        assert process.exitcode is not None, "it hangs: " + output.read_text()
    return [process.exitcode for process in started], output.read_text(errors="replace")


def go(demo_folder, out, faults=None, processes=1, **settings):
    """Begin the run in `out`, or go on with it if it has a checkpoint -> (exit codes, what was printed)."""
    usual = dict(keep_checkpoints=2, keep_every=4, eval_cloze_items=2, resume=len(checkpoints(out)) > 0)
    return start(arguments(demo_folder, out, **usual | settings), out, faults, processes)


def left(out):
    """Everything that a finished run leaves and that does not depend on the clock."""
    last, results = checkpoints(out)[-1], json.loads((out / "results.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.iterdir()
             if path.name != "train.json"}
    found["place"] = json.loads((last / "train.json").read_text())["place"] | dict(seconds=0)
    found["results"] = {key: results[key] for key in ("steps", "tokens", "flops", "nll", "topic_cloze")}
    clock = {"seconds", "tokens_per_second", "mfu"}
    lines = [{key: value for key, value in line.items() if key not in clock} for line in read_log(out)]
    found["steps"] = [line for line in lines if "tokens" in line]
    found["held out"] = [line for line in lines if "nll" in line]
    return found


def steps_of(out):
    return [int(folder.name[11:]) for folder in checkpoints(out)]


@pytest.fixture(scope="module")
def whole(demo_folder, tmp_path_factory):
    """(the folder of one undisturbed run, what it left)"""
    out = tmp_path_factory.mktemp("crash") / "whole"
    codes, output = go(demo_folder, out)
    assert codes == [0], output
    return out, left(out)


def random_kills(seed):
    """Three kills, each before the n-th call of some function."""
    draw = random.Random(seed)
    return [(point, draw.randint(1, POINTS[point]), None) for point in draw.choices(list(POINTS), k=3)]


@pytest.mark.parametrize("kills", [
    [("train.save_file", 1, [])],                                              # in the first checkpoint
    [("train.schedule", 7, [4, 5]), ("train.save_file", 2, [4, 5, 10]),        # in a step, and in a checkpoint
     ("train.topic_cloze", 1, [4, 5, 10]), ("train.topic_cloze", 3, [4, 15, 17])],  # in a validation, in the last table
    [("runtime.checkpoint.prune", 5, [4, 10, 15, 17])],                        # before an old one is removed
    *map(random_kills, range(int(os.environ.get("SMOLTOLK_SEEDS", 3))))], ids=lambda kills: f"{kills[0][0]} and so on")
def test_killed_and_resumed(whole, demo_folder, tmp_path, kills):
    """kills: (function, n, the steps with checkpoints then), killed before the n-th call."""
    out = tmp_path / "out"
    for point, n, steps in kills:
        codes, output = go(demo_folder, out, {point: (n, signal.SIGKILL)})
        assert codes == [-signal.SIGKILL] or codes == [0] and steps is None, output
        assert steps in (None, steps_of(out)), output
    codes, output = go(demo_folder, out)
    assert codes == [0] and left(out) == whole[1], output
    assert steps_of(out) == [4, 15, 17] and not list(out.glob(".*"))  # nothing half written


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_on_another_number_of_processes(whole, demo_folder, tmp_path, before, after):
    """From step 10 on, with uneven micro-batches, and with the data in another folder."""
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {"train.schedule": (13, signal.SIGKILL)}, before)
    assert codes == [-signal.SIGKILL] * before and steps_of(out)[-1] == 10, output
    moved = shutil.copytree(demo_folder, tmp_path / "moved")
    codes, output = go(moved, out, None, after, micro_batch=4)
    assert codes == [0] * after, output
    ours = left(out)
    for key, tolerance in (("steps", 2e-5), ("held out", 1e-4)):
        for line, expected in zip(ours[key], whole[1][key], strict=True):
            assert flat(line | dict(flops=0)) == pytest.approx(flat(expected | dict(flops=0)), rel=tolerance)


@pytest.mark.parametrize("point, n, step, number", [
    ("train.make_optimizers", 1, 1, signal.SIGTERM),  # before the first step
    ("train.schedule", 7, 7, signal.SIGUSR1),        # amid a stage
    ("train.heldout_nll", 2, 5, signal.SIGINT),      # in a validation
    ("train.topic_cloze", 6, 17, signal.SIGTERM)])   # in the final table
def test_a_signal_stops_with_a_checkpoint(whole, demo_folder, tmp_path, point, n, step, number):
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {point: (n, number)})
    assert codes == [0] and f"{number.name}: stopped after step {step}; go on with\n" in output, output
    assert steps_of(out)[-1] == step and not (out / "results.json").exists()
    python, script, *argv = shlex.split(output.split("go on with\n")[1])
    assert [python, script] == ["python", str(ROOT / "train.py")]
    codes, output = start(argv, out)
    assert codes == [0], output
    ours, expected = left(out), dict(whole[1])
    assert len(ours.pop("held out")) == len(expected.pop("held out")) - (step == 5)  # which it did not repeat
    assert ours == expected


@pytest.mark.parametrize("nodes, number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_signals_through_torchrun(demo_folder, tmp_path, nodes, number):
    """SIGTERM to all processes of one node; SIGUSR1 to one launcher of two, after torchrun has started all again."""
    out, output, deadline = tmp_path / "out", tmp_path / "output", time.monotonic() + 100
    stages = dict(s=dict(steps=99999, mixture=dict(text=1), train="all", learning_rate=1e-3))
    argv = arguments(demo_folder, out, stages=stages, cloze="", eval_interval=99999, keep_checkpoints=2)
    options = [f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", "--max-restarts=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{get_free_port()}", "--local_addr=127.0.0.1"]
    command = [sys.executable, LAUNCHER, *options, ROOT / "train.py", *argv]
    with open(output, "w") as file:
        launchers = [subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) for _ in range(nodes)]

    def wait_until(condition):
        while not condition():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.02)
    try:
        wait_until(lambda: checkpoints(out))
        if nodes == 2:
            os.kill(children_of(launchers[1])[0], signal.SIGKILL)
            wait_until(lambda: output.read_text().count("text + ") == 2)  # the first process has begun again
            before = steps_of(out)[-1]
            wait_until(lambda: steps_of(out)[-1] > before)
        children = [pid for launcher in launchers for pid in children_of(launcher)]
        for pid in [launchers[0].pid] if nodes == 2 else [launchers[0].pid, *children]:
            os.kill(pid, number)
        codes = [launcher.wait(60) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()  # which ends its processes too
    output, last = output.read_text(), checkpoints(out)[-1]
    assert codes == [0] * nodes, output[-3000:]
    assert f"{number.name}: stopped after step {int(last.name[11:])}; go on with\n" in output and not fault(last)
    assert f"\n  python {LAUNCHER} --nproc_per_node={2 // nodes} " in output
    assert len(children) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in children)  # none of them trains on


def children_of(process):
    return [int(pid) for listed in Path(f"/proc/{process.pid}/task").glob("*/children")
            for pid in listed.read_text().split()]


RESTARTED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from runtime.distributed import all_sum, join_world, leave_world
world = join_world("cpu")
assert all_sum([world.rank + 1], world).item() == 3
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if world.rank == 1 and attempt in "01":
    os._exit(3)
all_sum([1], world)
os.write(1, f"{attempt}:{world.rank}\\n".encode())  # in one piece: both processes write to the same pipe
leave_world()
"""


def test_torchrun_starts_all_again(tmp_path):
    """Twice: the store of torchrun outlives a restart, and the new processes must not find the dead ones in it."""
    (tmp_path / "script.py").write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2",
               f"--master_port={get_free_port()}", str(tmp_path / "script.py"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["2:0", "2:1"], done.stderr


def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(whole, demo_folder, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    last = out / "checkpoint-00000017"
    for name in ("config.json", "train.json", "model.safetensors", "speech.safetensors", "optimizer.safetensors"):
        raw = (last / name).read_bytes()
        (last / name).write_bytes(raw[:-1])
        assert newest(out) == (out / "checkpoint-00000015", [last])
        (last / name).write_bytes(raw)
    os.truncate(last / "model.safetensors", 99)
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 18, "sta')  # a line that the crash has cut short
    codes, output = go(demo_folder, out)
    assert codes == [0] and "checkpoint-00000017: cannot be opened" in output, output
    assert left(out) == whole[1] and (out / "bad-checkpoint-00000017").is_dir()
    for folder in checkpoints(out):
        os.truncate(folder / "config.json", 9)
    with pytest.raises(SystemExit, match="out: no checkpoint can be opened; set another --out_dir"):
        train.main(arguments(demo_folder, out, resume=True))


@pytest.mark.parametrize("settings, message", [
    (lambda demo: dict(resume=False), "holds a run already; go on with --resume=true"),
    (lambda demo: dict(num_hidden_layers=1, seed=2), "was trained with num_hidden_layers=2, not 1; seed=1, not 2"),
    (lambda demo: dict(text=[f"{demo}/paired"]), r"text\[0\]=.*'.*text'\], not \['\w+', 1.0, '.*paired'\]; resume w")])
def test_another_model_or_other_data_are_refused(whole, demo_folder, settings, message):
    with pytest.raises(SystemExit, match=f"whole: .*{message}"):
        train.main(arguments(demo_folder, whole[0], **dict(resume=True) | settings(demo_folder)))
    assert left(whole[0]) == whole[1]


@pytest.mark.parametrize("n, step, error, code, steps", [
    (3, 10, OSError(errno.ENOSPC, "No space left on device"), 0, [4, 15, 17]),
    (5, 17, SafetensorError("I/O error"), 1, [4, 10, 15])], ids=["once", "at the end"])
def test_a_full_disk(whole, demo_folder, tmp_path, n, step, error, code, steps):
    """Training goes on, and the next checkpoint is written. The exit code tells only of the last one."""
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {"train.save_file": (n, error)})
    assert codes == [code] and f"checkpoint-{step:08d}: could not be written ({error})" in output
    assert steps_of(out) == steps and (out / "results.json").exists()
    assert left(out) == whole[1] if code == 0 else "could not be written" in output.splitlines()[-1]


@pytest.mark.parametrize("processes, what", [(1, "loss"), (1, "gradient"), (2, "loss")])
def test_a_step_that_is_not_finite_ends_the_run(whole, demo_folder, tmp_path, processes, what):
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / "results.json").unlink()
    shutil.rmtree(out / "checkpoint-00000017")
    kinds = kinds_of(dict(text=1, speech=1, interleaved=1), np.arange(84))
    sequence = next(i for i in range(78, 84) if kinds[i] == "interleaved")  # of step 17; with two processes of rank 1
    name = re.escape(f"sequence {sequence} (interleaved, {demo_folder}/paired)")
    found = f"the loss of {name}" if what == "loss" else f"the gradient of one of .*{name}.*"
    faults = {"nan": (sequence, what), "torch.optim.AdamW.step": (2, RuntimeError("a weight was changed"))}
    codes, output = go(demo_folder, out, faults, processes, checkpoint_interval=16)
    assert codes == [1] * processes and "a weight was changed" not in output, output
    assert re.search(f"step 17, rank {processes - 1}: .*{found} is not finite\n", output), output
    assert "step 17: the loss or its gradient is not finite" in output and output.count("step 17, rank") == 1
    assert steps_of(out)[-1] == 16 and not (out / "results.json").exists()
    codes, output = go(demo_folder, out)
    assert codes == [0] and (processes > 1 or left(out) == whole[1]), output
