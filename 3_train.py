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
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import imaging
import storage
from common import DONE, Fail, TrainingConfig
from contrast import accumulate, one_way_loss
from journal import Log, State, check_identity, draw_curves, find_checkpoint, save_checkpoint, write_result
from loader import Batch, Data, Samples, epoch_plan, hashed, in_order, keep
from towers import SCENARIOS, Towers, World, fitting_micro_batch

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # WiSE-FT: 0 is the base model, 1 the fine-tuned one
LOG_EVERY = 10  # steps
FREE_SETTINGS = (  # may differ when a run goes on: they do not change what is learned from, or only what dropout draws
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
    probe: Batch | None = None  # pictures and captions away from the catalogue
    effective: int = 0  # pairs contrasted in one step, over all processes
    micro: int = 64  # pairs in memory at once, per process

    def say(self, line: str) -> None:
        """Print a line, once whatever the number of processes."""
        if self.world.main:
            print(line, flush=True)

    def share_lost(self) -> None:
        """Let every process know what any could not read. Fail, on all of them, where it is too much."""
        for samples in (self.train.samples, self.validation.samples):
            found = self.world.share(sorted(samples.bad.items()))
            samples.bad = {i: reason for some in found for i, reason in some}
            samples.check(self.config.max_failed)


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

        folder = run.world.cache(run.output) / f"{data.samples.split}-{tower}-{known}"
        with run.world.first_on_this_machine():
            keep(data, tower, folder, encode, run.micro, variants)


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
        (keys, images, texts), _ = world.gather(len(data), positions, keys.to(world.device), images, texts)
        scale, bias = towers.model.logit_scale, towers.model.logit_bias
        loss = 0.0
        for rows in (slice(start, start + 1024) for start in range(0, len(keys), 1024)):
            loss += one_way_loss(images[rows], texts, keys[rows], keys, scale, bias).item()
            loss += one_way_loss(texts[rows], images, keys[rows], keys, scale, bias).item()
    run.share_lost()
    return {"loss": loss / (2 * len(keys))} | retrieval_metrics(images, texts, keys)


def load_probe(path: str, clip) -> Batch:
    """Pictures and captions of a CSV (image_path,caption) that is not about the catalogue."""
    import numpy as np
    import torch

    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [(Path(path).parent / row["image_path"], row["caption"]) for row in csv.DictReader(handle)]
        if not rows:
            raise ValueError("no rows")
        pictures = [np.array(imaging.letterbox(imaging.load_image(source, clip.size), clip.size)) for source, _ in rows]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        captions = [caption for _, caption in rows]
        if None in captions:
            raise ValueError(f"no caption for {rows[captions.index(None)][0].name}")
    except (OSError, KeyError, TypeError, ValueError, imaging.BadImage) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else error
        raise Fail(f"--probe {path}: {what}; it wants a CSV with image_path,caption and its pictures") from None
    keys = torch.tensor([hashed(caption) for caption in captions])
    return Batch(len(rows), torch.arange(len(rows)), keys, images, clip.tokenizer(captions))


def general_probe(run: Run) -> dict[str, float]:
    """Retrieval over the probe, which shows what was forgotten."""
    import torch

    from clip import retrieval_metrics

    run.towers.train(False)
    parts = [run.probe.part(start, run.micro) for start in range(0, run.probe.total, run.micro)]
    with torch.no_grad():
        images, texts = (torch.cat(side) for side in zip(*map(run.towers.embed, parts), strict=True))
    return retrieval_metrics(images, texts, run.probe.keys.to(images.device))


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
    gradients = [p.grad for p in towers.trained.values() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    overflow = scaler.get_scale() > 1  # of fp16, which a smaller scale mends
    if not (loss.isfinite() and (norm.isfinite() or overflow)):
        raise FloatingPointError(f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}")
    if norm > config.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(towers.trained.values(), config.clip_norm, norm)
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        towers.model.logit_scale.clamp_(0, towers.largest_scale)
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
        run.share_lost()
        state.bad = dict(samples.bad)
        save_checkpoint(run, state, optimizer, scaler, known)
        run.world.share(None)  # no process goes on, or stops all, before it is written

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
        due = time.monotonic() - saved >= config.checkpoint_minutes * 60 and state.batch < steps
        if any(run.world.share(due)):
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


def sweep_alpha(run: Run, fine: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """The interpolation between base and fine-tuned weights that validates best, and what each gives (WiSE-FT)."""
    swept = []
    for alpha in ALPHAS:
        run.towers.interpolate(alpha, fine)
        facts = {"alpha": alpha, "validation": evaluate(run, run.validation)}
        if run.probe:
            facts["probe"] = general_probe(run)
        swept.append(facts)
    best = max(swept, key=lambda facts: (facts["validation"]["mrr"], facts["alpha"]))
    return best["alpha"], swept


# --------------------------------------------------------------------------------------------------------------------
# The whole


def prepare(
    config: TrainingConfig, shards: str, output: Path, checkpoint: dict[str, Any] | None = None
) -> tuple[Run, dict[str, Any]]:
    """Open shards and model; settle what was left to be found out, as the checkpoint has it where there is one."""
    from clip import auto_precision, load_clip

    world = World(config.device)
    if config.precision == "auto":  # a run goes on as it began, on another machine too
        begun = checkpoint["identity"]["precision"] if checkpoint else auto_precision(world.device.type)
        config = dataclasses.replace(config, precision=world.share(begun)[0])
    manifest = storage.load_manifest(shards)
    clip = load_clip(config.model, config.pretrained, world.device)
    probe = load_probe(config.probe, clip) if config.probe else None
    with world.first_on_this_machine():
        room = config.cache_gb * 1e9
        splits = [
            Samples(shards, manifest, s, world.cache(output) / "shards", room, config.limit)
            for s in ("train", "validation")
        ]
    for samples in splits:
        samples.check(config.max_failed)
    train, validation = (Data(samples, clip, config, k == 0) for k, samples in enumerate(splits))
    run = Run(config, output, world, clip, Towers(clip, config), train, validation, probe)
    if note := storage.scaled_up(manifest, clip):
        run.say(note)
    run.effective = config.effective_batch_size or min(1024, max(32, len(train) // 8))
    if run.effective > len(train):
        run.effective = len(train)
        run.say(f"the train split has only {len(train)} samples: all of them make one effective batch")
    return run, manifest


def fine_tune(run: Run, manifest: dict[str, Any], checkpoint: dict[str, Any] | None) -> dict[str, Any]:
    """Train, judge and export; returns what train.json says about it."""
    log, config = Log(run), run.config
    if not checkpoint:
        run.towers.refuse_idle_lora()
    if config.micro_batch_size != "auto":
        run.micro = int(config.micro_batch_size)
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
        f"effective batch {run.effective} = {run.world.size} processes x {parts} micro batches of up to {run.micro},"
        f" in {config.precision}"
    )
    counts = run.towers.counts()
    state = train(run, manifest, checkpoint, log)
    fine = state.best["weights"]
    best_alpha, swept = sweep_alpha(run, fine)
    alpha = best_alpha if config.wise else 1.0
    for facts in swept:
        forgotten = f", general probe {facts['probe']['mrr']:.4f}" if run.probe else ""
        run.say(f"  WiSE-FT: alpha {facts['alpha']:.2f}, validation MRR {facts['validation']['mrr']:.4f}{forgotten}")
    run.say(f"  the best alpha is {best_alpha}; exported is {alpha}" + ("" if config.wise else " (--wise: the best)"))
    known = identity(run, manifest)
    if run.world.main:
        run.towers.export(run.output, alpha, fine)
        draw_curves(log, run.output / "curves.png")
        log.close(run.output / "model" if config.wandb_artifacts else None)
    before, best = swept[0]["validation"], next(f["validation"] for f in swept if f["alpha"] == alpha)
    return {
        "model_dir": "model",
        "validation": {"zero_shot": before, "best": best, "best_epoch": state.best["epoch"]},
        "alpha": alpha,
        "best_alpha": best_alpha,
        "wise_ft": swept,
        "parameters": counts,
        "batch": {"effective": run.effective, "micro": run.micro, "processes": run.world.size},
        "identity": known,
    }


def run_scenario(config: TrainingConfig, shards: str, output: Path) -> None:
    """One scenario from shards to train.json."""
    import torch

    start = time.monotonic()
    common.keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    checkpoint = find_checkpoint(config, output) if SCENARIOS[config.scenario][2] else None
    run, manifest = prepare(config, shards, output, checkpoint)
    found = run.world.share(checkpoint and checkpoint["state"]["step"])
    if len(set(found)) > 1:
        raise Fail(f"the processes found checkpoints of steps {found}; put --output on a disk that all machines share")
    marker = output / "train.json"
    known = json.loads(json.dumps(identity(run, manifest)))
    if run.world.share(config.resume and is_finished(marker, config, known))[0]:
        run.say(f"{marker}: finished already; --no-resume trains again")
        return
    if run.world.main:
        storage.remove(marker)
    if SCENARIOS[config.scenario][2]:
        facts = fine_tune(run, manifest, checkpoint)
    else:
        facts = {"model_dir": None, "validation": {"zero_shot": evaluate(run, run.validation)}, "identity": known}
    if run.world.main:
        write_result(run, marker, shards, time.monotonic() - start, facts)


def is_finished(marker: Path, config: TrainingConfig, known: dict[str, Any]) -> bool:
    """Whether the marker belongs to a run that gave all that this one would."""
    facts = common.read_json(marker) if marker.is_file() else {}
    before = facts.get("settings", {})
    return facts.get("identity") == known and all(before[name] == getattr(config, name) for name in ("wise", "probe"))


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
    if config.micro_batch_size != "auto" and not (config.micro_batch_size.isdigit() and int(config.micro_batch_size)):
        parser.error(f"--micro-batch-size {config.micro_batch_size}: a number, or auto")
    helping = bool(int(os.environ.get("RANK", 0)))  # the first process holds the lock for all of torchrun's
    with contextlib.nullcontext(True) if helping else common.exclusive(args.output / ".lock") as mine:
        if not mine:
            raise Fail(f"{args.output}: another run is writing here; wait for it, or choose another --output")
        try:
            with common.memory_running_out("lower --micro-batch-size, or use --grad-checkpointing"):
                run_scenario(config, args.shards, args.output)
        except RuntimeError as error:
            if re.search("Connection (closed|reset) by (remote )?peer", str(error)):
                raise Fail("another process of this run stopped, and says why; start them all again") from None
            raise
    return DONE


if __name__ == "__main__":
    sys.exit(main())
