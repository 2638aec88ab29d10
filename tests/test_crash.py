"""Runs that are killed, stopped, restarted, short of disk space, or fed numbers that are not finite.

SMOLTOLK_SEEDS=100 python -m pytest tests/test_crash.py -k killed      more kills than the suite has time for
"""
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from test_train import ROOT, arguments, weights

import train
from data import kinds_of
from model import SmolTolk
from runtime.checkpoint import checkpoints, fault, newest, prune
from runtime.distributed import ALONE
from runtime.log import Log, flat, read_log, spikes

LAUNCHER = ROOT / "tools/launch.py"
os.environ["PYTHONPATH"] = str(ROOT)  # for the server below, which imports train once and forks every process
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "tools.figures"])
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# {function: how often it is called at most in a whole run of 17 steps}
POINTS = {
    "train.make_optimizer": 3, "train.schedule": 17, "train.step_flops": 17, "torch.nn.utils.clip_grad_norm_": 17,
    "train.heldout_nll": 6, "train.topic_cloze": 6, "train.finish": 1, "train.save_checkpoint": 5,
    "train.save_pretrained": 5, "train.save_file": 5, "runtime.files.to_disk": 50, "os.replace": 8,
    "runtime.checkpoint.prune": 5, "shutil.rmtree": 5, "runtime.log.Log.write": 22}


# ---------------------------------------------------------------------------------------------------------------------
# processes

def child(argv, output, faults, environment):
    """One process of a run.

    faults   {function: (n, what)}: before its n-th call a signal is sent, or an exception raised
             {"nan": (sequence, "loss" or "gradient")}: that sequence has a loss or a gradient of NaN
    """
    os.environ.update(environment)
    with open(output, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *argv]
    sys.modules["tools.figures"].loss_curves = lambda out: None  # drawing would take a third of the time
    for name, details in faults.items():
        if name == "nan":
            poison(*details)
            continue
        path, function = name.rsplit(".", 1)
        owner = sys.modules.get(path) or getattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2])
        setattr(owner, function, interrupted(getattr(owner, function), *details))
    train.main(argv)


def interrupted(function, n, what):
    """The function, with a signal sent or an exception raised before its n-th call."""
    calls = 0

    @functools.wraps(function)
    def replacement(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n and isinstance(what, Exception):
            raise what
        if calls == n:
            os.kill(os.getpid(), what)
        return function(*args, **kwargs)
    return replacement


def poison(sequence, what):
    """Make the loss of one sequence with speech, or its gradient, NaN."""
    load, forward, numbers = train.loader, SmolTolk.forward, {}

    def remembering_loader(*args):
        for step, batches in load(*args):
            numbers.clear()
            numbers.update({batch.ids.data_ptr(): torch.from_numpy(batch.index) for batch in batches})
            yield step, batches

    def poisoned_forward(self, ids, targets=None, layout=None, cache=None):
        out = forward(self, ids, targets, layout, cache)
        if ids.data_ptr() not in numbers or layout.speech is None:
            return out
        is_bad = numbers[ids.data_ptr()] == sequence
        factor = torch.where(is_bad, torch.nan, 1.0)[layout.speech // ids.size(1)]
        if what == "loss":
            return out._replace(speech_nll=out.speech_nll * factor)
        if out.speech_nll.requires_grad:
            out.speech_nll.register_hook(lambda gradient: gradient * factor)
        return out
    train.loader, SmolTolk.forward = remembering_loader, poisoned_forward


def start(argv, out, faults=None, processes=1, kill_after=None, limit=100):
    """Start the processes of a run as torchrun does, wait for them -> (exit codes, what they printed).

    faults       of all processes, or a list with those of each; see child
    kill_after   seconds until all are killed
    """
    faults = faults if isinstance(faults, list) else [faults or {}] * processes
    port, output, started = free_port(), out.with_suffix(".output"), []
    output.write_text("")
    for rank in range(processes):
        environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port)) if processes > 1 else {}
        started.append(FORK.Process(target=child, args=(argv, output, faults[rank], environment), daemon=True))
        started[-1].start()
    if kill_after is not None:
        time.sleep(kill_after)
        for process in started:
            process.kill()
    for process in started:
        process.join(limit)
        assert process.exitcode is not None, "it hangs: " + output.read_text()
    return [process.exitcode for process in started], output.read_text(errors="replace")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def go(demo_folder, out, faults=None, processes=1, kill_after=None, **settings):
    """Begin the run in `out`, or go on with it if it has a checkpoint -> (exit codes, what was printed)."""
    usual = dict(keep_checkpoints=2, eval_cloze_items=2, resume=len(checkpoints(out)) > 0)
    return start(arguments(demo_folder, out, **usual | settings), out, faults, processes, kill_after)


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


