"""The torch half that stages 3, 4 and the arena's search page share: loading a CLIP, encoding, changing its towers.

Loading:   load_clip("ViT-B-32", "openai") | load_clip("ViT-B-32", "weights.pt") | load_clip("local-dir:FOLDER")
Encoding:  encode_image(clip, pixels), encode_text(clip, captions): float32 [B, D], L2-normalised
Changing:  split_attention / fuse_attention (so that LoRA reaches q, k, v), take_projections / return_projections
           (so that a frozen tower's features can be kept), save_clip (a folder that plain open_clip loads)
Judging:   retrieval_ranks, retrieval_metrics

Importing it imports torch (3 s): scripts import it inside the functions that need it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Fail, canonical, read_json, whole_folder, write_json
from imaging import BadImage

LOCAL = "local-dir:"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".npy")

# --------------------------------------------------------------------------------------------------------------------
# Loading


@dataclasses.dataclass
class Clip:
    """An open_clip model in evaluation mode, with all that is needed to feed it and to save it again."""

    model: nn.Module
    tokenizer: Any  # list[str] -> int64 [B, context_length]
    size: int  # pixels a side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    context_length: int
    fingerprint: str  # sha256 over configuration and weights
    name: str  # for people: "ViT-B-32/openai" or a folder
    config: dict[str, Any]  # open_clip's model_cfg, the QuickGELU flag as loaded
    preprocess: dict[str, Any]  # open_clip's preprocess_cfg
    folder: Path | None = None  # where a local-dir came from (its tokenizer files travel with an export)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_clip(model: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> Clip:
    """Load an open_clip name with a tag or a checkpoint file, or a folder (`local-dir:DIR`, or just DIR).

    No pickle is ever executed: safetensors, or torch.load with weights_only. Raises Fail saying what to do.
    """
    import open_clip

    folder = _local_folder(model) or _local_folder(pretrained)
    if folder is not None:
        name, source, overrides = str(folder), f"{LOCAL}{folder}", {}
        config = _check_folder(folder)
        pretrained = None
    else:
        config, overrides = _check_name(model, pretrained)
        name, source = f"{model}/{pretrained}", model
    logging.disable(logging.ERROR)  # the hub and open_clip log every retry; what matters comes as one line below
    try:
        loaded = open_clip.create_model(
            source, pretrained, weights_only=True, pretrained_text=False, require_pretrained=True, **overrides
        )
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # open_clip, torch and the hub raise many kinds here; each means: not loadable
        raise _explain(name, pretrained, error) from None
    finally:
        logging.disable(logging.NOTSET)
    if hasattr(loaded, "text_decoder"):
        raise Fail(f"{name}: a CoCa, which writes captions too, is not supported; take a plain CLIP such as ViT-B-32")
    loaded = loaded.float().to(device).eval()  # stored half precision would make training and fingerprints drift
    preprocess = dict(open_clip.get_model_preprocess_cfg(loaded))
    size = preprocess["size"]
    return Clip(
        model=loaded,
        tokenizer=tokenizer,
        size=int(size if isinstance(size, int) else size[0]),
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        context_length=int(loaded.context_length),
        fingerprint=fingerprint(loaded, config | overrides),
        name=name,
        config=config | overrides,
        preprocess=preprocess,
        folder=folder,
    )


def _local_folder(name: str | None) -> Path | None:
    """The folder that a model or weights argument means, if it means one."""
    if name and name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    return Path(name) if name and Path(name).is_dir() else None


def _check_folder(folder: Path) -> dict[str, Any]:
    """model_cfg of an open_clip folder; Fail where the configuration or the weights are missing."""
    if not folder.is_dir():
        raise Fail(f"{folder}: no such model folder; check the path after {LOCAL}")
    config = read_json(folder / "open_clip_config.json", "open_clip model configuration")
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise Fail(f"{folder}/open_clip_config.json: no model_cfg in it; this is not an open_clip model folder")
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise Fail(f"{folder}: no weights in it (open_clip_model.safetensors); train or copy the model again")
    return config["model_cfg"]


def _check_name(model: str, pretrained: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """model_cfg of a built-in name and what its weights override; Fail for an unknown name, tag or file."""
    import open_clip

    known = open_clip.list_models()
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3) or ["ViT-B-32", "ViT-B-16", "ViT-L-14"]
        raise Fail(f"--model {model}: neither a folder nor an open_clip model; nearest: {', '.join(near)}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    some = ", ".join(tags[:8]) or "none"
    if not pretrained:
        raise Fail(f"--model {model} needs --pretrained: a tag ({some}), a weights file, or {LOCAL}FOLDER")
    if Path(pretrained).is_file():
        if Path(pretrained).suffix not in WEIGHTS:
            raise Fail(f"--pretrained {pretrained}: not a weights file; expected one of {' '.join(WEIGHTS)}")
        return open_clip.get_model_config(model), {}
    if pretrained not in tags:
        kind = "no such file" if os.sep in pretrained or Path(pretrained).suffix else "no such tag or file"
        raise Fail(f"--pretrained {pretrained}: {kind} for {model}; its tags: {some}")
    # The tag knows whether its weights were trained with QuickGELU; open_clip only warns and computes something else.
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    return open_clip.get_model_config(model), {"quick_gelu": bool(tag.get("quick_gelu", False))}


def _explain(name: str, pretrained: str | None, error: Exception) -> Fail:
    """One line for what open_clip could not load."""
    text = " ".join(str(error).split())[:200]
    if "download" in text.lower() or "connection" in text.lower() or "hub" in text.lower():
        return Fail(f"{name}: could not download it ({text}); check the network, or give --pretrained a local file")
    if "weights_only" in text or "Unpickl" in text or "TorchScript" in text:
        return Fail(f"{name}: holds more than plain tensors; convert it to safetensors (no pickle is loaded)")
    if "size mismatch" in text or "Missing key" in text or "Unexpected key" in text:
        return Fail(f"{name}: the weights belong to another architecture; check --model ({text})")
    return Fail(f"{name}: could not be loaded ({type(error).__name__}: {text}); check --model and --pretrained")


def has_bf16(device: str) -> bool:
    """Whether bfloat16 is computed in hardware there; elsewhere it would be slower than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def auto_precision(device: str) -> str:
    """What --precision auto means there."""
    return "bf16" if has_bf16(device) else "fp32"


