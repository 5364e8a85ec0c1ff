"""tests/bench_gpu.py runs, here without a GPU and at a few pairs: on a borrowed one there is no time to mend it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bench_gpu
import common

ROOT = Path(__file__).parents[1]
SMALL = f"local-dir:{ROOT / 'tests/small_clip'}"


@pytest.fixture
def without_gpu(monkeypatch):
    """Have the bench work on the CPU, with batches of 8."""
    world = common.World
    monkeypatch.setattr(common, "World", lambda device: world("cpu"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)
    monkeypatch.setattr(bench_gpu, "BATCH", 8)
    monkeypatch.setattr(bench_gpu, "SAMPLES", 256)


@pytest.mark.parametrize("scenario", ["text_lora", "dual_lora"])
def test_steps_and_gradients(without_gpu, scenario):
    run = bench_gpu.our_run(scenario, "fp32", micro=8, lora_dropout=0.0)
    step = bench_gpu.our_step(run)
    assert bench_gpu.arithmetic(step) > 1e9 and step()["loss"] > 0
    bench_gpu.wake_lora(run)
    batch = bench_gpu.our_batch(run)
    loss, whole = bench_gpu.gradients(run, batch)
    run.micro = 3
    same_loss, parts = bench_gpu.gradients(run, batch)
    assert same_loss == pytest.approx(loss)
    assert (parts - whole).norm() <= 1e-3 * whole.norm()


def test_what_is_read_from_disk(without_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "SETTINGS", (*bench_gpu.SETTINGS, "--augment", "simple", "--precision", "fp32"))
    shards = bench_gpu.write_shards(tmp_path / "shards", bench_gpu.SAMPLES, 16)
    epochs = bench_gpu.epoch_from_disk(tmp_path, shards, SMALL, 0.001)
    assert {"epoch 1, pairs a second", "epoch 2, pairs a second"} < epochs.keys()
    assert set(bench_gpu.check_resume(tmp_path, shards, SMALL).values()) == {0.0}
    copy = tmp_path / "model"
    copy.symlink_to(ROOT / "tests/small_clip")
    rates = bench_gpu.embed_command(tmp_path, shards, f"local-dir:{copy}")
    assert {"pictures, two models, a second", "texts, two models, a second", "whole command, seconds"} == rates.keys()
    results = tmp_path / "bench_gpu.jsonl"
    results.write_text(json.dumps({"date": "1", "kind": "rate", "found": rates, "card": "a card", "torch": "2"}) + "\n")
    assert "pictures, two models" in bench_gpu.markdown(results)