def half_written(out):
    return list(out.glob(".*.[0-9]*"))


@pytest.fixture(scope="module")
def whole(demo_folder, tmp_path_factory):
    """(the folder of one undisturbed run, what it left, the seconds that it took)"""
    out, began = tmp_path_factory.mktemp("crash") / "whole", time.monotonic()
    codes, output = go(demo_folder, out)
    assert codes == [0], output
    return out, left(out), time.monotonic() - began


def copy_until(whole, out, step):
    """A run that crashed after the checkpoint of a step. Its log goes further than the checkpoint."""
    shutil.copytree(whole[0], out)
    (out / "results.json").unlink()
    for folder in checkpoints(out):
        if int(folder.name[11:]) > step:
            shutil.rmtree(folder)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# killed

def random_kills(seed):
    """Three kills, each at any moment (a share of the run's time) or at the n-th call of some function."""
    draw, kills = random.Random(seed), []
    for _ in range(3):
        point = draw.choice(list(POINTS))
        kills.append((point, draw.randint(1, POINTS[point]), draw.random() if draw.random() < 0.4 else None))
    return kills


@pytest.mark.parametrize("kills", [
    [("train.save_file", 1, [])],                                              # in the first checkpoint
    [("train.schedule", 7, [4, 5]), ("train.save_file", 2, [5, 10]),           # in a step, and in a checkpoint
     ("train.topic_cloze", 1, [5, 10]), ("train.topic_cloze", 3, [15, 17])],   # in a validation, and in the final table
    [("runtime.checkpoint.prune", 5, [10, 15, 17])],                           # before an old one is removed
    *map(random_kills, range(int(os.environ.get("SMOLTOLK_SEEDS", 2))))], ids=lambda kills: f"{kills[0][0]} and so on")
def test_killed_and_resumed(whole, demo_folder, tmp_path, kills):
    """kills: (function, n, then), killed before the n-th call. then: steps with checkpoints, or see random_kills."""
    out = tmp_path / "out"
    for point, n, then in kills:
        kill_after = then * whole[2] if isinstance(then, float) else None
        codes, output = go(demo_folder, out, {point: (n, signal.SIGKILL)}, 1, kill_after)
        assert codes == [-signal.SIGKILL] or codes == [0] and not isinstance(then, list), output
        assert steps_of(out) == then or not isinstance(then, list), output
    codes, output = go(demo_folder, out)
    assert codes == [0] and left(out) == whole[1], output
    assert steps_of(out) == [15, 17] and not half_written(out)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_on_another_number_of_processes(whole, demo_folder, tmp_path, before, after):
    """From the middle of a run on. Two processes accumulate micro-batches of uneven sizes."""
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {"train.schedule": (13, signal.SIGKILL)}, before)
    assert codes == [-signal.SIGKILL] * before and steps_of(out)[-1] == 10, output
    codes, output = go(demo_folder, out, None, after, micro_batch=4)
    assert codes == [0] * after, output
    ours = left(out)
    for key, tolerance in (("steps", 2e-5), ("held out", 1e-4)):
        for line, expected in zip(ours[key], whole[1][key], strict=True):
            assert line.pop("flops", 0) == pytest.approx(expected.get("flops", 0), rel=0.01)  # of one process, times n
            assert flat(line) == pytest.approx({k: v for k, v in flat(expected).items() if k != "flops"}, rel=tolerance)
    expected = weights(whole[0] / "checkpoint-00000017")
    for name, value in weights(out / "checkpoint-00000017").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)


def test_a_process_that_dies_ends_all(demo_folder, tmp_path):
    codes, output = go(demo_folder, tmp_path / "out", [{}, {"train.schedule": (7, signal.SIGKILL)}], 2)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL), output


# ---------------------------------------------------------------------------------------------------------------------
# stopped

@pytest.mark.parametrize("point, n, step, number", [
    ("train.make_optimizer", 1, 1, signal.SIGTERM),  # before the first step
    ("train.schedule", 7, 7, signal.SIGUSR1),        # amid a stage
    ("train.heldout_nll", 2, 5, signal.SIGINT),      # in a validation
    ("train.topic_cloze", 6, 17, signal.SIGTERM)])   # in the final table
def test_a_signal_stops_with_a_checkpoint(whole, demo_folder, tmp_path, point, n, step, number):
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {point: (n, number)})
    assert codes == [0] and f"{number.name}: stopped after step {step}; go on with\n" in output, output
    assert steps_of(out)[-1] == step and not (out / "results.json").exists()
    command = output.split("go on with\n")[1]
    python, script, *argv = shlex.split(command)
    assert [python, script, argv[-1]] == ["python", str(ROOT / "train.py"), "--resume=true"]
    if step == 7:  # and at once when it goes on
        codes, output = start(argv, out, {"train.make_optimizer": (1, number)})
        assert codes == [0] and "stopped after step 8; go on" in output and output.endswith(command), output
    codes, output = start(argv, out)
    assert codes == [0], output
    ours, expected = left(out), dict(whole[1])
    assert len(ours.pop("held out")) == len(expected.pop("held out")) - (step == 5)  # which it did not repeat
    assert ours == expected