def fingerprint(model: nn.Module, config: dict[str, Any] | None = None) -> str:
    """sha256 (hex) over a model's configuration, and names, types, shapes and bytes of its weights."""
    total = hashlib.sha256(canonical(config or {}))
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def save_clip(clip: Clip, folder: str | Path) -> None:
    """Write a folder that plain open_clip loads by `local-dir:`; it appears whole, replacing an older one."""
    from safetensors.torch import save_file

    with whole_folder(folder) as temporary:
        if clip.folder is not None:  # tokenizer files, if the model brought its own
            for path in clip.folder.iterdir():
                if path.is_file() and path.suffix not in WEIGHTS and path.name != "open_clip_config.json":
                    shutil.copyfile(path, temporary / path.name)
        elif hasattr(clip.tokenizer, "tokenizer") and hasattr(clip.tokenizer.tokenizer, "save_pretrained"):
            clip.tokenizer.tokenizer.save_pretrained(temporary)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.model.state_dict().items()}
        save_file(state, temporary / "open_clip_model.safetensors")
        write_json(temporary / "open_clip_config.json", {"model_cfg": clip.config, "preprocess_cfg": clip.preprocess})


# --------------------------------------------------------------------------------------------------------------------
# Encoding


def decode_jpeg(data: bytes, size: int) -> Tensor:
    """uint8 [3, size, size] of a square JPEG. Raises BadImage where it is damaged."""
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode

    try:  # torchvision's decoder gives Pillow's very pixels in half the time, and lets other threads run
        pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise BadImage(f"damaged JPEG ({str(error).splitlines()[0][:80]})") from None
    if pixels.shape[1:] != (size, size):
        pixels = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    return pixels


