"""
Share the cores of a CPU with other programs.

torch divides each operation among several threads. A thread that has finished waits for the others in a loop, which
occupies its core. If another program needs that core as well, every operation is late. Training the tiny run on two
cores falls to a third of its speed as soon as a browser keeps one of them busy. With one thread it is hardly slowed.
"""
import os
import sys
import time

import torch

INTERVAL = 0.5  # seconds between two looks at what other programs do


def share_cores(model):
    """Give the model on a CPU one thread for each core that no other program keeps busy.

    The number is adjusted before a forward pass, at most every INTERVAL seconds. Sums are rounded differently with
    another number of threads. For results that are equal to the bit, fix the number with OMP_NUM_THREADS.
    """
    if "OMP_NUM_THREADS" in os.environ or next(model.parameters()).device.type != "cpu" or sys.platform != "linux":
        return
    cores = os.sched_getaffinity(0)
    last = time.perf_counter(), busy_seconds(cores)

    def adjust(*_):
        nonlocal last
        elapsed = time.perf_counter() - last[0]
        if elapsed > INTERVAL:
            now = busy_seconds(cores)
            others = (now - last[1]) / elapsed  # the number of cores that other programs keep busy
            torch.set_num_threads(max(1, len(cores) - round(others)))
            last = last[0] + elapsed, now

    model.register_forward_pre_hook(adjust)
    print(f"up to {len(cores)} threads, fewer while other programs are busy; OMP_NUM_THREADS=N fixes the number",
          file=sys.stderr)


def busy_seconds(cores):
    """Seconds that these cores have worked for other processes, added up. Source: Linux, proc(5)."""
    total = 0
    with open("/proc/stat") as file:
        for line in file:
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                user, nice, system = map(int, ticks[:3])
                total += user + nice + system
    own = os.times()
    return total / os.sysconf("SC_CLK_TCK") - own.user - own.system
