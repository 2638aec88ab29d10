"""
Many processes as one: torchrun starts them, here they find each other and add up numbers.
"""
import json
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime.devices import pick_device


class World(NamedTuple):
    """Where this process stands among all."""
    rank: int = 0
    local_rank: int = 0  # on its machine
    size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = World()


def join_world(device_name):
    """Join the processes that torchrun started, or be alone."""
    name = pick_device(device_name)
    rank, local_rank, size = (int(os.environ.get(key, default)) for key, default in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    world = World(rank, local_rank, size, torch.device(name, local_rank) if name == "cuda" else torch.device(name))
    if name == "cuda":
        torch.cuda.set_device(world.device)
    if "RANK" in os.environ:
        store, *_ = next(dist.rendezvous("env://", rank, size))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives a restart, with dead addresses in it
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # gloo adds up numbers that are on the CPU, so that no process waits for its GPU to count targets
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=size, device_id=world.device if name == "cuda" else None)
    return world


def leave_world():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(values, world):
    """Sum numbers over all processes: float64 tensor on the CPU."""
    values = torch.as_tensor(values).detach().cpu().double()
    if world.size > 1:
        dist.all_reduce(values)
    return values


def on_first(work, world):
    """What work() returns on the first process, on all of them; anything that json can hold.

    If work() ends the script with SystemExit, all processes end, and only the first one says why.
    """
    found = [None, None]
    if world.rank == 0:
        try:
            found = [work(), None]
        except SystemExit as end:
            found = [None, str(end)]
    if world.size > 1:
        text = json.dumps(found).encode()
        size = int(all_sum(len(text) if world.rank == 0 else 0, world))
        letters = torch.frombuffer(bytearray(text.ljust(size)[:size]), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        found = json.loads(bytes(letters.tolist()))
    value, reason = found
    if reason is not None:
        raise SystemExit(reason if world.rank == 0 else 1)
    return value


def distribute(model, world):
    """The model as training calls it: with several processes its gradients are averaged over them in backward()."""
    if not dist.is_initialized():
        return model
    for p in model.parameters():  # gradients that exist now become views of the buckets that are sent; gradients made
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # later would be second copies beside the buckets
    return DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, broadcast_buffers=False)
