"""3_train.py: exact gradients, the right parameters, going on after a kill, what it writes, and what it says."""

import collections
import copy
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import sample
import tiny

stage = importlib.import_module("3_train")
ROOT = Path(__file__).parents[1]
TRAINED = [name for name, parts in stage.SCENARIOS.items() if parts[2]]


SIGNS, DRAW_CURVES = stage.DRAWN, stage.draw_curves


one_thread = pytest.fixture(scope="module", autouse=True)(tiny.one_thread)


@pytest.fixture(scope="module", autouse=True)
def short_end():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_end(patch, stage)
        yield


@pytest.fixture
def full_end(monkeypatch):
    """For the tests that are about the end of a run: it is as users have it."""
    monkeypatch.setattr(stage, "DRAWN", SIGNS)
    monkeypatch.setattr(stage, "draw_curves", DRAW_CURVES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Tiny shards and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("base")
    tiny.make_shards(folder / "shards", train=64, validation=16, test=8, shards=3)
    tiny.make_clip(folder / "clip")
    return folder


def arguments(base, output, *more):
    flags = {"--shards": base / "shards", "--model": f"local-dir:{base / 'clip'}", "--output": output, "--epochs": 2}
    flags |= {"--lr": 1e-2, "--lora-lr": 3e-3, "--effective-batch-size": 24, "--workers": 1, "--precision": "fp32"}
    return [str(part) for pair in flags.items() for part in pair] + [str(part) for part in more]


def train(base, output, *more):
    """The real command line, in this process."""
    assert stage.main(arguments(base, output, *more)) == 0
    return json.loads((output / "train.json").read_text())


@pytest.fixture(scope="module")
def forks():
    """Processes of their own, forked in no time by a server that has imported what takes them longest."""
    return tiny.fork_server("test_train", "peft")


def make_run(base, output, *more):
    """A Run as the command line makes it, before its first step."""
    args = stage.build_parser().parse_args(arguments(base, output, *more))
    run = stage.prepare(common.from_flags(stage.TrainingConfig, args), str(args.shards), output)
    for split in (run.train, run.validation):
        stage.cache_captions(run, split)
    return run


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "open_clip_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------- parameters

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.c_fc", "mlp.c_proj")


def expected_parameters(scenario):
    vision, text, projections = stage.SCENARIOS[scenario]
    towers = ["visual.transformer"] * vision + ["transformer"] * text
    names = {
        f"{tower}.resblocks.{layer}.{linear}.lora_{factor}.default.weight"
        for tower in towers
        for layer in (0, 1)
        for linear in LINEARS
        for factor in "AB"
    }
    return names | ({"logit_scale", "projections.image.weight", "projections.text.weight"} if projections else set())


@pytest.mark.parametrize("scenario", list(stage.SCENARIOS))
def test_a_scenario_trains_its_parameters_and_no_others(base, tmp_path, scenario):
    run = make_run(base, tmp_path, "--scenario", scenario)
    assert set(run.towers.trained) == expected_parameters(scenario)
    if scenario == "zero_shot":
        return
    everything = [*run.towers.model.named_parameters(), *run.towers.projections.named_parameters("projections")]
    before = {name: parameter.detach().clone() for name, parameter in everything}
    zero_shot = stage.evaluate(run, run.validation)[0]
    optimizer, scaler, state = stage.make_optimizer(run), torch.amp.GradScaler("cpu", enabled=False), stage.State()
    batch = next(run.train.batches(stage.epoch_plan(64, 16, 0, 0, 0, 1), 0))
    for _ in range(12):
        stage.update(run, state, optimizer, scaler, batch, 15)
    for name, parameter in everything:
        if name in run.towers.trained:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
    assert stage.evaluate(run, run.validation)[0] != zero_shot
    assert 0 <= run.towers.model.logit_scale.item() <= math.log(100)


def test_fresh_adapters_change_nothing_and_zero_shot_builds_no_optimizer(base, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "make_optimizer", None)
    facts = train(base, tmp_path / "zero", "--scenario", "zero_shot")
    assert facts["model_dir"] is None and sorted(os.listdir(tmp_path / "zero")) == [".lock", "cache", "train.json"]
    clip = common.load_clip(str(base / "clip"))
    run = make_run(base, tmp_path / "dual", "--scenario", "dual_lora")
    batch = next(run.validation.batches(stage.in_order(16, 16)))
    with torch.no_grad():
        images, texts = run.towers.embed(batch)
        plain = clip.model.encode_text(batch.texts, normalize=True)
    assert (images - common.encode(clip, batch.images)).abs().max() < 5e-6
    assert (texts - plain).abs().max() < 5e-6
    assert facts["validation"]["zero_shot"] == pytest.approx(stage.evaluate(run, run.validation)[0], rel=1e-5)


def test_decay_and_rates_go_to_their_groups(base, tmp_path):
    run = make_run(base, tmp_path, "--scenario", "dual_lora")
    groups = {(g["peak"], g["weight_decay"]): len(g["params"]) for g in stage.make_optimizer(run).param_groups}
    assert groups == {(3e-3, 0.01): 48, (1e-2, 0.01): 2, (1e-2, 0.0): 1}
    rates = [stage.rate("cosine", k / 100) for k in range(101)]
    assert rates[0] == 0 and max(rates) == pytest.approx(1) and rates.index(max(rates)) == 10 and rates[-1] < 1e-9
    cycle = [stage.rate("onecycle", k / 100) for k in range(101)]
    assert cycle[0] == pytest.approx(0.04) and cycle.index(max(cycle)) == 30 and cycle[-1] == pytest.approx(4e-6)


@pytest.fixture(scope="module")
def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a red chair", "an oak table with four legs", "lamp", "x " * 200])


def pixels(count=4, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_towers_give_open_clips_features_and_gradients(tmp_path, tokens, custom_text, split):
    """Features and the gradients of all weights are those of open_clip's whole towers, checkpointed or not."""
    clip = common.load_clip(str(tiny.make_clip(tmp_path, custom_text=custom_text)))
    model = (stage.split_attention(clip.model) if split else clip.model).double()
    x = common.normalise_pixels(clip, pixels())

    def run(image, text) -> list[torch.Tensor]:
        model.zero_grad()
        features = [image(), text()]
        sum((f * torch.arange(f.numel()).view(f.shape)).sum() for f in features).backward()
        return features + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = run(lambda: model.visual(x), lambda: model.encode_text(tokens))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        found = run(lambda: model.visual(x), lambda: common.text_features(model, tokens))
        assert len(found) == len(expected)
        assert all(
            (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1) for a, b in zip(found, expected, strict=True)
        )


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_split_attention_equals_open_clips_towers(tmp_path, tokens, quick_gelu, training):
    clip = common.load_clip(str(tiny.make_clip(tmp_path, quick_gelu=quick_gelu)))
    images = pixels()
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        model = clip.model.to(dtype).train(training)
        x = common.normalise_pixels(clip, images)
        before = model.encode_image(x), model.encode_text(tokens)
        stage.split_attention(model)
        after = model.encode_image(x), model.encode_text(tokens)
        assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        for a, b in zip(after, before, strict=True):
            assert (a - b).abs().max() <= tolerance
        stage.fuse_attention(model)
        assert torch.equal(model.encode_image(x), before[0])
    assert common.fingerprint(model.float(), clip.config) == clip.fingerprint  # split and fused: not a bit moved


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_split_attention_equals_a_vit_b_32s(tokens, quick_gelu):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", force_quick_gelu=quick_gelu).eval()
    x = torch.randn(1, 3, 224, 224)
    found = {}
    for split in (False, True):
        stage.split_attention(model) if split else None
        for dtype in (torch.float64, torch.float32):  # there and back: float32 is exact in float64
            model.to(dtype)
            with torch.no_grad():
                found[split, dtype] = model.encode_image(x.to(dtype)), model.encode_text(tokens[1:3])
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        for a, b in zip(found[True, dtype], found[False, dtype], strict=True):
            assert (a - b).abs().max() <= tolerance


def test_bf16_attention_on_a_cpu_is_the_fused_one(base, tokens):
    clip = common.load_clip(str(base / "clip"))
    stage.split_attention(clip.model)
    with torch.no_grad():
        whole = clip.model.visual(common.normalise_pixels(clip, pixels())), common.text_features(clip.model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            half = clip.model.visual(common.normalise_pixels(clip, pixels())), common.text_features(clip.model, tokens)
    for a, b in zip(half, whole, strict=True):
        assert F.cosine_similarity(a.float(), b).min() > 0.999


def test_dropout_keeps_its_share():
    torch.manual_seed(0)
    for shape, steps in (((999, 1001), 13), ((7, 3), 77), ((500, 500), 128)):
        kept = stage.draw_mask(torch.empty(shape), steps, seed=1)
        assert torch.equal(
            kept, stage.draw_mask(torch.empty(shape), steps, seed=1)
        )  # as a backward pass draws it again
        assert kept.dtype == torch.int8 and kept.shape == shape and set(kept.unique().tolist()) == {0, 1}
        rate = steps / 256
        assert 1 - kept.float().mean().item() == pytest.approx(rate, abs=4 * (rate / kept.numel()) ** 0.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_lean_lora_is_pefts_layers(monkeypatch, rate, bias):
    """Outputs and gradients of the operations that PEFT runs one by one, for the same mask; and gradcheck."""
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, width, bias=bias, dtype=torch.float64) for width in (8, 5)))
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=rate, target_modules=["0", "1"], init_lora_weights=False)
    layers = tuple(peft.get_peft_model(model, config).base_model.model)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    kept = (torch.rand(10, 12) >= rate).to(torch.int8)
    monkeypatch.setattr(stage, "draw_mask", lambda *_: kept)
    plain = [layer.lora_dropout["default"] for layer in layers]
    weights = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def run(outputs):
        return [*outputs, *torch.autograd.grad(sum((y**3).sum() for y in outputs), [x, *weights])]

    def agree(found, expected):
        return all(torch.allclose(*pair, rtol=1e-12, atol=1e-12) for pair in zip(found, expected, strict=True))

    found = run(stage.lean_lora(layers, x))
    for layer in layers:
        if rate:
            layer.lora_dropout["default"] = MaskTimes(kept.view(2, 5, 12).double() / (1 - rate))
    assert agree(found, run([layer(x) for layer in layers]))
    for layer, dropout in zip(layers, plain, strict=True):
        layer.lora_dropout["default"] = dropout
    assert torch.autograd.gradcheck(lambda x, *_: stage.lean_lora(layers, x), [x, *weights])
    assert torch.autograd.gradcheck(lambda x, *_: stage.lean_lora(layers[:1], x), [x, *weights[:2]])
    model.eval()
    assert agree(stage.lean_lora(layers, x), [layer(x) for layer in layers])  # no dropout


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_an_activation_made_again_in_the_backward_pass_is_the_plain_one(rate):
    """lean_mlp() is what a GPU runs, to keep less; on a CPU it gives the same to the bit of float64's rounding."""
    import peft

    torch.manual_seed(0)
    mlp = nn.Sequential(collections.OrderedDict(
        c_fc=nn.Linear(6, 24, dtype=torch.float64), gelu=nn.GELU(), c_proj=nn.Linear(24, 6, dtype=torch.float64)
    ))  # fmt: skip
    config = peft.LoraConfig(r=3, lora_dropout=rate, target_modules=["c_fc", "c_proj"], init_lora_weights=False)
    mlp = peft.get_peft_model(mlp, config).base_model.model
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [parameter for parameter in mlp.parameters() if parameter.requires_grad]

    def run(forward):
        torch.manual_seed(1)
        y = forward(x)
        return [y, *torch.autograd.grad((y**3).sum(), [x, *weights])]

    def plain(x):
        hidden = stage.lean_lora((mlp.c_fc,), x)[0]
        return stage.lean_lora((mlp.c_proj,), mlp.gelu(hidden))[0]

    for a, b in zip(run(lambda x: stage.lean_mlp(mlp, x)), run(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


class MaskTimes(nn.Module):
    """A dropout whose mask is known."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def adapted(model, pattern):
    """A model with LoRA on the modules that match, both factors random: (peft model, {name: its update of W})."""
    import peft

    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=pattern))
    deltas = {}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_B") and len(module.lora_B):
            nn.init.normal_(module.lora_B["default"].weight)
            deltas[name] = 2.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight  # s = alpha / r
    return wrapped, deltas


BLOCK = "visual.transformer.resblocks.1"


@pytest.mark.parametrize("part", ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("tower", ["visual.", ""])
def test_each_adapted_layer_is_w_plus_sba_once(tmp_path, tokens, part, quick_gelu, tower):
    folder = str(tiny.make_clip(tmp_path, quick_gelu=quick_gelu))
    clip = common.load_clip(folder).model.double()
    plain, before = copy.deepcopy(clip), copy.deepcopy(clip)
    name = f"{tower}transformer.resblocks.1.{part}"
    _, deltas = adapted(stage.split_attention(clip), name.replace(".", r"\."))
    assert list(deltas) == [name]
    block = (plain.visual if tower else plain).transformer.resblocks[1]
    with torch.no_grad():
        if part in ("attn.q", "attn.k", "attn.v"):
            first = "qkv".index(part[-1]) * 32
            block.attn.in_proj_weight[first : first + 32] += deltas[name]
        else:
            {"attn.out": block.attn.out_proj, "mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}[
                part
            ].weight.add_(deltas[name])
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        found, expected, base = (m.encode_image(x) if tower else m.encode_text(tokens) for m in (clip, plain, before))
    assert (expected - base).abs().max() > 1e-2  # it does something
    assert (found - expected).abs().max() < 1e-12


def test_pefts_own_attention_would_fail_that(base):
    """Why SplitAttention exists: once this fails, PEFT has mended its LoRA on nn.MultiheadAttention."""
    clip, plain = common.load_clip(str(base / "clip")), common.load_clip(str(base / "clip"))
    adapted(clip.model.double(), f"{BLOCK}.attn".replace(".", r"\."))
    layer = clip.model.visual.transformer.resblocks[1].attn
    x = common.normalise_pixels(clip, pixels())
    block = plain.model.double().visual.transformer.resblocks[1].attn
    out = layer.base_layer.out_proj
    nn.init.normal_(out.lora_B["default"].weight)
    with torch.no_grad():
        block.in_proj_weight += 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        block.out_proj.weight += 2.0 * out.lora_B["default"].weight @ out.lora_A["default"].weight
        assert (clip.model.visual(x) - plain.model.visual(x)).abs().max() > 1e-3
        block.out_proj.weight += 2.0 * out.lora_B["default"].weight @ out.lora_A["default"].weight
        assert (clip.model.visual(x) - plain.model.visual(x)).abs().max() < 1e-12  # its delta is there twice


# -------------------------------------------------------------------------------------------------- other architectures

BERT = {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 100, "max_position_embeddings": 32}  # fmt: skip


def small(kind, tmp_path):
    """A small model whose towers are of another kind."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    more = {}
    if kind == "resnet":
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    if kind in ("timm", "timm head", "siglip"):
        vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    if kind == "timm convolutions":
        vision = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    if kind == "timm head":  # EVA02's and PE's way: timm's own head is the projection
        vision |= {"timm_pool": "avg", "timm_proj": None}
    if kind == "siglip":
        vision |= {"timm_pool": "map", "timm_proj": "none"}
        text |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        more = {"init_logit_bias": -10.0}
    if kind == "hf":
        (tmp_path / "config.json").write_text(json.dumps(BERT))
        text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    if kind == "siglip" or kind == "hf":
        return open_clip.model.CustomTextCLIP(16 if kind == "hf" else 64, vision, text, **more)
    return open_clip.model.CLIP(16, vision, text)


@pytest.mark.parametrize("kind", ["vit", "timm", "timm head", "siglip", "hf"])
def test_projections_are_found_taken_and_returned_wherever_a_model_keeps_them(tmp_path, tokens, kind):
    torch.manual_seed(0)
    model = small(kind, tmp_path).eval().double()
    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    tokens = tokens % 100 if kind == "hf" else tokens
    tokens = tokens[:, :32] if kind == "hf" else tokens
    with torch.no_grad():
        before = model.encode_image(x), model.encode_text(tokens)
        names, mark = sorted(model.state_dict()), common.fingerprint(model)
        taken = stage.take_projections(model)
        parts = taken["image"](model.visual(x)), taken["text"](common.text_features(model, tokens))
        for a, b in zip(parts, before, strict=True):
            assert (a - b).abs().max() < 1e-12
        assert isinstance(taken["image"], nn.Identity) == (kind == "siglip")
        assert sum(p.numel() for p in taken["text"].parameters()) > 0
        stage.return_projections(model, taken)
        assert sorted(model.state_dict()) == names and common.fingerprint(model) == mark
        assert torch.equal(model.encode_image(x), before[0])


# ------------------------------------------------------------------------------------------------------------ export


def test_an_export_loads_in_plain_open_clip_with_its_own_preprocessing(tmp_path, tokens):
    clip = common.load_clip(str(tiny.make_clip(tmp_path / "base", quick_gelu=True)))
    with torch.no_grad():
        clip.model.visual.proj.add_(0.01)
    stage.save_clip(clip, tmp_path / "out")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    images = pixels()
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        theirs = model.eval().encode_image(transform(picture)[None], normalize=True)
        assert torch.allclose(model.encode_text(tokens), clip.model.encode_text(tokens), atol=5e-6)
    assert torch.allclose(common.encode(clip, images[:1]), theirs, atol=5e-6)
    assert "QuickGELU" in str(model)
    assert common.load_clip(str(tmp_path / "out")).fingerprint == common.fingerprint(clip.model, clip.config)
    stage.save_clip(clip, tmp_path / "out")  # over an older one
    words = ["An OAK table, with four legs!", "grey-green 3-seat's  sofa", "160x200 cm"]
    others = open_clip.tokenizer.HFTokenizer(str(tmp_path / "out"), context_length=77)(words)  # from its files
    with torch.no_grad():
        assert torch.equal(clip.model.encode_text(others), clip.model.encode_text(clip.tokenizer(words)))
    assert not list(tmp_path.glob(".*.tmp"))


def test_metrics_of_perfect_and_of_collapsed_vectors():
    torch.manual_seed(0)
    vectors, keys = F.normalize(torch.randn(60, 8), dim=-1), torch.arange(60)[:, None]
    perfect, pairs = stage.retrieval_metrics(vectors, vectors, keys)
    assert set(perfect.values()) == {1.0} and len(perfect) == 9 and pairs.tolist() == [1.0] * 60
    collapsed = stage.retrieval_metrics(vectors[:1].expand(60, 8), vectors[:1].expand(60, 8), keys)[0]
    assert collapsed["mrr"] == pytest.approx(1 / 60) and collapsed["text_to_image_recall@10"] == 0


# ------------------------------------------------------------------------------------------------------ the gradient


def gradient(run, batch, micro):
    run.micro = micro
    for parameter in run.towers.trained.values():
        parameter.grad = None
    loss = stage.accumulate(run, batch, step=5)
    return loss, {name: parameter.grad.clone() for name, parameter in run.towers.trained.items()}


def error(one, other):
    """Relative error of a whole gradient, and of the temperature's."""
    flat = [torch.cat([g[name].reshape(-1) for name in sorted(g)]) for g in (one, other)]
    scale = abs(one["logit_scale"] - other["logit_scale"]) / abs(other["logit_scale"])
    return max(((flat[0] - flat[1]).norm() / flat[1].norm()).item(), scale.item())


def double_run(base, output, *more):
    """A run in float64 whose adapters are away from their start."""
    run = make_run(base, output, "--scenario", "dual_lora", "--lora-dropout", "0.3", *more)
    run.towers.model.double(), run.towers.projections.double()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in run.towers.trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return run


def test_micro_batches_give_the_gradient_of_the_whole_batch(base, tmp_path):
    run = double_run(base, tmp_path)
    batch = next(run.train.batches(stage.epoch_plan(64, 64, 0, 0, 0, 1), 0))
    run.towers.train(False)
    loss, whole = gradient(run, batch, 64)
    images, texts = run.towers.embed(batch)  # and by plain autograd, without any of our machinery
    scale = run.towers.model.logit_scale
    plain_loss = stage.pair_loss(images, texts, batch.keys, scale)
    plain = dict(zip(whole, torch.autograd.grad(plain_loss, list(run.towers.trained.values())), strict=True))
    assert loss == pytest.approx(plain_loss.item(), rel=1e-12) and error(whole, plain) < 1e-12
    for micro in (8, 24):
        assert error(gradient(run, batch, micro)[1], whole) < 1e-12

    run.towers.train(True)  # with dropout: one graph over the same draws
    embedded = []
    for start in range(0, 64, 8):
        stage.reseed(run.config.seed, 5, int(batch.ids[start]))
        embedded.append(run.towers.embed(batch.part(start, 8)))
    images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
    graph = torch.autograd.grad(stage.pair_loss(images, texts, batch.keys, scale), list(run.towers.trained.values()))
    dropped = gradient(run, batch, 8)[1]
    assert error(dropped, dict(zip(dropped, graph, strict=True))) < 1e-12
    assert error(dropped, whole) > 1e-3  # dropout was on
    parts = [run.towers.embed(batch.part(start, 8)) for start in range(0, 64, 8)]  # what accumulation alone would do
    naive = sum(stage.pair_loss(*p, batch.part(8 * k, 8).keys, scale) for k, p in enumerate(parts)) / 8
    naive = torch.autograd.grad(naive, list(run.towers.trained.values()))
    assert error(dict(zip(dropped, naive, strict=True)), dropped) > 0.1


def test_the_loss_is_open_clips_where_all_pairs_differ():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(12, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(2.0).double(), torch.tensor(-3.0).double()
    keys = torch.arange(24).view(12, 2)
    theirs = open_clip.loss.ClipLoss()(images, texts, scale.exp())
    assert stage.pair_loss(images, texts, keys, scale) == pytest.approx(theirs.item(), rel=1e-12)
    theirs = open_clip.loss.SigLipLoss()(images, texts, scale.exp(), bias)
    assert stage.pair_loss(images, texts, keys, scale, bias) == pytest.approx(theirs.item(), rel=1e-12)


def test_duplicates_and_equal_captions_are_positives_of_each_other():
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    scale, apart = torch.tensor(3.0), torch.arange(8).view(4, 2)
    group, caption = apart.clone(), apart.clone()
    group[1, 0], caption[1, 1] = group[0, 0], caption[0, 1]
    logits = scale.exp() * images @ texts.T
    target = torch.eye(4)
    target[:2, :2] = 0.5
    expected = -sum((target * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)) / 2
    for keys in (group, caption):
        assert stage.pair_loss(images, texts, keys, scale) == pytest.approx(expected.item(), rel=1e-5)
    assert stage.pair_loss(images, texts, apart, scale) != pytest.approx(expected.item(), rel=1e-2)


def rank_gradient(base, output, environment):
    """What one of two processes does for the next test: its gradient in float64, then the real command line."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    run = double_run(base, output)
    world = run.world
    batch = next(run.train.batches(stage.epoch_plan(64, 64, 0, 0, world.rank, world.size), 0))
    run.towers.train(True)
    loss, grads = gradient(run, batch, 8)
    torch.save((loss, grads, batch.ids), output / f"gradient-{world.rank}.pt")
    assemble, update, train, read, steps = stage.Split.assemble, stage.update, stage.train, [], []

    def noted_assemble(split, ids, total, epoch, *rest):
        batch, failed = assemble(split, ids, total, epoch, *rest)
        if split.training:
            read.extend((epoch, i) for i in batch.ids.tolist())
        return batch, failed

    def noted_train(run, *rest):
        if not run.trial:  # what was read and done to find the learning rate counts for nothing
            read.clear(), steps.clear()
        return train(run, *rest)

    stage.Split.assemble, stage.update = noted_assemble, lambda *a: steps.append(1) or update(*a)
    stage.train = noted_train
    flags = ("--lora-dropout", 0, "--workers", 4, "--shards", output / "shards")
    assert stage.main(arguments(base, output / "run", *flags)) == 0
    (output / f"read-{world.rank}.json").write_text(json.dumps([len(steps), read]))


def test_two_processes_equal_one(base, tmp_path, forks):
    damaged(base, tmp_path, 3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        forks.Process(target=rank_gradient, args=(base, tmp_path, world | {"RANK": rank, "LOCAL_RANK": rank}))
        for rank in "01"
    ]
    for process in ranks:
        process.start()
    run = double_run(base, tmp_path / "one")
    batch = next(run.train.batches(stage.epoch_plan(64, 64, 0, 0, 0, 1), 0))
    run.towers.train(True)
    loss, alone = gradient(run, batch, 8)
    facts = train(base, tmp_path / "alone", "--lora-dropout", 0, "--shards", tmp_path / "shards")
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    for rank in (0, 1):
        their_loss, theirs, ids = torch.load(tmp_path / f"gradient-{rank}.pt")
        assert torch.equal(ids, batch.ids[32 * rank : 32 * rank + 32])
        assert their_loss.item() == pytest.approx(loss.item(), rel=1e-10) and error(theirs, alone) < 1e-10
    together = json.loads((tmp_path / "run" / "train.json").read_text())
    assert together["batch"]["processes"] == 2
    assert together["counts"] == facts["counts"] and sorted(together["unreadable"]) == sorted(facts["unreadable"])
    assert together["counts"]["train"] == {"samples": 64, "unreadable": 3}
    read = [json.loads((tmp_path / f"read-{rank}.json").read_text()) for rank in (0, 1)]
    assert read[0][0] == read[1][0] == 6  # they end together
    for epoch in (0, 1):  # 3 shards over 2 processes of 4 workers: every readable sample once
        ids = [i for _, rank in read for of, i in rank if of == epoch]
        assert len(ids) == len(set(ids)) == 61
    assert together["validation"]["best"]["loss"] == pytest.approx(facts["validation"]["best"]["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------- data


def test_every_sample_once_an_epoch_over_ranks_and_workers(base, tmp_path):
    run = make_run(base, tmp_path, "--workers", "4")
    shares = []
    for rank in (0, 1):
        steps = list(stage.epoch_plan(len(run.train), 20, 7, 3, rank, 2))
        assert [b.ids.tolist() for b in run.train.batches(iter(steps), 3)] == [ids for ids, _ in steps]
        shares.append(steps)
    assert len(shares[0]) == len(shares[1]) == 4  # they end together
    assert sorted(i for steps in shares for ids, _ in steps for i in ids) == list(range(64))
    for (one, total), (other, same_total) in zip(*shares, strict=True):
        assert len(one) + len(other) == total == same_total == 16 and abs(len(one) - len(other)) <= 1
    again = list(stage.epoch_plan(64, 20, 7, 3, 0, 2, skip=2))
    assert again == shares[0][2:]  # resume to the sample, without reading
    assert again != list(stage.epoch_plan(64, 20, 7, 4, 0, 2, skip=2))


def test_readers_in_processes_read_what_threads_read(base, tmp_path):
    """As beside a GPU, where they keep the interpreter's lock free for the thread that starts kernels."""
    damaged(base, tmp_path, 3)
    run = make_run(base, tmp_path, "--shards", tmp_path / "shards")
    plan = list(stage.epoch_plan(64, 20, 7, 3, 0, 1))
    threads = list(run.train.batches(plan, 3))
    lost, run.train.unreadable = run.train.unreadable, {}
    readers = stage.Readers([run.train, run.validation], 2, apart=True)
    run.train.readers = run.validation.readers = readers
    processes = list(run.train.batches(plan, 3))
    assert run.train.unreadable == lost and len(lost) == 3
    for one, other in zip(threads, processes, strict=True):
        assert len(one.views) == len(one.images)
        assert all(torch.equal(*pair) for pair in zip(one[1:], other[1:], strict=True))
    checked = next(run.validation.batches(stage.in_order(16, 16)))
    assert len(checked.images) == 16 and len(checked.views) == 0
    run.validation.paths[0].rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=run.validation.paths[0].name):
        next(run.validation.batches(stage.in_order(16, 16)))
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(common.Fail, match=r"process that read pictures died; .*--workers"):
        list(run.train.batches(plan, 4))


def test_kept_captions_are_those_of_the_samples_that_are_there(base, tmp_path):
    """A damaged text leaves no captions beside other pictures once it is mended."""
    shutil.copytree(base / "shards", tmp_path / "shards")
    path, flags = tmp_path / "shards/train/shard-000000.tar", ("--shards", tmp_path / "shards", "--max-failed", 0.9)
    whole = path.read_bytes()

    def kept(output, *more):
        return make_run(base, output, *flags, "--limit", 20, *more).train

    fresh = kept(tmp_path / "fresh")
    members = stage.index_shard(base / "shards/train/shard-000000.tar")[3]
    offset, size = members["json"]
    path.write_bytes(whole[:offset] + b"\0" * size + whole[offset + size :])
    assert list(kept(tmp_path / "run").unreadable) == [3]
    path.write_bytes(whole)
    assert list(kept(tmp_path / "run").unreadable) == [3]  # known, and not read again
    mended = kept(tmp_path / "run", "--no-resume")
    assert mended.unreadable == {}
    for name, array in fresh.kept["captions"].items():
        assert np.array_equal(array, mended.kept["captions"][name])


def test_captions_change_with_the_epoch_and_are_the_items_own(base, tmp_path):
    run = make_run(base, tmp_path)
    record = json.loads(run.train.read(5, "json")[0])
    filled = common.prompts({name: record[name] for name in ("title", "style", "material", "color", "object_type")})
    seen = [run.train.captions(5, [epoch])[1][0] for epoch in range(len(filled))]
    assert sorted(seen) == sorted(filled) and len(set(seen)) > 1
    assert seen == run.train.captions(5, range(len(filled)))[1]
    own = run.validation.read(5, "txt")[0].decode()
    assert run.validation.captions(5, [None])[1] == [own]
    fixed = make_run(base, tmp_path, "--captions", "fixed")
    assert fixed.train.captions(5, [1])[1] == [fixed.train.read(5, "txt")[0].decode()]


def shown(pixels, kind, seeds):
    """uint8 [len(seeds), 3, S, S]: a picture as it is shown for each seed."""
    views = torch.tensor([stage.draw_view(kind, str(seed)) for seed in seeds])
    return stage.augment(pixels.expand(len(views), *pixels.shape), views)


@pytest.mark.parametrize("kind", ["simple", "advanced"])
def test_augmentation_is_seeded_varies_and_never_recolors(kind):
    plain = torch.tensor([200, 30, 90]).byte().view(3, 1, 1).expand(3, 32, 32)
    drawn = torch.full((3, 32, 32), 255).byte()
    drawn[:, 4:28, 4:14] = torch.tensor([20, 120, 60]).byte().view(3, 1, 1)
    results = shown(drawn, kind, range(100))
    assert results.shape == (100, 3, 32, 32) and results.dtype == torch.uint8
    assert len({tuple(r.flatten().tolist()) for r in results}) > 50
    for seed in (0, 63, 64, 99):  # whatever it is shown together with
        assert torch.equal(shown(drawn, kind, [seed])[0], results[seed])
    for result in results:
        middle = result[:, 12:20].reshape(3, -1).T.int()
        assert (middle - torch.tensor([20, 120, 60])).abs().sum(1).min() <= 9  # the color is still there
    flat = shown(plain, kind, range(100))[:, :, 12:20, 12:20].int()
    assert (flat - torch.tensor([200, 30, 90]).view(3, 1, 1)).abs().max() <= 2


def test_turn_and_crop_are_pillows_and_the_blur_is_torchvisions():
    from torchvision.transforms.v2 import functional as T

    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8)).resize((64, 64))
    pixels = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)
    neighbour, bilinear = math.exp(-0.5 / 0.8**2), Image.Resampling.BILINEAR
    view = torch.tensor([[1, 0, 0, 0, 1, 0, neighbour / (1 + 2 * neighbour)]])
    blurred = stage.augment(pixels[None], view)[0]
    assert (blurred.int() - T.gaussian_blur(pixels, [3, 3], [0.8, 0.8]).int()).abs().max() <= 1
    flipped = set()
    for seed in range(20):
        a, b, c, d, e, f, blur = stage.draw_view("advanced", str(seed))
        if not blur:
            affine = (a, b, 32 * (c + 1 - a - b), d, e, 32 * (f + 1 - d - e))  # in pixels
            theirs = smooth.transform((64, 64), Image.Transform.AFFINE, affine, bilinear, fillcolor="white")
            theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()
            difference = (shown(pixels, "advanced", [seed])[0].int() - theirs).abs()
            assert difference[:, 8:-8, 8:-8].max() <= 2
            flipped.add(a < 0)
    assert flipped == {False, True}


