"""
A step whose loss or gradient was not finite: which sequences it was, and which tensor was the first.

train.stop_not_finite asks for suspects before it keeps the step in a folder; `python train.py --replay=FOLDER` makes
the step again and asks for the explanation. A sequence is named by its number within the stage, kind and data set.
"""
from typing import NamedTuple

import numpy as np

import data
import model as smoltolk


def name_sequences(sources, mixture, seed, stage, index):
    """Names of the sequences `index` of stage number `stage`, in the order of the rows that data.sample gives."""
    kinds, which, names = data.kinds_of(mixture, index), data.uniform(seed, stage, index, 0), []
    for i in np.argsort(kinds != "text", kind="stable"):
        source = sources[kinds[i]]
        shard = source.shards[np.searchsorted(source.cumulated, which[i], side="right")]
        names.append(f"sequence {index[i]} ({kinds[i]}, {shard.folder})")
    return names


class Found(NamedTuple):
    rows: list      # those whose loss is not finite
    module: str     # the first whose output is not finite; "" if all are
    gradient: str   # the parameter whose gradient was the first not to be finite; "" if all are


def look(model, batch, beta, autocast):
    """Forward and backward of one micro-batch by itself, every tensor watched -> Found. Leaves no gradients."""
    modules, gradients, hooks = [], [], []
    for name, module in model.named_modules():
        def after(_module, _inputs, output, name=name):
            if hasattr(output, "isfinite") and not output.isfinite().all():
                modules.append(name)
        hooks.append(module.register_forward_hook(after))
    for name, p in model.named_parameters():
        if p.requires_grad:
            def made(p, name=name):
                if not p.grad.isfinite().all():
                    gradients.append(name)
            hooks.append(p.register_post_accumulate_grad_hook(made))
    tokens = batch.tokens.to(next(model.parameters()).device)
    with autocast:
        out = model(tokens[:, :-1], tokens[:, 1:], batch.text_rows, want=("logp",))
    smoltolk.mean_loss(out, beta).backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    rows = (~out.logp.isfinite().all(1)).nonzero().flatten().tolist()
    return Found(rows, next(iter(modules), ""), next(iter(gradients), ""))


def suspects(model, batches, names, beta, autocast, most=8):
    """Lines that name sequences of one process's micro-batches, at most `most` of each."""
    for batch, its_names in zip(batches, names):
        found = look(model, batch, beta, autocast)
        named = [its_names[row] for row in found.rows] or its_names
        more = f" and {len(named) - most} more" if len(named) > most else ""
        if found.rows or found.gradient:
            what = "the loss is" if found.rows else "the loss is finite, but the gradient of one of these is"
            yield f"{what} not finite: {', '.join(named[:most])}{more}"


def explain(model, batches, names, beta, autocast, most=8):
    """Lines that say what was not finite, sequence by sequence; at most `most` of them."""
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        yield f"not finite before the step: {', '.join(broken[:most])}"
    told = 0
    for batch, its_names in zip(batches, names):
        if any(look(model, batch, beta, autocast)):
            for row in range(len(batch.tokens)):
                alone = data.Batch(batch.tokens[row:row + 1], int(row < batch.text_rows), 0, 0, 0)
                found = look(model, alone, beta, autocast)
                if any(found) and told < most:
                    told += 1
                    first = [f"output of {found.module}"] * bool(found.module) + ["loss"] * bool(found.rows)
                    yield f"{its_names[row]}: {', '.join([*first, f'gradient of {found.gradient}'])}"
    if not told:
        yield "every sequence by itself is finite, in loss and gradient"
