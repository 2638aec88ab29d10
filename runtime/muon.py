"""
Muon (Jordan et al. 2024), an optimizer for the matrices inside a network. train.py can use it in place of AdamW.

A gradient matrix often has a few large singular values and many small ones. Muon makes them all about 1, so that a step
changes every direction of the matrix equally. torch.optim.Muon computes the same in bfloat16, one matrix at a time.
Here all matrices of one shape are computed together in their own precision, which is faster on a CPU
(docs/speed.md has the figures).
"""
import torch

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # coefficients of Jordan et al.; they increase small singular values fastest
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    groups: dicts with params, all of them matrices; lr and weight_decay as for AdamW. A step is scaled so that its root
    mean square is 0.2 lr, about that of a step of AdamW (Liu et al. 2025). So both can use the same learning rate.
    """

    def __init__(self, groups, momentum=0.95):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))
                size = 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)


def orthogonalise(x):
    """Bring all singular values of the matrices x [n, rows, columns] near 1, by a Newton-Schulz iteration."""
    if x.size(-2) > x.size(-1):
        return orthogonalise(x.mT).mT
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value exceeds 1
    for _ in range(STEPS):
        square = x @ x.mT  # [n, rows, rows]
        x = a * x + (b * square + c * square @ square) @ x
    return x
