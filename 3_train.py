"""Stage 3: fine-tune a CLIP on the shards, with LoRA, exactly as one large batch would, and go on after any stop.

Reads   --shards: a folder or s3://bucket/prefix from 2_prepare.py (splits train and validation)
Writes  --output: adapter/ (PEFT and projections), model/ (merged; open_clip loads it by local-dir:), checkpoint.pt,
        metrics.jsonl, curves.png, and train.json last

    python 3_train.py --shards data/shards --scenario dual_lora --model ViT-B-32 \\
        --output data/runs/dual_lora
    torchrun --nproc-per-node 8 3_train.py ...                  the same, on eight GPUs
    python 3_train.py --shards data/shards --model local-dir:tests/small_clip --epochs 2 \\
        --output data/runs/tiny                                 a minute on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import socket
import sys
import tarfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import common
from common import DONE, BadImage, Clip, Fail, World, setting

# scenario: (LoRA in the vision tower, LoRA in the text tower, projections and temperature trained)
SCENARIOS = {
    "zero_shot": (False, False, False),
    "linear_probe": (False, False, True),
    "dual_lora": (True, True, True),
    "vision_lora": (True, False, True),
    "text_lora": (False, True, True),
}
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)  # of the projections: tried on the validation split
UPDATES = 320  # that `auto` plans for, in 5 to 40 epochs: an epoch of a small catalogue has 8
LORA_RATE = 3e-3  # peak for so many updates; for more of them lower, by the square root
WARMUP = 0.1  # share of the updates in which the learning rates rise to their peak
MOST_WARMUP = 500  # updates: AdamW has its averages by then
LETTERBOX = {"resize_mode": "longest", "fill_color": 255}  # in open_clip's words, what 2_prepare.py does to a photo
CLIP_NORM = 1.0  # largest norm of the gradient: one odd batch must not throw the weights far
ADAPTED = "split"  # where PEFT finds the model: so it refuses a plain open_clip model instead of adapting a part of it
LORA_SCALE = 2  # alpha / rank: another rank then keeps the size of LoRA's updates
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper (arXiv 2103.00020)
CPU_MICRO_BATCH = 64  # pairs: a ViT-B/32 keeps about 2 GB for their backward pass, a smaller model less
VIT_B_32 = 151_277_313  # its parameters
CROPS = {"simple": 0.8, "advanced": 0.6}  # --augment: least share of the picture's area that a crop keeps
TURN, BLURRED = 10, 0.3  # --augment advanced: degrees, at most, and share of the views that are blurred
VIEWS = 4  # augmented views of a picture that are kept where its tower is frozen and runs only once
ALPHAS = tuple(k / 10 for k in range(11))  # of WiSE-FT: 0 is the base model, 1 the fine-tuned one
LOG_EVERY = 10  # steps
READ_TOGETHER = 64  # samples, at most, that a reader reads in one go: each go keeps the interpreter's lock a moment
READ_AHEAD = 2  # steps that are read while one is computed
MOST_READERS = 16  # by default

# --------------------------------------------------------------------------------------------------------------------
# Settings and command line


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Stage 3."""

    scenario: str = setting("dual_lora", "what is trained: LoRA in a tower or both, and projections", tuple(SCENARIOS))
    model: str = setting("ViT-B-32", "open_clip name, hf-hub:USER/NAME, or local-dir:FOLDER")
    pretrained: str | None = setting(None, "open_clip tag or weights file (unset: the usual weights of --model)")
    epochs: int | str = setting("auto", "passes over the train split; auto: 320 updates, in 5 to 40", low=1)
    effective_batch_size: int | None = setting(None, "pairs contrasted in one step (unset: N / 8, 32 to 1024)", low=1)
    micro_batch_size: int | str = setting(
        "auto", "pairs in memory at once; auto: what fits, 64 on a CPU (ViT-B/32)", low=1
    )
    lr: float | str = setting("auto", "peak learning rate of projections and temperature; auto: tried first", low=0)
    lora_lr: float | str = setting("auto", "peak learning rate of LoRA; auto: by the number of updates", low=0)
    warmup: int | str = setting("auto", "updates of rising rates; auto: a tenth of them, at most 500", low=0)
    weight_decay: float = setting(0.01, "of AdamW; none on temperature and biases", low=0)
    schedule: str = setting("cosine", "of the learning rates, after the warm-up", ("cosine", "onecycle"))
    lora_r: int = setting(16, "rank of LoRA; alpha is twice the rank", low=1)
    lora_dropout: float = setting(0.05, "dropout before LoRA", low=0, high=0.9)
    captions: str = setting("varied", "another prompt each epoch, or the shard's own", ("varied", "fixed"))
    augment: str = setting(
        "auto", "none, crop and flip, or rotation and blur too; auto: advanced where LoRA adapts the picture tower",
        ("auto", "none", *CROPS)
    )  # fmt: skip
    precision: str = setting(
        "auto", "auto: bf16 where the hardware has it, else fp32", ("auto", "fp32", "bf16", "fp16")
    )
    optimizer: str = setting("adamw", "8 bits save little for LoRA; far slower on a CPU", ("adamw", "adamw8bit"))
    patience: int | str = setting(
        "auto", "stop after so many epochs without a better validation MRR; auto: a quarter of them, at least 5", low=1
    )
    grad_checkpointing: bool = setting(False, "compute activations twice to save memory")
    compile: bool = setting(False, "torch.compile the towers; pays on a GPU, after minutes of compiling")
    wise: str = setting(
        "one-se", "of the weights between base and fine-tuned (WiSE-FT) export those nearest to the base within one "
        "standard error of the best on validation, or the best, or (off) the fine-tuned", ("one-se", "best", "off")
    )  # fmt: skip
    probe: str = setting("drawn", "general pictures that show what was forgotten: drawn, or CSV of image_path,caption")
    max_failed: float = setting(0.05, "share of samples that may be unreadable", low=0, high=1)
    limit: int | None = setting(None, "use only the first N samples of each split", low=1)
    seed: int = setting(42, "of order, captions, augmentation, dropout and LoRA's start")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = setting(None, "threads, or processes for a GPU, that read (unset: one a core, to 16)", low=1)
    cache_gb: float = setting(50.0, "disk for local copies of the shards that lie on S3", low=0)
    checkpoint_minutes: float = setting(10.0, "time between checkpoints within an epoch", low=0)
    checkpoint_url: str | None = setting(None, "s3://bucket/prefix that checkpoints are copied to and resumed from")
    wandb: str = setting("off", "Weights & Biases gets nothing, metrics, or the model too", ("off", "metrics", "model"))
    resume: bool = setting(True, "go on from the newest checkpoint")
    restart: bool = setting(False, "start over where the checkpoint belongs to other settings")


FINISHING = ("wise", "probe", "patience")  # a finished run with others is finished anew, from its last checkpoint
FREE_SETTINGS = (  # may differ when a run goes on
    *("workers", "cache_gb", "checkpoint_minutes", "checkpoint_url", "wandb", "resume", "restart"),
    *("max_failed", *FINISHING),
    *("device", "micro_batch_size", "grad_checkpointing", "compile"),  # sums round otherwise, dropout may be drawn anew
    *("model", "pretrained", "effective_batch_size"),  # identity has what is used
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="folder or s3://bucket/prefix made by 2_prepare.py")
    parser.add_argument("--output", type=Path, help="folder of this run, such as data/runs/dual_lora")
    parser.add_argument("--check", action="store_true", help="only see whether --model can be trained in --scenario")
    common.add_flags(parser, TrainingConfig)
    return parser


def read_flags(argv: list[str] | None) -> tuple[TrainingConfig, str, Path]:
    """(settings, --shards, --output); with --check the last two are empty."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.check and not (args.shards and args.output):
        parser.error("--shards and --output are needed")
    config = common.from_flags(TrainingConfig, args)
    return (config, "", Path()) if args.check else (config, args.shards, args.output)


# --help and mistakes are answered here: what is imported next takes seconds.
if __name__ == "__main__" and (code := common.entry_point(lambda argv: read_flags(argv) and DONE)()):
    sys.exit(code)

# ruff: noqa: E402
import numpy as np
import torch
import torch.nn.functional as F

with common.without_unused():
    from open_clip.transformer import ResidualAttentionBlock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------------------------
# Processes of torchrun: what common.World does not do


def gather(world: World, *columns: Tensor) -> tuple[list[Tensor], int]:
    """([N, ...] of each column [B, ...], the rows of all processes in the order of their ranks; where ours begin)."""
    if world.size == 1:
        return list(columns), 0
    counts = world.share(len(columns[0]))
    whole = []
    for column in columns:
        padded = column.new_zeros((max(counts), *column.shape[1:]))
        padded[: len(column)] = column
        parts = [torch.empty_like(padded) for _ in counts]
        with world.all_there():
            torch.distributed.all_gather(parts, padded)
        whole.append(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
    return whole, sum(counts[: world.rank])


@contextlib.contextmanager
def first_on_this_machine(world: World) -> Iterator[None]:
    """Let one process of each machine do what the others then find done."""
    if world.local_rank:
        world.share(None)  # waits
    yield
    if not world.local_rank:
        world.share(None)


def cache_folder(world: World, output: Path) -> Path:
    """This machine's own folder for what it keeps; `output` may be on a disk that several machines share."""
    machine = int(os.environ.get("GROUP_RANK", 0)) if world.size > 1 else 0  # torchrun's number of the machine
    return output / (f"cache-{machine}" if machine else "cache")


# --------------------------------------------------------------------------------------------------------------------
# Samples: an epoch's order, captions and augmentation; batches that are read ahead of the model


