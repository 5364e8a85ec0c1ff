"""Tiny shards and CLIPs with random weights, for the tests and benches of training and embedding."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

COLORS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "black": (20, 20, 20)}
TYPES = ("chair", "table", "lamp", "bed")
STYLES = ("modern", "rustic")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)  # unlike anybody's


def picture(color: str, kind: str, seed: int, size: int = 32) -> bytes:
    """A JPEG of one of four shapes in a color, at a place that depends on the seed."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    x, y, s = size // 8 + seed % 5, size // 8 + seed // 5 % 5, size // 2
    box = (x, y, x + s, y + s)
    if kind == "chair":
        draw.rectangle(box, fill=COLORS[color])
    elif kind == "table":
        draw.rectangle((x, y + s // 3, x + s, y + s // 2), fill=COLORS[color])
    elif kind == "lamp":
        draw.ellipse(box, fill=COLORS[color])
    else:
        draw.polygon([(x, y + s), (x + s // 2, y), (x + s, y + s)], fill=COLORS[color])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_shards(folder: Path, train: int = 48, validation: int = 16, test: int = 16, shards: int = 1, size: int = 32):
    """A shard folder as 2_prepare.py writes it; returns the folder."""
    splits, key = {}, 0
    for split, count in (("train", train), ("validation", validation), ("test", test)):
        entries = []
        for number in range(shards if split == "train" else 1):
            of = shards if split == "train" else 1
            mine = count * (number + 1) // of - count * number // of
            path = folder / split / f"shard-{number:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range(mine):
                    color, kind = list(COLORS)[key % 4], TYPES[key // 4 % 4]
                    title, style = f"{color} {kind}", STYLES[key // 16 % 2]
                    record = {
                        "id": f"p{key}", "title": title, "style": style, "material": "", "color": color,
                        "object_type": kind, "image_path": f"{key}.jpg", "group": f"p{key}", "source": "", "row": {},
                    }  # fmt: skip
                    for kind_, data in (
                        ("jpg", picture(color, kind, key // 16, size)),
                        ("json", json.dumps(record).encode()),
                        ("txt", f"{style} {title}".encode()),
                    ):
                        info = tarfile.TarInfo(f"{key:09d}.{kind_}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    key += 1
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            entries.append({"name": f"{split}/{path.name}", "samples": mine, "bytes": len(data), "sha256": digest})
        splits[split] = {"samples": count, "shards": entries}
    manifest = {"format": 1, "settings": {"image_size": size}, "versions": {}, "splits": splits, "counts": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_clip(folder: Path, seed: int = 0, **changes) -> Path:
    """An open_clip folder of a CLIP with 2 layers a tower and random weights; `changes` go into its configuration."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": config["vision_cfg"]["image_size"], "mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    arguments = json.loads(json.dumps(config))
    custom = arguments.pop("custom_text", False)
    model = (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**arguments)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    return folder


BERT = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 40}  # fmt: skip


def make_tokenizer(folder: Path) -> Path:
    """The files of a tokenizer of Hugging Face: a token a word, of the few that the tests know."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "an", "oak", "with", "four", "legs", *COLORS, *TYPES, *STYLES]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_hf_clip(folder: Path, **text) -> Path:
    """As make_clip(), with a BERT of Hugging Face, whose configuration and tokenizer the folder holds.

    It names itself by its whole path, as folders from elsewhere do.
    """
    make_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(BERT))
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False}
    text = {"hf_proj_type": "linear", "context_length": 40, **names, **text}
    return make_clip(folder, custom_text=True, text_cfg=text)


def vit_b32(seed: int = 0):
    """A ViT-B/32 with random weights, as load_clip would give it."""
    import open_clip
    import torch

    from common import Clip

    torch.manual_seed(seed)
    model = open_clip.create_model("ViT-B-32").eval()
    shown = open_clip.get_model_preprocess_cfg(model)
    tokenizer, config = open_clip.get_tokenizer("ViT-B-32"), {"embed_dim": 512}
    return Clip(model, tokenizer, 224, shown["mean"], shown["std"], 77, f"random {seed}", "random", config, shown)


def fork_server(*modules: str):
    """A context whose processes are forked by a server that has imported these modules: they start in no time."""
    import multiprocessing.forkserver

    multiprocessing.forkserver._forkserver._stop()  # an earlier one has imported others
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", *modules])
    before, root = dict(os.environ), Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = f"{root}:{root / 'tests'}"
    multiprocessing.forkserver.ensure_running()
    os.environ.clear(), os.environ.update(before)
    return context


def shorten_end(monkeypatch, stage) -> None:
    """Half of a tiny training's time goes into what follows it: fewer signs in the drawn probe, and no picture."""
    monkeypatch.setattr(stage, "DRAWN", dict(list(stage.DRAWN.items())[:4]))
    monkeypatch.setattr(stage, "draw_curves", lambda state, swept, path: path.touch())


def one_thread():
    """A fixture: one torch thread. Tiny tensors gain nothing from more, and on a busy machine lose much."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
