"""
Training and evaluation in several processes. torchrun starts them; this module connects them and adds up numbers.
"""
import json
import os
from inspect import signature
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runtime.devices import pick_device


class World(NamedTuple):
    """The rank and the device of this process, and the number of processes."""
    rank: int = 0
    local_rank: int = 0  # rank on this machine
    size: int = 1
    device: torch.device = torch.device("cpu")


ALONE = World()
NEW_NAME, OLD_NAME = "forward_sync_buffers", "broadcast_buffers"  # renamed in torch 2.13
SYNC_BUFFERS = NEW_NAME if NEW_NAME in signature(DistributedDataParallel).parameters else OLD_NAME


def join_world(device_name):
    """Join the processes that torchrun started -> World. Without torchrun this process is alone."""
    name = pick_device(device_name)
    rank, local_rank, size = (int(os.environ.get(key, default)) for key, default in
                              (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    world = World(rank, local_rank, size, torch.device(name, local_rank) if name == "cuda" else torch.device(name))
    if name == "cuda":
        torch.cuda.set_device(world.device)
    if "RANK" in os.environ:
        store, *_ = next(dist.rendezvous("env://", rank, size))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it still lists dead processes after a restart
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # gloo adds up numbers on the CPU, so that no process waits for its GPU to count targets.
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", store=store, rank=rank,
                                world_size=size, device_id=world.device if name == "cuda" else None)
    return world


def leave_world():
    if dist.is_initialized():
        dist.destroy_process_group()


def all_sum(values, world):
    """Sum numbers over all processes -> float64 tensor on the CPU."""
    values = torch.as_tensor(values).detach().cpu().double()
    if world.size > 1:
        dist.all_reduce(values)
    return values


def on_first(work, world):
    """Call work() in the first process, and return its result in all processes. The result must be valid in JSON.

    If work() raises SystemExit, all processes end, and the first one prints the message.
    """
    found = [None, None]
    if world.rank == 0:
        try:
            found = [work(), None]
        except SystemExit as end:
            found = [None, str(end)]
    if world.size > 1:
        text = json.dumps(found).encode()  # broadcast_object_list would unpickle it
        size = int(all_sum(len(text) if world.rank == 0 else 0, world))
        letters = torch.frombuffer(bytearray(text.ljust(size)[:size]), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        found = json.loads(bytes(letters.tolist()))
    value, reason = found
    if reason is not None:
        raise SystemExit(reason if world.rank == 0 else 1)
    return value


def distribute(model, world):
    """The model as training calls it. If torchrun started the processes, backward() averages gradients over them."""
    if not dist.is_initialized():
        return model
    # torch.compile would cut each layer where one of DDP's buckets ends. Layers are compiled one by one, so that
    # gradients are sent during backward anyway.
    torch._dynamo.config.optimize_ddp = False
    for p in model.parameters():  # DDP turns gradients that exist into views of its buckets; later ones would be copies
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True, **{SYNC_BUFFERS: False})