@pytest.mark.parametrize(("scenario", "augment"), [
    ("vision_lora", "none"), ("text_lora", "none"), ("linear_probe", "none"), ("text_lora", "simple"),
])  # fmt: skip
def test_kept_features_train_the_same_model(base, tmp_path, monkeypatch, scenario, augment):
    kept = train(base, tmp_path / "kept", "--scenario", scenario, "--augment", augment)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "kept" / "cache").iterdir())
    towers = ("image", "text")  # adapted ones as they were before LoRA
    assert names == sorted(f"{split}-{what}" for split in ("train", "validation") for what in ("captions", *towers))
    if augment != "none":
        features = next((tmp_path / "kept" / "cache").glob("train-image-*/features.npy"))
        assert features.stat().st_size > 4 * 64 * 32 * 4  # four views of each picture
        return
    monkeypatch.setattr(stage, "cache_tower_features", lambda *_, **__: None)
    plain = train(base, tmp_path / "plain", "--scenario", scenario, "--augment", augment)
    assert kept["validation"]["best"]["loss"] == pytest.approx(plain["validation"]["best"]["loss"], rel=1e-4)
    for name, tensor in weights(tmp_path / "plain").items():
        assert (tensor - weights(tmp_path / "kept")[name]).abs().max() < 2e-4, name


