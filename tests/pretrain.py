"""Pretrain the small CLIP of tests/small_clip on drawn pictures that share no item with the sample catalogue.

    python tests/pretrain.py --output tests/small_clip               about 10 minutes on one core
    python tests/pretrain.py --output data/tiny --count 300 --steps 20

It stands in for a public CLIP where there is no hub: it has seen furniture of another seed under loose captions
("a photo of a chair", "something red"), and shapes, trees and cars. So zero-shot search is far above chance, and a
shop's own titles still have much to teach it. Weights are kept in half precision: 49,408 tokens are most of them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import common
import sample

SEED = 1_000_003  # the sample's is 42: no design, view or background is shared
SIZE = 96
MODEL = {
    "embed_dim": 96,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
PREPROCESS = {
    "size": [SIZE, SIZE], "mode": "RGB", "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0,
    "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
LOOSE = (
    "a photo of a {type}", "a {color} {type}", "{color} {type}", "a photo of a {color} {type}", "something {color}",
    "a {material} {type}", "{style} {type}", "a {style} {material} {type}", "a {type} made of {material}",
    "{color} {material} {type}",
)  # fmt: skip


def furniture(index: int) -> tuple[np.ndarray, dict[str, str]]:
    """(uint8 [S, S, 3], attributes) of one piece."""
    item = sample.product(index, SEED)
    pixels = np.asarray(sample.draw(item, SEED, SIZE + 16))
    return pixels, {"type": item.object_type, "color": item.color, "material": item.material, "style": item.style}


def pictures(count: int) -> tuple[np.ndarray, list[dict[str, str]]]:
    """uint8 [N, S + 16, S + 16, 3] and what each shows; one in four is no furniture."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        drawn = list(common.progress(pool.imap(furniture, range(count), 32), "draw", count, "picture"))
    for image, caption in sample.probe(count // 3, SEED):
        *_, color, shape = caption.split()
        drawn.append((np.asarray(image.resize((SIZE + 16, SIZE + 16))), {"type": shape, "color": color}))
    return np.stack([pixels for pixels, _ in drawn]), [facts for _, facts in drawn]


def caption(facts: dict[str, str], rng: np.random.Generator) -> str:
    """A loose caption that the facts can fill, with a synonym now and then."""
    templates = LOOSE if "style" in facts else LOOSE[:5]
    text = str(rng.choice(templates)).format(**facts)
    for word, other in sample.SYNONYMS.items():
        text = text.replace(word, other) if rng.random() < 0.4 else text
    return text


def augment(pixels, rng: np.random.Generator):
    """float [B, 3, S, S] from uint8 [B, S + 16, S + 16, 3]: shifted, flipped, brighter or darker, a little noisy."""
    import torch

    top, left = rng.integers(0, 17, 2)
    x = torch.from_numpy(pixels[:, top : top + SIZE, left : left + SIZE]).permute(0, 3, 1, 2).float() / 255
    if rng.random() < 0.5:
        x = x.flip(-1)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (len(x), 1, 1, 1)).astype(np.float32))
    white = torch.from_numpy((rng.random((len(x), 1, 1, 1)) < 0.3).astype(np.float32))
    corner = x[:, :, :2, :2].mean((2, 3), keepdim=True)
    near = ((x - corner).abs().amax(1, keepdim=True) < 0.12).float() * white  # a shop's white ground
    x = (x * (1 - near) + near) * gain + torch.randn(x.shape) * 0.02
    mean, std = (torch.tensor(PREPROCESS[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (x.clamp(0, 1) - mean) / std


def pretrain(output: Path, count: int, steps: int, batch: int = 128) -> None:
    """Train and write an open_clip folder; captions that are equal are no negatives of each other."""
    import open_clip
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    from common import text_features

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    images, facts = pictures(count)
    model = open_clip.CLIP(**MODEL)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.monotonic()
    for step in range(steps):
        rows = rng.choice(len(images), min(batch, len(images)), replace=False)
        captions = [caption(facts[row], rng) for row in rows]
        tokens = tokenizer(captions)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(augment(images[rows], rng))
            text = text_features(model, tokens)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - start:.0f} s", flush=True)
        if step % 150 == 149 or step == steps - 1:
            output.mkdir(parents=True, exist_ok=True)
            state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
            with common.atomic_file(output / "open_clip_model.safetensors") as temporary:
                save_file(state, temporary)
            config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
            common.atomic_write(output / "open_clip_config.json", json.dumps(config, indent=2) + "\n")


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=2500, help="pieces of furniture to draw (default 2500)")
    parser.add_argument("--steps", type=int, default=450, help="training steps (default 450)")
    args = parser.parse_args(argv)
    pretrain(args.output, args.count, args.steps)
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
