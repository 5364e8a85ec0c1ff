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
import datetime
import hashlib
import io
import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from common import DONE, Fail, TrainingConfig
from loader import Batch, Data, Samples, epoch_plan, hashed, in_order, keep

# scenario: (LoRA in the vision tower, LoRA in the text tower, projections and temperature trained)
SCENARIOS = {
    "zero_shot": (False, False, False),
    "linear_probe": (False, False, True),
    "dual_lora": (True, True, True),
    "vision_lora": (True, False, True),
    "text_lora": (False, True, True),
}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # WiSE-FT: 0 is the base model, 1 the fine-tuned one
LOG_EVERY = 10  # steps
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper
FREE_SETTINGS = (  # may differ when a run goes on: they do not change what is computed, or only how exactly it adds up
    *("workers", "cache_gb", "checkpoint_minutes", "checkpoint_url", "wandb", "wandb_artifacts", "resume", "device"),
    *("wise", "probe", "micro_batch_size", "model", "pretrained", "effective_batch_size"),  # resolved ones are kept
)

# --------------------------------------------------------------------------------------------------------------------
# One process or many


class World:
    """This process among those that torchrun started (or the only one)."""

    def __init__(self, device: str = "auto"):
        import torch
        import torch.distributed as dist

        self.rank, self.size, self.local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(f"cuda:{self.local_rank}" if device == "cuda" else device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise Fail(f"--device {device}: {str(error).splitlines()[0]}; use --device cpu or auto") from None
        if self.size > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))  # ranks wait for one to fill a cache

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor):
        """The tensor summed over all processes, in place; each gets the same bits."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, total: int, positions, local):
        """[total, ...] from each process's rows [B, ...] and their positions (int64 [B]); rows nobody has are 0."""
        whole = local.new_zeros((total, *local.shape[1:]))
        whole[positions.to(whole.device)] = local
        return self.sum(whole)

    @contextlib.contextmanager
    def first_on_this_machine(self) -> Iterator[None]:
        """Let one process of each machine do what the others then find done."""
        import torch

        if self.local_rank:
            self.sum(torch.zeros(1, device=self.device))
        yield
        if not self.local_rank:
            self.sum(torch.zeros(1, device=self.device))


# --------------------------------------------------------------------------------------------------------------------
# The model under training


class Towers:
    """A CLIP prepared for a scenario: attention split, projections apart, LoRA where the scenario puts it."""

    def __init__(self, clip, config: TrainingConfig):
        import torch

        from clip import LeanDropout, split_attention, take_projections

        vision, text, projections = SCENARIOS[config.scenario]
        self.clip, self.model, self.config = clip, split_attention(clip.model), config
        self.model.requires_grad_(False)
        self.projections = take_projections(self.model)
        self.adapted = {"image": vision, "text": text}
        self.peft = None
        if vision or text:
            logging.disable(logging.WARNING)  # bitsandbytes, which peft imports, warns of what is not used here
            import peft

            logging.disable(logging.NOTSET)
            names = [name for tower, adapted in self.adapted.items() if adapted for name in self.linears(tower)]
            torch.manual_seed(config.seed)  # LoRA's start
            self.peft = peft.get_peft_model(
                self.model,
                peft.LoraConfig(
                    r=config.lora_r,
                    lora_alpha=config.lora_alpha,
                    lora_dropout=config.lora_dropout,
                    # Whole names: a list would be matched by endings, and text names are endings of "visual.*" ones.
                    target_modules="|".join(re.escape(name) for name in names),
                ),
            )
            for module in self.model.modules():
                if hasattr(module, "lora_dropout") and config.lora_dropout:
                    module.lora_dropout["default"] = LeanDropout(config.lora_dropout)
        for parameter in (*self.projections.parameters(), self.model.logit_scale, self.model.logit_bias):
            if parameter is not None:
                parameter.requires_grad_(projections)
        named = [*self.model.named_parameters(), *self.projections.named_parameters("projections")]
        self.trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.base = {name: p.detach().clone() for name, p in self.trained.items() if "lora_" not in name}
        self.dropouts = [m for name, m in self.model.named_modules() if name.endswith("lora_dropout.default")]
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        if config.compile:
            self.model.visual.compile()
            getattr(self.model, "text", self.model).transformer.compile(dynamic=True)

    def linears(self, tower: str) -> list[str]:
        """Names of the Linears of a tower's attention and MLP; Fail where it has none that LoRA could reach."""
        from open_clip.modified_resnet import ModifiedResNet
        from torch import nn

        names = []
        if tower == "text" or not isinstance(self.model.visual, ModifiedResNet):  # its pooling reads weights only
            for name, module in self.model.named_modules():
                # type() leaves out the subclass inside nn.MultiheadAttention, which is never called either
                if type(module) is nn.Linear and name.startswith("visual.") == (tower == "image"):
                    names.append(name)
        if not names:
            raise Fail(
                f"--scenario {self.config.scenario}: the {tower} tower of {self.clip.name} has no attention or MLP "
                "to adapt; use linear_probe"
            )
        return names

    def copy(self) -> dict[str, Any]:
        """The trained weights as they are now, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    def load(self, weights: dict[str, Any]) -> None:
        """Undo copy()."""
        import torch

        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    def train(self, mode: bool) -> None:
        """Dropout on or off where LoRA is; everything else always computes as in evaluation."""
        for module in self.dropouts:
            module.train(mode)

    def interpolate(self, alpha: float, fine: dict[str, Any]) -> None:
        """Set the weights to (1 - alpha) base + alpha fine-tuned (WiSE-FT, arXiv 2109.01903)."""
        import torch

        with torch.no_grad():
            for name, parameter in self.trained.items():
                there = fine[name].to(parameter.device)
                parameter.copy_(torch.lerp(self.base[name], there, alpha) if name in self.base else there)
        for module in self.model.modules():
            if hasattr(module, "lora_A"):  # its update is linear in its scaling
                module.scaling = dict.fromkeys(module.scaling, self.config.lora_alpha / self.config.lora_r * alpha)

    def autocast(self):
        """Half precision for the towers where asked for; loss, norms and temperature stay float32."""
        import torch

        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision, torch.float32)
        return torch.autocast(self.clip.device.type, kind, enabled=kind is not torch.float32)

    def features(self, tower: str, inputs):
        """What a tower gives before its projection, [B, W], for uint8 pictures or int64 tokens."""
        from clip import normalise, text_features

        if tower == "image":
            return self.model.visual(normalise(self.clip, inputs))
        return text_features(self.model, inputs.to(self.clip.device))

    def embed(self, batch: Batch) -> tuple[Any, Any]:
        """(images, texts), float [B, D], L2-normalised. A frozen tower's kept features are only projected."""
        import torch.nn.functional as F

        embedded = []
        for tower, inputs in (("image", batch.images), ("text", batch.texts)):
            with self.autocast():
                kept = inputs.is_floating_point()
                x = self.projections[tower](inputs.to(self.clip.device) if kept else self.features(tower, inputs))
            embedded.append(F.normalize(x.to(self.model.logit_scale.dtype), dim=-1))
        return tuple(embedded)


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
# Going on after anything