# ---------------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    train(base, output, "--micro-batch-size", 8)
    return output


def killed(flags, environment, moment):
    """The real command line until kill -9: before step `moment`, or while the third checkpoint is being written."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    update, replace, count = stage.update, os.replace, iter(range(9))

    def dying_update(run, state, *rest):
        if (state.step == moment and not run.trial) or (moment == "search" and run.trial and state.step == 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, state, *rest)

    def dying_replace(source, target):
        if moment == "writing" and Path(target).name == "checkpoint.pt" and next(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    stage.update, os.replace = dying_update, dying_replace
    stage.main(flags)


@pytest.fixture(scope="module")
def kill_9(forks):
    """Run killed() in a process of its own."""

    def run(flags, moment):
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        process = forks.Process(target=killed, args=(flags, aws, moment))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run


@pytest.mark.parametrize(
    "place, moment",
    [*(("disk", m) for m in ("search", 0, 1, 2, 3, 4, 5, "writing")), *(("s3", m) for m in (0, 3, "writing"))],
)
def test_after_kill_9_at_any_step_it_goes_on_to_the_same_bits(
    base, tmp_path, monkeypatch, request, kill_9, undisturbed, place, moment
):
    flags = ["--micro-batch-size", 8, "--checkpoint-minutes", 0]
    first = second = tmp_path / "run"
    if place == "s3":  # the machine is lost with its disk
        flags += ["--checkpoint-url", f"{request.getfixturevalue('bucket')}/{moment}"]
        second = tmp_path / "other"
    kill_9(arguments(base, first, *flags), moment)
    assert not (first / "train.json").exists()
    counted, update = [], stage.update
    monkeypatch.setattr(stage, "update", lambda run, *a: counted.append(run.trial) or update(run, *a))
    train(base, second, *flags)
    writing = 3 if place == "s3" else 4  # a checkpoint is on S3 before it is on the disk
    steps = {"search": 6, "writing": writing}[moment] if isinstance(moment, str) else 6 - moment
    assert counted.count(False) == steps  # nothing that was saved is done twice
    assert counted.count(True) == (6 if moment == "search" else 0)
    assert same(weights(second), weights(undisturbed))
    assert (second / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()


def test_a_finished_run_is_not_repeated_and_other_settings_are_named(base, tmp_path, undisturbed, capsys, monkeypatch):
    shutil.copytree(undisturbed, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "update", None)
        train(base, tmp_path / "run", "--micro-batch-size", 8)
    assert "finished already" in capsys.readouterr().out
    assert stage.main(arguments(base, tmp_path / "run", "--seed", 7)) == 1
    assert "seed was 42, is 7" in capsys.readouterr().err
    assert stage.main(unset(arguments(base, tmp_path / "run"), "--lr")) == 1  # as a run of before has it
    assert "lr was 0.01, is auto" in capsys.readouterr().err
    train(base, tmp_path / "run", "--seed", 7, "--no-resume")
    assert not same(weights(tmp_path / "run"), weights(undisturbed))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"torn")
    assert stage.main(arguments(base, tmp_path / "run", "--seed", 8)) == 1
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_restart_starts_over_only_where_the_checkpoint_is_of_other_settings(
    base, tmp_path, undisturbed, capsys, monkeypatch
):
    run, flags = tmp_path / "run", ("--micro-batch-size", 8, "--restart")
    shutil.copytree(undisturbed, run)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "update", None)
        train(base, run, *flags)
        assert "finished already" in capsys.readouterr().out
        (run / "train.json").unlink()
        train(base, run, *flags)
        assert same(weights(run), weights(undisturbed))
    monkeypatch.setattr(common, "auto_precision", lambda device: "bf16")
    flags += ("--seed", 7, "--precision", "auto")
    train(base, tmp_path / "new", *flags)
    capsys.readouterr()
    assert train(base, run, *flags)["identity"]["precision"] == "bf16"
    assert "seed was 42, is 7" in capsys.readouterr().out
    assert same(weights(run), weights(tmp_path / "new"))
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "new/metrics.jsonl").read_bytes()


def test_two_runs_do_not_write_into_one_folder(base, tmp_path, capsys):
    with common.exclusive(tmp_path / ".lock"):
        assert stage.main(arguments(base, tmp_path)) == 1
    assert "another run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def bucket(base):
    """The tiny shards in a bucket of moto on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}).items():
            patch.setenv(name, value)
        common._s3_client.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="training")
        for name, _ in common.list_files(base / "shards"):
            client.upload_file(str(base / "shards" / name), "training", f"shards/{name}")
        yield "s3://training"
    common._s3_client.cache_clear()
    server.stop()


