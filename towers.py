"""The model half of stage 3: a CLIP prepared for a scenario, and the processes that train it together."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Fail, TrainingConfig, whole_folder
from loader import Batch

# scenario: (LoRA in the vision tower, LoRA in the text tower, projections and temperature trained)
SCENARIOS = {
    "zero_shot": (False, False, False),
    "linear_probe": (False, False, True),
    "dual_lora": (True, True, True),
    "vision_lora": (True, False, True),
    "text_lora": (False, True, True),
}
MAX_LOGIT_SCALE = math.log(100)  # as in the CLIP paper


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

    def gather(self, total: int, positions, *columns) -> tuple[list[Any], Any]:
        """([N, ...] of each column, the rows of all processes in the order of their positions; int64 [B], where this
        process's rows are among them). Columns [B, ...] belong to ascending positions (int64 [B], below `total`); what
        no process has is left out."""
        import torch

        if self.size == 1:
            return list(columns), torch.arange(len(positions), device=self.device)
        positions = positions.to(self.device)
        there = torch.zeros(total, dtype=torch.int64, device=self.device)
        there[positions] = 1
        there = self.sum(there) > 0
        found = []
        for column in columns:
            whole = column.new_zeros((total, *column.shape[1:]))
            whole[positions] = column
            found.append(self.sum(whole)[there])
        return found, (there.cumsum(0) - 1)[positions]

    def share(self, value: Any) -> list[Any]:
        """What each process gives here (what JSON holds), in the order of their ranks."""
        import torch

        if self.size == 1:
            return [value]
        data, mine = torch.tensor([list(json.dumps(value).encode())], device=self.device), torch.tensor([self.rank])
        (sizes,), _ = self.gather(self.size, mine, torch.tensor([data.shape[1]], device=self.device))
        (rows,), _ = self.gather(self.size, mine, torch.nn.functional.pad(data, (0, int(sizes.max()) - data.shape[1])))
        return [json.loads(bytes(row[:size])) for row, size in zip(rows.tolist(), sizes.tolist(), strict=True)]

    @contextlib.contextmanager
    def first_on_this_machine(self) -> Iterator[None]:
        """Let one process of each machine do what the others then find done."""
        if self.local_rank:
            self.share(None)  # reads what came back: a sum on GPUs alone would hold nobody up
        yield
        if not self.local_rank:
            self.share(None)

    def cache(self, output: Path) -> Path:
        """This machine's own folder for what it keeps; `output` may be on a disk that several machines share."""
        machine = int(os.environ.get("GROUP_RANK", 0)) if self.size > 1 else 0  # torchrun's number of the machine
        return output / (f"cache-{machine}" if machine else "cache")


class Towers:
    """A CLIP prepared for a scenario: attention split, projections apart, LoRA where the scenario puts it."""

    def __init__(self, clip, config: TrainingConfig):
        import torch

        from clip import lean_lora, split_attention, take_projections, transformer_blocks

        vision, text, projections = SCENARIOS[config.scenario]
        self.clip, self.model, self.config = clip, split_attention(clip.model), config
        self.largest_scale = max(MAX_LOGIT_SCALE, self.model.logit_scale.item())  # some SigLIPs start above
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
                if isinstance(module, peft.tuners.lora.Linear):
                    module.forward = lambda x, layer=module: lean_lora((layer,), x)[0]
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
            for module in (self.model.visual, *transformer_blocks(self.model)):
                module.compile(dynamic=True)

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
        from clip import image_features, normalise, text_features

        if tower == "image":
            return image_features(self.model, normalise(self.clip, inputs))
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

    def rehearse(self, size: int) -> None:
        """Forward and backward of so many blank pairs, whose gradients are to be forgotten."""
        import torch

        self.train(True)
        pixels = torch.zeros(size, 3, self.clip.size, self.clip.size, dtype=torch.uint8)
        images, texts = self.embed(Batch(size, None, None, pixels, self.clip.tokenizer(["word " * 30] * size)))
        (images.sum() + texts.sum()).backward()

    def forget_gradients(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = None

    def refuse_idle_lora(self) -> None:
        """Fail where LoRA would change nothing: some towers (timm's EVA with one qkv) read a layer's weight past it."""
        lora = [name for name in self.trained if "lora_" in name]
        if not lora:
            return
        self.rehearse(2)  # the size that fitting_micro_batch begins with: --compile sees one shape less
        idle = [name for name in lora if self.trained[name].grad is None]
        self.forget_gradients()
        if idle:
            raise Fail(
                f"{self.clip.name} computes without {idle[0]} ({len(idle)} of {len(lora)} tensors of LoRA), which would"
                " change nothing there; use --scenario linear_probe"
            )

    def counts(self) -> dict[str, Any]:
        """How many parameters there are, are trained, and belong to LoRA."""
        trained = {name: parameter.numel() for name, parameter in self.trained.items()}
        lora = sum(count for name, count in trained.items() if "lora_" in name)
        base = sum(p.numel() for part in (self.model, self.projections) for p in part.parameters()) - lora
        return {"base": base, "trained": sum(trained.values()), "lora": lora, "lora_share": lora / base}

    def export(self, output: Path, alpha: float, fine: dict[str, Any]) -> None:
        """Write adapter/ and model/ for the weights at alpha; this becomes the plain open_clip model again."""
        from safetensors.torch import save_file

        from clip import fuse_attention, return_projections, save_clip

        self.interpolate(alpha, fine)
        with whole_folder(output / "adapter") as folder:
            if self.peft is not None:  # it drops what is no LoRA: the rest stands beside it
                self.peft.peft_config["default"].lora_alpha *= alpha
                self.peft.save_pretrained(folder)
            rest = {name: p.detach().cpu().contiguous() for name, p in self.trained.items() if "lora_" not in name}
            save_file(rest, folder / "projections.safetensors")
        if self.peft is not None:
            self.peft.merge_and_unload()
        fuse_attention(return_projections(self.model, self.projections))
        save_clip(self.clip, output / "model")


def memory_limit() -> int:
    """Bytes of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def fitting_micro_batch(towers: Towers, share: int) -> int:
    """The largest power of two of pairs that fits in memory, at most `share`.

    On a GPU found by trying; on a CPU from the bytes that two and four pairs keep for the backward pass. Nothing is
    learned.
    """
    import torch

    size = 1
    if towers.clip.device.type == "cpu":
        weights = {p.data_ptr() for part in (towers.model, towers.projections) for p in part.parameters()}

        def kept_by(size: int) -> int:
            kept: dict[int, int] = {}

            def note(tensor):
                if tensor.data_ptr() not in weights:
                    kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                towers.rehearse(size)
            return sum(kept.values())

        two, four = kept_by(2), kept_by(4)
        pair = (four - two) / 2  # what is kept for any number of pairs, such as weights in bf16, is no pair's
        while size < share and (two - 2 * pair) + size * 2 * pair < memory_limit() / 8:
            size *= 2
    else:
        while size < share:
            try:
                towers.rehearse(size * 2)
            except torch.OutOfMemoryError:
                break
            size *= 2
        torch.cuda.empty_cache()
    towers.forget_gradients()
    return min(size, share)
