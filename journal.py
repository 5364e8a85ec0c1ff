"""What is written down about a run of stage 3: where it stands, how it went, and what came out.

checkpoint.pt holds everything to go on with, as tensors and plain values (it is loaded with weights_only, no pickle).
The lines of metrics.jsonl are part of it: whatever happens in between, none is lost or written twice.
"""

from __future__ import annotations

import dataclasses
import io
import json
import resource
from pathlib import Path
from typing import Any

import common
import storage
from common import Fail, TrainingConfig

PARTS = {"identity", "micro", "state", "weights", "optimizer", "scaler"}  # of a checkpoint


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


def save_checkpoint(run, state: State, optimizer, scaler, known: dict[str, Any]) -> None:
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
    buffer = io.BytesIO()  # torch's own file writer answers a full disk with an internal error
    torch.save(content, buffer)
    common.write_whole(path, buffer.getvalue())
    if run.config.checkpoint_url:
        storage.put_whole(storage.join(run.config.checkpoint_url, "checkpoint.pt"), path)


def find_checkpoint(config: TrainingConfig, output: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of the output folder and --checkpoint-url; None without one or with --no-resume.

    Fail where all that there is is damaged: to start over would cost what a person may still save.
    """
    import zipfile

    import torch

    if not config.resume:
        return None
    places = [str(output / "checkpoint.pt")]
    places += [storage.join(config.checkpoint_url, "checkpoint.pt")] if config.checkpoint_url else []
    found, damaged = [], []
    for place in places:
        if storage.exists(place):
            try:
                data = io.BytesIO(storage.read_bytes(place))
                if torn := zipfile.ZipFile(data).testzip():  # torch.load looks at no checksum
                    raise ValueError(f"{torn} is damaged")
                data.seek(0)
                checkpoint = torch.load(data, map_location="cpu", weights_only=True)
                if not checkpoint.keys() >= PARTS or State(**checkpoint["state"]).step < 0:
                    raise ValueError("not made by 3_train.py")
                found.append(checkpoint)
            except Fail:
                raise
            except Exception as error:  # torch raises many kinds for a damaged file
                reason = " ".join(str(error).split())[:100]
                damaged.append(f"{place}: not a readable checkpoint ({reason})")
    if damaged and not found:
        raise Fail(f"{damaged[0]}; remove it, or use --no-resume")
    for line in damaged:
        print(f"{line}; going on from the other one", flush=True)
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

    def __init__(self, run):
        self.path, self.main, self.lines, self.wandb = run.output / "metrics.jsonl", run.world.main, [], None
        if run.config.wandb and self.main:
            import wandb

            settings = dataclasses.asdict(run.config)
            self.wandb = wandb.init(
                project="catalogue-clip", name=run.output.name, dir=str(run.output), config=settings
            )

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


def table(before: dict[str, float], after: dict[str, float] | None) -> str:
    """Validation, zero-shot beside fine-tuned."""
    lines = [f"{'validation':<26}{'zero-shot':>10}" + (f"{'fine-tuned':>12}" if after else "")]
    for name in before:
        if name not in ("kind", "epoch", "step"):
            lines.append(f"{name:<26}{before[name]:>10.4f}" + (f"{after[name]:>12.4f}" if after else ""))
    return "\n".join(lines)


def write_result(run, marker: Path, shards: str, seconds: float, facts: dict[str, Any]) -> None:
    """Write train.json, and say what came out."""
    import torch

    if run.world.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.world.device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lost = {data.samples.split: data.samples for data in (run.train, run.validation)}
    common.write_sidecar(
        marker,
        run.config,
        {split: {"samples": s.lost()[1], "unreadable": s.lost()[0]} for split, s in lost.items()},
        {"shards": shards, "base": run.clip.name, "base_fingerprint": facts["identity"]["model"]},
        seconds,
        scenario=run.config.scenario,
        model=run.config.model,
        pretrained=run.config.pretrained,
        memory_mb=round(memory / 1e6),
        unreadable=[*(line for s in lost.values() for line in (*s.damaged, *s.bad.values()))][:1000],
        versions=common.versions("torch", "open_clip_torch", "peft"),
        **facts,
    )
    for split, samples in lost.items():
        if samples.lost()[0]:
            print(f"{split}: {samples.lost()[0]} of {samples.lost()[1]} samples were unreadable; named in {marker}")
    print(table(facts["validation"]["zero_shot"], facts["validation"].get("best")), flush=True)
