"""Speed of stage 3 at ViT-B/32, batch 32, 16 tokens a caption: against what one would do instead, and its caches.

python tests/bench_train.py        parameters and memory of each scenario against full fine-tuning, as a table
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tiny
from bench import Case

BATCH = 32
CAPTION = "a photo of a modern red oak dining table with four turned wooden legs"  # 16 tokens with start and end


@functools.cache
def caption_tokens():
    """int64 [BATCH, 77]: captions of 16 tokens."""
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32")([CAPTION] * BATCH)
    assert int((tokens[0] > 0).sum()) == 16
    return tokens


def our_run(scenario: str, precision: str, **settings):
    """A Run of the real training code on random weights, without data."""
    import common

    common.keep_freed_memory()  # as 3_train.py does
    stage = importlib.import_module("3_train")
    clip = tiny.vit_b32()
    config = stage.TrainingConfig(scenario=scenario, precision=precision, **({"lr": 1e-4} | settings))
    config = stage.settle(config, BATCH, BATCH)
    towers = stage.Towers(clip, config)
    return stage.Run(config, Path(), common.World("cpu"), clip, towers, None, None, None, BATCH, BATCH)


def our_step(scenario: str, precision: str, kept: bool = True, plain: bool = False, run=None) -> Callable[[], object]:
    """One update of the real training code; kept: frozen towers' features are there already; plain: the towers run as
    open_clip runs them, over 77 tokens and to the last block's end."""
    import torch

    stage = importlib.import_module("3_train")
    run = run or our_run(scenario, precision)
    vision, text, _ = stage.SCENARIOS[scenario]
    images = torch.randint(0, 256, (BATCH, 3, 224, 224)).byte() if vision or not kept else torch.randn(BATCH, 768)
    texts = caption_tokens() if text or not kept else torch.randn(BATCH, 512)
    keys = torch.arange(2 * BATCH).view(BATCH, 2)
    batch = stage.Batch(BATCH, torch.arange(BATCH), keys, images, texts)
    if plain:
        run.towers.features = functools.partial(plain_features, run.clip)
    optimizer, scaler, state = stage.make_optimizer(run), torch.amp.GradScaler("cpu", enabled=False), stage.State()
    return lambda: stage.update(run, state, optimizer, scaler, batch, 1000)


def plain_features(clip, tower: str, inputs, views):
    """What a tower gives before its projection, by open_clip's own forward."""
    import common

    return (
        clip.model.encode_image(common.normalise_pixels(clip, inputs))
        if tower == "image"
        else clip.model.encode_text(inputs)
    )


def transformers_step(precision: str) -> Callable[[], object]:
    """One step of transformers' CLIPModel with PEFT's LoRA on the same layers, at the usual 77 tokens."""
    import logging

    logging.disable(logging.WARNING)
    import peft
    from transformers import CLIPConfig, CLIPModel

    logging.disable(logging.NOTSET)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets,
                           modules_to_save=["visual_projection", "text_projection"])  # fmt: skip
    model = peft.get_peft_model(CLIPModel(CLIPConfig()), lora).train()
    return plain_step(model, precision, lambda images, tokens: model(tokens, images, return_loss=True).loss)


def full_step(precision: str) -> Callable[[], object]:
    """One step of open_clip's own full fine-tuning."""
    import open_clip

    model = open_clip.create_model("ViT-B-32").train()
    loss = open_clip.loss.ClipLoss()
    return plain_step(model, precision, lambda images, tokens: loss(*model(images, tokens)))


def plain_step(model, precision: str, forward) -> Callable[[], object]:
    """Forward, backward, clip, AdamW."""
    import torch

    images, tokens = torch.randn(BATCH, 3, 224, 224), caption_tokens()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(images, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


class Side:
    """A training step in a process of its own, for ours changes how its process keeps memory."""

    def __init__(self, times: int, maker: Callable, *arguments):
        self.made = times, maker, arguments
        self.process = self.pipe = None

    def ask(self, what: str):
        """seconds (a pair), arithmetic or operations."""
        if not self.process:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=answer, args=(theirs, *self.made), daemon=True)
            self.process.start()
        self.pipe.send(what)
        return self.pipe.recv()

    def end(self) -> None:
        self.process.terminate()
        self.process = None


def answer(pipe, times: int, maker: Callable, arguments: tuple) -> None:
    """The process of a Side."""
    step = maker(*arguments)
    step()

    def seconds() -> float:
        step()  # training has no pauses, after which a step takes up to a fifth longer
        start = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - start) / times / BATCH

    known = {"seconds": seconds, "arithmetic": lambda: arithmetic(step), "operations": lambda: operations(step)}
    while True:
        pipe.send(known[pipe.recv()]())


def operations(act: Callable[[], object]) -> str:
    """The torch operations that take most of the time of one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        act()
    total = sum(event.self_cpu_time_total for event in profiler.key_averages())
    top = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:4]
    parts = ", ".join(f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in top)
    return f"torch operations: {parts}"


def arithmetic(act: Callable[[], object]) -> int:
    """Floating-point operations of the products, attention and convolutions in one call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, mm_flop

    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: mm_flop(a, b)}  # which torch leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        act()
    return counter.get_total_flops()