def test_shards_on_s3_train_the_same_model_from_a_local_copy(base, tmp_path, bucket, undisturbed, capsys):
    flags = ("--shards", f"{bucket}/shards", "--micro-batch-size", 8)
    assert stage.main(arguments(base, tmp_path, *flags, "--cache-gb", 0)) == 1
    assert "--cache-gb" in capsys.readouterr().err
    (tmp_path / "cache/shards").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache/shards" / f"{'0' * 64}.tar").write_text("of a manifest that was here before")
    train(base, tmp_path, *flags)
    assert same(weights(tmp_path), weights(undisturbed))
    copies = list((tmp_path / "cache" / "shards").glob("*.tar"))
    assert len(copies) == 4
    times = [copy.stat().st_mtime_ns for copy in copies]
    train(base, tmp_path, *flags, "--no-resume")  # a copy is made once
    assert [copy.stat().st_mtime_ns for copy in copies] == times


def test_a_torn_checkpoint_is_named_and_may_give_way_to_a_whole_one(base, tmp_path, bucket, undisturbed, capsys):
    flags = ("--micro-batch-size", 8, "--checkpoint-url", f"{bucket}/torn")
    train(base, tmp_path, *flags)
    (tmp_path / "train.json").unlink()
    data = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    assert stage.main(arguments(base, tmp_path, *flags)) == 1
    assert f"{tmp_path / 'checkpoint.pt'}: not a readable checkpoint" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").unlink()
    train(base, tmp_path, *flags)
    assert "going on after step 6" in capsys.readouterr().out
    assert same(weights(tmp_path), weights(undisturbed))


def test_a_bucket_that_is_not_there_says_so(base, tmp_path, bucket, capsys):
    assert stage.main(arguments(base, tmp_path, "--shards", f"{bucket}/nothing")) == 1
    assert "s3://training/nothing/manifest.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what it writes


@pytest.mark.parametrize("scenario", TRAINED)
def test_the_merged_model_is_the_adapters_and_loads_in_plain_open_clip(base, tmp_path, full_end, scenario):
    facts = train(base, tmp_path, "--scenario", scenario, "--wise", "off")
    names = {".lock", "adapter", "checkpoint.pt", "curves.png", "metrics.jsonl", "model", "train.json"}
    assert set(os.listdir(tmp_path)) - {"cache"} == names and facts["model_dir"] == "model"
    merged, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    code = read_code(tmp_path / "adapter" / "README.md").replace("local-dir:clip", f"local-dir:{base / 'clip'}")
    exec(code.replace("data/runs/dual_lora/adapter", str(tmp_path / "adapter")), found := {})
    clip = found["clip"]
    images = torch.randint(0, 256, (3, 3, 32, 32)).byte()
    tokens = clip.tokenizer(["a red chair", "a lamp", "a modern bed"])
    with torch.no_grad():
        pictures = common.normalise_pixels(clip, images)
        for ours_, theirs in (
            (clip.model.visual(pictures), merged.eval().encode_image(pictures)),
            (common.text_features(clip.model, tokens), merged.encode_text(tokens)),
        ):
            assert (ours_ - theirs).abs().max() <= 5e-6
    assert common.load_clip(str(tmp_path / "model")).mean == tiny.MEAN
    changed = {name for name, tensor in weights(tmp_path).items() if not torch.equal(tensor, base_weights(base)[name])}
    assert {"visual.proj", "text_projection", "logit_scale"} <= changed
    assert any("visual.transformer" in name for name in changed) == stage.SCENARIOS[scenario][0]
    assert any(name.startswith("transformer") for name in changed) == stage.SCENARIOS[scenario][1]


