"""The optimizers, AdamW and Muon, and the schedule of the learning rate.

    optimizer = make_optimizer(model, lr=4e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2,
                               name="muon")
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * learning_rate(step, steps, warmup, peak=4e-4)

A step does nothing if optimizer.found_inf is 1, which GradScaler or trainer.py sets when gradients
are not finite: an `if` in Python would wait for the device at every step. This file needs torch,
and no other file of the project.

Not included: optimizer state that is sharded over processes.
"""

import math

import torch


def make_optimizer(module, lr, betas, eps, weight_decay, name="adamw", dtype=None, lr_factors=None):
    """AdamW for the trainable parameters of a module, or, if name is "muon", Muon with AdamW.

    Weight decay is on matrices only: not on biases, LayerNorms, the class embedding, logit_scale.
    dtype: that of Muon's matrix products (default: that of the weights). lr_factors: {name of a
    parameter: its learning rate as a multiple of lr}, 1 for those that it does not have.
    """
    parameters = {}  # by what differs between groups
    for key, p in module.named_parameters():
        if p.requires_grad:
            is_muon = name == "muon" and is_muon_matrix(key, p)
            lr_factor = (lr_factors or {}).get(key, 1) * (MUON_LR_FACTOR if is_muon else 1)
            parameters.setdefault((is_muon, p.ndim < 2, lr_factor), []).append(p)
    groups = []
    # Sorted, since checkpoints have the state of the parameters in this order.
    for (is_muon, is_vector, lr_factor), params in sorted(parameters.items()):
        groups.append({"params": params, "weight_decay": 0.0 if is_vector else weight_decay,
                       "lr_factor": lr_factor, "muon": is_muon})
    options = dict(lr=lr, betas=betas, eps=eps, fused=True)
    uses_muon = any(group["muon"] for group in groups)
    return Muon(groups, dtype, **options) if uses_muon else torch.optim.AdamW(groups, **options)


def is_muon_matrix(key, parameter):
    """Whether Muon takes this parameter: a matrix of a transformer block.

    Embeddings and projections are matrices too, but AdamW is the better optimizer for them (Jordan
    et al.). key: the name of the parameter.
    """
    return parameter.ndim == 2 and ".resblocks." in key


def learning_rate(step, steps, warmup, peak):
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Muon ----