def normalise(clip: Clip, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float [B, 3, S, S] on the model's device, with the model's own mean and std."""
    weight = next(clip.model.parameters())
    mean = weight.new_tensor(clip.mean).view(3, 1, 1) * 255
    std = weight.new_tensor(clip.std).view(3, 1, 1) * 255
    return (pixels.to(weight.device, non_blocking=True).to(weight.dtype) - mean) / std


@torch.no_grad()
def encode_image(clip: Clip, pixels: Tensor) -> Tensor:
    """float32 [B, D], L2-normalised, of uint8 [B, 3, S, S]."""
    return F.normalize(image_features(clip.model, normalise(clip, pixels)).float(), dim=-1)


@torch.no_grad()
def encode_text(clip: Clip, captions: list[str]) -> Tensor:
    """float32 [B, D], L2-normalised, of captions."""
    return F.normalize(text_features(clip.model, tokenize(clip, captions)).float(), dim=-1)


def tokenize(clip: Clip, captions: list[str]) -> Tensor:
    """int64 [B, context_length] on the model's device."""
    return clip.tokenizer(captions).to(clip.device)


def image_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """[B, D] of float [B, 3, S, S]: the tower's own result, its last block computed for the class token only."""
    from open_clip.transformer import VisionTransformer

    tower = model.visual
    if not (isinstance(tower, VisionTransformer) and tower.pool_type == "tok" and tower.attn_pool is None):
        return tower(pixels)
    x = tower._embeds(pixels)  # (B, L, W)
    x = transformer_at(tower.transformer, x, x.new_zeros(len(x), dtype=torch.int64))
    x, _ = tower._pool(x)  # (B, W)
    return x if tower.proj is None else x @ tower.proj


def text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, D] of int64 [B, L]: the tower's own result, computed only up to the longest caption of the batch.

    Exact where attention is causal and one token is pooled: what stands behind that token cannot reach it.
    Positions and mask are sliced; open_clip's force_context_length would interpolate trained positions.
    """
    tower = getattr(model, "text", model)  # CustomTextCLIP keeps the tower apart, CLIP has its parts at the top
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask = getattr(tower, "attn_mask", None)
    if pool not in ("argmax", "eos") or mask is None or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text(tokens)
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    ends = tokens.argmax(dim=-1) if pool == "argmax" else (tokens == eos).int().argmax(dim=-1)
    length = int(ends.max()) + 1
    tokens = tokens[:, :length]
    x = tower.token_embedding(tokens) + tower.positional_embedding[:length]  # (B, L, W)
    x = tower.ln_final(transformer_at(tower.transformer, x, ends, mask[:length, :length]))[:, 0]  # (B, W)
    if tower.text_projection is None:
        return x
    return tower.text_projection(x) if isinstance(tower.text_projection, nn.Module) else x @ tower.text_projection


def transformer_at(transformer: nn.Module, x: Tensor, places: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, 1, W]: open_clip's Transformer on x [B, L, W], at one place of each row (int64 [B]).

    Exact. Nothing reads the last block elsewhere, so its query and MLP, 10 of a block's 12 parts, are computed there
    alone. mask: float [L, L], added to the scores of attention.
    """
    from open_clip.transformer import ResidualAttentionBlock
    from torch.utils.checkpoint import checkpoint

    rows = torch.arange(len(x), device=x.device)
    *blocks, last = transformer.resblocks
    split = type(last) is ResidualAttentionBlock and isinstance(last.attn, SplitAttention)
    if not (split and transformer.batch_first):
        return transformer(x, attn_mask=mask)[rows, places, None]
    for block in blocks:
        if transformer.grad_checkpointing:
            x = checkpoint(block, x, None, None, mask, use_reentrant=False)
        else:
            x = block(x, attn_mask=mask)
    seen = last.ln_1(x)
    mask = None if mask is None else mask[places, None, None]  # (B, 1, 1, L)
    x = x[rows, places, None]  # (B, 1, W)
    x = x + last.ls_1(last.attention(seen[rows, places, None], seen, seen, attn_mask=mask))
    return x + last.ls_2(last.mlp(last.ln_2(x)))


