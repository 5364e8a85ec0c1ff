"""Stages 3 and 4 on a GPU: checked first, then timed against transformers + PEFT and open_clip's own loop.

    python tests/bench_gpu.py              everything, in at most 9 minutes; appends lines to bench_gpu.jsonl
    python tests/bench_gpu.py --markdown   the last run as the table of docs/performance.md

ViT-B/32 with random weights at an effective batch of 1,024; pictures and captions are drawn and shards written on the
spot, so that nothing comes from the network. A figure is the median of several runs; both sides run in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
import tiny

RESULTS = ROOT / "bench_gpu.jsonl"
BATCH = 1024  # pairs contrasted with each other
SAMPLES = 24 * BATCH  # of the train split on disk
CAPTION = "a photo of a modern red oak dining table with four turned wooden legs"  # 16 tokens with start and end
SCENARIOS = ("zero_shot", "linear_probe", "text_lora", "vision_lora", "dual_lora")

# --------------------------------------------------------------------------------------------------------------------
# What is measured on


def save_model(folder: Path) -> str:
    """A ViT-B/32 with random weights as an open_clip folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    shown = dict(open_clip.get_model_preprocess_cfg(model))
    config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": shown}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def draw_photos(count: int) -> list[bytes]:
    """JPEGs of 224 px, about 25 KB each, as photos in shards are: smooth areas, edges, some grain."""
    import numpy as np
    from PIL import Image

    photos = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        image = Image.fromarray(random.integers(0, 255, (9, 9, 3), np.uint8)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        image = Image.fromarray((np.asarray(image) + random.normal(0, 6, (224, 224, 1))).clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        photos.append(buffer.getvalue())
    return photos


def write_shards(folder: Path, train: int = SAMPLES, others: int = 256) -> Path:
    """A shard folder as 2_prepare.py writes it, of drawn photos."""
    photos, splits, key = draw_photos(256), {}, 0
    for split, count in (("train", train), ("validation", others), ("test", others)):
        entries = []
        for number in range(-(-count // 1000)):
            path = folder / split / f"shard-{number:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = min(1000, count - number * 1000)
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range(samples):
                    title = f"modern red oak dining table number {key}"
                    record = {"id": f"p{key}", "title": title, "color": "grey", "object_type": "table", "style": "",
                              "material": "", "image_path": f"{key}.jpg", "group": f"p{key}", "row": {}}  # fmt: skip
                    # a comment behind the picture's end makes each a picture of its own
                    photo = photos[key % len(photos)] + str(key).encode()
                    for kind, data in (("jpg", photo), ("json", json.dumps(record).encode()), ("txt", title.encode())):
                        info = tarfile.TarInfo(f"{key:09d}.{kind}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    key += 1
            entries.append({"name": f"{split}/{path.name}", "samples": samples, "bytes": path.stat().st_size,
                            "sha256": common.file_digest(path)})  # fmt: skip
        splits[split] = {"samples": count, "shards": entries}
    manifest = {"format": 1, "settings": {"image_size": 224}, "versions": {}, "splits": splits, "counts": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@functools.cache
def caption_tokens(count: int):
    """int64 [count, 77]: captions of 16 tokens."""
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32")([CAPTION])
    assert int((tokens[0] > 0).sum()) == 16
    return tokens.expand(count, -1).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Training steps: ours, and what one would do instead


def our_run(scenario: str, precision: str, micro: int = BATCH, **settings):
    """A Run of the real training code on random weights, without data."""
    stage = importlib.import_module("3_train")
    world = common.World("cuda")
    clip = tiny.vit_b32()
    clip.model.to(world.device)
    settings = {"lr": 1e-4} | settings
    config = stage.TrainingConfig(scenario=scenario, precision=precision, device="cuda", **settings)
    config = stage.settle(config, BATCH, BATCH)
    return stage.Run(config, Path(), world, clip, stage.Towers(clip, config), None, None, None, BATCH, micro)


def our_batch(run, size: int | None = None):
    """Pictures, to be augmented as a run does it unasked, and tokens drawn; or a frozen tower's kept features."""
    import torch

    stage, size = importlib.import_module("3_train"), size or run.effective
    vision, text, _ = stage.SCENARIOS[run.config.scenario]
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 224, 224), generator=random, dtype=torch.uint8)
    images = images if vision else torch.randn(size, 768, generator=random)
    texts = caption_tokens(size) if text else torch.randn(size, 512, generator=random)
    keys = torch.arange(2 * size).view(size, 2)
    views = [stage.draw_view("advanced", str(seed)) for seed in range(size if vision else 0)]
    tensors = (keys, images, texts, torch.tensor(views).reshape(-1, 7))
    return stage.Batch(size, torch.arange(size), *(tensor.pin_memory() for tensor in tensors))


def our_step(run) -> Callable[[], object]:
    """One update of the real training code; the batch comes from pinned memory each time."""
    import torch

    stage = importlib.import_module("3_train")
    batch, optimizer = our_batch(run), stage.make_optimizer(run)
    scaler = torch.amp.GradScaler("cuda", enabled=run.config.precision == "fp16")
    state = stage.State()
    return lambda: stage.update(run, state, optimizer, scaler, batch, 10_000)


def plain_step(model, precision: str, forward) -> Callable[[], object]:
    """Forward, backward, clip, AdamW; the batch comes from pinned memory each time."""
    import torch

    pixels, tokens = torch.randn(BATCH, 3, 224, 224).pin_memory(), caption_tokens(BATCH).pin_memory()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-6, fused=True)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def step():
        images, texts = pixels.to("cuda", non_blocking=True), tokens.to("cuda", non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast("cuda", kind, enabled=kind is not None):
            loss = forward(images, texts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    return step


def transformers_step(precision: str) -> Callable[[], object]:
    """transformers' CLIPModel with PEFT's LoRA on the same layers and projections, at the usual 77 tokens."""
    import logging

    import peft
    from transformers import CLIPConfig, CLIPModel

    logging.disable(logging.WARNING)
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, modules_to_save=["visual_projection", "text_projection"],
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    )  # fmt: skip
    model = peft.get_peft_model(CLIPModel(CLIPConfig()), lora).train().cuda()
    logging.disable(logging.NOTSET)
    return plain_step(model, precision, lambda images, tokens: model(tokens, images, return_loss=True).loss)


def open_clip_step(precision: str) -> Callable[[], object]:
    """open_clip's own loop: full fine-tuning."""
    import open_clip

    model = open_clip.create_model("ViT-B-32").train().cuda()
    loss = open_clip.loss.ClipLoss()
    return plain_step(model, precision, lambda images, tokens: loss(*model(images, tokens)))


def arithmetic(step: Callable[[], object]) -> int:
    """Floating-point operations of the products, attention and convolutions in one call.

    Not by torch's FlopCounterMode: its hooks on modules forbid a nested autograd.grad, as ours has in a backward pass.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry, mm_flop

    known, total = flop_registry | {torch.ops.aten.addmm_: lambda _, a, b, **more: mm_flop(a.shape, b.shape)}, 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal total
            result = function(*args, **(kwargs or {}))
            count = known.get(function._overloadpacket)
            total += count(*args, **(kwargs or {}), out_val=result) if count else 0
            return result

    with Counter():
        step()
    return total


def measure_step(step: Callable[[], object], runs: int = 5, times: int = 2) -> dict:
    """Seconds a step (median of `runs`), peak memory in bytes, floating-point operations of a step."""
    import torch

    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            step()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / times)
    memory = torch.cuda.max_memory_allocated()
    return {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "memory": memory,
            "flops": arithmetic(step)}  # fmt: skip


def free() -> None:
    """Give back what the last model took."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def matrix_peak() -> float:
    """Floating-point operations a second of a large bf16 product."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        torch.cuda.synchronize()
        found.append(5 * 2 * 8192**3 / (time.perf_counter() - start))
    return statistics.median(found[2:])


def profile_step(step: Callable[[], object], count: int = 10) -> str:
    """The kernels that take most of the GPU's time in one call, and how much of the time it is idle."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
    events = [event for event in profiler.key_averages() if event.self_device_time_total]
    busy = sum(event.self_device_time_total for event in events if "CUDA" in str(event.device_type)) / 1e6
    top = sorted(events, key=lambda event: -event.self_device_time_total)[:count]
    parts = "; ".join(f"{event.key[:60]} {event.self_device_time_total / 1e3:.1f} ms" for event in top)
    return f"{wall * 1e3:.0f} ms under the profiler, GPU busy {busy * 1e3:.0f} ms: {parts}"


# --------------------------------------------------------------------------------------------------------------------
# Checks: a fast step that computes something else is worth nothing


def gradients(run, batch) -> tuple[float, object]:
    """(loss, float64 [P] gradient of all that is trained) of one effective batch."""
    import torch

    stage = importlib.import_module("3_train")
    for parameter in run.towers.trained.values():
        parameter.grad = None
    run.towers.train(True)
    large = 2.0**16 if run.config.precision == "fp16" else 1.0  # what a GradScaler begins with
    loss = stage.accumulate(run, batch, 0, lambda loss: loss * large)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in run.towers.trained.values()]
    return float(loss), torch.cat([grad.double().flatten() for grad in grads]) / large


def wake_lora(run) -> None:
    """LoRA's B begins at zero, where A has no gradient: random values make every gradient count."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in run.towers.trained.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)


def check_gradients() -> dict[str, float]:
    """Relative difference of gradients: micro batches against the whole batch, half precision against float32."""
    import torch

    found, size = {}, 256
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    run = our_run("dual_lora", "fp32", micro=size, lora_dropout=0.0)
    wake_lora(run)
    batch = our_batch(run, size)
    loss, whole = gradients(run, batch)
    run.micro = 32
    _, parts = gradients(run, batch)
    found["micro batches of 32 against 256, fp32"] = float((parts - whole).norm() / whole.norm())
    run.micro = size
    for precision in ("bf16", "fp16"):
        run.config = run.towers.config = dataclasses.replace(run.config, precision=precision)
        half_loss, half = gradients(run, batch)
        found[f"{precision} against fp32"] = float((half - whole).norm() / whole.norm())
        found[f"{precision} against fp32, loss"] = abs(half_loss - loss) / loss
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    return found


def check_way(name: str, **settings) -> dict[str, float]:
    """Loss after six steps in one of the ways that should give nearly the same, and seconds a step."""
    import torch

    torch.manual_seed(0)
    step = our_step(our_run("dual_lora", "bf16", lora_dropout=0.0, lr=1e-3, **settings))
    start = time.perf_counter()
    losses = [float(step()["loss"]) for _ in range(6)]
    found = {f"{name}: loss after six steps": losses[-1], f"{name}: seconds of these": time.perf_counter() - start}
    return found | {f"{name}: seconds a step": measure_step(step, 3)["seconds"]}


def run_script(*command: str) -> subprocess.CompletedProcess:
    """Run one of the project's scripts to its end; Fail with the end of what it printed."""
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise common.Fail(f"{command[0]} ended with {ended.returncode}: {(ended.stdout + ended.stderr)[-600:]}")
    return ended


def train_command(shards: Path, model: str, output: Path, *more: str) -> list[str]:
    return ["3_train.py", "--shards", str(shards), "--scenario", "dual_lora", "--model", model, "--pretrained", model,
            "--output", str(output), "--effective-batch-size", str(BATCH), *more]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# From disk: how long the GPU waits for data, and vectors


SETTINGS = ("--epochs", "2", "--precision", "bf16", "--lr", "1e-4")


def epoch_from_disk(work: Path, shards: Path, model: str, seconds_a_step: float) -> dict[str, float]:
    """Pairs a second of each epoch of dual_lora from shards, as the command runs it, against its steps with data at
    hand."""
    printed = run_script(*train_command(shards, model, work / "through", *SETTINGS)).stdout.splitlines()
    speeds = [float(line.rpartition(", ")[2].split()[0]) for line in printed if line.startswith("epoch ")]
    return {f"epoch {k + 1}, pairs a second": speed for k, speed in enumerate(speeds)} | {
        "share of the second epoch that the GPU waits": max(0.0, 1 - seconds_a_step / BATCH * speeds[-1]),
    }


def check_resume(work: Path, shards: Path, model: str) -> dict[str, float]:
    """Largest difference of trained weights: a run killed after its first epoch and gone on with, and that of
    epoch_from_disk(), which ran through; under torchrun by NCCL where there are several GPUs."""
    import torch

    def weights(folder: Path) -> dict:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["weights"]

    def difference(one: dict, other: dict) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    command, saved = train_command(shards, model, work / "stopped", *SETTINGS), work / "stopped" / "checkpoint.pt"
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    before = next((saved.stat() for line in process.stdout if line.startswith("epoch 1/")), None)
    while before and saved.stat().st_mtime_ns == before.st_mtime_ns and process.poll() is None:
        time.sleep(0.01)  # the checkpoint behind the first epoch is being written
    process.kill()
    process.wait()
    resumed = run_script(*command).stdout
    if f"going on after step {SAMPLES // BATCH}, in epoch 2" not in resumed:
        raise common.Fail(f"the run was not killed in its second epoch: {resumed[:300]}")
    through = weights(work / "through")
    found = {"killed and gone on with, largest difference of a weight": difference(through, weights(work / "stopped"))}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(gpus))
        run_script(*torchrun, *train_command(shards, model, work / "nccl", *SETTINGS))
        found[f"{gpus} GPUs by NCCL, largest difference"] = difference(through, weights(work / "nccl"))
    return found


def embed_command(work: Path, shards: Path, model: str) -> dict[str, float]:
    """What 4_embed.py says of its own rates, two models (the second is the first with other preprocessing)."""
    output = work / "embeddings" / "master.parquet"
    other = Path(model.removeprefix("local-dir:")).with_name("other")
    shutil.copytree(model.removeprefix("local-dir:"), other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]  # another fingerprint
    (other / "open_clip_config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    result = run_script("4_embed.py", "--shards", str(shards), "--model", model, "--pretrained", model,
                        "--finetuned", str(other), "--output", str(output))  # fmt: skip
    wall = time.perf_counter() - start
    rates = {}
    for line in result.stderr.splitlines():
        if line.startswith("encoding: ") and " in " in line:  # encoding: 8704 pictures in 3.1 s, 2807.7 a second
            words = line.split()
            rates[f"{words[2]}, two models, a second"] = float(words[-3])
    return rates | {"whole command, seconds": wall}


def encode_rates() -> dict[str, float]:
    """Milliseconds a picture and a prompt in bf16 with the data at hand, in batches of 128."""
    import torch

    clip = tiny.vit_b32()
    clip.model.cuda()
    pixels = torch.randint(0, 256, (128, 3, 224, 224), dtype=torch.uint8).pin_memory()
    found = {}
    for name, inputs in (("picture", {"pixels": pixels}), ("prompt", {"captions": [CAPTION] * 128})):
        with torch.autocast("cuda", torch.bfloat16):
            seconds = []
            for _ in range(8):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    common.encode(clip, **inputs)
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / 1280)
        found[f"ms a {name}, one model, data at hand"] = statistics.median(seconds[2:]) * 1e3
    return found


# --------------------------------------------------------------------------------------------------------------------
# The whole


def note(facts: dict, kind: str, **more) -> None:
    """Print a result and append it to bench_gpu.jsonl."""
    line = {"kind": kind} | more
    with open(RESULTS, "a") as handle:
        handle.write(json.dumps(line | facts) + "\n")
    print(json.dumps(line), flush=True)


def time_steps(facts: dict, peak: float) -> dict[str, dict]:
    """Every scenario and both other ways, in bf16 (and ours and theirs of dual_lora in float32)."""
    import torch

    torch.set_float32_matmul_precision("high")
    found = {}
    makers = {("ours", scenario, "bf16"): functools.partial(lambda s: our_step(our_run(s, "bf16")), scenario)
              for scenario in SCENARIOS if scenario != "zero_shot"}  # fmt: skip
    makers |= {("transformers + PEFT", "dual_lora", "bf16"): functools.partial(transformers_step, "bf16"),
               ("open_clip", "full fine-tuning", "bf16"): functools.partial(open_clip_step, "bf16"),
               ("ours", "dual_lora", "fp32"): lambda: our_step(our_run("dual_lora", "fp32")),
               ("transformers + PEFT", "dual_lora", "fp32"): functools.partial(transformers_step, "fp32")}  # fmt: skip
    for (whose, scenario, precision), maker in makers.items():
        try:
            with common.explain_out_of_memory("smaller"):
                result = measure_step(maker())
        except common.Fail as error:
            note(facts, "step", whose=whose, scenario=scenario, precision=precision, error=str(error))
            result = None
        free()  # behind the except block: until its end the error holds the model
        if result is None:
            continue
        found[f"{whose} {scenario} {precision}"] = result
        seconds = result["seconds"]
        note(facts, "step", whose=whose, scenario=scenario, precision=precision, pairs_a_second=BATCH / seconds,
             milliseconds=seconds * 1e3, memory_mb=result["memory"] / 1e6, teraflop=result["flops"] / 1e12,
             share_of_peak=result["flops"] / seconds / peak)  # fmt: skip
    return found


def markdown(path: Path) -> str:
    """The table of docs/performance.md from the last run."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["date"] == lines[-1]["date"]]
    rows = ["| training step of 1,024 pairs | pairs a second | memory, GB | share of the card's matrix peak |",
            "|---|---|---|---|"]  # fmt: skip
    for line in lines:
        if line["kind"] == "step" and "error" not in line:
            rows.append(
                f"| {line['whose']}, {line['scenario']}, {line['precision']} | {line['pairs_a_second']:,.0f} |"
                f" {line['memory_mb'] / 1e3:.1f} | {line['share_of_peak']:.0%} |"
            )
    rows += ["", "| what | figure |", "|---|---|"]
    for line in lines:
        if line["kind"] in ("check", "rate"):
            rows += [f"| {name} | {value:.4g} |" for name, value in line["found"].items()]
    return f"{lines[0]['card']}, torch {lines[0]['torch']}\n\n" + "\n".join(rows)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the last results as a table and stop")
    parser.add_argument("--profile", action="store_true", help="also profile a step of dual_lora")
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.markdown:
        print(markdown(RESULTS))
        return common.DONE
    import torch

    if not torch.cuda.is_available():
        raise common.Fail("no CUDA GPU is here; this bench needs one")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    facts = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "card": torch.cuda.get_device_name(),
             "torch": torch.__version__}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        work, began = Path(folder), time.perf_counter()
        stack.callback(lambda: print(f"took {time.perf_counter() - began:.0f} s"))
        shards, model = write_shards(work / "shards"), save_model(work / "model")
        few = write_shards(work / "few", 4096)
        peak = matrix_peak()
        note(facts, "rate", found={"bf16 matrix product, TFLOP/s": peak / 1e12})
        steps, failed = {}, []

        def attempt(kind: str, make: Callable[..., dict], *arguments) -> None:
            """Note what a section finds; one that fails is said at the end and holds up no other."""
            name = getattr(make, "__name__", arguments[0] if arguments else "")
            try:
                note(facts, kind, found=make(*arguments))
                print(f"{name}: until {time.perf_counter() - began:.0f} s", flush=True)
            except (common.Fail, RuntimeError, AssertionError, ImportError) as error:
                failed.append(f"{name}: {type(error).__name__} {error}")
                print(failed[-1], flush=True)
            free()

        attempt("check", check_gradients)
        steps |= time_steps(facts, peak)
        if args.profile:
            print(profile_step(our_step(our_run("dual_lora", "bf16"))))
            free()
        attempt("rate", epoch_from_disk, work, shards, model, steps["ours dual_lora bf16"]["seconds"])
        attempt("check", check_resume, work, shards, model)
        attempt("rate", encode_rates)
        attempt("rate", embed_command, work, few, model)
        attempt("check", check_way, "adamw")
        attempt("check", functools.partial(check_way, optimizer="adamw8bit"), "adamw8bit")
        attempt("check", functools.partial(check_way, compile=True), "compile")
    print(markdown(RESULTS))
    if failed:
        raise common.Fail(f"{len(failed)} parts failed: {'; '.join(failed)[:500]}")
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