def epoch_plan(
    count: int, size: int, seed: int, epoch: int, rank: int, ranks: int, skip: int = 0
) -> Iterator[tuple[list[int], int]]:
    """An epoch's steps as (samples of this process, pairs over all processes); every sample once, shuffled.

    Steps differ by one sample at most, so that there is no small rest at the end.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    steps = math.ceil(count / size)
    for step in range(skip, steps):
        mine = order[count * step // steps : count * (step + 1) // steps]
        total = len(mine)
        yield mine[total * rank // ranks : total * (rank + 1) // ranks].tolist(), total


def in_order(count: int, size: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[list[int], int]]:
    """This process's share of a split in order, in batches of `size`, as epoch_plan() has it."""
    stop = count * (rank + 1) // ranks
    for first in range(count * rank // ranks, stop, size):
        yield list(range(first, min(first + size, stop))), count


NO_VIEWS = torch.empty(0, 7)


class Batch(NamedTuple):
    """A part of an effective batch, on the CPU. What could not be read is missing from it, never replaced."""

    total: int  # pairs in the effective batch, over all processes
    ids: Tensor  # int64 [B]: samples
    keys: Tensor  # int64 [B, 2]: duplicate group and caption; pairs that agree in one are positives of each other
    images: Tensor  # uint8 [B, 3, S, S], or a frozen tower's float32 [B, W]
    texts: Tensor  # tokens int64 [B, L], or a frozen tower's float32 [B, W]
    views: Tensor = NO_VIEWS  # float32 [B, 7]: draw_view() of each picture; [0, 7] where they are shown as they are

    def part(self, start: int, size: int) -> Batch:
        return Batch(self.total, *(field[start : start + size] for field in self[1:]))


def draw_view(kind: str, seed: str) -> tuple[float, ...]:
    """How to show a picture: six numbers of an affine map from what is shown to the picture, in sides from -1 to 1,
    row by row, and the blur, the weight of each neighbour of a pixel. Crop and flip, for `advanced` turned and blurred.

    Never recoloured, for prompts name colors. What is new is drawn last, so that views keep their other numbers.
    """
    draw, angle, blur = random.Random(seed), 0.0, 0.0
    if kind == "advanced":
        angle = math.radians(draw.uniform(-TURN, TURN))
        if draw.random() < BLURRED:
            neighbour = math.exp(-0.5 / draw.uniform(0.1, 1.0) ** 2)  # against 1 for the pixel itself
            blur = neighbour / (1 + 2 * neighbour)
    side = math.sqrt(draw.uniform(CROPS[kind], 1.0))
    x, y = (draw.uniform(side - 1, 1 - side) for _ in range(2))  # the middle of the crop
    flipped = -side if draw.random() < 0.5 else side
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * flipped, -sin * side, cos * x - sin * y, sin * flipped, cos * side, sin * x + cos * y, blur


def views_digest(kind: str) -> str:
    """Tells one way to draw views from another: a changed draw_view() is neither gone on with nor mixed with kept ones.

    Rounded, so that another machine's sine makes no difference.
    """
    views = [draw_view(kind, str(seed)) for seed in range(10)] if kind != "none" else []
    return common.digest([[round(number, 4) for number in view] for view in views])[:16]


def augment(pixels: Tensor, views: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> the same, shown as the views [B, 7] say; on a GPU 8 us a picture, on a core 2 ms.

    Outside of a picture is white, as in its letterbox.
    """
    size, device, shown = pixels.shape[-1], pixels.device, torch.empty_like(pixels)
    middles = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    together = 256 if device.type == "cuda" else 8  # that stay in a processor's cache; in float32, a few times
    for rows in (slice(start, start + together) for start in range(0, len(views), together)):
        blurred = views[rows, 6].nonzero()[:, 0]  # on the CPU: no wait for a GPU
        blur = views[rows, 6][blurred].view(-1, 1, 1, 1).to(device, non_blocking=True)
        a, b, c = views[rows, :6].to(device, non_blocking=True).view(-1, 1, 1, 2, 3).unbind(-1)
        grid = a * middles[:, None] + b * middles[:, None, None] + c  # (B, S, S, 2)
        x = 255 + F.grid_sample(pixels[rows].float() - 255, grid, align_corners=False)
        if len(blurred):
            blurred = blurred.to(device, non_blocking=True)
            y = F.pad(x[blurred], (1, 1, 1, 1), "reflect")
            y = y[..., 1:-1, :] + blur * (y[..., :-2, :] - 2 * y[..., 1:-1, :] + y[..., 2:, :])
            x[blurred] = y[..., 1:-1] + blur * (y[..., :-2] - 2 * y[..., 1:-1] + y[..., 2:])
        shown[rows] = x.round_()
    return shown


def hash_text(text: str) -> int:
    """A signed 64-bit number for a string, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def index_shard(path: Path) -> list[dict[str, tuple[int, int]]]:
    """{extension: (offset, bytes)} of each sample of a tar file. Raises Fail where the tar is cut or damaged."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise Fail(f"{path}: damaged shard ({error}); run 2_prepare.py again") from None
    return list(samples.values())


class Split:
    """The samples of a split in any order, and batches of them.

    An index of offsets (52 bytes a sample) instead of a stream: a global shuffle is an array, and resuming within an
    epoch reads nothing. Where a tower is frozen, its kept features take the place of pictures or captions.
    """

    KINDS = ("jpg", "json", "txt")

    def __init__(self, name: str, entries: list[dict], paths: list[Path], clip: Clip, config: TrainingConfig):
        self.name, self.entries, self.paths, self.clip, self.config = name, entries, paths, clip, config
        self.training = name == "train"
        self.augmented = self.training and config.augment != "none"
        self.kept: dict[str, dict[str, Any]] = {}  # "captions", "image", "text" -> what cache_arrays() gives
        self.readers: Readers  # of all splits together: open_splits() gives them
        self.unreadable: dict[int, str] = {}  # sample -> what is wrong with it
        shard, places = [], []
        for number, (entry, path) in enumerate(zip(entries, paths, strict=True)):
            found = index_shard(path)
            if len(found) != entry["samples"]:
                raise Fail(f"{path}: {len(found)} samples, not {entry['samples']}; run 2_prepare.py again")
            shard += [number] * len(found)
            places += [[members.get(kind, (0, -1)) for kind in self.KINDS] for members in found]
        self.shard = np.array(shard[: config.limit], dtype=np.int32)
        self.places = np.array(places[: config.limit], dtype=np.int64).reshape(-1, len(self.KINDS), 2)
        self.check_unreadable()

    def __len__(self) -> int:
        return len(self.shard)

    def counts(self) -> dict[str, int]:
        """Samples of the split, and how many of them are known to be unreadable."""
        return {"samples": len(self), "unreadable": len(self.unreadable)}

    def check_unreadable(self) -> None:
        """Fail where more samples than --max-failed are unreadable."""
        total, lost = self.counts().values()
        if lost == total or lost > self.config.max_failed * total:
            first = next(iter(self.unreadable.values()), "none left")
            hint = "run 2_prepare.py --verify, make the shards again, or raise --max-failed"
            raise Fail(f"{lost} of {total} {self.name} samples are unreadable; first: {first}; {hint}")

    def place(self, i: int) -> str:
        """Shard and offset of a sample, for messages."""
        return f"{self.entries[self.shard[i]]['name']} at byte {self.places[i, 0, 0]}"

    def mark_unreadable(self, failed: dict[int, str]) -> None:
        """Count unreadable samples, given with their reasons; Fail where there are too many."""
        self.unreadable |= {i: f"{self.place(i)}: {reason}" for i, reason in failed.items()}
        self.check_unreadable()

    def read(self, i: int, *kinds: str) -> list[bytes]:
        """The bytes of members of sample i. Raises BadImage."""
        found = []
        with open(self.paths[self.shard[i]], "rb") as handle:
            for kind in kinds:
                offset, size = self.places[i, self.KINDS.index(kind)].tolist()
                if size < 0:
                    raise BadImage(f"its {kind} is missing")
                handle.seek(offset)
                found.append(handle.read(size))
                if len(found[-1]) < size:
                    raise BadImage("the shard ends early")
        return found

    def captions(self, i: int, epochs: Iterable[int]) -> tuple[str, list[str]]:
        """(duplicate group of sample i, its caption in each epoch). Raises BadImage.

        The shard's own prompt, or in training another of the item's prompts each epoch.
        """
        record, own = self.read(i, "json", "txt")
        try:
            fields, own = json.loads(record or b"{}"), own.decode().strip()
            group, id = str(fields.get("group") or fields.get("id") or self.place(i)), str(fields.get("id"))
            if not self.training or self.config.captions == "fixed" or not fields.get("title"):
                return group, [own for _ in epochs]
            meta = {name: fields.get(name) or "" for name in ("title", *common.ATTRIBUTES)}
            return group, [common.pick_prompt(meta, id, self.config.seed, epoch) for epoch in epochs]
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise BadImage(f"damaged text ({error})") from None

    def __getstate__(self) -> dict[str, Any]:
        """What a process needs that only reads."""
        return {name: value for name, value in vars(self).items() if name not in ("clip", "kept", "readers")}

    def load(self, ids: list[int], images: Tensor, seed: str | None) -> tuple[dict[int, str], list[tuple]]:
        """Fill in pictures, uint8 [len(ids), 3, S, S]; returns (reasons of failed ones, views, none without a seed)."""
        failed = {}
        for i, image in zip(ids, images, strict=True):
            try:
                image.copy_(common.decode_jpeg(self.read(i, "jpg")[0], images.shape[-1]))
            except BadImage as error:
                failed[i] = str(error)
        return failed, [draw_view(self.config.augment, f"{seed} {i}") for i in ids] if seed else []

    def assemble(self, ids: list[int], total: int, epoch: int | None, images: Tensor, blocks: list) -> tuple:
        """(the step's batch, what could not be read with the reasons); blocks: futures of load()."""
        loaded, kept = [block.result() for block in blocks], self.kept
        failed = {i: reason for some, _ in loaded for i, reason in some.items()}
        views = torch.tensor([view for _, some in loaded for view in some]).reshape(-1, NO_VIEWS.shape[1])
        if failed:
            good = [place for place, i in enumerate(ids) if i not in failed]
            ids, images = [ids[place] for place in good], images[good]
            views = views[good] if len(views) else views

        def this_epoch(table: np.ndarray) -> np.ndarray:
            return table[ids, (epoch or 0) % table.shape[1]]

        if "image" in kept:
            images = torch.from_numpy(kept["image"]["features"][this_epoch(kept["image"]["table"])])
        captions = kept["captions"]
        rows = this_epoch(captions["table"])
        texts = kept["text"]["features"][rows] if "text" in kept else captions["tokens"][rows].astype(np.int64)
        keys = np.stack([captions["groups"][ids], captions["hashes"][rows]], axis=1)
        tensors = torch.from_numpy(keys), images, torch.from_numpy(texts), views
        if self.clip.device.type == "cuda":  # pinned memory is copied without waiting
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Batch(total, torch.tensor(ids, dtype=torch.int64), *tensors), failed

    def batches(self, plan: Iterable[tuple[list[int], int]], epoch: int | None = None) -> Iterator[Batch]:
        """A Batch for each step of the plan; the next ones are read meanwhile. Fail where too much is unreadable."""
        seed, readers = f"{self.config.seed} {epoch}" if self.augmented else None, self.readers
        reading: deque = deque()  # futures of assemble()
        shape, pinned = (3, self.clip.size, self.clip.size), self.clip.device.type == "cuda"

        def finished() -> Batch:
            batch, failed = reading.popleft().result()
            self.mark_unreadable(failed)
            return batch

        if "image" not in self.kept:
            readers.start()
        pool = ThreadPoolExecutor(readers.count)
        try:
            for ids, total in plan:
                ids = [i for i in ids if i not in self.unreadable]
                count = 0 if "image" in self.kept else len(ids)
                images = torch.empty(count, *shape, dtype=torch.uint8, pin_memory=pinned)
                together = min(READ_TOGETHER, math.ceil(len(ids) / readers.count)) or 1
                parts = (slice(start, start + together) for start in range(0, count, together))
                blocks = [pool.submit(readers.load, self, ids[part], images[part], seed) for part in parts]
                reading.append(pool.submit(self.assemble, ids, total, epoch, images, blocks))
                if len(reading) > READ_AHEAD:
                    yield finished()
            while reading:
                yield finished()
        finally:
            pool.shutdown(cancel_futures=True)


class Readers:
    """What threads call to load samples: Split.load itself, or in processes that each have a lock of their own.

    Threads do on a CPU, which is busy anyway. Beside a GPU that takes thousands of pictures a second, the thread that
    starts its kernels would wait for the interpreter's lock so often that a step takes three times as long.
    """

    def __init__(self, splits: list[Split], workers: int | None, apart: bool):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
        self.count = workers or min(MOST_READERS, max(1, (os.cpu_count() or 1) // processes))
        self.splits, self.apart = {split.name: split for split in splits}, apart
        self.idle: SimpleQueue = SimpleQueue()  # (pipe, socket for pixels) of each process

    def start(self) -> None:
        """Start the processes where there are to be some; they end with this one, and leave Ctrl-C to it."""
        if not self.apart or not self.idle.empty():
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["open_clip"])  # with torch, once for all: it takes seconds and 300 MB
        for _ in range(self.count):
            (pipe, its_pipe), (pixels, its_pixels) = context.Pipe(), socket.socketpair()
            context.Process(target=serve_pictures, args=(self.splits, its_pipe, its_pixels), daemon=True).start()
            its_pipe.close(), its_pixels.close()
            self.idle.put((pipe, pixels))

    def load(self, split: Split, ids: list[int], images: Tensor, seed: str | None) -> tuple:
        """Split.load(), with its errors. Raises Fail where the process that should do it is gone."""
        if not self.apart:
            return split.load(ids, images, seed)
        pipe, pixels = reader = self.idle.get()
        try:
            pipe.send((split.name, ids, images.shape[-1], seed))
            left = memoryview(images.numpy()).cast("B")
            while left and (got := pixels.recv_into(left, 0, socket.MSG_WAITALL)):
                left = left[got:]
            answer = pipe.recv()
        except (EOFError, OSError):
            raise Fail("a process that read pictures died; if memory ran out, lower --workers and run again") from None
        finally:
            self.idle.put(reader)
        if isinstance(answer, OSError):
            raise answer
        return answer


def serve_pictures(splits: dict[str, Split], pipe: Any, pixels: socket.socket) -> None:
    """In a process: answer Readers.load() until the other end is closed. No pixel is pickled or in /dev/shm."""
    common.start_worker()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, ids, size, seed = pipe.recv()
            images = torch.empty(len(ids), 3, size, size, dtype=torch.uint8)
            try:
                answer = splits[name].load(ids, images, seed)
            except OSError as error:
                answer = error
            pixels.sendall(images.numpy())
            pipe.send(answer)


def open_splits(shards: str, manifest: dict, cache: Path, clip: Clip, config: TrainingConfig) -> list[Split]:
    """Train and validation; shards on S3 are copied to `cache` first.

    Fail for an empty split, and for a shard of the test split: what is chosen on it would prove nothing.
    """
    test = {entry["sha256"] for entry in manifest["splits"].get("test", {}).get("shards", [])}
    splits = {split: manifest["splits"].get(split, {}).get("shards", []) for split in ("train", "validation")}
    for split, entries in splits.items():
        if not entries:
            raise Fail(f"the {split} split is empty; give more rows, or check the split report of 2_prepare.py")
        if leaked := [entry["name"] for entry in entries if entry["sha256"] in test]:
            raise Fail(f"{leaked[0]}: this shard is in the test split too; run 2_prepare.py again")
    wanted = {f"{entry['sha256']}.tar" for entries in splits.values() for entry in entries}
    for path in cache.glob("*.tar"):  # copies of shards that an earlier run here was made of
        if path.name not in wanted:
            path.unlink(missing_ok=True)
    paths = iter(common.local_shards(shards, [*splits["train"], *splits["validation"]], cache, config.cache_gb))
    splits = [Split(name, some, [next(paths) for _ in some], clip, config) for name, some in splits.items()]
    readers = Readers(splits, config.workers, apart=clip.device.type == "cuda")
    for split in splits:
        split.readers = readers
    return splits


# --------------------------------------------------------------------------------------------------------------------
# Attention and LoRA: where PEFT's own way is wrong or slow


class SplitAttention(nn.Module):
    """nn.MultiheadAttention as four Linears q, k, v, out, so that LoRA reaches each of them exactly once.

    PEFT's own LoRA for nn.MultiheadAttention (0.21.2) adds the output projection's delta twice.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.heads, self.dropout = attention.num_heads, attention.dropout
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", attention.in_proj_weight.chunk(3), biases, strict=True):
            self.add_module(name, linear_of(weight, bias))
        self.out = linear_of(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, x, key, value, need_weights=False, attn_mask=None):
        """Self-attention, as open_clip's towers call it: key and value are x [B, L, W] too."""
        B, L, W = x.shape
        projected = lean_lora((self.q, self.k, self.v), x)
        q, k, v = (part.view(B, L, self.heads, W // self.heads).transpose(1, 2) for part in projected)
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # where the fused kernel is 4 to 10 times slower
            scores = (q * (W // self.heads) ** -0.5) @ k.transpose(-1, -2)
            x = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).reshape(B, L, W)), None

    def fused(self) -> nn.MultiheadAttention:
        """The same attention as open_clip keeps it."""
        parts, kinds = (self.q, self.k, self.v), ("weight",) if self.q.bias is None else ("weight", "bias")
        fused = nn.MultiheadAttention(self.q.in_features, self.heads, self.dropout, "bias" in kinds, batch_first=True)
        state = {f"in_proj_{kind}": torch.cat([getattr(part, kind) for part in parts]) for kind in kinds}
        fused.to(self.q.weight).load_state_dict(state | {f"out_proj.{kind}": getattr(self.out, kind) for kind in kinds})
        return fused.train(self.training)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear that holds copies of these weights."""
    kind = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **kind)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """open_clip's own residual blocks of both towers."""
    return [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]


def split_attention(model: nn.Module) -> nn.Module:
    """Replace, in place, the attention of every residual block by SplitAttention; returns the model."""
    for block in residual_blocks(model):
        block.attn = SplitAttention(block.attn).train(block.training)
    return model


def fuse_attention(model: nn.Module) -> nn.Module:
    """Undo split_attention, with the weights as they now are; returns the model."""
    for block in residual_blocks(model):
        block.attn = block.attn.fused()
    return model


class LoraProduct(torch.autograd.Function):
    """h W^T + b + scale (h kept) A^T B^T for each (W, b, A, B), where h is x or, with an activation, activation(x).

    x [N, I]; each W [O, I] and b [O] (or None) frozen, A [R, I], B [O, R]; `dropped` / 256 is the dropout. PEFT runs
    the same operation by operation, and keeps masks and copies of x as floats: a step of a ViT-B/32 then takes a third
    longer (CPU, float32, batch 32). On a GPU, where memory is scarcer than time, only x is kept for the backward pass:
    h and the mask are made again.
    """

    @staticmethod
    def forward(ctx, x, activation, dropped, seed, scale, *parts):
        weights, biases, a, b = (parts[i::4] for i in range(4))
        h = activation(x) if activation else x
        kept = draw_mask(h, dropped, seed) if dropped else None
        masked = h if kept is None else h * kept
        low = masked @ torch.cat(a).T  # (N, R of all)
        again = x.is_cuda or activation is not None
        ctx.save_for_backward(x if again else masked, None if again else kept, low, *weights, *a, *b)
        ctx.settings, ctx.ranks = (again, activation, dropped, seed, scale), [len(one) for one in a]
        ys = (h @ w.T if bias is None else torch.addmm(bias, h, w.T) for w, bias in zip(weights, biases, strict=True))
        lows = low.split(ctx.ranks, dim=1)
        return tuple(y.addmm_(part, up.T, alpha=scale) for y, part, up in zip(ys, lows, b, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        x, kept, low, *parts = ctx.saved_tensors
        again, activation, dropped, seed, scale = ctx.settings
        weights, a, b = (parts[i * len(grads) : (i + 1) * len(grads)] for i in range(3))
        masked = h = x
        if again:
            with torch.enable_grad():
                x = x.detach().requires_grad_(activation is not None)
                h = activation(x) if activation else x
            kept = draw_mask(h, dropped, seed) if dropped else None
            masked = h.detach() if kept is None else h.detach() * kept
        down = torch.cat([grad @ up for grad, up in zip(grads, b, strict=True)], dim=1).mul_(scale)  # (N, R of all)
        grad_a = (down.T @ masked).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = down @ torch.cat(a)
            grad_x = grad_x if kept is None else grad_x.mul_(kept)
            for grad, weight in zip(grads, weights, strict=True):
                grad_x.addmm_(grad, weight)
            if activation:
                (grad_x,) = torch.autograd.grad(h, x, grad_x)
        lows = low.split(ctx.ranks, dim=1)
        grad_b = [(grad.T @ part).mul_(scale) for grad, part in zip(grads, lows, strict=True)]
        return grad_x, *[None] * 4, *(g for pair in zip(grad_a, grad_b, strict=True) for g in (None, None, *pair))


def lean_lora(layers: tuple[nn.Module, ...], x: Tensor, activation: Callable | None = None) -> tuple[Tensor, ...]:
    """What several Linears give for one input x, or activation(x); PEFT's LoRA Linears together, in autocast precision.

    These share the dropout of that input, as they do in loralib, the code of the paper (arXiv 2106.09685).
    """
    if not all(hasattr(layer, "lora_A") for layer in layers):
        return tuple(layer(x) for layer in layers)
    dropout, scale = layers[0].lora_dropout["default"], layers[0].scaling["default"]
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    dropped = max(1, round(dropout.p * 256)) if dropout.training and getattr(dropout, "p", 0) else 0
    seed = int(torch.empty((), dtype=torch.int64).random_()) if dropped else 0
    parts = []
    for layer in layers:
        parts += [*frozen_parts(layer, kind), *(m["default"].weight.to(kind) for m in (layer.lora_A, layer.lora_B))]
    shape, x = x.shape, x.reshape(-1, x.shape[-1]).to(kind)
    ys = LoraProduct.apply(x, activation, dropped, seed, scale / (1 - dropped / 256), *parts)
    return tuple(y.view(*shape[:-1], -1) for y in ys)


def frozen_parts(layer: nn.Module, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Frozen weight and bias of a LoRA layer in the precision of its products, cast once: they never change."""
    base = layer.base_layer
    if base.weight.dtype == kind:
        return base.weight, base.bias
    if getattr(layer, "frozen", None) is None or layer.frozen[0].dtype != kind:
        layer.frozen = (base.weight.to(kind), None if base.bias is None else base.bias.to(kind))
    return layer.frozen


def lean_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """open_clip's MLP of two LoRA Linears; what lies between them is not kept for the backward pass on a GPU."""
    return lean_lora((mlp.c_proj,), lean_lora((mlp.c_fc,), x)[0], mlp.gelu)[0]


def draw_mask(h: Tensor, dropped: int, seed: int) -> Tensor:
    """int8 [N, W] of 1 and, with a probability of dropped / 256, 0.

    Of 8 random bits an element: drawing floats, as torch's dropout does, would be a tenth of a step, on a GPU a sixth.
    """
    generator = torch.Generator(h.device).manual_seed(seed)
    bits = torch.empty((h.numel() + 7) // 8, dtype=torch.int64, device=h.device)
    bits = bits.random_(-(2**63), None, generator=generator).view(torch.int8)[: h.numel()].view(h.shape)
    return torch.ge(bits, dropped - 128, out=torch.empty_like(bits))


# --------------------------------------------------------------------------------------------------------------------
# Towers: a CLIP prepared for a scenario, and made plain open_clip again


class Projection(nn.Module):
    """A raw projection parameter as a module: [B, W] -> [B, D]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def projection_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(tower, owner, attribute) of each projection, wherever this kind of model keeps it."""
    visual, text = model.visual, getattr(model, "text", model)
    if not hasattr(visual, "trunk"):
        yield "image", visual, "proj"
    elif names := [name for name in ("proj", "mlp") if hasattr(visual.head, name)]:  # timm
        yield "image", visual.head, names[0]
    elif isinstance(getattr(visual.trunk, "head", None), nn.Linear | nn.Identity):  # Identity: it is taken
        yield "image", visual.trunk, "head"
    yield "text", text, "text_projection" if hasattr(text, "text_projection") else "proj"


def take_projections(model: nn.Module) -> nn.ModuleDict:
    """Take the projections {"image", "text"} out of a model, whose towers then give features before projection.

    A tower without one (SigLIP's picture tower) gets an Identity.
    """
    taken = nn.ModuleDict({"image": nn.Identity(), "text": nn.Identity()})
    for tower, owner, name in projection_places(model):
        projection = getattr(owner, name)
        if projection is not None and not isinstance(projection, nn.Identity):
            raw = isinstance(projection, nn.Parameter)
            taken[tower] = Projection(projection) if raw else projection
            optional = raw or name == "text_projection"  # open_clip asks `is not None` there
            setattr(owner, name, None if optional else nn.Identity())
    return taken


def return_projections(model: nn.Module, projections: nn.ModuleDict) -> nn.Module:
    """Undo take_projections; returns the model."""
    for tower, owner, name in projection_places(model):
        projection = projections[tower]
        if not isinstance(projection, nn.Identity):
            setattr(owner, name, projection.weight if isinstance(projection, Projection) else projection)
    return model


def clip_tokenizer() -> Any:
    """open_clip's built-in tokenizer as other libraries read it from files; it pads with the token of the end."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    own, end = SimpleTokenizer(), "<end_of_text>"
    named = {"bos_token": "<start_of_text>", "eos_token": end, "unk_token": end, "pad_token": end}
    return CLIPTokenizer(vocab=own.encoder, merges=list(own.bpe_ranks), model_max_length=own.context_length, **named)


def save_clip(clip: Clip, folder: str | Path) -> None:
    """Write a folder that plain open_clip loads by `local-dir:`; it appears whole, replacing an older one.

    Its preprocessing letterboxes on white, as the shards do. Tokenizer and text tower of Hugging Face lie in it, and no
    path of this machine: what was a local folder is "." there.
    """
    config, preprocess = json.loads(json.dumps(clip.config)), clip.preprocess | LETTERBOX
    text, tower = config.get("text_cfg", {}), getattr(clip.model, "text", None)
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if os.path.isdir(text.get(name) or ""):
            text[name] = "."
    with common.atomic_folder(folder) as temporary:
        tokenizer = clip.tokenizer if hasattr(clip.tokenizer, "save_pretrained") else clip_tokenizer()
        tokenizer.save_pretrained(temporary)
        if hasattr(tower, "config"):
            tower.config.save_pretrained(temporary)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.model.state_dict().items()}
        save_file(state, temporary / "open_clip_model.safetensors")
        common.write_json(temporary / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess})


def shown_base(clip: Clip) -> list[str]:
    """--model and --pretrained that give this base, without this machine's path to it."""
    if clip.folder:
        return [f"{common.LOCAL}{clip.folder.resolve().name}"]
    model, pretrained = common.model_place(clip.name, ".")
    return [model, Path(pretrained).name] if pretrained else [model]


ADAPTER_README = """\
# What a run has learned of {base}

LoRA (`adapter_model.safetensors`, for PEFT) and beside it projections and temperature (`projections.safetensors`). They
belong together, and to this project's layout of the model: its attention is split into q, k, v and out. PEFT alone
would load a part of them; they are named in a way that it refuses a plain open_clip model. From the project's folder:

```python
import importlib

import common

train = importlib.import_module("3_train")
base = common.load_clip({arguments})  # a folder or file: by its path
clip = train.load_adapter(base, "data/runs/dual_lora/adapter")  # this folder
```

`clip.model` is then plain open_clip with everything merged, the same as in `../model`.
"""


MODEL_README = """\
---
{metadata}
---
# {title}

A CLIP that searches one shop's catalogue: words find its products, and a picture finds those that look alike.

- **Library:** open_clip {version}
- **Base:** {base}; its licence, which holds for this model too: {licence}
- **Data:** {train} pairs of product photo and prompt to train on, {validation} to validate on
- **How it was made:** `{scenario}`, {made}
- **Pictures:** scaled to {size} px on the longer side and laid on a white square, which `preprocess` below does

## What it finds

On the validation split, by which it was chosen:

| | base | this model |
|---|---|---|
{table}

{results}

## How to load it

```python
{code}
```
"""
MODEL_CODE = """\
import open_clip

folder = "."  # of this file
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")"""
HF_MODEL_CODE = """\
import json

import open_clip

folder = "."  # of this file
with open(f"{folder}/open_clip_config.json") as file:
    text = json.load(file)["model_cfg"]["text_cfg"]
text |= {"hf_model_name": folder, "hf_model_pretrained": False}  # open_clip would look for the text tower elsewhere
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", text_cfg=text)
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")"""


def base_metadata(clip: Clip) -> dict[str, str]:
    """What the hub wants to know of a base: its repository and its licence, as far as the base's own card says."""
    import open_clip
    from huggingface_hub import ModelCard

    model, tag = common.model_place(clip.name, ".")
    listed = open_clip.get_pretrained_cfg(model, tag or "").get("hf_hub", "")
    hub = model.removeprefix(common.HUB) if model.startswith(common.HUB) else "/".join(listed.split("/")[:2])
    place = clip.folder / "README.md" if clip.folder else hub
    found = {} if clip.folder or not hub else {"base_model": hub}
    with contextlib.suppress(Exception):  # no card, or no network
        card = ModelCard.load(place).data.to_dict() if place else {}
        names = ("license", "license_name", "license_link", "base_model")
        found = {name: card[name] for name in names if card.get(name)} | found
    return found


def model_card(clip: Clip, config: TrainingConfig, counts: dict[str, dict[str, int]], facts: dict[str, Any]) -> str:
    """README.md of model/: a model card with the metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    base, tags = base_metadata(clip), ["clip", "image-text-retrieval", "product-search"]
    metadata = ModelCardData(library_name="open_clip", pipeline_tag="zero-shot-image-classification", tags=tags, **base)
    before, after = facts["validation"]["zero_shot"], facts["validation"]["best"]
    name = " ".join(shown_base(clip)).removeprefix(common.LOCAL)
    made = f"epoch {facts['validation']['best_epoch']}, batches of {facts['batch']['effective']} pairs"
    made += f", LoRA of rank {config.lora_r}" if facts["parameters"]["lora"] else ""
    return MODEL_README.format(
        metadata=metadata.to_yaml(), title=f"{name}, fine-tuned on a catalogue",
        version=common.versions("open_clip_torch")["open_clip_torch"], base=name,
        licence=base.get("license", "not known here, see where it came from"), scenario=config.scenario, size=clip.size,
        made=f"{made}, alpha {facts['alpha']:g} between base (0) and fine-tuned weights (1) as in WiSE-FT",
        table="\n".join(f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in before),
        results=f"{common.CARD_TEST[0]}\n4_embed.py writes the results of the test split here.\n{common.CARD_TEST[1]}",
        code=HF_MODEL_CODE if "hf_model_name" in clip.config.get("text_cfg", {}) else MODEL_CODE,
        **{split: some["samples"] - some["unreadable"] for split, some in counts.items()},
    )  # fmt: skip


class Towers:
    """A CLIP prepared for a scenario: attention split, projections apart, LoRA where the scenario puts it."""

    def __init__(self, clip: Clip, config: TrainingConfig):
        if type(clip.model.visual).__name__ == "ModifiedResNet":
            raise Fail(f"{clip.name}: ResNet picture towers are not supported; take a ViT, such as --model ViT-B-32")
        vision, text, projections = SCENARIOS[config.scenario]
        self.clip, self.model, self.config = clip, split_attention(clip.model), config
        self.largest_scale = max(MAX_LOGIT_SCALE, self.model.logit_scale.item())  # some SigLIPs start above
        self.model.requires_grad_(False)
        self.projections = take_projections(self.model)
        self.adapted = {"image": vision, "text": text}
        self.peft = self.add_lora() if vision or text else None
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
            for module in (self.model.visual, *residual_blocks(self.model)):
                module.compile(dynamic=True)

    def add_lora(self) -> nn.Module:
        """Put LoRA on the Linears of attention and MLP in the adapted towers, in place; returns PEFT's wrapper."""
        # type() leaves out the subclass inside nn.MultiheadAttention, which is never called either
        linears = [name for name, module in self.model.named_modules() if type(module) is nn.Linear]
        places = {"image": [n for n in linears if n.startswith("visual.")]}
        places["text"] = [n for n in linears if n not in places["image"]]
        if without := {tower for tower, adapted in self.adapted.items() if adapted and not places[tower]}:
            self.refuse_scenario(f"the {min(without)} tower has no attention or MLP to adapt", without)
        for module in self.model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = True  # timm's EVA and PE then call their qkv, instead of using its weight
        torch.manual_seed(self.config.seed)  # LoRA's start
        # Whole names: a list would be matched by endings, and text names are endings of "visual.*" ones.
        names = [re.escape(name) for tower, adapted in self.adapted.items() if adapted for name in places[tower]]
        rank, dropout = self.config.lora_r, self.config.lora_dropout
        with common.without_unused():
            import peft

            lora = peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, lora_dropout=dropout)
            lora.target_modules = rf"{ADAPTED}\.({'|'.join(names)})"
            wrapper = peft.get_peft_model(nn.ModuleDict({ADAPTED: self.model}), lora)
        for module in self.model.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.forward = lambda x, layer=module: lean_lora((layer,), x)[0]
        for mlp in (block.mlp for block in residual_blocks(self.model)):
            if self.clip.device.type == "cuda" and hasattr(getattr(mlp, "c_proj", None), "lora_A"):
                mlp.forward = lambda x, mlp=mlp: lean_mlp(mlp, x)
        return wrapper

    def refuse_scenario(self, why: str, without: set[str]) -> None:
        """Fail, naming the best scenario for a model whose towers `without` cannot take LoRA."""
        other = {"image": "text_lora", "text": "vision_lora"}
        best = "linear_probe" if without == other.keys() else other[min(without)]
        raise Fail(f"--scenario {self.config.scenario}: {self.clip.name}: {why}; use --scenario {best}")

    def copy(self) -> dict[str, Tensor]:
        """The trained weights as they are now, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    def train(self, mode: bool) -> None:
        """Dropout on or off where LoRA is; everything else always computes as in evaluation."""
        for module in self.dropouts:
            module.train(mode)

    def interpolate(self, alpha: float, fine: dict[str, Tensor]) -> None:
        """Set the weights to (1 - alpha) base + alpha fine-tuned (WiSE-FT, arXiv 2109.01903); 1.0 undoes copy()."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                there = fine[name].to(parameter.device)
                parameter.copy_(torch.lerp(self.base[name], there, alpha) if name in self.base else there)
        for module in self.model.modules():
            if hasattr(module, "lora_A"):  # its update is linear in its scaling
                module.scaling = dict.fromkeys(module.scaling, LORA_SCALE * alpha)

    def autocast(self) -> torch.autocast:
        """Half precision for the towers where asked for; loss, norms and temperature stay float32."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision, torch.float32)
        return torch.autocast(self.clip.device.type, kind, enabled=kind is not torch.float32)

    def features(self, tower: str, inputs: Tensor, views: Tensor = NO_VIEWS) -> Tensor:
        """What a tower gives before its projection, [B, W], for uint8 pictures in their views, or int64 tokens."""
        if tower == "text":
            return common.text_features(self.model, inputs)
        pixels = inputs.to(self.clip.device, non_blocking=True)
        return self.model.visual(common.normalise_pixels(self.clip, augment(pixels, views) if len(views) else pixels))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(images, texts), float [B, D], L2-normalised. A frozen tower's kept features are only projected."""
        embedded = []
        for tower, x in (("image", batch.images), ("text", batch.texts)):
            with self.autocast():
                kept = x.is_floating_point()
                x = x.to(self.clip.device, non_blocking=True) if kept else self.features(tower, x, batch.views)
                x = self.projections[tower](x)
            embedded.append(F.normalize(x.to(self.model.logit_scale.dtype), dim=-1))
        return embedded[0], embedded[1]

    def dry_run(self, size: int) -> set[str]:
        """Forward and backward of blank pairs with captions of full length; the parameters that got a gradient."""
        self.train(True)
        pixels = torch.zeros(size, 3, self.clip.size, self.clip.size, dtype=torch.uint8)
        try:
            images, texts = self.embed(Batch(size, None, None, pixels, self.clip.tokenizer(["word " * 100] * size)))
            (images.sum() + texts.sum()).backward()
            return {name for name, parameter in self.trained.items() if parameter.grad is not None}
        finally:
            for parameter in self.trained.values():
                parameter.grad = None

    def check_lora_gradients(self) -> None:
        """Fail where LoRA would change nothing: some towers (timm's EVA with one qkv) use a layer's weight directly."""
        lora = [name for name in self.trained if "lora_" in name]
        reached = self.dry_run(2) if lora else set()
        idle = [name for name in lora if name not in reached]
        if idle:
            why = f"it computes without {idle[0]} ({len(idle)} of {len(lora)} tensors of LoRA): it would learn nothing"
            self.refuse_scenario(why, {"image" if name.startswith("visual.") else "text" for name in idle})

    def fitting_micro_batch(self, share: int) -> int:
        """Pairs in memory at once where --micro-batch-size is auto, at most `share`.

        On a GPU the whole share, halved until it fits. Elsewhere full memory shows only by a killed process: as many
        as take the memory of CPU_MICRO_BATCH in a ViT-B/32, about.
        """
        if self.clip.device.type != "cuda":
            parameters = sum(parameter.numel() for parameter in self.model.parameters())
            return min(share, CPU_MICRO_BATCH * max(1, VIT_B_32 // parameters))
        while share > 1:
            with contextlib.suppress(torch.OutOfMemoryError):
                self.dry_run(share)
                break
            torch.cuda.empty_cache()
            share = math.ceil(share / 2)
        return share

    def export(self, output: Path, alpha: float, fine: dict[str, Tensor]) -> None:
        """Write adapter/ and model/ for the weights at alpha; the model becomes plain open_clip again."""
        self.interpolate(alpha, fine)
        with common.atomic_folder(output / "adapter") as folder:
            if self.peft is not None:  # PEFT saves LoRA only: the rest stands beside it
                self.peft.peft_config["default"].lora_alpha *= alpha
                self.peft.save_pretrained(folder)
            rest = {name: p.detach().cpu().contiguous() for name, p in self.trained.items() if "lora_" not in name}
            save_file(rest, folder / "projections.safetensors", {"base_fingerprint": self.clip.fingerprint})
            names = shown_base(self.clip)
            about = {"base": " ".join(names), "arguments": ", ".join(map(json.dumps, names))}
            (folder / "README.md").write_text(ADAPTER_README.format(**about), encoding="utf-8")
        if self.peft is not None:
            self.peft.merge_and_unload()
        fuse_attention(return_projections(self.model, self.projections))
        save_clip(self.clip, output / "model")


def load_adapter(clip: Clip, folder: str | Path) -> Clip:
    """The base with all of adapter/ merged in place, as in model/. Fail for a part of one, or one of another base."""
    lora, rest = Path(folder, "adapter_model.safetensors"), Path(folder, "projections.safetensors")
    projections = take_projections(split_attention(clip.model))
    try:
        with safe_open(rest, "pt") as file:
            base = (file.metadata() or {}).get("base_fingerprint")
        if base != clip.fingerprint:
            raise Fail(f"{folder}: made for another base than {clip.name}; its README.md names the right one")
        if Path(folder, "adapter_config.json").is_file():
            with common.without_unused():
                import peft

                wrapper = peft.PeftModel.from_pretrained(nn.ModuleDict({ADAPTED: clip.model}), str(folder))
            if load_file(lora).keys() != peft.get_peft_model_state_dict(wrapper).keys():
                raise ValueError("it adapts other layers than the model has")
            wrapper.merge_and_unload()
        named = dict([*clip.model.named_parameters(), *projections.named_parameters("projections")])
        with torch.no_grad():
            for name, tensor in load_file(rest).items():
                named[name].copy_(tensor)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:120]
        raise Fail(f"{folder}: not a whole adapter ({problem}); take the run's model/, or train it again") from None
    fuse_attention(return_projections(clip.model, projections))
    return clip


# --------------------------------------------------------------------------------------------------------------------
# The loss and its gradient: exact for the whole effective batch, over micro batches and processes


@dataclasses.dataclass
class Run:
    """All that the parts of one run share."""

    config: TrainingConfig
    output: Path
    world: World
    clip: Clip
    towers: Towers
    train: Split
    validation: Split
    probe: Batch  # pictures and captions away from the catalogue
    effective: int = 0  # pairs contrasted in one step, over all processes
    micro: int = CPU_MICRO_BATCH  # pairs in memory at once, per process
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)  # what must be equal to go on with a run
    checkpoint: dict[str, Any] | None = None  # to go on from
    wandb: Any = None  # the run there
    trial: bool = False  # settings are being tried: nothing is printed, logged or saved

    @property
    def speaks(self) -> bool:
        """Whether this process prints and logs."""
        return self.world.main and not self.trial

    def print(self, line: str) -> None:
        """Print a line, once whatever the number of processes."""
        if self.speaks:
            print(line, flush=True)

    def share_unreadable(self) -> None:
        """Tell every process what any could not read. Fail, on all of them, where it is too much."""
        for split in (self.train, self.validation):
            split.unreadable = {i: reason for some in self.world.share(split.unreadable) for i, reason in some.items()}
            split.check_unreadable()


def one_way_loss(queries, gallery, query_keys, keys, scale, bias=None) -> Tensor:
    """Sum over queries [B, D] of their loss against the gallery [N, D].

    Pairs that agree in any column of their keys (int64 [B, K], [N, K]) are all positives: a duplicate product or the
    same caption is no negative. Softmax cross-entropy with the positives sharing the target (CLIP), or the sigmoid
    loss of SigLIP (arXiv 2303.15343) where the model has a bias.
    """
    logits, positive = scale.exp() * (queries @ gallery.T), (query_keys[:, None] == keys).any(dim=-1)  # (B, N)
    if bias is not None:
        return -F.logsigmoid((logits + bias) * (2.0 * positive - 1.0)).sum()
    return -(positive / positive.sum(dim=1, keepdim=True) * logits.log_softmax(dim=1)).sum()


def pair_loss(images, texts, keys, scale, bias=None) -> Tensor:
    """The mean of both directions over N pairs."""
    one_way = one_way_loss(images, texts, keys, keys, scale, bias), one_way_loss(texts, images, keys, keys, scale, bias)
    return sum(one_way) / (2 * len(images))


def reseed(seed: int, step: int, first: int) -> None:
    """Random numbers that depend only on the step and the first sample of a micro batch: a second pass and a resumed
    run draw the same dropout, and so does any number of processes whose micro batches begin at the same samples."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {first}".encode()).digest()[:8], "little")
    # Without a GPU torch.manual_seed takes half a millisecond: it notes from where each kind was to be seeded.
    seeded = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seeded(number)


def accumulate(run: Run, batch: Batch, step: int, scale_up: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """Leave in .grad the gradient of the whole effective batch, over all processes; returns the loss.

    Two passes where memory does not hold the batch (GradCache, arXiv 2101.06983): all embeddings without a graph, the
    loss over all pairs, then each micro batch again with its share of the gradient. Plain accumulation would contrast
    pairs with their micro batch only, which is another loss. `scale_up` is a GradScaler's.
    """
    towers, world = run.towers, run.world
    parts = [batch.part(start, run.micro) for start in range(0, len(batch.ids), run.micro)]
    fits = len(parts) == 1
    embedded = []
    for part in parts:
        reseed(run.config.seed, step, int(part.ids[0]))
        with torch.set_grad_enabled(fits):
            embedded.append(towers.embed(part))
    dim, scale = run.clip.config["embed_dim"], towers.model.logit_scale
    local = [torch.cat([e[side].detach() for e in embedded] or [scale.new_empty(0, dim)]) for side in (0, 1)]
    (images, texts, keys), first = gather(world, *local, batch.keys.to(world.device, non_blocking=True))
    leaves = images.requires_grad_(), texts.requires_grad_()
    loss = pair_loss(*leaves, keys, scale, towers.model.logit_bias)
    scale_up(loss).backward()  # the temperature has its whole gradient now, on every process
    for k, part in enumerate(parts):
        if not fits:
            reseed(run.config.seed, step, int(part.ids[0]))
            embedded[k] = towers.embed(part)
        rows = slice(first + k * run.micro, first + k * run.micro + len(part.ids))
        ends = [(e, leaf.grad[rows]) for e, leaf in zip(embedded[k], leaves, strict=True) if e.requires_grad]
        torch.autograd.backward(*zip(*ends, strict=True))
        embedded[k] = None  # its graph is done with
    if world.size > 1:
        shared = [p for name, p in towers.trained.items() if not name.endswith(("logit_scale", "logit_bias"))]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in shared])
        with world.all_there():
            torch.distributed.all_reduce(flat)
        for p, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p).clone()
    return loss.detach()


# --------------------------------------------------------------------------------------------------------------------
# Features of frozen towers, computed once and kept on disk: their weights never change


def cache_arrays(run: Run, split: Split, name: str, made: list, make: Callable[[Path], None]) -> None:
    """Set split.kept[name] to the arrays that make(folder) writes, once for all that `made` tells apart."""
    made = [[entry["sha256"] for entry in split.entries], len(split), run.config.seed, *made]
    made.append(run.clip.fingerprint)
    place, kind = cache_folder(run.world, run.output), f"{split.name}-{name}"
    folder = place / f"{kind}-{common.digest(made)[:16]}"
    mark = folder / "failed.json"  # samples that could not be read; written last
    with first_on_this_machine(run.world):
        usable = mark.is_file() and (run.config.resume or run.world.local_rank or not common.read_json(mark))
        if not usable:  # with --no-resume also where something could not be read: it may be mended by now
            for other in place.glob(f"{kind}-*"):
                shutil.rmtree(other)
            folder.mkdir(parents=True)
            make(folder)
            for path in folder.glob("*.npy"):
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())
            common.write_json(mark, sorted(split.unreadable.items()))
    split.unreadable |= dict(common.read_json(mark))
    split.kept[name] = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def cache_captions(run: Run, split: Split) -> None:
    """Read and tokenise a split's captions, those of all epochs, once. Where "varied" there is another each epoch.

    table.npy, int64 [N, epochs until they begin again]: row of each sample's caption in hashes.npy, int64 [captions],
    and tokens.npy, int32 [captions, L], by length, so that little is padded where they are read in order; groups.npy,
    int64 [N].
    """
    varied = split.training and run.config.captions == "varied"
    turns = math.lcm(*range(1, len(common.TEMPLATES) + 1))  # after which an item's prompts begin again
    epochs = min(run.config.epochs, turns) if varied else 1
    tokenizer = split.clip.tokenizer
    words = tokenizer(["Another tokenizer, another cache."])

    def make(folder: Path) -> None:
        rows: dict[str, int] = {}
        table, groups = np.zeros((len(split), epochs), np.int64), np.zeros(len(split), np.int64)
        for i in common.progress(range(len(split)), f"{split.name} captions", unit="sample"):
            try:
                group, captions = split.captions(i, range(epochs))
                groups[i], table[i] = hash_text(group), [rows.setdefault(caption, len(rows)) for caption in captions]
            except BadImage as error:
                split.mark_unreadable({i: str(error)})
        by_length = sorted(rows, key=len)
        place = np.argsort([rows[caption] for caption in by_length])  # of a row in by_length
        np.save(folder / "table.npy", place[table])
        np.save(folder / "groups.npy", groups)
        np.save(folder / "hashes.npy", np.array([hash_text(caption) for caption in by_length]))
        tokens = new_array(folder / "tokens.npy", np.int32, (len(by_length), words.shape[1]))
        for start in range(0, len(by_length), 1024):
            tokens[start : start + 1024] = tokenizer(by_length[start : start + 1024]).numpy()

    made = [varied, epochs, common.TEMPLATES, common.DETAILS, words.tolist()]
    cache_arrays(run, split, "captions", made, make)


def feature_blocks(run: Run, split: Split, tower: str, views: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """(rows of features.npy, pictures or tokens, their views) of all that a tower is to be run over."""
    if tower == "image":
        for view in range(views):
            for batch in split.batches(in_order(len(split), run.micro), view):
                yield view * len(split) + batch.ids.numpy(), batch.images, batch.views
        return
    tokens = split.kept["captions"]["tokens"]
    for start in range(0, len(tokens), run.micro):
        rows = slice(start, start + run.micro)
        yield rows, torch.from_numpy(tokens[rows].astype(np.int64)), NO_VIEWS


def write_features(run: Run, split: Split, tower: str, views: int, folder: Path) -> None:
    """features.npy, float32 [rows, W]: what a tower gives before its projection, for each caption or view of a picture.

    table.npy, int64 [N, views], has the rows of a picture's views.
    """
    count = views * len(split) if tower == "image" else len(split.kept["captions"]["tokens"])
    if tower == "image":
        np.save(folder / "table.npy", np.arange(count).reshape(views, -1).T)
    features, title = None, f"{split.name} {'pictures' if tower == 'image' else 'captions'}, once"
    blocks = feature_blocks(run, split, tower, views)
    for rows, inputs, shown in common.progress(blocks, title, math.ceil(count / run.micro), "batch"):
        if not len(inputs):
            continue
        with torch.no_grad(), run.towers.autocast():
            x = run.towers.features(tower, inputs, shown).float().cpu().numpy()
        if features is None:
            features = new_array(folder / "features.npy", np.float32, (count, x.shape[1]))
        features[rows] = x


def cache_tower_features(run: Run, split: Split, adapted: bool = False) -> None:
    """Run frozen towers over a split once: linear_probe then trains 500 times faster, text_lora 7 times.

    Pictures that are augmented anew each epoch have no lasting features: a few fixed views are kept instead.
    `adapted`: the towers that LoRA will adapt, as they are before it, for search_rates(), which needs no more views.
    """
    config, clip = run.config, run.clip
    split.augmented = split.training and config.augment != "none" and not adapted
    views = VIEWS if split.augmented else 1
    for tower in (tower for tower, lora in run.towers.adapted.items() if lora == adapted):
        if tower == "image":
            made = [config.precision, config.augment, views, clip.mean, clip.std]
            made += [views_digest(config.augment)] if split.augmented else []
        else:
            made = [config.precision, hashlib.sha256(split.kept["captions"]["tokens"]).hexdigest()]
        cache_arrays(run, split, tower, made, functools.partial(write_features, run, split, tower, views))
    split.augmented = split.training and config.augment != "none"


def new_array(path: Path, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file, with its room on the disk: on a full one, writing to a memory map kills the process."""
    array = np.lib.format.open_memmap(path, "w+", kind, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array


# --------------------------------------------------------------------------------------------------------------------
# Evaluation: validation, the general probe, and weights between base and fine-tuned


def retrieval_metrics(images: Tensor, texts: Tensor, keys: Tensor) -> tuple[dict[str, float], np.ndarray]:
    """(recall@1/5/10 and MRR, text to image and image to text, and `mrr`, the mean of both; MRR of each pair [N]).

    images, texts: float [N, D], L2-normalised; keys: int64 [N, K], equal in any column where an answer is right.
    """
    images, texts, keys = (tensor.cpu().numpy() for tensor in (images, texts, keys))
    metrics, reciprocal = {}, []
    for name, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        ranks = common.right_ranks(queries, gallery, keys)
        metrics |= {f"{name}_recall@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
        metrics[f"{name}_mrr"] = float((1.0 / ranks).mean())
        reciprocal.append(1.0 / ranks)
    metrics["mrr"] = (metrics["text_to_image_mrr"] + metrics["image_to_text_mrr"]) / 2
    return metrics, sum(reciprocal) / 2


def evaluate(run: Run, split: Split) -> tuple[dict[str, float], np.ndarray]:
    """(loss, recall@1/5/10 and MRR, both ways, over a whole split with the shard's own captions; MRR of each pair,
    float64 [N], in order of the split); memory linear in N."""
    towers, world = run.towers, run.world
    towers.train(False)
    nothing = torch.empty(0, run.clip.config["embed_dim"], device=world.device)
    found = [(torch.empty(0, 2, dtype=torch.int64, device=world.device), nothing, nothing)]
    with torch.no_grad():
        for batch in split.batches(in_order(len(split), run.micro, world.rank, world.size)):
            if len(batch.ids):
                found.append((batch.keys.to(world.device, non_blocking=True), *towers.embed(batch)))
        (keys, images, texts), _ = gather(world, *(torch.cat(column) for column in zip(*found, strict=True)))
        judged = None
        if world.main:
            scale, bias, loss = towers.model.logit_scale, towers.model.logit_bias, 0.0
            for rows in (slice(start, start + 1024) for start in range(0, len(keys), 1024)):
                loss += one_way_loss(images[rows], texts, keys[rows], keys, scale, bias).item()
                loss += one_way_loss(texts[rows], images, keys[rows], keys, scale, bias).item()
            metrics, reciprocal = retrieval_metrics(images, texts, keys)
            judged = {"loss": loss / (2 * len(keys))} | metrics, reciprocal
    run.share_unreadable()
    return world.share(judged)[0]


def nearest_within_error(candidates: list[np.ndarray]) -> tuple[int, list[tuple[float, float]]]:
    """The one-standard-error rule (Breiman et al. 1984): the first candidate that is as good as the best one.

    candidates: MRR of the same pairs [N], those that depart least from the base first. Returns (index; how far each
    mean is below the best, and the standard error of that difference, paired over the pairs).
    """
    best = max(candidates, key=np.mean)
    below = [best - candidate for candidate in candidates]
    behind = [(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0) for x in below]
    return next(i for i, (difference, error) in enumerate(behind) if difference <= error), behind


def probe_batch(clip: Clip, pictures: list[np.ndarray], captions: list[str]) -> Batch:
    """Pictures uint8 [S, S, 3] and their captions as one Batch; equal captions are right answers to each other."""
    keys = torch.tensor([[hash_text(caption)] for caption in captions])
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return Batch(len(captions), torch.arange(len(captions)), keys, images, clip.tokenizer(captions))


def load_probe(path: str, clip: Clip) -> Batch:
    """Pictures and captions of a CSV (image_path,caption) that is not about the catalogue."""
    try:
        rows = common.read_table(path, ("image_path", "caption"))
        if not len(rows) or not rows["caption"].all():
            raise ValueError("no rows, or a row without a caption")
        sources = [Path(path).parent / name for name in rows["image_path"]]
        pictures = [np.array(common.letterbox(common.load_image(source, clip.size), clip.size)) for source in sources]
        return probe_batch(clip, pictures, rows["caption"].tolist())
    except (OSError, ValueError, Fail, BadImage) as error:
        raise Fail(f"--probe {path}: {error}; it wants a CSV with image_path,caption and its pictures") from None


DRAWN = {  # what --probe drawn draws: signs of DejaVu Sans, a font that comes with matplotlib
    "circle": "●", "square": "■", "triangle": "▲", "star": "★", "ring": "○", "cross": "✚", "house": "⌂",
    "flower": "✿", "heart": "♥", "face": "☻", "sun": "☀", "cloud": "☁", "umbrella": "☂", "snowman": "☃",
    "telephone": "☎", "shamrock": "☘", "skull": "☠", "moon": "☾", "crown": "♛", "castle": "♜", "horse": "♞",
    "spade": "♠", "diamond": "♦", "music note": "♫", "anchor": "⚓", "swords": "⚔", "scales": "⚖", "gear": "⚙",
    "flag": "⚑", "scissors": "✂", "airplane": "✈", "envelope": "✉", "pencil": "✏", "snowflake": "❄", "arrow": "➡",
    "hexagon": "⬢", "mouse": "🐭", "cow": "🐮", "cat": "🐱", "monkey": "🐵", "playing card": "🂡", "wheelchair": "♿",
    "hand": "☝", "comet": "☄", "domino": "🁫", "peace sign": "☮", "lightning": "⚡", "keyboard": "⌨",
}  # fmt: skip
INKS = ("black", "crimson", "royalblue", "seagreen")


def draw_probe(clip: Clip) -> Batch:
    """General pictures and their names: each sign of DRAWN in two inks, on white; deterministic."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", round(clip.size * 0.7))
    pictures, names = [], [name for name in DRAWN for _ in range(2)]
    for number, name in enumerate(names):
        canvas = Image.new("RGB", (clip.size, clip.size), "white")
        middle, ink = (clip.size / 2, clip.size / 2), INKS[number % len(INKS)]
        ImageDraw.Draw(canvas).text(middle, DRAWN[name], fill=ink, font=font, anchor="mm")
        pictures.append(np.array(canvas))
    return probe_batch(clip, pictures, names)


def sweep_alpha(run: Run, fine: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What each interpolation between base and fine-tuned weights gives on validation and on the general probe.

    The probe shows what of the base model's knowledge was forgotten (WiSE-FT, arXiv 2109.01903); trials go without.
    """
    swept, pairs, probe = [], [], run.probe
    for tower, field in (("image", "images"), ("text", "texts")):
        if not (run.trial or run.towers.adapted[tower]):  # frozen: it runs once
            with torch.no_grad(), run.towers.autocast():
                parts = getattr(probe, field).split(run.micro)
                parts = [run.towers.features(tower, part).float().cpu() for part in parts]
            probe = probe._replace(**{field: torch.cat(parts)})
    for alpha in ALPHAS:
        run.towers.interpolate(alpha, fine)
        metrics, reciprocal = evaluate(run, run.validation)
        swept.append({"alpha": alpha, "validation": metrics})
        pairs.append(reciprocal)
        if not run.trial:
            parts = [probe.part(start, run.micro) for start in range(0, probe.total, run.micro)]
            with torch.no_grad():
                images, texts = (torch.cat(side) for side in zip(*map(run.towers.embed, parts), strict=True))
            swept[-1]["probe"] = retrieval_metrics(images, texts, probe.keys)[0]
    for facts, (below, error) in zip(swept, nearest_within_error(pairs)[1], strict=True):
        facts |= {"below_best": below, "standard_error": error}
    return swept


def choose_alpha(wise: str, swept: list[dict[str, Any]], least: float = 0.0) -> dict[str, Any]:
    """The one of sweep_alpha() to export, by --wise; with one-se none that validates below `least`, if that can be."""
    if wise == "off":
        return swept[-1]
    best = max(swept, key=lambda facts: (facts["validation"]["mrr"], facts["alpha"]))
    near = [f for f in swept if f["below_best"] <= f["standard_error"] and f["validation"]["mrr"] >= least]
    return near[0] if wise == "one-se" and near else best


def print_alphas(run: Run, swept: list[dict[str, Any]], exported: dict[str, Any]) -> None:
    """The table of WiSE-FT, what is exported marked."""
    run.print("WiSE-FT: weights between base (alpha 0) and fine-tuned (alpha 1)")
    run.print(f"{'alpha':>7}{'validation MRR':>17}{'below the best':>17}{'its error':>12}{'general probe MRR':>20}")
    for facts in swept:
        row = f"{facts['alpha']:>7.1f}{facts['validation']['mrr']:>17.4f}{facts['below_best']:>17.4f}"
        row += f"{facts['standard_error']:>12.4f}{facts['probe']['mrr']:>20.4f}"
        run.print(row + ("  <- exported" if facts is exported else ""))


# --------------------------------------------------------------------------------------------------------------------
# Checkpoint and log: where a run stands, and how it went

CHECKPOINT_PARTS = {"identity", "micro", "state", "weights", "optimizer", "scaler"}


@dataclasses.dataclass
class State:
    """Where a run stands: all that a checkpoint holds beside weights and optimizer, as plain values and tensors."""

    epoch: int = 0  # of the next step
    batch: int = 0  # of the next step, within its epoch
    step: int = 0  # steps done
    updates: int = 0  # steps that changed the weights: fp16 skips those whose gradient overflowed
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # unreadable training samples found so far
    search: dict[str, Any] = dataclasses.field(default_factory=dict)  # what search_rates() found
    mean: dict[str, Any] = dataclasses.field(default_factory=dict)  # average_weights() of the epochs so far
    best: dict[str, Any] = dataclasses.field(default_factory=dict)  # epoch, metrics and averaged weights, best MRR
    lines: list[str] = dataclasses.field(default_factory=list)  # of metrics.jsonl: none is lost or written twice


def save_checkpoint(run: Run, state: State, optimizer, scaler) -> None:
    """Write checkpoint.pt, whole; copy it to --checkpoint-url."""
    if run.trial:
        return
    run.share_unreadable()
    state.bad = dict(run.train.unreadable)
    if run.world.main:
        weights = {name: parameter.detach() for name, parameter in run.towers.trained.items()}
        content = {"identity": run.identity, "micro": run.micro, "state": dataclasses.asdict(state), "weights": weights}
        buffer = io.BytesIO()  # torch's own file writer answers a full disk with an internal error
        torch.save(content | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, buffer)
        if run.config.checkpoint_url:  # first: a machine that has the file, too, must not be ahead of the others
            common.upload_atomic(buffer.getvalue(), common.join(run.config.checkpoint_url, "checkpoint.pt"))
        common.atomic_write(run.output / "checkpoint.pt", buffer.getvalue())
    run.world.share(None)  # no process goes on, or stops all, before it is written


def find_checkpoint(config: TrainingConfig, output: Path) -> dict[str, Any] | None:
    """The newest checkpoint of the output folder and --checkpoint-url; None without one or with --no-resume.

    No pickle is executed. Fail where one is damaged: starting over would cost what a person may still save.
    """
    places = [str(output / "checkpoint.pt")]
    places += [common.join(config.checkpoint_url, "checkpoint.pt")] if config.checkpoint_url else []
    found = []
    for place in filter(common.exists, places if config.resume else []):
        data = io.BytesIO(common.read_bytes(place))
        try:
            if torn := zipfile.ZipFile(data).testzip():  # torch.load looks at no checksum
                raise ValueError(f"{torn} is damaged")
            data.seek(0)
            found.append(torch.load(data, map_location="cpu", weights_only=True))
            if not found[-1].keys() >= CHECKPOINT_PARTS:
                raise ValueError("not made by 3_train.py")
        except Exception as error:  # torch raises many kinds for a damaged file
            problem = " ".join(str(error).split())[:100]
            raise Fail(f"{place}: not a readable checkpoint ({problem}); remove it, or use --no-resume") from None
    return max(found, key=lambda checkpoint: checkpoint["state"]["step"], default=None)


def identity_of(config: TrainingConfig, clip: Clip, manifest: dict[str, Any], effective: int) -> dict[str, Any]:
    """What must be equal for a run to be gone on with: settings as they were asked for, `auto` included."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_SETTINGS}
    settings |= {"clip_norm": CLIP_NORM, "lora_alpha": LORA_SCALE * config.lora_r, "views": VIEWS}
    settings["drawn_views"] = views_digest(config.augment)
    shards = {s: [entry["sha256"] for entry in manifest["splits"][s]["shards"]] for s in ("train", "validation")}
    return settings | {
        "model": clip.fingerprint, "mean": list(clip.mean), "std": list(clip.std),
        "shards": common.digest(shards), "effective_batch_size": effective,
    }  # fmt: skip


def differences(theirs: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The names in which another run's identity differs; some editions did not note mean, std and views."""
    noted = {name: known.get(name) for name in ("mean", "std", "drawn_views")} | theirs
    return [name for name, value in known.items() if value != noted.get(name)]


def matching_checkpoint(config: TrainingConfig, output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """find_checkpoint()'s; where it belongs to another run, Fail, naming the difference, or with --restart None."""
    checkpoint = find_checkpoint(config, output)
    theirs = checkpoint["identity"] if checkpoint else identity
    known = identity | ({"precision": theirs.get("precision")} if config.precision == "auto" else {})
    other = [f"{name} was {theirs.get(name)}, is {known[name]}" for name in differences(theirs, known)]
    if not other:
        return checkpoint
    problem = f"checkpoint.pt belongs to other settings ({'; '.join(other[:4])})"
    if not config.restart:
        raise Fail(f"{problem}; use --no-resume to start over, or other --output")
    print(f"{problem}: starting over (--restart)", flush=True)
    return None


def log(run: Run, state: State, **facts: Any) -> None:
    """Append a line to metrics.jsonl, and to Weights & Biases where wanted; `kind` is "step" or "validation"."""
    known = {name: None if value == math.inf else value for name, value in facts.items()}  # JSON has no infinite norm
    state.lines.append(json.dumps(known) + "\n")
    if run.speaks:
        with open(run.output / "metrics.jsonl", "a", encoding="utf-8") as handle:
            handle.write(state.lines[-1])
        if run.wandb:
            run.wandb.log({f"{facts['kind']}/{name}": value for name, value in facts.items() if name != "kind"})


def draw_curves(state: State, swept: list[dict[str, Any]], path: Path) -> None:
    """Loss over steps, validation MRR over epochs, the learning rates tried, and WiSE-FT's alphas."""
    import matplotlib
    import pandas as pd

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines, alphas = pd.DataFrame(map(json.loads, state.lines)), pd.json_normalize(swept)
    steps, epochs = lines[lines["kind"] == "step"], lines[lines["kind"] == "validation"]
    figure, ((loss, mrr), (rates, wise)) = plt.subplots(2, 2, figsize=(11, 8))
    steps.plot("step", "loss", label="training", ax=loss)
    epochs.plot("step", "loss", label="validation", style="o-", ax=loss)
    loss.set(xlabel="step", ylabel="contrastive loss", title="Loss (over more pairs at validation)")
    epochs.plot("epoch", ["text_to_image_mrr", "image_to_text_mrr"], style="o-", ax=mrr)
    mrr.set(xlabel="epoch (0: the start)", ylabel="MRR", title="Validation", ylim=(0, 1))
    for tried in state.search.get("tried", []):
        rates.plot(range(1, len(tried["curve"]) + 1), tried["curve"], "o-", label=f"{tried['lr']:g}")
        rates.legend()
    rates.set(xlabel="epoch", ylabel="validation MRR", title="Projections alone, by learning rate")
    label = "validation, error of the difference to the best"
    alphas.plot("alpha", "validation.mrr", yerr="standard_error", label=label, fmt="o-", capsize=3, ax=wise)
    alphas.plot("alpha", "probe.mrr", style="s--", label="general probe", ax=wise)
    wise.set(xlabel="alpha (0: base, 1: fine-tuned)", ylabel="MRR", title="WiSE-FT", ylim=(0, 1))
    figure.tight_layout()
    with common.atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------
# Training


def rate(kind: str, done: float, warmup: float = WARMUP) -> float:
    """Share of the peak learning rate when `done` (0 to 1) of the updates are made; `warmup` of them rise (cosine)."""
    if kind == "onecycle":  # from 1/25 up in 30%, down to 1/250,000 (arXiv 1708.07120)
        low, high, part = (1 / 25, 1, done / 0.3) if done < 0.3 else (1 / 250_000, 1, (1 - done) / 0.7)
        return low + (high - low) * (1 - math.cos(math.pi * part)) / 2
    if done < warmup:
        return done / warmup
    return (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW over three groups: LoRA and projections at their own rates, temperature and biases without decay."""
    config, groups = run.config, {"lora": [], "projections": [], "scalars": []}
    for name, parameter in run.towers.trained.items():
        groups["lora" if "lora_" in name else "projections" if parameter.ndim > 1 else "scalars"].append(parameter)
    settings = [
        {"params": some, "peak": config.lora_lr if kind == "lora" else config.lr, "lr": 0.0,
         "weight_decay": 0.0 if kind == "scalars" else config.weight_decay}
        for kind, some in groups.items() if some
    ]  # fmt: skip
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(settings)
    return torch.optim.AdamW(settings, fused=True)


def update(run: Run, state: State, optimizer, scaler, batch: Batch, total_updates: int) -> dict[str, float]:
    """One training step: gradient, clipping, AdamW. Raises FloatingPointError before a NaN reaches the weights.

    A GPU is waited for once, when loss and norm are read.
    """
    towers, config = run.towers, run.config
    towers.train(True)
    optimizer.zero_grad()
    share = rate(config.schedule, (state.updates + 1) / (total_updates + 1), config.warmup / total_updates)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    loss = accumulate(run, batch, state.step, scaler.scale)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in towers.trained.values() if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(towers.trained.values(), CLIP_NORM, norm)
    numbers = torch.stack([x.detach().float() for x in (loss, norm, towers.model.logit_scale.exp())]).tolist()
    before = scaler.get_scale()
    overflow = before > 1  # of fp16, which a smaller scale mends
    if not (math.isfinite(numbers[0]) and (math.isfinite(numbers[1]) or overflow)):
        raise FloatingPointError(f"loss {numbers[0]:.4g}, gradient norm {numbers[1]:.4g}")
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        towers.model.logit_scale.clamp_(0, towers.largest_scale)
    state.step += 1
    state.batch += 1
    state.updates += scaler.get_scale() >= before
    rates = {"lr": config.lr * share, "lora_lr": config.lora_lr * share}
    return dict(zip(("loss", "gradient_norm", "logit_scale"), numbers, strict=True)) | rates


def average_weights(mean: dict[str, Tensor], now: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
    """The mean of the weights after each of `epoch` epochs, later ones counting more: the k-th k times.

    It lies nearer to the middle of what fits than the last weights do, and nearer to the base (Shamir and Zhang 2013,
    arXiv 1212.1824; Izmailov et al. 2018, arXiv 1803.05407).
    """
    return {name: torch.lerp(mean.get(name, now[name]), now[name], 2 / (epoch + 1)) for name in now}


def train(run: Run, state: State) -> None:
    """All epochs, or those that are left; state.best then has the best one, 0 for the weights of before."""
    config, towers = run.config, run.towers
    optimizer = make_optimizer(run)
    scaler = torch.amp.GradScaler(run.world.device.type, enabled=config.precision == "fp16")
    if run.checkpoint:
        optimizer.load_state_dict(run.checkpoint["optimizer"])
        scaler.load_state_dict(run.checkpoint["scaler"])
        towers.interpolate(1.0, run.checkpoint["weights"])
        run.train.unreadable |= state.bad
        run.print(f"going on after step {state.step}, in epoch {min(state.epoch + 1, config.epochs)}")
    if run.speaks:  # what was logged after the checkpoint is dropped
        common.atomic_write(run.output / "metrics.jsonl", "".join(state.lines))
    if not state.lines:
        metrics, _ = evaluate(run, run.validation)
        state.best = {"epoch": 0, "metrics": metrics, "weights": towers.copy()}
        log(run, state, kind="validation", epoch=0, step=0, **metrics)
        save_checkpoint(run, state, optimizer, scaler)
    while state.epoch < config.epochs and state.epoch - state.best["epoch"] < config.patience:
        train_epoch(run, state, optimizer, scaler)
        state.epoch, state.batch = state.epoch + 1, 0
        now = towers.copy()
        state.mean = average_weights(state.mean, now, state.epoch)
        towers.interpolate(1.0, state.mean)
        metrics, _ = evaluate(run, run.validation)
        towers.interpolate(1.0, now)
        if metrics["mrr"] > state.best["metrics"]["mrr"]:
            state.best = {"epoch": state.epoch, "metrics": metrics, "weights": state.mean}
        log(run, state, kind="validation", epoch=state.epoch, step=state.step, **metrics)
        run.print(f"  validation: loss {metrics['loss']:.4f}, MRR {metrics['mrr']:.4f}")
        save_checkpoint(run, state, optimizer, scaler)
    if state.epoch < config.epochs:
        run.print(f"stopped: no better validation MRR for {config.patience} epochs (--patience)")


def train_epoch(run: Run, state: State, optimizer, scaler) -> None:
    """The steps of the current epoch, from state.batch on."""
    config, world, count = run.config, run.world, len(run.train)
    steps, title, pairs = math.ceil(count / run.effective), f"epoch {state.epoch + 1}/{config.epochs}", 0
    plan = epoch_plan(count, run.effective, config.seed, state.epoch, world.rank, world.size, state.batch)
    start = saved = time.monotonic()
    hidden = None if run.speaks else True  # None: where there is no terminal
    batches = run.train.batches(plan, state.epoch)
    for batch in (bar := tqdm(batches, title, steps, initial=state.batch, unit="step", disable=hidden)):
        numbers = update(run, state, optimizer, scaler, batch, steps * config.epochs)
        pairs += batch.total
        bar.set_postfix(loss=f"{numbers['loss']:.3f}", lr=f"{numbers['lr']:.1e}", refresh=False)
        if state.step % LOG_EVERY == 0 or state.batch == steps:
            log(run, state, kind="step", epoch=state.epoch + 1, step=state.step, **numbers)
        due = time.monotonic() - saved >= config.checkpoint_minutes * 60 and state.batch < steps
        if any(world.share(due)):
            save_checkpoint(run, state, optimizer, scaler)
            saved = time.monotonic()
    speed = pairs / (time.monotonic() - start)
    run.print(f"{title}: step {state.step}, loss {numbers['loss']:.4f}, {speed:.0f} pairs a second")


def try_rate(run: Run, lr: float, start: dict[str, Tensor]) -> tuple[dict[str, Any], np.ndarray, dict[str, Tensor]]:
    """(facts, MRR of each validation pair, weights) of the best epoch of the projections alone at a peak rate `lr`."""
    config, state, diverged = dataclasses.replace(run.config, lr=lr, lora_lr=0.0), State(), False
    run.towers.interpolate(1.0, start)
    try:
        train(dataclasses.replace(run, config=config, trial=True), state)
    except FloatingPointError:
        diverged = True
    curve = [line["mrr"] for line in map(json.loads, state.lines) if line["kind"] == "validation"]
    run.towers.interpolate(1.0, state.best["weights"])
    facts = {"lr": lr, "mrr": max(curve), "epoch": state.best["epoch"], "curve": curve[1:], "diverged": diverged}
    return facts, evaluate(run, run.validation)[1], state.best["weights"]


def search_rates(run: Run) -> dict[str, Any]:
    """Train the projections alone at each of RATES, or at --lr, on the kept features of both towers; choose one.

    Chosen is the smallest rate that validates within one standard error of the best: a smaller one forgets less. LoRA
    begins at what it gave (LP-FT, arXiv 2202.10054), and so ends at least there. Returns {"lr", "tried", "base_mrr",
    and "probe_mrr", what linear_probe would export}. Fail where every rate diverges.
    """
    towers, config, splits = run.towers, run.config, (run.train, run.validation)
    for split in splits:
        cache_tower_features(run, split, adapted=True)
    run.print("projections alone, on kept features:")
    lora = [parameter for name, parameter in towers.trained.items() if "lora_" in name]
    start, before = towers.copy(), evaluate(run, run.validation)[1]
    for parameter in lora:
        parameter.requires_grad_(False)
    tried = [try_rate(run, lr, start) for lr in (RATES if config.lr == "auto" else (config.lr,))]
    good = [one for one in tried if not one[0]["diverged"]]
    if not good:
        raise Fail("the loss diverges at every learning rate that was tried; give a lower --lr, or --precision fp32")
    chosen, _, weights = good[nearest_within_error([pairs for _, pairs, _ in good])[0]]
    for facts, *_ in tried:
        mark = "  diverged" if facts["diverged"] else "  <- chosen" if facts is chosen else ""
        run.print(f"  lr {facts['lr']:g}: validation MRR {facts['mrr']:.4f} after epoch {facts['epoch']}{mark}")
    probe = choose_alpha("one-se", sweep_alpha(dataclasses.replace(run, trial=True), weights))
    for parameter in lora:
        parameter.requires_grad_(True)
    towers.interpolate(1.0, weights if lora else start)
    for split in splits:
        for tower in (tower for tower, adapted in towers.adapted.items() if adapted):
            split.kept.pop(tower, None)  # LoRA is going to change it
    found = {"lr": chosen["lr"], "tried": [facts for facts, *_ in tried]}
    return found | {"base_mrr": float(before.mean()), "probe_mrr": probe["validation"]["mrr"]}


# --------------------------------------------------------------------------------------------------------------------
# One scenario, from shards to train.json


def settle(config: TrainingConfig, count: int, effective: int) -> TrainingConfig:
    """The settings with numbers for what is `auto`, as far as the number of steps decides it."""
    steps = math.ceil(count / effective)
    epochs = min(40, max(5, math.ceil(UPDATES / steps))) if config.epochs == "auto" else config.epochs
    updates = steps * epochs
    auto = {"epochs": epochs, "warmup": min(WARMUP * updates, MOST_WARMUP), "patience": max(5, epochs // 4)}
    auto["lora_lr"] = LORA_RATE * min(1.0, math.sqrt(UPDATES / updates))
    return dataclasses.replace(config, **{name: auto[name] for name in auto if getattr(config, name) == "auto"})


def prepare(config: TrainingConfig, shards: str, output: Path) -> Run:
    """Open shards, model and checkpoint; settle what was left to be found out, as the checkpoint has it."""
    world = World(config.device)
    if config.augment == "auto":
        config = dataclasses.replace(config, augment="advanced" if SCENARIOS[config.scenario][0] else "none")
    manifest = common.load_manifest(shards)
    clip = common.load_clip(config.model, config.pretrained, world.device)
    probe = draw_probe(clip) if config.probe == "drawn" else load_probe(config.probe, clip)
    with first_on_this_machine(world):
        train, validation = open_splits(shards, manifest, cache_folder(world, output) / "shards", clip, config)
    effective = min(len(train), config.effective_batch_size or min(1024, max(32, len(train) // 8)))
    identity = identity_of(config, clip, manifest, effective)
    checkpoint = matching_checkpoint(config, output, identity) if SCENARIOS[config.scenario][2] else None
    if len(set(found := world.share(checkpoint and checkpoint["state"]["step"]))) > 1:
        raise Fail(f"the processes found checkpoints of steps {found}; put --output on a disk that all machines share")
    if config.precision == "auto":  # a run goes on as it began, on another machine too
        begun = checkpoint["identity"]["precision"] if checkpoint else common.auto_precision(world.device.type)
        identity["precision"] = world.share(begun)[0]
        config = dataclasses.replace(config, precision=identity["precision"])
    config = settle(config, len(train), effective)
    run = Run(config, output, world, clip, Towers(clip, config), train, validation, probe, effective)
    run.identity, run.checkpoint = identity, checkpoint
    if (side := manifest.get("settings", {}).get("image_size") or clip.size) < clip.size:
        run.print(f"note: the shards' pictures of {side} px are scaled up to the {clip.size} px of {clip.name}")
    return run


def explain_result(run: Run, state: State, exported: dict[str, Any]) -> list[str]:
    """Print and return what a person should know about a run that gained nothing, or less than it could."""
    lora, mrr = any(run.towers.adapted.values()), exported["validation"]["mrr"]
    probe, notes = state.search.get("probe_mrr", 0.0), []
    if exported["alpha"] == 0:
        notes.append("nothing that was trained validates better than the base by more than its error: it is exported")
    elif lora and state.best["epoch"] == 0:
        notes.append("LoRA did not improve the validation MRR; the projections of linear_probe are exported")
    if lora and mrr < probe:
        notes.append(f"validation MRR {mrr:.4f} is below linear_probe's {probe:.4f}; use --scenario linear_probe")
    for note in notes:
        run.print(f"note: {note}")
    return notes


def begin(run: Run) -> State:
    """Where the run stands, its micro batch and rates settled, its captions and features of frozen towers kept."""
    config, world, towers, checkpoint = run.config, run.world, run.towers, run.checkpoint
    state = State(**checkpoint["state"]) if checkpoint else State()
    if not checkpoint:
        towers.check_lora_gradients()
    share, run.micro = math.ceil(run.effective / world.size), config.micro_batch_size
    if run.micro == "auto":  # found once a run: another split of the same batch adds up in another order
        run.micro = checkpoint["micro"] if checkpoint else min(world.share(towers.fitting_micro_batch(share)))
    for split in (run.train, run.validation):
        cache_captions(run, split)
        cache_tower_features(run, split)
    parts = f"{world.size} processes x {math.ceil(share / run.micro)} micro batches of up to {run.micro}"
    run.print(f"effective batch {run.effective} = {parts}, in {config.precision}")
    if not checkpoint and (any(towers.adapted.values()) or config.lr == "auto"):
        state.search = search_rates(run)
    run.config = dataclasses.replace(config, lr=state.search.get("lr", config.lr))
    return state


def fine_tune(run: Run) -> dict[str, Any]:
    """Train, evaluate and export; returns what train.json says about it."""
    if run.config.wandb != "off" and run.world.main:
        import wandb

        try:
            run.wandb = wandb.init(project="catalogue-clip", name=run.output.name, dir=str(run.output))
        except wandb.errors.Error as error:
            remedy = "run `wandb login`, set WANDB_MODE=offline, or use --wandb off"
            raise Fail(f"--wandb {run.config.wandb}: {error}; {remedy}") from None
    state = begin(run)
    config, towers = run.config, run.towers
    chosen = {name: getattr(config, name) for name in ("epochs", "patience", "warmup", "lr", "lora_lr")}
    run.print("settings: " + ", ".join(f"{name} {value:g}" for name, value in chosen.items()))
    if run.wandb:
        run.wandb.config.update(dataclasses.asdict(config), allow_val_change=True)
    try:
        train(run, state)
    except FloatingPointError as error:
        remedy = "start over with lower --lr and --lora-lr, or with --precision fp32, and --no-resume"
        raise Fail(f"step {state.step + 1}: {error}; {remedy}") from None
    swept = sweep_alpha(run, state.best["weights"])
    exported = choose_alpha(config.wise, swept, state.search.get("probe_mrr", 0.0))
    print_alphas(run, swept, exported)
    notes = explain_result(run, state, exported)
    trained, lora = (sum(p.numel() for name, p in towers.trained.items() if of in name) for of in ("", "lora_"))
    base = sum(p.numel() for part in (towers.model, towers.projections) for p in part.parameters()) - lora
    if run.world.main:
        towers.export(run.output, exported["alpha"], state.best["weights"])
        draw_curves(state, swept, run.output / "curves.png")
    if run.wandb:
        if config.wandb == "model":
            run.wandb.log_artifact(str(run.output / "model"), name="model", type="model")
        run.wandb.finish()
    before, best = swept[0]["validation"], exported["validation"]
    return {
        "model_dir": "model",
        "validation": {"zero_shot": before, "best": best, "best_epoch": state.best["epoch"]},
        "alpha": exported["alpha"], "wise_ft": swept, "chosen": chosen, "search": state.search, "notes": notes,
        "parameters": {"base": base, "trained": trained, "lora": lora, "lora_share": lora / base},
        "batch": {"effective": run.effective, "micro": run.micro, "processes": run.world.size},
    }  # fmt: skip


def write_result(run: Run, shards: str, seconds: float, facts: dict[str, Any]) -> None:
    """Write train.json, the mark of a finished run, and print what came out."""
    config, marker, splits = run.config, run.output / "train.json", (run.train, run.validation)
    counts = {split.name: split.counts() for split in splits}
    facts |= {"scenario": config.scenario, "versions": common.versions("torch", "open_clip_torch", "peft")}
    facts["unreadable"] = [line for split in splits for line in split.unreadable.values()][:1000]
    inputs = {"shards": shards, "base": run.clip.name, "base_fingerprint": run.clip.fingerprint}
    if facts["model_dir"]:
        common.atomic_write(run.output / "model" / "README.md", model_card(run.clip, config, counts, facts))
    common.write_sidecar(marker, config, counts, inputs, seconds, identity=run.identity, **facts)
    for name, count in counts.items():
        if count["unreadable"]:
            print(f"{name}: {count['unreadable']} of {count['samples']} samples were unreadable; named in {marker}")
    before, after = facts["validation"]["zero_shot"], facts["validation"].get("best")
    print(f"{'validation':<26}{'zero-shot':>10}" + (f"{'fine-tuned':>12}" if after else ""))
    for name in before:
        print(f"{name:<26}{before[name]:>10.4f}" + (f"{after[name]:>12.4f}" if after else ""), flush=True)


def run_scenario(config: TrainingConfig, shards: str, output: Path) -> None:
    """One scenario from shards to train.json."""
    start, marker = time.monotonic(), output / "train.json"
    common.keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    run = prepare(config, shards, output)
    facts = common.read_json(marker) if config.resume and marker.is_file() else None
    facts = {"settings": {}, "identity": {}} | (facts if isinstance(facts, dict) else {})
    same = facts["settings"].items() >= {name: getattr(run.config, name) for name in FINISHING}.items()
    if run.world.share(same and not differences(facts["identity"], run.identity))[0]:
        run.print(f"{marker}: finished already; --no-resume trains again")
        return
    if run.world.main:
        marker.unlink(missing_ok=True)
    if SCENARIOS[config.scenario][2]:
        facts = fine_tune(run)
    else:
        cache_captions(run, run.validation)
        facts = {"model_dir": None, "validation": {"zero_shot": evaluate(run, run.validation)[0]}}
    if run.world.main:
        write_result(run, shards, time.monotonic() - start, facts)


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    config, shards, output = read_flags(argv)
    if not shards:  # --check
        clip = common.load_clip(config.model, config.pretrained, World(config.device).device)
        Towers(clip, config).check_lora_gradients()
        print(f"{clip.name} can be trained: {config.scenario}")
        return DONE
    world = World(config.device)  # with the first process, which holds the lock for all, the others end, too
    with common.exclusive(output / ".lock") if world.main else contextlib.nullcontext(True) as mine:
        if not mine:
            raise Fail(f"{output}: another run is writing here; wait for it, or choose another --output")
        with common.explain_out_of_memory("lower --micro-batch-size, or use --grad-checkpointing"):
            run_scenario(config, shards, output)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
