"""The loss of stage 3 and its gradient: exact for the whole effective batch, over micro batches and processes."""

from __future__ import annotations

import hashlib

from loader import Batch


def one_way_loss(queries, gallery, query_keys, keys, scale, bias=None):
    """Sum over queries [B, D] of their loss against the gallery [N, D].

    Pairs that agree in any column of their keys (int64 [B, K], [N, K]) are all positives: a duplicate product or the
    same caption is no negative. Softmax cross-entropy with the positives sharing the target (CLIP), or the sigmoid
    loss of SigLIP (arXiv 2303.15343) where the model has a bias.
    """
    return _loss_of_rows(scale.exp() * (queries @ gallery.T), _positive(query_keys, keys), bias)


def pair_loss(images, texts, keys, scale, bias=None):
    """The mean of both directions over N pairs."""
    logits, positive = scale.exp() * (images @ texts.T), _positive(keys, keys)  # (N, N)
    both = _loss_of_rows(logits, positive, bias) + _loss_of_rows(logits.T, positive, bias)
    return both / (2 * len(images))


def _positive(query_keys, keys):
    """bool [B, N] of int64 [B, K] and [N, K]: which agree in any column."""
    return (query_keys[:, None] == keys[None]).any(dim=-1)


def _loss_of_rows(logits, positive, bias):
    """Sum over the rows of logits [B, N]."""
    import torch.nn.functional as F

    if bias is not None:
        return -F.logsigmoid((logits + bias) * (2.0 * positive - 1.0)).sum()
    target = positive / positive.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum()


def reseed(seed: int, step: int, position: int) -> None:
    """Random numbers that depend on the place in the run alone: a second pass and a resumed run draw the same dropout,
    and so does any number of processes whose micro batches begin at the same pairs."""
    import torch

    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {position}".encode()).digest()[:8], "little")
    # Without a GPU torch.manual_seed takes half a millisecond: it notes from where each kind was to be seeded.
    seeded = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seeded(number)


def accumulate(run, batch: Batch, step: int, scale_up=lambda loss: loss):
    """Leave in .grad the gradient of the whole effective batch, over all processes; returns the loss.

    Two passes where memory does not hold the batch (GradCache, arXiv 2101.06983): all embeddings without a graph, the
    loss over all pairs, then each micro batch again with its share of the gradient. Plain accumulation would contrast
    pairs with their micro batch only, which is another loss. `scale_up` is a GradScaler's.
    """
    import torch

    towers, world = run.towers, run.world
    parts = [batch.part(start, run.micro) for start in range(0, len(batch.positions), run.micro)]
    fits = len(parts) == 1
    embedded = []
    for part in parts:
        reseed(run.config.seed, step, int(part.positions[0]))
        with torch.set_grad_enabled(fits):
            embedded.append(towers.embed(part))
    dim, scale = run.clip.config["embed_dim"], towers.model.logit_scale
    local = [torch.cat([e[side].detach() for e in embedded] or [scale.new_empty(0, dim)]) for side in (0, 1)]
    own_keys = batch.keys.view(-1, 2).to(world.device)
    (images, texts, keys), mine = world.gather(batch.total, batch.positions, *local, own_keys)
    leaves = images.requires_grad_(), texts.requires_grad_()
    loss = pair_loss(*leaves, keys, scale, towers.model.logit_bias)
    scale_up(loss).backward()  # the temperature has its whole gradient now, on every process
    for k, (part, rows) in enumerate(zip(parts, mine.split(run.micro), strict=False)):  # of no rows: one empty split
        if not fits:
            reseed(run.config.seed, step, int(part.positions[0]))
            embedded[k] = towers.embed(part)
        ends = [(e, leaf.grad[rows]) for e, leaf in zip(embedded[k], leaves, strict=True) if e.requires_grad]
        torch.autograd.backward(*zip(*ends, strict=True))
        embedded[k] = None  # its graph is done with
    if world.size > 1:
        shared = [p for name, p in towers.trained.items() if not name.endswith(("logit_scale", "logit_bias"))]
        flat = world.sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in shared]))
        for p, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p).clone()
    return loss.detach()
