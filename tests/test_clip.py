"""clip.py: loading says what is wrong, the split attention is the original one, exports load in plain open_clip."""

import io
import json
import os
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import clip as ours
import tiny
from common import Fail
from imaging import BadImage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokens():
    return open_clip.get_tokenizer("ViT-B-32")(["a red chair", "an oak table with four legs", "lamp", "x " * 200])


def pixels(count=4, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


# ---------------------------------------------------------------------------------------------------------- loading


def test_loading_by_folder_prefix_and_as_weights_is_the_same(folder):
    clips = [
        ours.load_clip(f"local-dir:{folder}"),
        ours.load_clip(str(folder)),
        ours.load_clip("ViT-B-32", str(folder)),
    ]
    assert len({clip.fingerprint for clip in clips}) == 1
    assert (clips[0].size, clips[0].mean, clips[0].std) == (32, tiny.MEAN, tiny.STD)
    assert clips[0].context_length == 77 and not clips[0].model.training


def test_fingerprint_sees_weights_and_the_quickgelu_flag(folder, tmp_path):
    base = ours.load_clip(str(folder)).fingerprint
    assert ours.load_clip(str(tiny.make_clip(tmp_path / "same"))).fingerprint == base
    assert ours.load_clip(str(tiny.make_clip(tmp_path / "seed", seed=1))).fingerprint != base
    assert ours.load_clip(str(tiny.make_clip(tmp_path / "gelu", quick_gelu=True))).fingerprint != base


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("ViT-B-23", "openai", "ViT-B-32"),
        ("ViT-B-32", "opnai", "openai"),
        ("ViT-B-32", None, "--pretrained"),
        ("ViT-B-32", "/nowhere/weights.pt", "no such file"),
        ("local-dir:/nowhere", None, "no such model folder"),
    ],
)
def test_a_wrong_name_tag_or_path_says_what_to_do(model, pretrained, says):
    with pytest.raises(Fail, match=says) as caught:
        ours.load_clip(model, pretrained)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_configuration_says_so(tmp_path):
    with pytest.raises(Fail, match=r"open_clip_config\.json"):
        ours.load_clip(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(Fail, match="no weights"):
        ours.load_clip(str(tmp_path))


def test_weights_of_another_architecture_and_pickles_are_refused(tmp_path):
    torch.save({"visual.proj": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(Fail, match="another architecture"):
        ours.load_clip("RN50", str(tmp_path / "other.pt"))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(Fail):
            ours.load_clip("RN50", str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_a_coca_is_refused_in_one_line(monkeypatch, folder):
    monkeypatch.setattr(
        open_clip, "create_model", lambda *_, **__: torch.nn.ModuleDict({"text_decoder": nn.Identity()})
    )
    with pytest.raises(Fail, match=r"CoCa.*ViT-B-32"):
        ours.load_clip(str(folder))


def test_an_openai_tag_turns_quickgelu_on(monkeypatch):
    asked = {}

    def create(name, pretrained=None, **more):
        asked.update(more)
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(Fail, match="local file"):
        ours.load_clip("ViT-B-32", "openai")
    assert asked["quick_gelu"] is True
    with pytest.raises(Fail):
        ours.load_clip("ViT-B-32", "laion2b_s34b_b79k")
    assert asked["quick_gelu"] is False


# ---------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize("custom_text", [False, True])
def test_text_cut_to_its_longest_caption_is_exact(tmp_path, tokens, custom_text):
    clip = ours.load_clip(str(tiny.make_clip(tmp_path, custom_text=custom_text)))
    for part in (tokens, tokens[:3], tokens[2:3]):
        whole = clip.model.encode_text(part)
        assert (ours.text_features(clip.model, part) - whole).abs().max() <= 2.4e-6 * whole.abs().max().clamp(min=1)
    double = clip.model.double()
    assert (ours.text_features(double, tokens[:3]) - double.encode_text(tokens[:3])).abs().max() < 1e-12


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_the_last_block_at_one_token_is_exact(tmp_path, tokens, custom_text, split):
    """Features and the gradients of all weights are those of open_clip's whole towers, checkpointed or not."""
    clip = ours.load_clip(str(tiny.make_clip(tmp_path, custom_text=custom_text)))
    model = (ours.split_attention(clip.model) if split else clip.model).double()
    x = ours.normalise(clip, pixels())

    def run(image, text) -> list[torch.Tensor]:
        model.zero_grad()
        features = [image(), text()]
        sum((f * torch.arange(f.numel()).view(f.shape)).sum() for f in features).backward()
        return features + [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = run(lambda: model.visual(x), lambda: model.encode_text(tokens))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        found = run(lambda: ours.image_features(model, x), lambda: ours.text_features(model, tokens))
        assert len(found) == len(expected)
        assert all(
            (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1) for a, b in zip(found, expected, strict=True)
        )


def test_encoding_normalises_with_the_models_own_numbers(folder):
    clip = ours.load_clip(str(folder))
    images = pixels()
    x = (images.float() / 255 - torch.tensor(tiny.MEAN).view(3, 1, 1)) / torch.tensor(tiny.STD).view(3, 1, 1)
    with torch.no_grad():
        expected = clip.model.encode_image(x, normalize=True)
    assert torch.allclose(ours.encode_image(clip, images), expected, atol=1e-5)
    text = ours.encode_text(clip, ["a chair", "a bed"])
    assert torch.allclose(text.norm(dim=-1), torch.ones(2)) and text.dtype == torch.float32


def test_decoding_gives_pillows_pixels_and_refuses_what_is_damaged():
    data = tiny.picture("red", "bed", 3, size=48)
    expected = torch.tensor(list(Image.open(io.BytesIO(data)).tobytes())).view(48, 48, 3).permute(2, 0, 1)
    decoded = ours.decode_jpeg(data, 48)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded.int(), expected.int())
    assert ours.decode_jpeg(data, 32).shape == (3, 32, 32)
    for bad in (b"", b"<html>", data[: len(data) // 3]):
        with pytest.raises(BadImage):
            ours.decode_jpeg(bad, 48)


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_split_attention_equals_open_clips_towers(tmp_path, tokens, quick_gelu, training):
    clip = ours.load_clip(str(tiny.make_clip(tmp_path, quick_gelu=quick_gelu)))
    images = pixels()
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        model = clip.model.to(dtype).train(training)
        x = ours.normalise(clip, images)
        before = model.encode_image(x), model.encode_text(tokens)
        ours.split_attention(model)
        after = model.encode_image(x), model.encode_text(tokens)
        assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
        for a, b in zip(after, before, strict=True):
            assert (a - b).abs().max() <= tolerance
        ours.fuse_attention(model)
        assert torch.equal(model.encode_image(x), before[0])
    assert ours.fingerprint(model.float(), clip.config) == clip.fingerprint  # split and fused: not a bit moved


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_split_attention_equals_a_vit_b_32s(tokens, quick_gelu):
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", force_quick_gelu=quick_gelu).eval()
    x = torch.randn(1, 3, 224, 224)
    found = {}
    for split in (False, True):
        ours.split_attention(model) if split else None
        for dtype in (torch.float64, torch.float32):  # there and back: float32 is exact in float64
            model.to(dtype)
            with torch.no_grad():
                found[split, dtype] = model.encode_image(x.to(dtype)), model.encode_text(tokens[1:3])
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
        for a, b in zip(found[True, dtype], found[False, dtype], strict=True):
            assert (a - b).abs().max() <= tolerance


def test_bf16_attention_on_a_cpu_is_the_fused_one(folder, tokens):
    clip = ours.load_clip(str(folder))
    ours.split_attention(clip.model)
    with torch.no_grad():
        whole = clip.model.visual(ours.normalise(clip, pixels())), ours.text_features(clip.model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            half = clip.model.visual(ours.normalise(clip, pixels())), ours.text_features(clip.model, tokens)
    for a, b in zip(half, whole, strict=True):
        assert F.cosine_similarity(a.float(), b).min() > 0.999


def test_dropout_keeps_its_share():
    torch.manual_seed(0)
    for shape, steps in (((999, 1001), 13), ((7, 3), 77), ((500, 500), 128)):
        kept = ours.kept_by_dropout(shape, steps, torch.device("cpu"))
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
    monkeypatch.setattr(ours, "kept_by_dropout", lambda *_: kept)
    plain = [layer.lora_dropout["default"] for layer in layers]
    weights = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def run(outputs):
        return [*outputs, *torch.autograd.grad(sum((y**3).sum() for y in outputs), [x, *weights])]

    def agree(found, expected):
        return all(torch.allclose(*pair, rtol=1e-12, atol=1e-12) for pair in zip(found, expected, strict=True))

    found = run(ours.lean_lora(layers, x))
    for layer in layers:
        if rate:
            layer.lora_dropout["default"] = MaskTimes(kept.view(2, 5, 12).double() / (1 - rate))
    assert agree(found, run([layer(x) for layer in layers]))
    for layer, dropout in zip(layers, plain, strict=True):
        layer.lora_dropout["default"] = dropout
    assert torch.autograd.gradcheck(lambda x, *_: ours.lean_lora(layers, x), [x, *weights])
    assert torch.autograd.gradcheck(lambda x, *_: ours.lean_lora(layers[:1], x), [x, *weights[:2]])
    model.eval()
    assert agree(ours.linears(layers, x), [layer(x) for layer in layers])  # no dropout


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
    clip, plain, before = (ours.load_clip(folder).model.double() for _ in range(3))
    name = f"{tower}transformer.resblocks.1.{part}"
    _, deltas = adapted(ours.split_attention(clip), name.replace(".", r"\."))
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


def test_pefts_own_attention_would_fail_that(folder):
    """Why SplitAttention exists: once this fails, PEFT has mended its LoRA on nn.MultiheadAttention."""
    clip, plain = ours.load_clip(str(folder)), ours.load_clip(str(folder))
    adapted(clip.model.double(), f"{BLOCK}.attn".replace(".", r"\."))
    layer = clip.model.visual.transformer.resblocks[1].attn
    x = ours.normalise(clip, pixels())
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


def towers(kind, tmp_path):
    """A small model whose towers are of another kind."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    more = {}
    if kind == "resnet":
        vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    if kind in ("timm", "timm head", "siglip"):
        vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
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


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm", "timm head", "siglip", "hf"])
def test_projections_are_found_taken_and_returned_wherever_a_model_keeps_them(tmp_path, tokens, kind):
    torch.manual_seed(0)
    model = towers(kind, tmp_path).eval().double()
    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    tokens = tokens % 100 if kind == "hf" else tokens
    tokens = tokens[:, :32] if kind == "hf" else tokens
    with torch.no_grad():
        before = model.encode_image(x), model.encode_text(tokens)
        names, mark = sorted(model.state_dict()), ours.fingerprint(model)
        taken = ours.take_projections(model)
        parts = taken["image"](model.visual(x)), taken["text"](ours.text_features(model, tokens))
        for a, b in zip(parts, before, strict=True):
            assert (a - b).abs().max() < 1e-12
        assert isinstance(taken["image"], nn.Identity) == (kind == "siglip")
        assert sum(p.numel() for p in taken["text"].parameters()) > 0
        ours.return_projections(model, taken)
        assert sorted(model.state_dict()) == names and ours.fingerprint(model) == mark
        assert torch.equal(model.encode_image(x), before[0])


# ------------------------------------------------------------------------------------------------------------ export


def test_an_export_loads_in_plain_open_clip_with_its_own_preprocessing(tmp_path, tokens):
    clip = ours.load_clip(str(tiny.make_clip(tmp_path / "base", quick_gelu=True)))
    with torch.no_grad():
        clip.model.visual.proj.add_(0.01)
    ours.save_clip(clip, tmp_path / "out")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    images = pixels()
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    with torch.no_grad():
        theirs = model.eval().encode_image(transform(picture)[None], normalize=True)
        assert torch.allclose(model.encode_text(tokens), clip.model.encode_text(tokens), atol=5e-6)
    assert torch.allclose(ours.encode_image(clip, images[:1]), theirs, atol=5e-6)
    assert "QuickGELU" in str(model)
    assert ours.load_clip(str(tmp_path / "out")).fingerprint == ours.fingerprint(clip.model, clip.config)
    ours.save_clip(clip, tmp_path / "out")  # over an older one
    assert not list(tmp_path.glob(".*.tmp"))


# ----------------------------------------------------------------------------------------------------------- judging


def test_ranks_are_those_of_a_naive_count_and_ties_count_against_the_model():
    torch.manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(60, 8), dim=-1) for _ in range(2))
    keys = torch.stack([torch.arange(60) // 3, torch.randint(0, 20, (60,))], dim=1)
    scores = queries @ gallery.T
    expected = []
    for i in range(60):
        same = [bool((keys[i] == keys[j]).any()) for j in range(60)]
        best = max(scores[i, j].item() for j in range(60) if same[j])
        expected.append(1 + sum(scores[i, j].item() >= best for j in range(60) if not same[j]))
    assert ours.retrieval_ranks(queries, gallery, keys, rows=7).tolist() == expected
    collapsed = torch.ones(60, 8) / 8**0.5
    assert ours.retrieval_ranks(collapsed, collapsed, torch.arange(60)).tolist() == [60] * 60
    broken = collapsed.clone()
    broken[::2] = torch.nan
    assert ours.retrieval_ranks(broken, gallery, torch.arange(60))[::2].tolist() == [60] * 30
    perfect = ours.retrieval_metrics(queries, queries, torch.arange(60))
    assert perfect["mrr"] == perfect["text_to_image_recall@1"] == 1.0