@dataclasses.dataclass
class State:
    """Where a run stands. All that a checkpoint holds beside weights and optimizer; plain values only."""

    epoch: int = 0  # of the next step
    batch: int = 0  # of the next step, within its epoch
    step: int = 0  # steps done
    updates: int = 0  # steps that changed the weights: fp16 skips those whose gradient overflowed
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # unreadable training samples found so far
    best: dict[str, Any] = dataclasses.field(default_factory=dict)  # epoch, metrics and weights with the best MRR
    lines: list[str] = dataclasses.field(default_factory=list)  # of metrics.jsonl


def identity(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to be gone on with."""
    settings = {k: v for k, v in dataclasses.asdict(run.config).items() if k not in FREE_SETTINGS}
    shards = {s: [entry["sha256"] for entry in manifest["splits"][s]["shards"]] for s in ("train", "validation")}
    made = {"model": run.clip.fingerprint, "shards": common.digest(shards)}
    return settings | made | {"effective_batch_size": run.effective}


def save_checkpoint(run: Run, state: State, optimizer, scaler, known: dict[str, Any]) -> None:
    """Write checkpoint.pt, whole; copy it to --checkpoint-url."""
    import torch

    if not run.world.main:
        return
    path = run.output / "checkpoint.pt"
    content = {
        "identity": known,
        "micro": run.micro,
        "state": dataclasses.asdict(state),
        "weights": {name: parameter.detach() for name, parameter in run.towers.trained.items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    with common.whole_file(path) as temporary:
        torch.save(content, temporary)
    if run.config.checkpoint_url:
        common.put_whole(common.join(run.config.checkpoint_url, "checkpoint.pt"), path)


def find_checkpoint(config: TrainingConfig, output: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of the output folder and --checkpoint-url; None without one or with --no-resume."""
    import torch

    if not config.resume:
        return None
    places = [str(output / "checkpoint.pt")]
    places += [common.join(config.checkpoint_url, "checkpoint.pt")] if config.checkpoint_url else []
    found = []
    for place in places:
        if common.exists(place):
            try:
                with common.open_read(place) as handle:
                    found.append(torch.load(io.BytesIO(handle.read()), map_location="cpu", weights_only=True))
            except Exception as error:  # torch raises many kinds for a damaged file
                reason = str(error).splitlines()[0][:100]
                raise Fail(f"{place}: not a readable checkpoint ({reason}); remove it, or use --no-resume") from None
    return max(found, key=lambda checkpoint: checkpoint["state"]["step"], default=None)


def check_identity(checkpoint: dict[str, Any], known: dict[str, Any]) -> None:
    """Fail, naming the difference, where a checkpoint belongs to another run."""
    theirs = checkpoint["identity"]
    other = [name for name in known if known[name] != theirs.get(name)]
    if other:
        what = "; ".join(f"{name} was {theirs.get(name)}, is {known[name]}" for name in other[:4])
        raise Fail(
            f"checkpoint.pt belongs to other settings ({what}); use --no-resume to start over, or other --output"
        )


class Log:
    """metrics.jsonl, and Weights & Biases where wanted. Its lines are part of the state, so none is lost or doubled."""

    def __init__(self, run: Run):
        self.path, self.main, self.lines, self.wandb = run.output / "metrics.jsonl", run.world.main, [], None
        if run.config.wandb and self.main:
            import wandb

            settings = dataclasses.asdict(run.config)
            name = f"{run.output.name}"
            self.wandb = wandb.init(project="catalogue-clip", name=name, dir=str(run.output), config=settings)

    def start(self, state: State) -> None:
        """Go on from a state: what was logged after it is forgotten."""
        self.lines = state.lines
        if self.main:
            common.write_whole(self.path, "".join(self.lines))

    def write(self, **facts: Any) -> None:
        """Append one line."""
        self.lines.append(json.dumps(facts) + "\n")
        if self.main:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(self.lines[-1])
        if self.wandb:
            kind = facts.pop("kind")
            self.wandb.log({f"{kind}/{name}": value for name, value in facts.items()})

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.lines) if line["kind"] == kind]

    def close(self, artifact: Path | None) -> None:
        if self.wandb:
            if artifact:
                self.wandb.log_artifact(str(artifact), name="model", type="model")
            self.wandb.finish()


