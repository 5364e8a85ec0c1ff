"""Stage 3: fine-tune a CLIP on the shards, with LoRA, exactly as one large batch would, and go on after anything.

Reads   --shards: a folder or s3://bucket/prefix from 2_prepare.py (splits train and validation)
Writes  --output: adapter/ (PEFT and projections), model/ (merged; open_clip loads it by local-dir:), checkpoint.pt,
        metrics.jsonl, curves.png, and train.json last

    python 3_train.py --shards data/shards --scenario dual_lora --model ViT-B-32 --pretrained openai \\
        --output data/runs/dual_lora
    torchrun --nproc-per-node 8 3_train.py ...                  the same, on eight GPUs
    python 3_train.py --shards data/shards --model local-dir:tests/small_clip --epochs 2 \\
        --output data/runs/tiny                                 a minute on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from common import DONE, Fail, TrainingConfig
from journal import Log, State, check_identity, draw_curves, find_checkpoint, save_checkpoint, table
from loader import Batch, Data, Samples, epoch_plan, hashed, in_order, keep
from towers import SCENARIOS, Towers, World, fitting_micro_batch

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # WiSE-FT: 0 is the base model, 1 the fine-tuned one
LOG_EVERY = 10  # steps
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper
FREE_SETTINGS = (  # may differ when a run goes on: they do not change what is computed, or only how exactly it adds up
    *("workers", "cache_gb", "checkpoint_minutes", "checkpoint_url", "wandb", "wandb_artifacts", "resume", "device"),
    *("wise", "probe", "micro_batch_size", "model", "pretrained", "effective_batch_size"),  # resolved ones are kept
)

# --------------------------------------------------------------------------------------------------------------------
# What the parts of a run share


@dataclasses.dataclass
class Run:
    """All that the parts of one run share."""

    config: TrainingConfig
    output: Path
    world: World
    clip: Any
    towers: Towers
    train: Data
    validation: Data
    effective: int = 0  # pairs contrasted in one step, over all processes
    micro: int = 64  # pairs in memory at once, per process

    def say(self, line: str) -> None:
        """Print a line, once whatever the number of processes."""
        if self.world.main:
            print(line, flush=True)


def keep_features(run: Run, data: Data) -> None:
    """Let frozen towers run once over a split: linear_probe then trains 500 times faster, text_lora 7 times.

    Pictures that are augmented anew each epoch have no lasting features: a few fixed views are kept instead.
    """
    import torch

    config = run.config
    shards = [entry["sha256"] for entry in data.samples.entries]
    for tower in (tower for tower, adapted in run.towers.adapted.items() if not adapted):
        varies = data.training and (config.augment != "none" if tower == "image" else config.captions == "varied")
        variants = (config.views if tower == "image" else config.epochs) if varies else 1
        shape = [varies, variants, config.seed, config.augment, len(data)]
        known = common.digest([shards, run.clip.fingerprint, config.precision, shape])[:16]

        def encode(inputs, tower=tower):
            with torch.no_grad(), run.towers.autocast():
                return run.towers.features(tower, inputs).float().cpu()

        folder = run.output / "cache" / f"{data.samples.split}-{tower}-{known}"
        with run.world.first_on_this_machine():
            keep(data, tower, folder, encode, run.micro, variants)


# --------------------------------------------------------------------------------------------------------------------
# The loss and its gradient, exact for the whole effective batch


def one_way_loss(queries, gallery, query_keys, keys, scale, bias=None):
    """Sum over queries [B, D] of their loss against the gallery [N, D].

    Pairs that agree in any column of their keys (int64 [B, K], [N, K]) are all positives: a duplicate product or the
    same caption is no negative. Softmax cross-entropy with the positives sharing the target (CLIP), or the sigmoid
    loss of SigLIP (arXiv 2303.15343) where the model has a bias.
    """
    import torch.nn.functional as F

    logits = scale.exp() * (queries @ gallery.T)  # (B, N)
    positive = (query_keys[:, None] == keys[None]).any(dim=-1)
    if bias is not None:
        return -F.logsigmoid((logits + bias) * (2.0 * positive - 1.0)).sum()
    target = positive / positive.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum()


def pair_loss(images, texts, keys, scale, bias=None):
    """The mean of both directions over N pairs."""
    both = one_way_loss(images, texts, keys, keys, scale, bias) + one_way_loss(texts, images, keys, keys, scale, bias)
    return both / (2 * len(images))


def reseed(seed: int, step: int, position: int) -> None:
    """Random numbers that depend on the place in the run alone: a second pass, a resumed run and any number of
    processes draw the same dropout."""
    import torch

    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {position}".encode()).digest()[:8], "little"))


def accumulate(run: Run, batch: Batch, step: int, scale_up=lambda loss: loss):
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
    images, texts = (world.gather(batch.total, batch.positions, side) for side in local)
    keys = world.gather(batch.total, batch.positions, batch.keys.view(-1, 2).to(world.device))
    there = world.gather(batch.total, batch.positions, torch.ones(len(batch.positions), device=world.device)) > 0
    leaves = [side[there].requires_grad_() for side in (images, texts)]
    loss = pair_loss(*leaves, keys[there], scale, towers.model.logit_bias)
    scale_up(loss).backward()  # the temperature has its whole gradient now, on every process
    for side, leaf in zip((images, texts), leaves, strict=True):
        side[there] = leaf.grad
    for k, part in enumerate(parts):
        if not fits:
            reseed(run.config.seed, step, int(part.positions[0]))
            embedded[k] = towers.embed(part)
        rows = part.positions.to(world.device)
        ends = [(e, g[rows]) for e, g in zip(embedded[k], (images, texts), strict=True) if e.requires_grad]
        torch.autograd.backward(*zip(*ends, strict=True))
        embedded[k] = None  # its graph is done with
    if world.size > 1:
        shared = [p for name, p in towers.trained.items() if not name.endswith(("logit_scale", "logit_bias"))]
        flat = world.sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in shared]))
        for p, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p).clone()
    return loss.detach()


# --------------------------------------------------------------------------------------------------------------------
# Validation


def evaluate(run: Run, data: Data) -> dict[str, float]:
    """Loss, recall@1/5/10 and MRR, both ways, over a whole split with the shard's own captions; memory linear in N."""
    import torch

    from clip import retrieval_metrics

    towers, world = run.towers, run.world
    towers.train(False)
    found: list[list] = [[], [], [], []]
    with torch.no_grad():
        for batch in data.batches(in_order(len(data), run.micro, world.rank, world.size)):
            if len(batch.positions):
                for column, value in zip(found, (batch.positions, batch.keys, *towers.embed(batch)), strict=True):
                    column.append(value)
        if not found[0]:  # more processes than samples
            nothing = torch.empty(0, run.clip.config["embed_dim"], device=world.device)
            found = [[torch.empty(0).long()], [torch.empty(0, 2).long()], [nothing], [nothing]]
        positions, keys, images, texts = (torch.cat(column) for column in found)
        there = world.gather(len(data), positions, torch.ones(len(positions), device=world.device)) > 0
        keys, images, texts = (
            world.gather(len(data), positions, x)[there] for x in (keys.to(world.device), images, texts)
        )
        scale, bias = towers.model.logit_scale, towers.model.logit_bias
        loss = 0.0
        for rows in (slice(start, start + 1024) for start in range(0, len(keys), 1024)):
            loss += one_way_loss(images[rows], texts, keys[rows], keys, scale, bias).item()
            loss += one_way_loss(texts[rows], images, keys[rows], keys, scale, bias).item()
    return {"loss": loss / (2 * len(keys))} | retrieval_metrics(images, texts, keys)