@pytest.mark.parametrize("point, n, steps", [("train.schedule", 7, (7, 8)), ("train.topic_cloze", 6, (17,))])
def test_a_signal_to_one_process_stops_both(demo_folder, tmp_path, point, n, steps):
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, [{}, {point: (n, signal.SIGTERM)}], 2)
    assert codes == [0, 0] and output.count("go on with") == 1, output
    assert steps_of(out)[-1] in steps and not (out / "results.json").exists()


@pytest.mark.parametrize("nodes, number", [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_signals_through_torchrun(demo_folder, tmp_path, nodes, number):
    """One node that shuts down sends SIGTERM to all that it runs. Of two nodes one loses a process, so that torchrun
    starts all again; then it gets SIGUSR1, as Slurm sends it: the launcher alone.
    """
    out, output, deadline = tmp_path / "out", tmp_path / "output", time.monotonic() + 100
    stages = dict(s=dict(steps=99999, mixture=dict(text=1), train="all", learning_rate=1e-3))
    argv = arguments(demo_folder, out, stages=stages, cloze="", eval_interval=99999, keep_checkpoints=2)
    options = [f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}", "--max-restarts=1", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    with open(output, "w") as file:
        launchers = [subprocess.Popen([sys.executable, LAUNCHER, *options, ROOT / "train.py", *argv], stdout=file,
                                      stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"))
                     for _ in range(nodes)]

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
    more = " --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500" if nodes == 2 else ""
    assert f"\n  python {LAUNCHER} --nproc_per_node={2 // nodes}{more} {ROOT}/train.py --out_dir=" in output
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
               f"--master_port={free_port()}", str(tmp_path / "script.py"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["2:0", "2:1"], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# what a run goes on from

def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(whole, demo_folder, tmp_path, capsys):
    out = copy_until(whole, tmp_path / "out", 17)
    last = out / "checkpoint-00000017"
    for path in last.iterdir():
        raw = path.read_bytes()
        for harm in (cut, Path.unlink):
            harm(path)
            folder, bad = newest(out)
            if path.name in ("tokenizer.json", "units.json"):  # training reads those of its settings
                assert folder == last
            else:
                assert folder.name == "checkpoint-00000015" and bad == [last]
                assert re.match(rf"{last}: cannot be opened \(.+\); the checkpoint", capsys.readouterr().err)
            path.write_bytes(raw)
    cut(last / "model.safetensors")
    codes, output = go(demo_folder, out)
    assert codes == [0] and "checkpoint-00000017: cannot be opened" in output, output
    assert left(out) == whole[1] and (out / "bad-checkpoint-00000017").is_dir()
    for folder in checkpoints(out):
        cut(folder / "config.json")
    with pytest.raises(SystemExit, match="out: no checkpoint can be opened; set another --out_dir"):
        train.main(arguments(demo_folder, out, resume=True))


def test_a_run_is_never_overwritten(whole, demo_folder, tmp_path):
    before = left(whole[0])
    codes, output = go(demo_folder, whole[0], None, 2, resume=False)
    assert codes == [1, 1] and output.count("whole: holds a run already; go on with --resume=true") == 1, output
    assert left(whole[0]) == before
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds the results of a run without its checkpoints; set another"):
        train.main(arguments(demo_folder, tmp_path))


@pytest.mark.parametrize("settings, message", [
    (lambda demo: dict(num_hidden_layers=1, seed=2), "num_hidden_layers=2, not 1; seed=1, not 2"),
    (lambda demo: dict(text=[f"{demo}/paired"]), r"text\[0\]=.*'.*text'\], not \['\w+', 1.0, '.*paired'\]")])
def test_another_model_or_other_data_are_refused(whole, demo_folder, settings, message):
    before = left(whole[0])
    with pytest.raises(SystemExit, match=f"whole: was trained with {message}.*; resume with the same"):
        train.main(arguments(demo_folder, whole[0], resume=True, **settings(demo_folder)))
    assert left(whole[0]) == before


def test_data_may_lie_elsewhere_and_held_out_data_may_change(whole, demo_folder, tmp_path):
    moved = shutil.copytree(demo_folder, tmp_path / "moved")
    out = copy_until(whole, tmp_path / "out", 15)
    codes, output = go(moved, out, eval_sequences=7, val_text=[str(moved / "text")])
    assert codes == [0] and re.search("   changed  .*eval_sequences: 6 -> 7", output), output
    [changed] = [line["changed"] for line in read_log(out) if "changed" in line]
    assert changed["eval_sequences"] == [6, 7] and changed["val_text[0]"][1][2] == str(moved / "text")
    assert changed["text"] == [[f"{demo_folder}/text"], [f"{moved}/text"]] and "text[0]" not in changed
    ours = left(out)
    assert ours["model.safetensors"] == whole[1]["model.safetensors"] and ours["steps"] == whole[1]["steps"]


@pytest.mark.parametrize("n, step, error, code, steps", [
    (3, 10, FULL, 0, [15, 17]), (5, 17, SafetensorError("I/O error"), 1, [10, 15])], ids=["once", "at the end"])
def test_a_full_disk(whole, demo_folder, tmp_path, n, step, error, code, steps):
    """Training goes on, and the next checkpoint is written. The exit code tells only of the last one."""
    out = tmp_path / "out"
    codes, output = go(demo_folder, out, {"train.save_file": (n, error)})
    assert codes == [code] and f"checkpoint-{step:08d}: could not be written ({error})" in output
    assert steps_of(out) == steps and not half_written(out)
    assert json.loads((out / "results.json").read_text())["steps"] == 17
    assert left(out) == whole[1] if code == 0 else "could not be written" in output.splitlines()[-1]


@pytest.mark.parametrize("processes, what", [(1, "loss"), (1, "gradient"), (2, "loss")])
def test_a_step_that_is_not_finite_ends_the_run(whole, demo_folder, tmp_path, processes, what):
    out = copy_until(whole, tmp_path / "out", 15)
    kinds = kinds_of(dict(text=1, speech=1, interleaved=1), np.arange(84))
    sequence = next(i for i in range(78, 84) if kinds[i] == "interleaved")  # of step 17; with two processes of rank 1
    name = re.escape(f"sequence {sequence} (interleaved, {demo_folder}/paired)")
    found = f"the loss of {name}" if what == "loss" else f"the gradient of one of .*{name}.*"
    for n in (2, 1):  # the second time it goes on from the checkpoint of step 16, and comes to the same step
        faults = {"nan": (sequence, what), "torch.optim.AdamW.step": (n, RuntimeError("a weight was changed"))}
        codes, output = go(demo_folder, out, faults, processes, checkpoint_interval=16)
        assert codes == [1] * processes and "a weight was changed" not in output, output
        assert re.search(f"step 17, rank {processes - 1}: .*{found} is not finite\n", output), output
        assert "step 17: the loss or its gradient is not finite" in output and output.count("step 17, rank") == 1
        assert steps_of(out)[-1] == 16 and not (out / "results.json").exists()
    codes, output = go(demo_folder, out)
    assert codes == [0] and (processes > 1 or left(out) == whole[1]), output


# ---------------------------------------------------------------------------------------------------------------------
# the parts

def test_spikes_are_found():
    draw = np.random.default_rng(0)
    lines = [dict(stage="a", step=i, tokens=i, text_nll=3 - i / 100 + 0.05 * draw.normal(), speech_nll=None,
                  grad_norm=1 + 0.1 * draw.normal()) for i in range(100)]
    assert not any(spikes(line, lines[:i]) for i, line in enumerate(lines))
    assert spikes(lines[99] | dict(grad_norm=3.0), lines[:99]).keys() == {"grad_norm"}
    assert spikes(lines[99] | dict(text_nll=4.0), lines[:99]).keys() == {"text_nll"}
    assert not spikes(lines[99] | dict(text_nll=4.0, stage="b"), lines[:99])  # another stage, another level
    assert not spikes(lines[99] | dict(text_nll=1.0), lines[:99])  # better is no spike


def test_which_checkpoints_stay(tmp_path):
    for step in range(5, 101, 5):
        (tmp_path / f"checkpoint-{step:08d}").mkdir()
        prune(tmp_path, 2, 30)
    assert steps_of(tmp_path) == [30, 60, 90, 95, 100] and not half_written(tmp_path)


def test_the_log_goes_on_after_the_checkpoint(tmp_path, capsys):
    settings = SimpleNamespace(out_dir=tmp_path, stages=dict(s=dict(steps=9)), wandb_project="", tensorboard=False)
    lines, path = [dict(step=step, stage="s") for step in range(1, 5)], tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "sta')  # torn by a crash
    assert read_log(tmp_path) == lines
    log = Log(settings, ALONE, dict(total=2))
    log.write(dict(step=3), "")
    assert read_log(tmp_path) == [*lines[:2], dict(step=3)]
    path.unlink()
    path.mkdir()  # so that it cannot be written to
    log.write(dict(step=4), "")
    assert "log.jsonl: [Errno 21] Is a directory" in capsys.readouterr().err