def learned(run):
    """Whether the validation loss of the last epoch is below the base's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["loss"] < json.loads((run / "train.json").read_text())["validation"]["zero_shot"]["loss"]


def read_code(path):
    """The Python of a README.md."""
    return path.read_text().split("```python\n")[1].split("```")[0]


def test_an_adapter_is_loaded_whole_or_not_at_all(base, tmp_path):
    import peft

    adapter = tmp_path / "run" / "adapter"
    train(base, tmp_path / "run", "--epochs", 1, "--wise", "off")
    for change in (lambda model: model, stage.split_attention):
        model = change(common.load_clip(str(base / "clip")).model)
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.PeftModel.from_pretrained(model, str(adapter))
    with pytest.raises(common.Fail, match="made for another base"):
        stage.load_adapter(common.load_clip(str(tiny.make_clip(tmp_path / "other", seed=1))), adapter)
    for name in ("adapter_model.safetensors", "projections.safetensors"):
        part = adapter / name
        whole = part.read_bytes()
        for content in (whole[: len(whole) // 2], None):
            part.write_bytes(content) if content else part.unlink()
            with pytest.raises(common.Fail, match="not a whole adapter"):
                stage.load_adapter(common.load_clip(str(base / "clip")), adapter)
        part.write_bytes(whole)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"].replace(r"|visual\.transformer\.resblocks\.0\.attn\.k", "")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(common.Fail, match=r"not a whole adapter \(it adapts other layers"):
        stage.load_adapter(common.load_clip(str(base / "clip")), adapter)


def base_weights(base):
    from safetensors.torch import load_file

    return load_file(base / "clip" / "open_clip_model.safetensors")


def test_training_learns_and_says_so(base, tmp_path, capsys, full_end):
    facts = train(base, tmp_path, "--epochs", 12, "--effective-batch-size", 16, "--patience", 12)
    before, after = facts["validation"]["zero_shot"], facts["validation"]["best"]
    assert after["loss"] < before["loss"] - 0.2 and after["mrr"] > before["mrr"] + 0.2
    out = capsys.readouterr().out
    assert "fine-tuned" in out and f"{after['mrr']:.4f}" in out and "pairs a second" in out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "validation"]
    assert [line["epoch"] for line in epochs] == list(range(13))
    best = max(epochs, key=lambda line: line["mrr"])
    assert best["epoch"] == facts["validation"]["best_epoch"]
    assert facts["wise_ft"][-1]["validation"]["mrr"] == pytest.approx(best["mrr"], abs=1e-6)
    assert epochs[0]["mrr"] == pytest.approx(max(facts["search"]["tried"][0]["curve"]), abs=1e-6)  # the probe's
    assert facts["wise_ft"][0]["validation"]["mrr"] == pytest.approx(facts["search"]["base_mrr"], abs=1e-6)
    assert {line["step"] for line in lines if line["kind"] == "step"} >= {4, 10, 20, 48}
    assert facts["parameters"]["lora"] == facts["parameters"]["trained"] - 2 * 32 * 16 - 1
    assert facts["counts"]["train"] == {"samples": 64, "unreadable": 0}
    from PIL import Image

    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_wise_exports_the_chosen_interpolation_and_its_adapter(base, tmp_path, monkeypatch, capsys):
    facts = train(base, tmp_path, "--wise", "off")
    assert facts["alpha"] == 1 and [f["alpha"] for f in facts["wise_ft"]] == [k / 10 for k in range(11)]
    assert "1.0" in next(line for line in capsys.readouterr().out.splitlines() if "<- exported" in line)
    zero, one = base_weights(base), weights(tmp_path)
    monkeypatch.setattr(stage, "update", None)  # --wise of a finished run trains no further
    best = max(facts["wise_ft"], key=lambda f: (f["validation"]["mrr"], f["alpha"]))
    assert train(base, tmp_path, "--wise", "best")["alpha"] == best["alpha"]
    monkeypatch.setattr(stage, "choose_alpha", lambda wise, swept, *_: swept[5])
    facts = train(base, tmp_path, "--wise", "one-se")
    assert facts["alpha"] == 0.5
    assert facts["validation"]["best"] == facts["wise_ft"][5]["validation"]
    half = weights(tmp_path)
    for name in zero:
        assert torch.allclose(half[name], (zero[name] + one[name]) / 2, atol=1e-6), name
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 16


def test_the_one_standard_error_rule_by_hand():
    """Differences 0.5, 0.1, 0, -: the first candidate whose mean is within its own paired error of the best's."""
    best = np.array([1.0, 1.0, 0.5, 0.9])
    bad, close, equal = best - 0.5, best - [0.4, 0.0, 0.0, 0.0], best.copy()
    index, behind = stage.nearest_within_error([bad, close, equal, best])
    assert index == 1 and [round(d, 6) for d, _ in behind] == [0.5, 0.1, 0, 0]
    assert [e for _, e in behind] == pytest.approx([0, 0.1, 0, 0])  # std(0.4, 0, 0, 0; ddof 1) / 2 = 0.1
    assert stage.nearest_within_error([bad, best - [0.4, 0.001, 0, 0], best])[0] == 2
    swept = [{"alpha": a, "below_best": d, "standard_error": e, "validation": {"mrr": m}}
             for a, d, e, m in ((0, 0.5, 0.1, 0.3), (0.5, 0.1, 0.1, 0.7), (1, 0, 0, 0.8))]  # fmt: skip
    assert [stage.choose_alpha(wise, swept)["alpha"] for wise in ("one-se", "best", "off")] == [0.5, 1, 1]
    assert stage.choose_alpha("one-se", swept, least=0.75)["alpha"] == 1  # not below the linear probe
    assert stage.choose_alpha("one-se", swept, least=0.9)["alpha"] == 1  # where none is above it: the best


def test_a_probe_shows_what_was_forgotten(base, tmp_path, capsys):
    probe = tmp_path / "probe.csv"
    sample.make_probe(tmp_path, 8)
    probe.write_bytes(b"\xef\xbb\xbf" + probe.read_bytes())  # as spreadsheets save it
    facts = train(base, tmp_path / "run", "--probe", probe, "--epochs", 1)
    fields = {"alpha", "validation", "below_best", "standard_error", "probe"}
    assert [set(f) for f in facts["wise_ft"]] == [fields] * 11
    assert all(0.125 <= f["probe"]["mrr"] <= 1 for f in facts["wise_ft"])
    said = capsys.readouterr().out
    assert "general probe" in said and f"{facts['wise_ft'][0]['probe']['mrr']:.4f}" in said
    head = "image_path,caption\n"
    wrong = {"none.csv": None, "column.csv": "image_path\n0000.png", "empty.csv": head, "gone.csv": f"{head}9.png,x"}
    wrong["short.csv"] = f"{head}0000.png\n"
    for name, text in wrong.items():  # at once, not after a night of training
        if text:
            (tmp_path / name).write_text(text)
        assert stage.main(arguments(base, tmp_path / "other", "--probe", tmp_path / name)) == 1
        said = capsys.readouterr().err
        assert name in said and "image_path,caption" in said and not (tmp_path / "other" / "checkpoint.pt").exists()


def unset(flags, *names):
    """A command line without these flags and their values."""
    return [flag for i, flag in enumerate(flags) if flag not in names and flags[max(i - 1, 0)] not in names]


def search(base, output, *more):
    """A run whose rates, epochs and warm-up are left to it."""
    assert stage.main(unset(arguments(base, output, *more), "--lr", "--lora-lr", "--epochs")) == 0
    return json.loads((output / "train.json").read_text())


def test_settings_left_open_are_chosen_and_told(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "RATES", (1e-3, 1e-2))
    facts = search(base, tmp_path / "a", "--scenario", "linear_probe", "--patience", 3)
    out = capsys.readouterr().out
    tried = facts["search"]["tried"]
    assert [one["lr"] for one in tried] == [1e-3, 1e-2] and not any(one["diverged"] for one in tried)
    numbers = {"epochs": 40, "patience": 3, "warmup": 12.0, "lr": facts["search"]["lr"], "lora_lr": 3e-3}
    assert facts["chosen"] == numbers  # an epoch has 3 steps
    assert facts["settings"]["lr"] == facts["search"]["lr"] and facts["identity"]["lr"] == "auto"
    for one in tried:  # the curve, and the epoch that it chose
        assert one["mrr"] == max([facts["search"]["base_mrr"], *one["curve"]])
        assert f"lr {one['lr']:g}: validation MRR {one['mrr']:.4f} after epoch {one['epoch']}" in out
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    curve = [line["mrr"] for line in lines if line["kind"] == "validation"][1:]
    won = next(one for one in tried if one["lr"] == facts["search"]["lr"])
    assert curve == won["curve"]  # the run repeats the try that won, to the bit
    other = search(base, tmp_path / "b", "--scenario", "linear_probe", "--patience", 3)
    assert other["search"] == facts["search"] and same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    alone = train(base, tmp_path / "c", "--scenario", "linear_probe", "--lr", 1e-3)  # a number stays a number
    assert alone["search"] == {} and alone["chosen"]["lr"] == 1e-3 and alone["chosen"]["epochs"] == 2