def general_probe(run: Run, path: str) -> dict[str, float]:
    """Retrieval over the pictures and captions of a CSV (image_path,caption) that is not about the catalogue."""
    import numpy as np
    import torch
    from PIL import Image

    from clip import retrieval_metrics

    try:
        with open(path, newline="", encoding="utf-8") as handle:
            rows = [(Path(path).parent / row["image_path"], row["caption"]) for row in csv.DictReader(handle)]
    except (OSError, KeyError) as error:
        raise Fail(f"--probe {path}: {error}; it wants a CSV with image_path,caption") from None
    size, embedded, captions = run.clip.size, [], [hashed(caption) for _, caption in rows]
    run.towers.train(False)
    for start in range(0, len(rows), run.micro):
        some = rows[start : start + run.micro]
        squares = []
        for source, _ in some:
            picture = common.load_image(source, size)
            picture.thumbnail((size, size))
            square = Image.new("RGB", (size, size), "white")
            square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
            squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        texts = run.clip.tokenizer([caption for _, caption in some])
        with torch.no_grad():
            embedded.append(run.towers.embed(Batch(len(some), None, None, torch.stack(squares), texts)))
    images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
    return retrieval_metrics(images, texts, torch.tensor(captions, device=images.device))


# --------------------------------------------------------------------------------------------------------------------
# Training


