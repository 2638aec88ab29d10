"""
torchrun for machines that are taken away: signals to stop are handed on, and the exit code is the training's own.

    python -m tools.launch --nproc_per_node=4 train.py config/train_150m.py          takes all that torchrun takes

torchrun as it is ends with 1 on SIGTERM whatever its processes do, and kills those that still write after 30 seconds;
SIGUSR1 ends it at once, and they train on without it. Here they hear SIGTERM, SIGUSR1 and Ctrl-C and it waits for them:
0 when the checkpoint is written. Linux; elsewhere, and before they have started, such a signal ends all.
"""
import os
import shlex
import signal
import sys
from pathlib import Path

from torch.distributed.run import main


def hand_on(number, _):
    """Give a signal to the processes that torchrun has started: its children."""
    children = [pid for listed in Path("/proc/self/task").glob("*/children") for pid in listed.read_text().split()]
    for pid in children:
        os.kill(int(pid), number)
    if not children:
        raise SystemExit(128 + number)


if __name__ == "__main__":
    os.environ["LAUNCHER"] = shlex.join(["python", sys.argv[0]])  # for the command that goes on
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # torch 2.13: no dead addresses next time
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, hand_on)
    main(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]])  # those that torchrun still takes for itself