def loading(workdir: Path) -> tuple[Callable[[], float], Callable[[], str]]:
    """Pictures of 224 px and captions, read, decoded and tokenised by one thread, as for the first epoch."""

    @functools.cache
    def data():
        from types import SimpleNamespace

        import open_clip

        import common

        stage = importlib.import_module("3_train")
        folder = tiny.make_shards(workdir / "shards", train=1000, validation=8, test=8, size=224)
        clip = SimpleNamespace(size=224, tokenizer=open_clip.get_tokenizer("ViT-B-32"), fingerprint="",
                               device=SimpleNamespace(type="cpu"))  # fmt: skip
        config = stage.TrainingConfig(workers=1, epochs=1, augment="advanced")
        split = stage.open_splits(str(folder), common.load_manifest(folder), workdir / "cache", clip, config)[0]
        return SimpleNamespace(config=config, output=workdir, world=common.World("cpu"), clip=clip), split

    def run() -> float:
        import torch

        stage = importlib.import_module("3_train")
        torch.set_num_threads(1)
        known, split = data()
        shutil.rmtree(workdir / "cache", ignore_errors=True)
        start, count = time.perf_counter(), 0
        stage.cache_captions(known, split)
        for batch in split.batches(stage.epoch_plan(len(split), 128, 0, 0, 0, 1), 0):
            count += len(batch.ids)
        return (time.perf_counter() - start) / count

    def bound() -> str:
        from common import decode_jpeg

        jpeg = data()[1].read(0, "jpg")[0]
        start = time.perf_counter()
        for _ in range(500):
            decode_jpeg(jpeg, 224)
        return f"decoding JPEG: {(time.perf_counter() - start) / 500 * 1e6:.0f} of {run() * 1e6:.0f} microseconds"

    return run, bound


def steps(title: str, ours: tuple, theirs: tuple, target: float, times: int = 1) -> Case:
    """A case of two training steps, each a maker and its arguments."""
    sides = Side(times, *ours), Side(1, *theirs)

    def bound() -> str:
        more = sides[1].ask("arithmetic") / sides[0].ask("arithmetic")
        found = f"arithmetic, of which theirs has {more:.3g} times as much; {sides[0].ask('operations')}"
        for side in sides:
            side.end()
        return found

    return Case(title, *(functools.partial(side.ask, "seconds") for side in sides), target, "pair", bound)


def cases(workdir: Path) -> list[Case]:
    """The cases of stage 3."""
    from common import auto_precision

    found, unasked = [], auto_precision("cpu")
    pairs = [("auto", "fp32", 2.4, 3.3)]
    if unasked == "bf16":  # else the others say the same again, or compute in what the processor has not
        pairs += [("bf16", "bf16", 1.4, 1.8), ("fp32", "fp32", 2.4, 3.3)]
    for ours, theirs, hugging, full in pairs:
        step = (our_step, "dual_lora", unasked if ours == "auto" else ours)
        for name, maker, target in (
            ("transformers' CLIPModel + PEFT", transformers_step, hugging),
            ("open_clip's full fine-tuning", full_step, full),
        ):
            found.append(steps(f"dual_lora, {ours} / {name}, {theirs}", step, (maker, theirs), target))
    for scenario, times, target in (("vision_lora", 1, 1.3), ("text_lora", 4, 7.0), ("linear_probe", 300, 500.0)):
        ours = (our_step, scenario, "fp32")
        found.append(steps(f"{scenario} / without kept features", ours, (*ours, False), target, times))
        title = f"{scenario} / without kept features, towers as open_clip runs them"
        found.append(steps(title, ours, (*ours, False, True), target, times))
    load, bound = loading(workdir)
    found.append(Case("loading 224 px pictures / 2,000 a second a core", load, lambda: 1 / 2000, 1.0, "picture", bound))
    return found


# --------------------------------------------------------------------------------------------------------------------
# Memory


def trained_parameters(towers) -> dict[str, float]:
    """How many parameters are trained, and LoRA's share of all."""
    trained = {name: parameter.numel() for name, parameter in towers.trained.items()}
    lora = sum(count for name, count in trained.items() if "lora_" in name)
    total = sum(p.numel() for part in (towers.model, towers.projections) for p in part.parameters())
    return {"trained": sum(trained.values()), "lora_share": lora / (total - lora)}


def measure_memory(scenario: str | None, settings: dict, answer) -> None:
    """In a process of its own: send (trained parameters, LoRA's share, bytes that three steps added at their peak)."""
    import open_clip
    import peft  # noqa: F401  what importing takes is nobody's
    import torch

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if scenario:
        run = our_run(scenario, "fp32", **settings)
        counts, step = trained_parameters(run.towers), our_step(scenario, "fp32", run=run)
    else:
        step = full_step("fp32")
        total = sum(p.numel() for p in open_clip.create_model("ViT-B-32", device=torch.device("meta")).parameters())
        counts = {"trained": total, "lora_share": 0.0}
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put((counts["trained"], counts["lora_share"], (peak - imported) * 1024))


def memory_table() -> str:
    """Each scenario, at rank 16 and at rank 1, against open_clip's full fine-tuning: ViT-B/32, float32, batch 32."""
    context = multiprocessing.get_context("spawn")
    cases = [("full fine-tuning", None, {})]
    cases += [(name, name, {}) for name in ("linear_probe", "text_lora", "vision_lora", "dual_lora")]
    cases += [("dual_lora, rank 1", "dual_lora", {"lora_r": 1}),
              ("dual_lora, --grad-checkpointing", "dual_lora", {"grad_checkpointing": True})]  # fmt: skip
    lines = ["| what | parameters trained | LoRA's share | memory, MB | of full |", "|---|---|---|---|---|"]
    whole = 0
    for name, scenario, settings in cases:
        answer = context.Queue()
        process = context.Process(target=measure_memory, args=(scenario, settings, answer))
        process.start()
        trained, share, peak = answer.get(timeout=600)
        process.join()
        whole = whole or peak
        lines.append(f"| {name} | {trained:,} | {share:.2%} | {peak / 1e6:.0f} | {peak / whole:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table())