def identity(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to be gone on with."""
    settings = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in FREE_SETTINGS}
    shards = {s: [entry["sha256"] for entry in manifest["splits"][s]["shards"]] for s in ("train", "validation")}
    made = {"model": run.clip.fingerprint, "shards": common.digest(shards)}
    return settings | made | {"effective_batch_size": run.effective}


def rate(kind: str, done: float, warmup: float) -> float:
    """Share of the peak learning rate when `done` (0 to 1) of the updates are made."""
    if kind == "onecycle":  # from 1/25 up in 30%, down to 1/250,000 (arXiv 1708.07120)
        low, high, part = (1 / 25, 1, done / 0.3) if done < 0.3 else (1 / 250_000, 1, (1 - done) / 0.7)
        return low + (high - low) * (1 - math.cos(math.pi * part)) / 2
    if done < warmup:
        return done / warmup
    return (1 + math.cos(math.pi * (done - warmup) / max(1e-9, 1 - warmup))) / 2


def make_optimizer(run: Run):
    """AdamW over three groups: LoRA and projections at their own rates, temperature and biases without decay."""
    import torch

    config, groups = run.config, {"lora": [], "projections": [], "scalars": []}
    for name, parameter in run.towers.trained.items():
        groups["lora" if "lora_" in name else "projections" if parameter.ndim > 1 else "scalars"].append(parameter)
    peaks = {"lora": config.lora_lr, "projections": config.lr, "scalars": config.lr}
    decay = {"lora": config.weight_decay, "projections": config.weight_decay, "scalars": 0.0}
    settings = [
        {"params": some, "peak": peaks[kind], "lr": 0.0, "weight_decay": decay[kind]}
        for kind, some in groups.items()
        if some
    ]
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(settings)
    return torch.optim.AdamW(settings, fused=True)


def update(run: Run, state: State, optimizer, scaler, batch: Batch, total_updates: int) -> dict[str, float]:
    """One step: gradient, clip, AdamW. Raises FloatingPointError before a number that is none reaches the weights."""
    import torch

    towers, config = run.towers, run.config
    towers.train(True)
    optimizer.zero_grad()
    share = rate(config.schedule, (state.updates + 1) / (total_updates + 1), config.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    loss = accumulate(run, batch, state.step, scaler.scale)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(towers.trained.values(), config.clip_norm)
    if not (loss.isfinite() and (norm.isfinite() or scaler.is_enabled())):
        raise FloatingPointError(f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}")
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        towers.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    state.step += 1
    state.batch += 1
    state.updates += scaler.get_scale() >= before
    return {
        "loss": loss.item(),
        "lr": config.lr * share,
        "lora_lr": config.lora_lr * share,
        "gradient_norm": norm.item(),
        "logit_scale": towers.model.logit_scale.exp().item(),
    }


def train(run: Run, manifest: dict[str, Any], checkpoint: dict[str, Any] | None, log: Log) -> State:
    """All epochs, or those that are left; returns the state with the best epoch in it."""
    import torch

    config, towers, samples = run.config, run.towers, run.train.samples
    optimizer = make_optimizer(run)
    scaler = torch.amp.GradScaler(run.world.device.type, enabled=config.precision == "fp16")
    known, state = identity(run, manifest), State()
    if checkpoint:
        check_identity(checkpoint, known)
        state = State(**checkpoint["state"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        towers.load(checkpoint["weights"])
        samples.bad |= state.bad
        run.say(f"going on after step {state.step}, in epoch {min(state.epoch + 1, config.epochs)}")

    def save() -> None:
        state.bad = dict(samples.bad)
        save_checkpoint(run, state, optimizer, scaler, known)

    log.start(state)
    if not checkpoint:
        log.write(kind="validation", epoch=0, step=0, **evaluate(run, run.validation))
    while state.epoch < config.epochs and not out_of_patience(state, config):
        one_epoch(run, state, optimizer, scaler, log, save)
        state.epoch, state.batch = state.epoch + 1, 0
        metrics = evaluate(run, run.validation)
        if metrics["mrr"] > state.best.get("metrics", {}).get("mrr", -1):
            state.best = {"epoch": state.epoch, "metrics": metrics, "weights": towers.copy()}
        log.write(kind="validation", epoch=state.epoch, step=state.step, **metrics)
        run.say(f"  validation: loss {metrics['loss']:.4f}, MRR {metrics['mrr']:.4f}")
        save()
    return state


def one_epoch(run: Run, state: State, optimizer, scaler, log: Log, save: Callable[[], None]) -> None:
    """The steps of the current epoch, from state.batch on."""
    from tqdm import tqdm

    config = run.config
    steps = math.ceil(len(run.train) / run.effective)
    plan = epoch_plan(
        len(run.train), run.effective, config.seed, state.epoch, run.world.rank, run.world.size, state.batch
    )
    start = saved = time.monotonic()
    pairs, title, numbers = 0, f"epoch {state.epoch + 1}/{config.epochs}", {"loss": math.nan}
    bar = tqdm(total=steps, initial=state.batch, desc=title, unit="step", disable=None if run.world.main else True)
    for batch in run.train.batches(plan, state.epoch):
        try:
            numbers = update(run, state, optimizer, scaler, batch, steps * config.epochs)
        except FloatingPointError as error:
            save()
            raise Fail(
                f"step {state.step + 1}: {error}; the last good state is in checkpoint.pt; start over with lower --lr "
                "and --lora-lr, or with --precision fp32, and --no-resume"
            ) from None
        pairs += batch.total
        speed = pairs / (time.monotonic() - start)
        bar.set_postfix(loss=f"{numbers['loss']:.3f}", lr=f"{numbers['lr']:.1e}", pairs=f"{speed:.0f}/s", refresh=False)
        bar.update()
        if state.step % LOG_EVERY == 0 or state.batch == steps:
            log.write(kind="step", epoch=state.epoch + 1, step=state.step, **numbers)
        if time.monotonic() - saved >= config.checkpoint_minutes * 60 and state.batch < steps:
            save()
            saved = time.monotonic()
    bar.close()
    speed = pairs / (time.monotonic() - start)
    run.say(f"{title}: step {state.step}, loss {numbers['loss']:.4f}, {speed:.0f} pairs a second")


def out_of_patience(state: State, config: TrainingConfig) -> bool:
    """Whether --patience epochs went by without a better one."""
    return config.patience is not None and bool(state.best) and state.epoch - state.best["epoch"] >= config.patience


# --------------------------------------------------------------------------------------------------------------------
# What remains of a run


def choose_alpha(run: Run, fine: dict[str, Any], log: Log) -> tuple[float, list[dict[str, Any]]]:
    """The interpolation between base and fine-tuned weights to export, and what each validates at (WiSE-FT)."""
    swept = []
    for alpha in ALPHAS:
        run.towers.interpolate(alpha, fine)
        facts = {"alpha": alpha, "validation": evaluate(run, run.validation)}
        if run.config.probe:
            facts["probe"] = general_probe(run, run.config.probe)
        swept.append(facts)
    best = max(swept, key=lambda facts: (facts["validation"]["mrr"], facts["alpha"]))
    return best["alpha"] if run.config.wise else 1.0, swept


def export(run: Run, alpha: float, fine: dict[str, Any]) -> None:
    """Write adapter/ and model/ for the weights at alpha; the towers become the plain open_clip model again."""
    from safetensors.torch import save_file

    from clip import fuse_attention, return_projections, save_clip

    towers = run.towers
    towers.interpolate(alpha, fine)
    with common.whole_folder(run.output / "adapter") as folder:
        if towers.peft is not None:  # it drops what is no LoRA: the rest stands beside it
            towers.peft.peft_config["default"].lora_alpha *= alpha
            towers.peft.save_pretrained(folder)
        rest = {name: parameter for name, parameter in towers.trained.items() if "lora_" not in name}
        save_file(
            {name: parameter.detach().cpu().contiguous() for name, parameter in rest.items()},
            folder / "projections.safetensors",
        )
    if towers.peft is not None:
        towers.peft.merge_and_unload()
    fuse_attention(return_projections(towers.model, towers.projections))
    save_clip(run.clip, run.output / "model")


def parameter_counts(run: Run) -> dict[str, Any]:
    """How many parameters there are, are trained, and belong to LoRA."""
    towers = run.towers
    trained = {name: parameter.numel() for name, parameter in towers.trained.items()}
    lora = sum(count for name, count in trained.items() if "lora_" in name)
    every = sum(p.numel() for part in (towers.model, towers.projections) for p in part.parameters())
    return {"base": every - lora, "trained": sum(trained.values()), "lora": lora, "lora_share": lora / (every - lora)}


# --------------------------------------------------------------------------------------------------------------------
# The whole


def prepare(config: TrainingConfig, shards: str, output: Path) -> tuple[Run, dict[str, Any]]:
    """Open shards and model; settle what was left to be found out."""
    from clip import load_clip

    world = World(config.device)
    if config.precision == "auto":
        config = dataclasses.replace(config, precision="bf16" if world.device.type == "cuda" else "fp32")
    manifest = common.load_manifest(shards)
    with world.first_on_this_machine():
        room = config.cache_gb * 1e9
        splits = [
            Samples(shards, manifest, s, output / "cache" / "shards", room, config.limit)
            for s in ("train", "validation")
        ]
    for samples in splits:
        samples.check(config.max_failed)
    clip = load_clip(config.model, config.pretrained, world.device)
    train, validation = (Data(samples, clip, config, k == 0) for k, samples in enumerate(splits))
    run = Run(config, output, world, clip, Towers(clip, config), train, validation)
    run.effective = config.effective_batch_size or min(1024, max(32, len(train) // 8))
    if run.effective > len(train):
        run.effective = len(train)
        run.say(f"the train split has only {len(train)} samples: all of them make one effective batch")
    return run, manifest


def fine_tune(run: Run, manifest: dict[str, Any], checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    """Train, judge and export; returns what train.json says about it."""
    log = Log(run)
    if run.config.micro_batch_size != "auto":
        run.micro = int(run.config.micro_batch_size)
    else:  # found out once: another split of the same batch adds up in another order
        run.micro = (
            checkpoint["micro"]
            if checkpoint
            else fitting_micro_batch(run.towers, math.ceil(run.effective / run.world.size))
        )
    for data in (run.train, run.validation):
        keep_features(run, data)
    parts = math.ceil(run.effective / run.world.size / run.micro)
    run.say(
        f"effective batch {run.effective} = {run.world.size} processes x {parts} micro batches of up to {run.micro}"
    )
    counts = parameter_counts(run)
    state = train(run, manifest, checkpoint, log)
    fine = state.best["weights"]
    alpha, swept = choose_alpha(run, fine, log)
    known = identity(run, manifest)
    if run.world.main:
        export(run, alpha, fine)
        draw_curves(log, run.output / "curves.png")
        log.close(run.output / "model" if run.config.wandb_artifacts else None)
    before, best = swept[0]["validation"], next(f["validation"] for f in swept if f["alpha"] == alpha)
    return {
        "model_dir": "model",
        "validation": {"zero_shot": before, "best": best, "best_epoch": state.best["epoch"]},
        "alpha": alpha,
        "wise_ft": swept,
        "parameters": counts,
        "batch": {"effective": run.effective, "micro": run.micro, "processes": run.world.size},
        "identity": known,
    }


def run_scenario(config: TrainingConfig, shards: str, output: Path) -> None:
    """One scenario from shards to train.json."""
    import torch

    start = time.monotonic()
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    checkpoint = find_checkpoint(config, output) if SCENARIOS[config.scenario][2] else None
    run, manifest = prepare(config, shards, output)
    marker = output / "train.json"
    known = json.loads(json.dumps(identity(run, manifest)))
    if config.resume and marker.is_file() and common.read_json(marker).get("identity") == known:
        print(f"{marker}: finished already; --no-resume trains again", flush=True)
        return
    if run.world.main:
        common.remove(marker)
    if SCENARIOS[config.scenario][2]:
        facts = fine_tune(run, manifest, checkpoint)
    else:
        facts = {"model_dir": None, "validation": {"zero_shot": evaluate(run, run.validation)}, "identity": known}
    if not run.world.main:
        return
    if run.world.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lost = {data.samples.split: data.samples for data in (run.train, run.validation)}
    common.write_sidecar(
        marker,
        run.config,
        {split: {"samples": s.lost()[1], "unreadable": s.lost()[0]} for split, s in lost.items()},
        {"shards": shards, "base": run.clip.name, "base_fingerprint": known["model"]},
        time.monotonic() - start,
        scenario=config.scenario,
        model=config.model,
        pretrained=config.pretrained,
        memory_mb=round(memory / 1e6),
        unreadable=[*(line for s in lost.values() for line in (*s.damaged, *s.bad.values()))][:1000],
        versions=common.versions("torch", "open_clip_torch", "peft"),
        **facts,
    )
    for split, samples in lost.items():
        if samples.lost()[0]:
            print(f"{split}: {samples.lost()[0]} of {samples.lost()[1]} samples were unreadable; named in {marker}")
    print(table(facts["validation"]["zero_shot"], facts["validation"].get("best")), flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="folder or s3://bucket/prefix made by 2_prepare.py")
    parser.add_argument("--output", required=True, type=Path, help="folder of this run, such as data/runs/dual_lora")
    common.add_flags(parser, TrainingConfig)
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    config = common.from_flags(TrainingConfig, args)
    for name in ("epochs", "effective_batch_size", "lora_r", "views", "workers"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if config.micro_batch_size != "auto" and not (config.micro_batch_size.isdigit() and int(config.micro_batch_size)):
        parser.error(f"--micro-batch-size {config.micro_batch_size}: a number, or auto")
    helping = bool(int(os.environ.get("RANK", 0)))  # the first process holds the lock for all of torchrun's
    with contextlib.nullcontext(True) if helping else common.exclusive(args.output / ".lock") as mine:
        if not mine:
            raise Fail(f"{args.output}: another run is writing here; wait for it, or choose another --output")
        try:
            run_scenario(config, args.shards, args.output)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not re.search("out of memory|not enough memory|can't allocate memory", str(error)):
                raise
            raise Fail("out of memory; lower --micro-batch-size, or use --grad-checkpointing") from None
    return DONE


if __name__ == "__main__":
    sys.exit(main())