# --------------------------------------------------------------------------------------------------------------------
# Changing the towers


class SplitAttention(nn.Module):
    """nn.MultiheadAttention as four Linears q, k, v, out, so that LoRA reaches each of them exactly once.

    PEFT's own LoRA for nn.MultiheadAttention (0.21.2) adds the output projection's delta twice.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        width = attention.embed_dim
        self.heads = attention.num_heads
        self.dropout = attention.dropout
        for index, name in enumerate(("q", "k", "v")):
            rows = slice(index * width, (index + 1) * width)
            bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
            self.add_module(name, _linear(attention.in_proj_weight[rows], bias))
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query, key, value, need_weights=False, attn_mask=None):
        B, L, W = query.shape
        q, k, v = (
            x.view(B, -1, self.heads, W // self.heads).transpose(1, 2)  # (B, heads, L, W / heads)
            for x in self._projected(query, key, value)
        )
        mask = None if attn_mask is None else attn_mask.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        # The fused kernel of a CPU is 4 to 10 times slower in bf16, and the bits of a single query depend on its batch.
        if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[2] == 1):
            scores = (q * (W // self.heads) ** -0.5) @ k.transpose(-1, -2)
            x = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(x.transpose(1, 2).reshape(B, L, W)), None

    def _projected(self, query, key, value):
        """What q, k and v make of their inputs; adapters of the same input are computed together."""
        if query is key and key is value:
            return linears((self.q, self.k, self.v), query)
        if key is value:
            return self.q(query), *linears((self.k, self.v), key)
        return self.q(query), self.k(key), self.v(value)

    def fused(self) -> nn.MultiheadAttention:
        """The same attention as open_clip keeps it."""
        parts = (self.q, self.k, self.v)
        width, bias = self.q.in_features, self.q.bias is not None
        fused = nn.MultiheadAttention(width, self.heads, self.dropout, bias=bias, batch_first=True)
        fused = fused.to(self.q.weight.device, self.q.weight.dtype).train(self.training)
        with torch.no_grad():
            fused.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
            fused.out_proj.weight.copy_(self.out.weight)
            if bias:
                fused.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
                fused.out_proj.bias.copy_(self.out.bias)
        return fused


class LoraProduct(torch.autograd.Function):
    """x W^T + b + scale (x kept) A^T B^T for each (W, b, A, B), with few passes over memory beside the products.

    x [N, I]; kept: int8 [N, I] of 0 and 1, or None; each W [O, I] and b [O] (or None) frozen, A [R, I], B [O, R].
    PEFT runs the same operation by operation, and keeps masks and copies of x as floats.
    """

    @staticmethod
    def forward(ctx, x, kept, scale, *parts):
        weights, biases, a, b = (parts[i::4] for i in range(4))
        masked = x if kept is None else x * kept
        low = masked @ torch.cat(a).T  # (N, R of all)
        ctx.save_for_backward(masked, kept, low, *weights, *a, *b)
        ctx.scale, ctx.ranks = scale, [len(one) for one in a]
        ys = (x @ w.T if bias is None else torch.addmm(bias, x, w.T) for w, bias in zip(weights, biases, strict=True))
        lows = low.split(ctx.ranks, dim=1)
        return tuple(y.addmm_(part, up.T, alpha=scale) for y, part, up in zip(ys, lows, b, strict=True))

    @staticmethod
    def backward(ctx, *grads):
        masked, kept, low, *parts = ctx.saved_tensors
        count, scale = len(grads), ctx.scale
        weights, a, b = (parts[i * count : (i + 1) * count] for i in range(3))
        down = torch.cat([grad @ up for grad, up in zip(grads, b, strict=True)], dim=1).mul_(scale)  # (N, R of all)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = down @ torch.cat(a)
            grad_x = grad_x if kept is None else grad_x.mul_(kept)
            for grad, weight in zip(grads, weights, strict=True):
                grad_x.addmm_(grad, weight)
        grad_a = (down.T @ masked).split(ctx.ranks)
        lows = low.split(ctx.ranks, dim=1)
        grad_b = [(grad.T @ part).mul_(scale) for grad, part in zip(grads, lows, strict=True)]
        return grad_x, None, None, *(one for pair in zip(grad_a, grad_b, strict=True) for one in (None, None, *pair))


def lean_lora(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """What PEFT LoRA Linears compute of one input, in its autocast precision.

    They share the dropout of that input, as they do in loralib, the code of the paper (arXiv 2106.09685).
    """
    dropout, scale = layers[0].lora_dropout["default"], layers[0].scaling["default"]
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    kept = None
    if dropout.training and getattr(dropout, "p", 0):
        steps = max(1, round(dropout.p * 256))  # of 1/256
        kept = kept_by_dropout((x.numel() // x.shape[-1], x.shape[-1]), steps, x.device)
        scale /= 1 - steps / 256
    parts = []
    for layer in layers:
        base = layer.base_layer
        parts += [base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    parts = [None if part is None else part.to(kind) for part in parts]
    ys = LoraProduct.apply(x.reshape(-1, x.shape[-1]).to(kind), kept, scale, *parts)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def linears(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Several Linears of one input, together where all of them have LoRA."""
    lora = all(hasattr(layer, "lora_A") for layer in layers)
    return lean_lora(layers, x) if lora else tuple(layer(x) for layer in layers)