def test_epochs_warm_up_and_lora_rate_follow_the_number_of_steps():
    auto = stage.TrainingConfig()
    for count, effective, epochs in ((320, 40, 40), (1430, 178, 36), (100_000, 1024, 5), (40, 40, 40)):
        found = stage.settle(auto, count, effective)
        updates = math.ceil(count / effective) * epochs
        assert found.epochs == epochs and found.warmup == pytest.approx(min(updates / 10, 500))
        assert found.lora_lr == pytest.approx(3e-3 * min(1, (320 / updates) ** 0.5)) and found.lr == "auto"
        assert found.patience == max(5, epochs // 4)
    fixed = dataclasses.replace(auto, epochs=3, warmup=0, lora_lr=0.5, patience=1)
    assert stage.settle(fixed, 320, 40) == fixed
    assert stage.rate("cosine", 0.01, 0) == pytest.approx(1, abs=1e-3)  # no warm-up


def test_a_rate_that_diverges_is_told_and_not_taken(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "RATES", (1e-2, 1e38))
    facts = search(base, tmp_path / "run", "--scenario", "text_lora", "--epochs", 2)
    assert [one["diverged"] for one in facts["search"]["tried"]] == [False, True]
    assert facts["search"]["lr"] == 1e-2 and facts["validation"]["best"]["mrr"] > facts["search"]["base_mrr"]
    assert "lr 1e+38" in (said := capsys.readouterr().out) and "diverged" in said
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    monkeypatch.setattr(stage, "RATES", (1e38,))
    assert stage.main(unset(arguments(base, tmp_path / "all"), "--lr")) == 1
    assert "diverges at every learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("scenario", ["linear_probe", "text_lora"])
def test_where_nothing_helps_the_base_is_exported_and_the_run_says_so(base, tmp_path, monkeypatch, capsys, scenario):
    monkeypatch.setattr(stage, "RATES", (1e-12,))
    monkeypatch.setattr(stage, "LORA_RATE", 1e-12)
    facts = search(base, tmp_path, "--scenario", scenario, "--patience", 1)
    assert facts["alpha"] == 0 and facts["validation"]["best"] == facts["validation"]["zero_shot"]
    said = capsys.readouterr().out
    assert "note: nothing that was trained validates better than the base" in said
    for name, tensor in base_weights(base).items():
        assert torch.allclose(weights(tmp_path)[name], tensor, atol=1e-6), name


def test_lora_begins_at_the_linear_probe_and_never_ends_below_it(base, tmp_path, capsys):
    probe = train(base, tmp_path / "probe", "--scenario", "linear_probe")
    ruined = train(base, tmp_path / "lora", "--scenario", "text_lora", "--lora-lr", 10)  # nothing good comes of it
    assert ruined["search"]["probe_mrr"] == probe["validation"]["best"]["mrr"]
    assert ruined["validation"]["best"]["mrr"] >= probe["validation"]["best"]["mrr"]
    lines = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["mrr"] == pytest.approx(probe["wise_ft"][-1]["validation"]["mrr"], abs=1e-6)
    if ruined["validation"]["best_epoch"] == 0 and ruined["alpha"]:
        assert "note: LoRA did not improve" in capsys.readouterr().out
    run, state = make_run(base, tmp_path / "run"), stage.State(search={"probe_mrr": 0.6}, best={"epoch": 3})
    below, above = ({"alpha": 1.0, "validation": {"mrr": mrr}} for mrr in (0.5, 0.7))
    assert "below linear_probe's 0.6000" in stage.explain_result(run, state, below)[0]
    assert stage.explain_result(run, state, above) == []


def test_nothing_is_chosen_on_the_test_split(base, tmp_path, capsys):
    """Training is the same to the bit without the test split; a shard of it that leaks into validation is found."""
    train(base, tmp_path / "whole", "--scenario", "linear_probe")
    shutil.copytree(base / "shards", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "test")
    flags = ("--scenario", "linear_probe", "--shards", tmp_path / "shards")
    train(base, tmp_path / "blind", *flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "blind"))
    manifest = json.loads((base / "shards" / "manifest.json").read_text())
    manifest["splits"]["validation"] = manifest["splits"]["test"]
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    assert stage.main(arguments(base, tmp_path / "leak", *flags)) == 1
    assert "test/shard-000000.tar: this shard is in the test split too" in capsys.readouterr().err


def test_the_drawn_probe_holds_general_pictures_all_different(base, full_end):
    clip = common.load_clip(str(base / "clip"))
    one, other = stage.draw_probe(clip), stage.draw_probe(clip)
    assert torch.equal(one.images, other.images) and one.images.shape == (96, 3, 32, 32)
    assert len({picture.numpy().tobytes() for picture in one.images}) == 96  # no sign is missing from the font
    assert len(stage.DRAWN) == len(set(one.keys.flatten().tolist())) == 48
    assert not set(stage.DRAWN) & set(sample.TYPES)


def test_training_stops_when_patience_is_used_up(base, tmp_path):
    facts = train(base, tmp_path, "--epochs", 9, "--patience", 2, "--lr", 0, "--lora-lr", 0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "validation"] == [0, 1, 2]
    assert facts["validation"]["best_epoch"] == 0


def test_auto_is_64_on_a_cpu_and_what_fits_on_a_gpu_and_learns_nothing(base, tmp_path, monkeypatch):
    run = make_run(base, tmp_path, "--scenario", "dual_lora")
    before = run.towers.copy()
    assert [run.towers.fitting_micro_batch(share) for share in (24, 64, 65, 1000)] == [24, 64, 65, 1000]  # it is small
    monkeypatch.setattr(stage, "VIT_B_32", 0)
    assert [run.towers.fitting_micro_batch(share) for share in (24, 64, 65, 1000)] == [24, 64, 64, 64]
    run.towers.dry_run(3)
    tried = []

    def small_memory(towers, size):
        tried.append(size)
        if size > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(common.Clip, "device", torch.device("cuda"))
        patch.setattr(stage.Towers, "dry_run", small_memory)
        assert run.towers.fitting_micro_batch(59) == 8 and tried == [59, 30, 15, 8]
    assert same(run.towers.copy(), before)
    assert all(parameter.grad is None for parameter in run.towers.trained.values())


def test_auto_is_found_once_a_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.Towers, "fitting_micro_batch", lambda *_: 7)
    assert train(base, tmp_path, "--epochs", 1)["batch"]["micro"] == 7
    monkeypatch.setattr(stage.Towers, "fitting_micro_batch", lambda *_: 9)
    (tmp_path / "train.json").unlink()
    assert train(base, tmp_path, "--epochs", 1)["batch"]["micro"] == 7


