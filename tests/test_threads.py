"""runtime/threads.py: as many threads as there are free cores."""
import os
import subprocess
import sys
import time

import pytest
import torch

from runtime import threads

SPIN = "import time; end = 0.3\nwhile time.process_time() < end: pass"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_busy_seconds_are_those_of_other_programs():
    cores = os.sched_getaffinity(0)
    before = threads.busy_seconds(cores)
    subprocess.run([sys.executable, "-c", SPIN], check=True)
    assert threads.busy_seconds(cores) - before > 0.25

    one = {min(cores)}
    os.sched_setaffinity(0, one)  # then this core cannot work for others in the time in which it works for us
    try:
        began, before, end = time.perf_counter(), threads.busy_seconds(one), time.process_time() + 0.3
        while time.process_time() < end:
            pass
        elapsed = time.perf_counter() - began
        assert threads.busy_seconds(one) - before < elapsed - 0.25
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
@pytest.mark.parametrize("busy, left", [(0.0, 4), (0.4, 4), (0.6, 3), (2.0, 2), (9.0, 1)])
def test_each_busy_core_costs_a_thread(monkeypatch, busy, left):
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(threads, "busy_seconds", lambda cores: busy * clock[0])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    model, before = torch.nn.Linear(2, 2), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        threads.share_cores(model)
        for _ in range(3):
            clock[0] += 0.3
            model(torch.ones(1, 2))
        assert torch.get_num_threads() == left
        monkeypatch.setenv("OMP_NUM_THREADS", "4")  # fixed by the user
        torch.set_num_threads(4)
        fixed = torch.nn.Linear(2, 2)
        threads.share_cores(fixed)
        clock[0] += 1
        fixed(torch.ones(1, 2))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