def kept_by_dropout(shape: tuple[int, int], steps: int, device: torch.device) -> Tensor:
    """int8 [N, W] of 1 and, with a probability of steps / 256, 0.

    From 8 random bits an element: to draw floats, as torch's dropout does, would be a tenth of a step on a CPU.
    """
    count = shape[0] * shape[1]
    bits = torch.empty((count + 7) // 8, dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int8)
    return torch.ge(bits[:count].view(shape), steps - 128, out=torch.empty(shape, dtype=torch.int8, device=device))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear that holds copies of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """open_clip's own residual blocks of both towers."""
    from open_clip.transformer import ResidualAttentionBlock

    return [module for module in model.modules() if isinstance(module, ResidualAttentionBlock)]


def split_attention(model: nn.Module) -> nn.Module:
    """Replace, in place, the attention of every residual block by SplitAttention; returns the model."""
    for block in transformer_blocks(model):
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = SplitAttention(block.attn).train(block.training)
    return model


def fuse_attention(model: nn.Module) -> nn.Module:
    """Undo split_attention, with the weights as they now are; returns the model."""
    for block in list(model.modules()):
        if isinstance(getattr(block, "attn", None), SplitAttention):
            block.attn = block.attn.fused()
    return model


class Projection(nn.Module):
    """A raw projection parameter as a module: [B, W] -> [B, D]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _projection_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(tower, owner, attribute) of each projection, wherever this kind of model keeps it."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    visual, text = model.visual, getattr(model, "text", model)
    if isinstance(visual, ModifiedResNet):
        yield "image", visual.attnpool, "c_proj"
    elif isinstance(visual, TimmModel):
        names = [name for name in ("proj", "mlp") if hasattr(visual.head, name)]
        if names:
            yield "image", visual.head, names[0]
        elif isinstance(getattr(visual.trunk, "head", None), nn.Linear | nn.Identity):  # Identity: it is taken
            yield "image", visual.trunk, "head"
    else:
        yield "image", visual, "proj"
    yield "text", text, "text_projection" if hasattr(text, "text_projection") else "proj"


def take_projections(model: nn.Module) -> nn.ModuleDict:
    """Take the projections {"image", "text"} out of a model, whose towers then give features before projection.

    A tower without one (SigLIP's picture tower) gets an Identity.
    """
    from open_clip.modified_resnet import ModifiedResNet

    taken = nn.ModuleDict({"image": nn.Identity(), "text": nn.Identity()})
    for tower, owner, name in _projection_places(model):
        projection = getattr(owner, name)
        if projection is None or isinstance(projection, nn.Identity):
            continue
        raw = isinstance(projection, nn.Parameter)
        taken[tower] = Projection(projection) if raw else projection
        if isinstance(model.visual, ModifiedResNet) and tower == "image":
            # Its pooling reads c_proj.weight and .bias itself: an exact identity takes their place.
            eye = torch.eye(projection.in_features, device=projection.weight.device, dtype=projection.weight.dtype)
            setattr(owner, name, _linear(eye, eye.new_zeros(len(eye))))
        else:
            optional = raw or name == "text_projection"  # open_clip asks `is not None` there
            setattr(owner, name, None if optional else nn.Identity())
    return taken


def return_projections(model: nn.Module, projections: nn.ModuleDict) -> nn.Module:
    """Undo take_projections; returns the model."""
    for tower, owner, name in _projection_places(model):
        projection = projections[tower]
        if isinstance(projection, nn.Identity):
            continue
        owner._modules.pop(name, None)
        setattr(owner, name, projection.weight if isinstance(projection, Projection) else projection)
    return model


# --------------------------------------------------------------------------------------------------------------------
# Judging


def retrieval_ranks(queries: Tensor, gallery: Tensor, relevant: Tensor, rows: int = 1024) -> Tensor:
    """int64 [N]: rank (from 1) of the best relevant gallery item for each query; memory is linear in N.

    queries, gallery: float [N, D], L2-normalised, row i of one belonging to row i of the other;
    relevant: int64 [N] or [N, K]; gallery item j is relevant to query i where they agree in any column.
    Ties and NaN count against the model: a collapsed one, which gives all pairs one score, does not look perfect.
    """
    keys = relevant.view(len(relevant), -1)
    ranks = []
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        scores = queries[part] @ gallery.T  # (rows, N)
        same = (keys[part, None, :] == keys[None, :, :]).any(dim=-1)
        best = scores.masked_fill(~same, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append((~(scores < best) & ~same).sum(dim=1) + 1)
    return torch.cat(ranks)


def retrieval_metrics(images: Tensor, texts: Tensor, relevant: Tensor) -> dict[str, float]:
    """recall@1/5/10 and MRR, text to image and image to text, and `mrr`, the mean of both."""
    metrics: dict[str, float] = {}
    for name, queries, gallery in (("text_to_image", texts, images), ("image_to_text", images, texts)):
        ranks = retrieval_ranks(queries, gallery, relevant).cpu()  # Apple's GPUs have no float64
        metrics |= {f"{name}_recall@{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
        metrics[f"{name}_mrr"] = (1.0 / ranks.double()).mean().item()
    metrics["mrr"] = (metrics["text_to_image_mrr"] + metrics["image_to_text_mrr"]) / 2
    return metrics


def model_place(name: str, embeddings: str | Path) -> tuple[str, str | None]:
    """(model, pretrained) for clip.load_clip, from a model's name in the metadata of master.parquet.

    A folder is relative to where the Parquet file lies, so that the data can be moved; else to the working directory.
    """
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        beside = Path(embeddings).parent / folder
        return f"local-dir:{beside if beside.is_dir() else folder}", None
    model, _, pretrained = name.partition("/")
    return model, pretrained or None