def test_gradient_checkpointing_gives_the_same_gradient(base, tmp_path):
    gradients = []
    for flag in ("--no-grad-checkpointing", "--grad-checkpointing"):
        run = double_run(base, tmp_path, flag)
        batch = next(run.train.batches(stage.epoch_plan(64, 16, 0, 0, 0, 1), 0))
        run.towers.train(True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            gradients.append(gradient(run, batch, 8)[1])
    assert error(*gradients) < 1e-12 and len(kept) < 500


def test_compiled_towers_compute_the_same(base, tmp_path, monkeypatch):
    compile, calls = torch.nn.Module.compile, []

    def without_inductor(module, **flags):  # it would take half a minute
        calls.append(module)
        compile(module, backend="eager", **flags)

    monkeypatch.setattr(torch.nn.Module, "compile", without_inductor)
    found = []
    for flag in ("--no-compile", "--compile"):
        run = double_run(base, tmp_path, flag)
        with torch.no_grad():
            found.append(run.towers.embed(next(run.validation.batches(stage.in_order(16, 4)))))
    assert len(calls) == 1 + len(stage.residual_blocks(run.towers.model))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("flags", [
    ("--precision", "bf16"), ("--optimizer", "adamw8bit"), ("--schedule", "onecycle", "--grad-checkpointing"),
    ("--augment", "advanced", "--captions", "fixed"), ("--micro-batch-size", "5", "--limit", "30"),
])  # fmt: skip
def test_further_ways_of_training_run_to_the_end(base, tmp_path, flags):
    facts = train(base, tmp_path, "--epochs", 3, *flags)
    assert facts["validation"]["best"]["loss"] < facts["validation"]["zero_shot"]["loss"]


def computes_in_bf16(monkeypatch, answer):
    """Let torch say that of the processor."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: answer, raising=False)


@pytest.mark.parametrize("in_hardware, precision", [(True, "bf16"), (False, "fp32")])
def test_bf16_is_chosen_where_the_processor_computes_in_it(base, tmp_path, capsys, monkeypatch, in_hardware, precision):
    computes_in_bf16(monkeypatch, in_hardware)
    assert train(base, tmp_path, "--precision", "auto", "--epochs", 1)["identity"]["precision"] == precision
    assert f"of up to 24, in {precision}" in capsys.readouterr().out


def test_a_run_goes_on_in_its_precision_on_another_processor(base, tmp_path, capsys, monkeypatch):
    flags = ("--precision", "auto", "--epochs", 1)
    computes_in_bf16(monkeypatch, True)
    train(base, tmp_path, *flags)
    computes_in_bf16(monkeypatch, False)
    capsys.readouterr()
    assert train(base, tmp_path, *flags)["identity"]["precision"] == "bf16"
    assert "finished already" in capsys.readouterr().out


def test_lora_that_the_model_never_asks_is_refused(base, tmp_path):
    run = make_run(base, tmp_path, "--scenario", "dual_lora")
    run.towers.check_lora_gradients()
    assert all(parameter.grad is None for parameter in run.towers.trained.values())
    run.towers.trained["visual.qkv.lora_A"] = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(common.Fail, match=r"without visual.qkv.lora_A \(1 of .* --scenario text_lora$"):
        run.towers.check_lora_gradients()
    run.towers.trained["transformer.lora_A"] = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(common.Fail, match=r"--scenario linear_probe$"):
        run.towers.check_lora_gradients()
    del run.towers.trained["visual.qkv.lora_A"]
    with pytest.raises(common.Fail, match=r"--scenario vision_lora$"):
        run.towers.check_lora_gradients()


def test_a_temperature_above_the_limit_is_not_cut(base, tmp_path):
    for start, limit in ((4.7215, 4.7215), (2.0, math.log(100))):
        clip = common.load_clip(f"local-dir:{base / 'clip'}")
        clip.model.logit_scale.data.fill_(start)
        towers = stage.Towers(clip, stage.TrainingConfig(scenario="linear_probe"))
        assert towers.largest_scale == pytest.approx(limit)
    run = make_run(base, tmp_path)
    run.towers.largest_scale = 0.5
    batch = next(run.train.batches(stage.epoch_plan(64, 16, 0, 0, 0, 1), 0))
    stage.update(run, stage.State(), stage.make_optimizer(run), torch.amp.GradScaler("cpu", enabled=False), batch, 10)
    assert run.towers.model.logit_scale.item() == 0.5


@pytest.mark.parametrize("scenario", TRAINED)
def test_a_process_may_have_no_part_in_a_batch(base, tmp_path, scenario):
    run = make_run(base, tmp_path, "--scenario", scenario)
    for data in (run.train, run.validation):
        stage.cache_tower_features(run, data)
    step = stage.epoch_plan(64, 1, 0, 0, 0, 2)  # one pair for two processes: the first has none
    batch = next(run.train.batches(step, 0))
    assert len(batch.ids) == 0 and batch.keys.shape == (0, 2) and batch.keys.dtype == torch.int64


def test_each_machine_keeps_its_own_cache(tmp_path, monkeypatch):
    world = stage.World("cpu")
    assert stage.cache_folder(world, tmp_path) == tmp_path / "cache"
    world.size = 4
    folders = set()
    for machine in ("0", "1", "2"):
        monkeypatch.setenv("GROUP_RANK", machine)
        folders.add(stage.cache_folder(world, tmp_path))
    assert len(folders) == 3 and tmp_path / "cache" in folders


def test_fp16_skips_overflowed_steps_without_moving_the_schedule(base, tmp_path):
    run = make_run(base, tmp_path, "--precision", "fp16", "--scenario", "dual_lora")
    optimizer, state = stage.make_optimizer(run), stage.State()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batch = next(run.train.batches(stage.epoch_plan(64, 16, 0, 0, 0, 1), 0))
    before = run.towers.copy()
    stage.update(run, state, optimizer, scaler, batch, 10)
    assert (state.step, state.updates) == (1, 0) and scaler.get_scale() == 2.0**39
    assert same(run.towers.copy(), before)
    while state.updates < 3:
        stage.update(run, state, optimizer, scaler, batch, 10)
    assert run.towers.model.logit_scale.dtype == torch.float32 and not same(run.towers.copy(), before)


def test_wandb_offline_gets_the_numbers(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    train(base, tmp_path, "--epochs", 1, "--wandb", "model")
    logged = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    for name in (
        b"validation/mrr",
        b"step/loss",
        b"step/logit_scale",
        b"step/gradient_norm",
        b"step/lora_lr",
        b"open_clip_model.safetensors",
    ):
        assert name in logged


# -------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize("flags", [(), ("--precision", "fp16", "--epochs", 9, "--patience", 9)])
def test_a_nan_stops_before_it_reaches_the_weights(base, tmp_path, capsys, monkeypatch, flags):
    original = stage.accumulate

    def accumulate(run, batch, step, *rest):
        loss = original(run, batch, step, *rest)
        if run.trial:
            return loss
        if flags and step >= 2:  # no scale of fp16 mends this
            run.towers.model.logit_scale.grad.fill_(math.nan)
        return loss * math.nan if step == 2 and not flags else loss

    monkeypatch.setattr(stage, "accumulate", accumulate)
    assert stage.main(arguments(base, tmp_path, "--checkpoint-minutes", 0, *flags)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(Path(sys.argv[0]).name)]
    assert len(said) == 1 and ("gradient norm nan" if flags else "step 3: loss nan") in said[0] and "--lr" in said[0]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["state"]["updates"] == 2 and all(tensor.isfinite().all() for tensor in saved["weights"].values())
    assert not (tmp_path / "train.json").exists()


def damaged(base, tmp_path, count):
    """A copy of the shards with `count` pictures of the first shard overwritten."""
    shutil.copytree(base / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "train" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    for members in stage.index_shard(path)[:count]:
        offset, size = members["jpg"]
        data[offset : offset + size] = b"\0" * size
    path.write_bytes(data)
    shutil.copytree(base / "clip", tmp_path / "clip")
    return tmp_path


def test_another_mean_is_another_run_and_its_features_are_made_anew(base, tmp_path, capsys):
    other = tmp_path / "base"
    shutil.copytree(base, other)
    flags = ("--scenario", "linear_probe", "--epochs", 1)
    train(other, tmp_path / "a", *flags)
    config = other / "clip/open_clip_config.json"
    content = json.loads(config.read_text())
    content["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(content))
    capsys.readouterr()
    assert stage.main(arguments(other, tmp_path / "a", *flags)) == 1 and "mean was" in capsys.readouterr().err
    train(other, tmp_path / "a", *flags, "--no-resume")
    train(other, tmp_path / "b", *flags)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "a/cache").iterdir()}
    assert len(kept) == len(list((tmp_path / "a/cache").iterdir())), "features of the other mean are gone"


def test_no_machine_is_ahead_of_what_all_of_them_find(base, tmp_path, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    exists = common.exists
    monkeypatch.setattr(common, "exists", lambda path: not common.is_s3(path) and exists(path))
    monkeypatch.setattr(common, "upload_atomic", cut_off)
    run = arguments(base, tmp_path, "--scenario", "linear_probe", "--checkpoint-url", "s3://shop/run")
    assert stage.main(run) == common.INTERRUPTED and not (tmp_path / "checkpoint.pt").exists()


def test_what_saves_memory_may_change_when_a_run_goes_on(base, tmp_path, monkeypatch, capsys):
    train_epoch = stage.train_epoch

    def short_of_memory(run, *rest):
        if not run.trial:
            raise MemoryError
        train_epoch(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "train_epoch", short_of_memory)
        assert stage.main(arguments(base, tmp_path, "--scenario", "vision_lora", "--epochs", 1)) == 1
    said = capsys.readouterr().err
    assert "--micro-batch-size" in said and "--grad-checkpointing" in said
    flags = ("--epochs", 1, "--grad-checkpointing", "--micro-batch-size", 8, "--max-failed", 0.2)
    train(base, tmp_path, "--scenario", "vision_lora", *flags)
    assert "going on after step 0" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["[]", "null", '{"identity": {}}', '{"identity": {}, "settings": {}}'])
def test_a_mark_that_is_none_of_ours_is_written_anew(base, tmp_path, damaged):
    (tmp_path / "train.json").write_text(damaged)
    assert train(base, tmp_path, "--scenario", "zero_shot")["scenario"] == "zero_shot"


def test_another_way_to_draw_views_is_another_run(base, tmp_path, monkeypatch, capsys):
    scenario = ("--scenario", "text_lora", "--augment", "simple", "--epochs", 1)
    train(base, tmp_path, *scenario)
    kept = {path.name for path in (tmp_path / "cache").glob("train-image-*")}
    monkeypatch.setattr(stage, "CROPS", {"simple": 0.5, "advanced": 0.5})
    capsys.readouterr()
    assert stage.main(arguments(base, tmp_path, *scenario)) == 1
    assert "drawn_views was" in capsys.readouterr().err
    train(base, tmp_path, *scenario, "--no-resume")
    assert kept and kept.isdisjoint(path.name for path in (tmp_path / "cache").glob("train-image-*"))


def test_a_run_that_did_not_note_mean_std_and_views_goes_on(base, tmp_path, capsys):
    train(base, tmp_path, "--epochs", 1)
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "train.json"
    saved, facts = torch.load(path, weights_only=True), json.loads(marker.read_text())
    for identity in (saved["identity"], facts["identity"]):
        del identity["mean"], identity["std"], identity["drawn_views"]
    torch.save(saved, path), marker.write_text(json.dumps(facts))
    capsys.readouterr()
    train(base, tmp_path, "--epochs", 1, "--restart")
    assert "finished already" in capsys.readouterr().out


def test_a_refusal_by_wandb_is_one_line_before_anything_is_computed(base, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    assert stage.main(arguments(base, tmp_path, "--wandb", "metrics")) == 1
    said = capsys.readouterr().err
    assert "wandb login" in said and said.count("\n") == 1 and not (tmp_path / "cache").exists()


def test_of_what_is_exported_one_thing_is_said(base, tmp_path):
    run, state = make_run(base, tmp_path), stage.State(best={"epoch": 0})
    for alpha, said in ((0.0, "base"), (1.0, "linear_probe")):
        (note,) = stage.explain_result(run, state, {"alpha": alpha, "validation": {"mrr": 0.5}})
        assert said in note


@pytest.mark.parametrize("scenario", ["dual_lora", "text_lora"])
def test_corrupt_pictures_are_counted_named_and_left_out(base, tmp_path, capsys, scenario):
    other = damaged(base, tmp_path / "some", 3)
    facts = train(other, tmp_path / "run", "--scenario", scenario)
    assert facts["counts"]["train"] == {"samples": 64, "unreadable": 3}
    assert len(facts["unreadable"]) == 3 and "shard-000000.tar at byte" in facts["unreadable"][0]
    assert "3 of 64 samples were unreadable" in capsys.readouterr().out
    many = damaged(base, tmp_path / "many", 8)
    assert stage.main(arguments(many, tmp_path / "run2", "--scenario", scenario)) == 1
    assert "--max-failed" in capsys.readouterr().err


def test_missing_cut_and_empty_shards_say_what_to_do(base, tmp_path, capsys):
    other = damaged(base, tmp_path / "cut", 0)
    path = other / "shards" / "train" / "shard-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert stage.main(arguments(other, tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "shard-000001.tar" in said and "2_prepare.py" in said
    path.rename(path.with_suffix(".away"))
    assert stage.main(arguments(other, tmp_path / "run")) == 1
    assert "missing shard" in capsys.readouterr().err
    path.write_bytes(whole)
    manifest = json.loads((other / "shards" / "manifest.json").read_text())
    manifest["splits"]["validation"] = {"samples": 0, "shards": []}
    (other / "shards" / "manifest.json").write_text(json.dumps(manifest))
    assert stage.main(arguments(other, tmp_path / "run")) == 1
    assert "validation split is empty" in capsys.readouterr().err


def test_bad_settings_say_what_to_do(base, tmp_path, capsys, monkeypatch):
    for flags, code, says in (
        (("--scenario", "duallora"), 2, "dual_lora"),
        (("--micro-batch-size", "many"), 2, "number or auto"),
        (("--epochs", "0"), 2, "--epochs"),
        (("--device", "cuda:9"), 1, "--device cpu"),
        (("--model", "ViT-B-99"), 1, "ViT-B-32"),
        (("--shards", str(tmp_path / "none")), 1, "2_prepare.py"),
    ):
        try:
            assert stage.main(arguments(base, tmp_path / "run", *flags)) == code
        except SystemExit as error:
            assert error.code == code
        assert says in capsys.readouterr().err
    train(base, tmp_path / "big", "--effective-batch-size", 1000, "--epochs", 1)
    assert "effective batch 64 = " in capsys.readouterr().out

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage, "accumulate", full)
    assert stage.main(arguments(base, tmp_path / "full")) == 1
    assert "--micro-batch-size" in capsys.readouterr().err
    monkeypatch.setattr(stage, "accumulate", lambda *_: bytearray(1 << 62))
    assert stage.main(arguments(base, tmp_path / "full")) == 1
    assert "--micro-batch-size" in capsys.readouterr().err


def test_check_says_whether_a_model_can_be_trained_without_any_data(base, tmp_path, capsys, monkeypatch):
    model = ("--model", str(base / "clip"))
    assert stage.main(["--check", "--scenario", "text_lora", *model]) == 0
    assert "can be trained: text_lora" in capsys.readouterr().out
    clip = dataclasses.replace(common.load_clip(str(base / "clip")), model=small("timm convolutions", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_clip", lambda *_: clip)
        assert stage.main(["--check", "--scenario", "dual_lora", "--model", "convolutions"]) == 1
    assert "use --scenario text_lora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stage.main(["--scenario", "text_lora", *model])
    assert "--shards and --output are needed" in capsys.readouterr().err


def test_weights_are_averaged_over_the_epochs_the_later_ones_more():
    mean = {}
    for epoch, value in enumerate((6.0, 3.0, 12.0), 1):
        mean = stage.average_weights(mean, {"w": torch.tensor([value, -value])}, epoch)
    torch.testing.assert_close(mean["w"], torch.tensor([8.0, -8.0]))  # (1 * 6 + 2 * 3 + 3 * 12) / 6


def test_a_tower_that_lora_cannot_reach_says_so(base, tmp_path):
    for kind, says in (
        ("resnet", r"ResNet picture towers are not supported.*ViT-B-32"),
        ("timm convolutions", r"no-linears: the image tower has no attention or MLP to adapt.*text_lora$"),
    ):
        clip = dataclasses.replace(common.load_clip(str(base / "clip")), model=small(kind, tmp_path), name="no-linears")
        with pytest.raises(common.Fail, match=says):
            stage.Towers(clip, stage.TrainingConfig(scenario="vision_lora"))


@pytest.mark.parametrize(("kind", "scenario"), [
    ("timm", "dual_lora"), ("siglip", "dual_lora"), ("hf", "dual_lora"),
    ("timm convolutions", "linear_probe"), ("timm convolutions", "text_lora"),
])  # fmt: skip
def test_other_architectures_train_and_come_back(base, tmp_path, kind, scenario):
    torch.manual_seed(0)
    model = small(kind, tmp_path).eval()
    clip = dataclasses.replace(common.load_clip(str(base / "clip")), model=model, name=kind, fingerprint=kind)
    clip.size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    clip.config = {"embed_dim": model.visual(torch.zeros(1, 3, clip.size, clip.size)).shape[1]}
    if kind == "hf":
        tokenizer = clip.tokenizer
        clip.tokenizer = lambda captions: tokenizer(captions)[:, :32] % 100
    run = make_run(base, tmp_path, "--scenario", scenario)
    run.clip, run.towers = clip, stage.Towers(clip, run.config)
    for data in (run.train, run.validation):
        data.clip = clip
        stage.cache_captions(run, data)
    names = set(run.towers.trained)
    assert any("qkv" in name for name in names) == (kind in ("timm", "siglip"))
    assert ("logit_bias" in names) == (kind == "siglip")
    optimizer, scaler, state = stage.make_optimizer(run), torch.amp.GradScaler("cpu", enabled=False), stage.State()
    batch = next(run.train.batches(stage.epoch_plan(64, 16, 0, 0, 0, 1), 0))
    losses = [stage.update(run, state, optimizer, scaler, batch, 30)["loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["ViT-B-32-SigLIP2-256", "ViT-B-16-SigLIP2", "PE-Core-B-16", "ViT-B-16-SigLIP"])
def test_bases_worth_trying_train_and_embed(tmp_path, monkeypatch, name):
    """open_clip's own configuration with fewer layers, smaller widths, random weights; the last is Marqo's network."""
    import pyarrow.parquet
    import timm

    create, config = timm.create_model, open_clip.get_model_config(name)
    small = {"embed_dim": 64, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **small, **more))
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 1}
    if "hf_tokenizer_name" in config["text_cfg"]:
        tiny.make_tokenizer(tmp_path / "base")
        config["text_cfg"]["vocab_size"] = 64
    tiny.make_clip(tmp_path / "base", **config | {"embed_dim": 64})
    tiny.make_shards(tmp_path / "shards", train=16, validation=4, test=8)
    flags = ["--shards", str(tmp_path / "shards"), "--model", f"local-dir:{tmp_path / 'base'}"]
    run, vectors = tmp_path / "run", tmp_path / "master.parquet"
    more = ["--scenario", "dual_lora", "--epochs", "1", "--lr", "1e-2", "--lora-lr", "1e-2", "--wise", "off"]
    assert stage.main([*flags, "--output", str(run), *more]) == 0
    facts = json.loads((run / "train.json").read_text())
    assert facts["parameters"]["lora"] > 0 and learned(run)
    assert importlib.import_module("4_embed").main([*flags, "--finetuned", str(run), "--output", str(vectors)]) == 0
    rows = pyarrow.parquet.read_table(vectors)
    assert len(rows) == 28 and rows["finetuned_embedding"].type.list_size == 64
    (tmp_path / "base").rename(tmp_path / "away")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'model'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{run / 'model'}")(rows["prompt"].to_pylist())
    with torch.no_grad():
        theirs = model.eval().encode_text(tokens, normalize=True)
    ours = torch.tensor(rows["finetuned_text_embedding"].to_pylist())
    assert (ours * theirs).sum(dim=1).min() > 0.999


def test_a_hugging_face_tower_leaves_a_model_that_works_moved_and_offline(base, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    folder = tiny.make_hf_clip(tmp_path / "base")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: shop/base\n---\n")
    flags = ("--scenario", "text_lora", "--epochs", 1, "--wise", "off")
    facts = train(base, tmp_path / "run", "--model", f"local-dir:{folder}", *flags)
    assert learned(tmp_path / "run")
    expected = common.encode(common.load_clip(str(tmp_path / "run/model")), pixels(), None)
    folder.rename(tmp_path / "away")
    moved = (tmp_path / "run/model").rename(tmp_path / "moved")
    for path in (*moved.iterdir(), *(tmp_path / "run/adapter").iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clip = common.load_clip(str(moved))
    assert torch.equal(common.encode(clip, pixels()), expected)
    monkeypatch.chdir(tmp_path)
    exec(read_code(moved / "README.md").replace('"."', f'"{moved}"'), found := {})
    words = ["a red chair", "an oak table"]
    with torch.no_grad():
        theirs = found["model"].eval().encode_text(found["tokenizer"](words), normalize=True)
    assert (common.encode(clip, captions=words) - theirs).abs().max() < 1e-6
    card = ModelCard.load(moved / "README.md")
    assert card.data.license == "mit" and card.data.base_model == "shop/base" and card.data.library_name == "open_clip"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "64 pairs of product photo and prompt to train on, 16 to validate on" in card.text
    best = facts["validation"]["best"]["mrr"]
    assert f"| mrr | {facts['validation']['zero_shot']['mrr']:.4f} | {best:.4f} |" in card.text


def test_the_card_names_repository_and_licence_of_a_base_from_the_hub(base, monkeypatch):
    import huggingface_hub

    asked = []

    def load(place):
        asked.append(place)
        return huggingface_hub.ModelCard("---\nlicense: apache-2.0\n---\n")

    clip = common.load_clip(str(base / "clip"))
    clip.folder = None
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", load)
    for name, place, shown in (
        ("ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", ["ViT-B-32", "laion2b_s34b_b79k"]),
        ("hf-hub:shop/clip", "shop/clip", ["hf-hub:shop/clip"]),
    ):
        clip.name = name
        assert stage.base_metadata(clip) == {"base_model": place, "license": "apache-2.0"}
        assert stage.shown_base(clip) == shown and asked[-1] == place
    clip.name = "ViT-B-32//home/someone/weights.pt"
    assert stage.base_metadata(clip) == {} and stage.shown_base(clip) == ["ViT-B-32", "weights.pt"]


def test_a_vit_b_32_from_a_checkpoint_file_goes_through_training_and_embedding(tmp_path, monkeypatch):
    """Random weights in place of a hub's: what real use does, with its sizes and shapes, on few pairs."""
    import pyarrow.parquet

    monkeypatch.setattr(stage, "ALPHAS", (0.0, 0.5, 1.0))
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32", force_quick_gelu=True).state_dict(), tmp_path / "weights.pt")
    shards = tiny.make_shards(tmp_path / "shards", train=8, validation=4, test=2, size=224)
    model = f"--shards {shards} --model ViT-B-32-quickgelu --pretrained {tmp_path / 'weights.pt'}".split()
    run, vectors = tmp_path / "run", tmp_path / "master.parquet"
    sample.make_probe(tmp_path, 2)
    settings = f"--epochs 1 --micro-batch-size 4 --lr 1e-2 --wise off --probe {tmp_path / 'probe.csv'}".split()
    assert stage.main([*model, "--output", str(run), *settings]) == 0
    facts = json.loads((run / "train.json").read_text())
    widths = (768, 512)  # of vision and text; r * (in + out) of q, k, v, out (W, W), c_fc (W, 4W) and c_proj (4W, W)
    assert facts["parameters"]["lora"] == sum(12 * 16 * (4 * 2 * w + 2 * 5 * w) for w in widths)
    assert facts["parameters"]["base"] == 151_277_313 and 0.029 < facts["parameters"]["lora_share"] < 0.030
    stage_4 = importlib.import_module("4_embed")
    assert stage_4.main([*model, "--finetuned", str(run / "model"), "--output", str(vectors)]) == 0
    table = pyarrow.parquet.read_table(vectors)
    images = torch.stack([common.decode_jpeg(tiny.picture("red", "chair", k, 224), 224) for k in range(2)])
    by_folder = open_clip.create_model_and_transforms(f"local-dir:{run / 'model'}")
    weights_file = str(run / "model" / "open_clip_model.safetensors")
    by_path = open_clip.create_model_and_transforms("ViT-B-32", pretrained=weights_file, force_quick_gelu=True)
    base = common.load_clip(*model[3::2])
    pixels = common.normalise_pixels(base, images)
    with torch.no_grad():
        found = [theirs.eval().encode_image(pixels, normalize=True) for theirs, _, _ in (by_folder, by_path)]
    assert torch.equal(*found) and all("QuickGELU" in str(theirs) for theirs, _, _ in (by_folder, by_path))
    flat = [str(transform).translate(str.maketrans("[]", "()")) for _, _, transform in (by_folder, by_path)]
    mean_and_std = [text[text.index("Normalize") :] for text in flat]  # the model's own
    assert mean_and_std[0] == mean_and_std[1] and "0.48145466" in flat[0]
    assert "ResizeKeepRatio(size=(224, 224)" in flat[0] and "CenterCrop(size=(224, 224)" in flat[1]  # ours letterboxes
    assert (found[0] - common.encode(base, images)).abs().max() > 1e-3
    assert len(table) == 14 and table.column("base_embedding").type.list_size == 512
    first = torch.tensor(table.column("finetuned_embedding")[0].as_py())
    assert torch.nn.functional.cosine_similarity(first, found[0][0], dim=0) > 0.99