MUON_LR_FACTOR = 3   # Muon's learning rate, as a multiple of AdamW's
MOMENTUM = 0.95
ITERATIONS = 5
# The polynomial of Jordan et al. It is so steep at 0 that five iterations are enough, and takes
# singular values to 0.7..1.2 instead of 1, which does not matter here.
A, B, C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.AdamW):
    """Muon for the groups with muon=True, AdamW for the others.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
    (kellerjordan.github.io/posts/muon). The update of a matrix is its gradient with momentum, of
    which the singular values are replaced by 1:

        momentum = 0.95 * momentum + 0.05 * gradient
        U, S, V = svd(0.95 * momentum + 0.05 * gradient)
        weight = weight * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(rows, columns)) * U @ V.T

    The factor 0.2 * sqrt(...) gives all updates the size that AdamW's have (Liu et al., arXiv
    2502.16982, section 2.2). dtype: that of the matrix products in orthogonalize (default: that of
    the weights).

    Cost: orthogonalize takes 20 r^2 c + 10 r^3 FLOPs for a matrix of r rows and c >= r columns, or
    of c rows and r columns. That is 2.0 TFLOPs per step for ViT-B/32 and 8.7 for ViT-L/14, whatever
    the batch: 7 % and 2 % of a step of 1,024 pairs with one 224 crop. Measured on two CPU cores
    (`python -m extras.bench train`), an update of ViT-B/32 takes 4.7 s, and AdamW's 0.13 s, where a
    step of 1,024 pairs takes 83 s. Every process computes the entire update.
    """

    def __init__(self, groups, dtype=None, **options):
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Update all parameters. Clears the gradients of the matrices of Muon."""
        for group in self.param_groups:
            if group["muon"]:
                matrices = {}  # by shape, since matrices of one shape are orthogonalized together
                for p in group["params"]:
                    matrices.setdefault(p.shape, []).append(p)
                for params in matrices.values():
                    self._step_muon(params, group["lr"], group["weight_decay"])
        super().step()

    def _step_muon(self, params, lr, weight_decay):
        """Update matrices of one shape."""
        found_inf = getattr(self, "found_inf", params[0].new_zeros(()))
        rate = lr * (1 - found_inf)  # 0 skips the step
        updates = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), device=p.device)  # AdamW expects it
                state["momentum"] = torch.zeros_like(p)
            state["step"] += 1 - found_inf
            grad, momentum = p.grad.nan_to_num_(0, 0, 0), state["momentum"]
            momentum.lerp_(grad, (1 - MOMENTUM) * (1 - found_inf))
            updates.append(grad.lerp_(momentum, MOMENTUM))
            p.grad = None  # super().step() skips parameters without a gradient
        updates = torch.stack(updates).to(self.dtype or params[0].dtype)     # [M, rows, columns]
        updates = orthogonalize(updates).to(params[0].dtype)
        size = 0.2 * math.sqrt(max(updates.shape[1:]))
        for p, update in zip(params, updates):
            p.mul_(1 - rate * weight_decay)
            p.sub_(update * (rate * size))


def orthogonalize(x):
    """Replace the singular values of matrices by about 1: U @ V.T of x = U @ S @ V.T.

    x [M, rows, columns] -> the same shape. Instead of a decomposition, this iterates the polynomial
    A x + B x^3 + C x^5 of the singular values (Newton-Schulz), which needs only matrix products.
    """
    shape, is_tall = x.shape, x.shape[1] > x.shape[2]
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values in 0..1
    if is_tall:
        x = x.mT
    # A CPU computes each product of a batch on one thread, so a single matrix is no batch.
    product_and_sum = torch.baddbmm
    if len(x) == 1:
        x, product_and_sum = x[0], torch.addmm
    for _ in range(ITERATIONS):
        square = x @ x.mT                                                    # [M, rows, rows]
        polynomial = product_and_sum(square, square, square, beta=B, alpha=C)
        x = product_and_sum(x, polynomial, x, beta=A)                        # [M, rows, columns]
    return (x.mT if is_tall else x).reshape(shape)


# ---- restoring ----

def load_optimizer(optimizer, saved, step, path):
    """Restore an optimizer's state after `step` steps from its state dict. The groups stay as they
    are.

    A fused optimizer writes as many values as a parameter has, whatever the state has. So the state
    is compared with the parameters first, and copied. Raises ValueError with the path.
    """
    parameters = [(p, group["muon"]) for group in optimizer.param_groups for p in group["params"]]
    state = saved.get("state")
    if not isinstance(state, dict) or (step and state.keys() != set(range(len(parameters)))):
        raise ValueError(f"{path}: the state of the optimizer is not that of this model")
    restored = {}
    for i, moments in state.items():
        parameter, is_muon = parameters[i]
        like = {"step": torch.zeros(())}
        for name in ("momentum",) if is_muon else ("exp_avg", "exp_avg_sq"):
            like[name] = parameter
        restored[i] = {}
        for name, expected in like.items():
            value = moments.get(name) if isinstance(moments, dict) else None
            if (type(value) is not torch.Tensor or value.layout != torch.strided or value.is_meta
                    or (value.shape, value.dtype) != (expected.shape, expected.dtype)):
                raise ValueError(f"{path}: {name} of parameter {i} in the optimizer's state is not "
                                 f"a tensor of {list(expected.shape)}, {expected.dtype}")
            highest = step if name == "step" else math.inf
            lowest = 0 if name in ("step", "exp_avg_sq") else -math.inf
            if not ((value >= lowest) & (value <= highest) & value.isfinite()).all():
                raise ValueError(f"{path}: {name} of parameter {i} in the optimizer's state has "
                                 "values that cannot be")
            restored[i][name] = value.clone(memory_format=torch.contiguous_format)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": restored, "param_groups": groups})