# --------------------------------------------------------------------------------------------------------------------
# Training


def memory_limit() -> int:
    """Bytes of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def fitting_micro_batch(run: Run) -> int:
    """The largest power of two of pairs that fits in memory, at most this process's share of the effective batch.

    On a GPU found by trying; on a CPU from the bytes kept for the backward pass of two pairs. Nothing is learned.
    """
    import torch

    towers, share = run.towers, math.ceil(run.effective / run.world.size)
    towers.train(True)

    def attempt(size: int) -> None:
        pixels = torch.zeros(size, 3, run.clip.size, run.clip.size, dtype=torch.uint8)
        images, texts = towers.embed(Batch(size, None, None, pixels, run.clip.tokenizer(["word " * 30] * size)))
        (images.sum() + texts.sum()).backward()

    size = 1
    if run.world.device.type == "cpu":
        kept: dict[int, int] = {}

        def note(tensor):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            attempt(2)
        weights = sum(p.numel() * p.element_size() for p in towers.model.parameters())
        pair = max(1, sum(kept.values()) - weights) / 2
        while size < share and size * 2 * pair < memory_limit() / 8:
            size *= 2
    else:
        while size < share:
            try:
                attempt(size * 2)
            except torch.OutOfMemoryError:
                break
            size *= 2
        torch.cuda.empty_cache()
    for parameter in towers.trained.values():
        parameter.grad = None
    return min(size, share)


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


def draw_curves(log: Log, path: Path) -> None:
    """Loss over steps, validation MRR over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, epochs = log.all("step"), log.all("validation")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training")
    left.plot([line["step"] for line in epochs], [line["loss"] for line in epochs], "o-", label="validation")
    left.set(xlabel="step", ylabel="contrastive loss", title="Loss (over more pairs at validation)")
    left.legend()
    for name in ("text_to_image_mrr", "image_to_text_mrr"):
        right.plot([line["epoch"] for line in epochs], [line[name] for line in epochs], "o-", label=name)
    right.set(xlabel="epoch (0: zero-shot)", ylabel="MRR", title="Validation", ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    with common.whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def parameter_counts(run: Run) -> dict[str, Any]:
    """How many parameters there are, are trained, and belong to LoRA."""
    towers = run.towers
    trained = {name: parameter.numel() for name, parameter in towers.trained.items()}
    lora = sum(count for name, count in trained.items() if "lora_" in name)
    every = sum(p.numel() for part in (towers.model, towers.projections) for p in part.parameters())
    return {"base": every - lora, "trained": sum(trained.values()), "lora": lora, "lora_share": lora / (every - lora)}


def table(before: dict[str, float], after: dict[str, float] | None) -> str:
    """Validation, zero-shot beside fine-tuned."""
    lines = [f"{'validation':<26}{'zero-shot':>10}" + (f"{'fine-tuned':>12}" if after else "")]
    for name in before:
        if name not in ("kind", "epoch", "step"):
            lines.append(f"{name:<26}{before[name]:>10.4f}" + (f"{after[name]:>12.4f}" if after else ""))
    return "\n".join(lines)


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
        run.micro = checkpoint["micro"] if checkpoint else fitting_micro_batch(run)
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
    with common.exclusive(args.output / ".lock") as mine:
        if not mine and not int(os.environ.get("RANK", 0)):
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
