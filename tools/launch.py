"""
Run torchrun on machines that can be taken away: when a signal announces this, training writes a checkpoint and stops.

    python -m tools.launch --nproc_per_node=4 train.py config/train_150m.py          takes all options of torchrun

torchrun itself exits with 1 after SIGTERM, whatever its processes do, and kills processes that are still writing after
30 seconds. SIGUSR1 ends torchrun at once, while its processes keep training. This script passes SIGTERM, SIGUSR1 and
Ctrl-C on to the processes and waits for them. It exits with 0 when they have written the checkpoint. This works on
Linux. On other systems, and before the processes have started, such a signal ends everything.
"""
import os
import shlex
import signal
import sys
from pathlib import Path

from torch.distributed.run import main


def hand_on(number, _):
    """Send a signal to the processes that torchrun has started. They are the children of this one."""
    children = []
    for listing in Path("/proc/self/task").glob("*/children"):
        children += listing.read_text().split()
    for pid in children:
        os.kill(int(pid), number)
    if not children:
        raise SystemExit(128 + number)


if __name__ == "__main__":
    started = ["-m", __spec__.name] if __spec__ else [sys.argv[0]]  # as a module, or by its path
    os.environ["LAUNCHER"] = shlex.join(["python", *started])  # train.py prints it in the command that resumes the run
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else torch 2.13 restarts with dead addresses
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, hand_on)
    main(["--signals-to-handle=SIGHUP,SIGQUIT", *sys.argv[1:]])  # the signals that torchrun still handles itself
