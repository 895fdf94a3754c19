"""Laws of the rehearsal: its figures are those of arrays, devices and programs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sparx_jax import chips
from sparx_jax.chips import CHIPS, find_devices
from sparx_jax.compile import (
    collectives,
    largest_batch,
    predict,
    report,
    table,
    traffic,
)
from sparx_jax.errors import UserError
from sparx_jax.training.config import default_config
from tests.training.jobs import CONFIG, ROOT

LIBTPU = ROOT / ".cache/libtpu"
needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None and not LIBTPU.is_dir(),
    reason="`make libtpu` puts TPU's compiler there; CI does",
)
# The flags of the suite are for CPU, and libtpu refuses one that it does not know.
NO_FLAGS = {"XLA_FLAGS": ""}
CHIP = chips.Chip("made", memory=1000.0, flops=10.0, bandwidth=5.0, links=2.0)


def test_collectives_are_counted_with_their_bytes():
    text = """
  %a = f32[10,2]{1,0} all-reduce(%x), replica_groups={}
  %b = (bf16[8]{0}, bf16[4]{0}) all-reduce(%y, %z), to_apply=%sum
  %c = (f32[2]{0}, f32[6]{0:T(128)}) all-gather-start(%q), dimensions={0}
  %d = f32[6]{0} all-gather-done(%c)
  %e = f32[] add(%f, %all-reduce)
"""
    assert collectives(text) == {"all-reduce": [2, 80 + 24], "all-gather": [1, 32]}


def test_traffic_is_what_the_main_part_reads_and_writes():
    text = """
%fused (p: f32[99]) -> f32[99] {
  ROOT %inside = f32[99]{0} add(%p, %p)
}

ENTRY %main (x: bf16[8,4]) -> (f32[2]) {
  %x = bf16[8,4]{1,0} parameter(0), sharding={replicated}
  %mm.1 = (bf16[8,2]{1,0}, s8[4096]{0}) custom-call(%x, %x), custom_call_target="gemm"
  %gte = bf16[8,2]{1,0} get-tuple-element(%mm.1), index=0
  %fusion = f32[2]{0} fusion(%gte), kind=kInput, calls=%fused
  ROOT %out = (f32[2]{0}) tuple(%fusion)
}
"""
    assert traffic(text) == (64 + 64 + 32) + (32 + 8)


def test_a_prediction_is_a_roofline():
    step = {
        "operations": 100.0,
        "traffic": 10.0,
        "cycles": 0,
        "collectives": {"all-reduce": [1, 8]},
    }
    found = predict(step, CHIP, 4)
    assert found == {"arithmetic": 10.0, "memory": 2.0, "network": 2 * 8 * 3 / 4 / 2}
    found = predict(step | {"cycles": 60}, CHIP._replace(clock=20.0), 1)
    assert (found["schedule"], found["network"]) == (3.0, 0.0)


@pytest.mark.parametrize("first", [2, 16, 300])
def test_the_largest_batch_is_found_and_was_compiled(first):
    """Memory of 100 + 7 n, and a compiler that says so when it does not fit."""
    compiled = []

    def measure(n):
        compiled.append(n)
        peak = 100.0 + 7 * n
        return {"peak": peak, "fits": peak <= 1000 * 15.75 / 16}

    batch, step = largest_batch(measure, CHIP, measure(first), first, 4)
    assert batch == 120 and step["peak"] == 940 and len(compiled) <= 4
    assert batch in compiled or batch == first
    none, _ = largest_batch(lambda n: {"peak": 2e3 + n, "fits": False}, CHIP,
                            {"peak": 2e3, "fits": False}, 1, 1)  # fmt: skip
    assert none == 0


def test_a_batch_that_fits_counts_though_none_of_the_larger_ones_does():
    measure = lambda n: {"peak": 100.0 * n, "fits": n < 5}  # noqa: E731
    assert largest_batch(measure, CHIP, measure(4), 4, 1) == (4, measure(4))


def test_a_step_that_does_not_fit_is_told(capsys):
    step = {"per_device": 8, "peak": 3000.0, "fits": False, "parameters": 4.0}
    text = "\n".join(table([("none, train", step)], CHIP, 4))
    assert "300%: TOO MUCH" in text


def test_the_table_predicts_the_time_of_all_devices():
    """The slower of the two that overlap, then the network; rates are of all images."""
    times = {"arithmetic": 0.02, "memory": 0.03, "network": 0.01}
    step = {
        "per_device": 8,
        "peak": 500.0,
        "fits": True,
        "parameters": 2.0**31,
        "collectives": {"all-reduce": [3, 2**21]},
        "predicted_s": times,
    }
    xla = step | {"predicted_s": times | {"schedule": 0.07}, "peak": 990.0}
    lines = table([("none, train", step), ("block, train", xla)], CHIP, 4)
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines}
    rows = {name: [cell.strip() for cell in row] for name, row in cells.items()}
    assert rows["one of 4 made"] == ["none, train", "block, train"]
    assert rows["images a device"] == ["8", "8"]
    assert rows["parameters"] == ["2.00 GiB"] * 2
    # The runtime keeps a 64th of the memory for itself.
    assert rows["of the device's memory"] == ["50%", "99%: TOO MUCH"]
    assert rows["collectives"] == ["3 all-reduce 2.0 MiB"] * 2
    assert rows["predicted time"] == [
        "40 ms, 800 images/s, bound by memory",
        "80 ms, 400 images/s, bound by schedule",
    ]


def test_steps_are_compiled_for_the_images_of_a_device(monkeypatch):
    """Of a part of the batch in training, where gradients are accumulated."""
    seen = []

    def compile_step(config, devices, kind):
        seen.append((kind, config.batch_size, config.eval_batch_size))
        return {"peak": 1.0, "fits": True, "remat": config.model.remat}

    monkeypatch.setattr("sparx_jax.compile.compile_step", compile_step)
    settings, saved = default_config(), []
    settings.batch_size, settings.eval_batch_size = 32, 24
    settings.accumulation_steps = 4
    devices, chip = jax.devices() * 2, find_devices("here")[1]
    mesh = SimpleNamespace(devices=np.zeros((2, 1)))  # one device cannot be in it twice
    monkeypatch.setattr("sparx_jax.compile.make_mesh", lambda *_: mesh)
    report(settings, devices, chip, ["none", "stage"], False, saved.append)
    assert seen == [("train", 32, 8), ("train", 32, 8), ("eval", 96, 24)]
    steps = saved[-1]["steps"]
    for remat in ("none", "stage"):
        train = steps[remat]["train"]
        assert (train["per_device"], train["remat"]) == (4, remat)
    assert steps["eval"]["eval"]["per_device"] == 12


def test_unknown_devices_and_missing_compilers_are_told(monkeypatch):
    for topology in ("v9:2x2", "v5e", "v5e:0xx"):
        with pytest.raises(UserError, match="is not known; there are v5e:16x16"):
            find_devices(topology)
    monkeypatch.setattr(chips, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "jax\[tpu\]=='):
        find_devices("v4:2x2x4")
    devices, chip = find_devices("here")
    assert devices == jax.devices() and chip.memory > 2**30
    assert all(chip.memory > 1e9 and chip.links for chip in CHIPS.values())


def test_figures_are_saved_after_each_step(monkeypatch):
    def compile_step(config, devices, kind):
        if kind == "eval":
            raise MemoryError
        return {"peak": 1.0, "fits": True}

    monkeypatch.setattr("sparx_jax.compile.compile_step", compile_step)
    settings, saved = default_config(), []
    settings.batch_size = settings.eval_batch_size = 8
    save = lambda found: saved.append(json.dumps(found))  # noqa: E731
    with pytest.raises(MemoryError):
        report(settings, *find_devices("here"), [], False, save)
    (found,) = map(json.loads, saved)
    assert list(found["steps"]) == ["none"]
    assert found["steps"]["none"]["train"]["peak"] == 1


def rehearse(tmp_path, config, *flags, **env):
    out = tmp_path / "figures.json"
    words = [sys.executable, "-m", "sparx_jax.compile", config, *flags, f"--out={out}"]
    path = f"{LIBTPU}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **env}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_the_devices_of_this_machine_are_rehearsed(tmp_path):
    flags = ["--nosearch", "--config.batch_size=16", "--config.eval_batch_size=8"]
    flags.append("--config.model.num_classes=10")
    told, found = rehearse(tmp_path, CONFIG, *flags, JAX_NUM_CPU_DEVICES="2")
    assert "| one of 2 cpu | none, train | eval, eval |" in told
    train, evaluation = found["steps"]["none"]["train"], found["steps"]["eval"]["eval"]
    # 12,731 parameters and the statistics of BatchNorm, in float32; two moments.
    assert 4 * 12_731 <= train["parameters"] < 4 * 13_500
    assert train["average"] == train["parameters"]
    assert train["optimizer"] >= 2 * 4 * 12_731
    assert train["batch"] == 8 * (32 * 32 * 3 + 4 + 4)
    assert evaluation["parameters"] == train["parameters"]
    assert evaluation["average"] == evaluation["optimizer"] == 0
    held = sum(train[k] for k in ("parameters", "average", "optimizer", "batch"))
    assert train["fits"] and train["peak"] > held
    assert train["peak"] > evaluation["peak"]
    number, size = train["collectives"]["all-reduce"]
    assert number >= 1 and size >= 4 * 12_731  # the gradient, at least
    assert "all-gather" not in train["collectives"]
    assert "| predicted time | ? | ? |" in told and "predicted_s" not in train


@pytest.mark.slow
@needs_libtpu
def test_a_pod_that_is_not_there_is_rehearsed(tmp_path):
    flags = ["--nosearch", "--topology=v5e:2x4", "--config.eval_batch_size=8"]
    flags.append("--config.model.drop_path_rate=0.1")
    told, found = rehearse(tmp_path, CONFIG, *flags, **NO_FLAGS)
    assert found["devices"] == 8 and found["device"]["kind"] == "TPU v5 lite"
    train = found["steps"]["none"]["train"]
    assert train["fits"] and train["cycles"] > 0 and "schedule" in told
    assert "all-reduce" in train["collectives"]
    assert "all-gather" not in train["collectives"]
    # Those of mixup at most: draws of one axis were passed around.
    assert train["collectives"].get("collective-permute", [0])[0] <= 3


@pytest.mark.slow
@needs_libtpu
def test_on_a_pod_scans_and_depthwise_convolutions_are_kernels(tmp_path):
    flags = ["--nosearch", "--topology=v5e:2x4", "--config.batch_size=64"]
    flags += ["--config.eval_batch_size=64", "--config.model.dtype=bfloat16"]
    flags += ["--config.model.depths=(1,1,1,1)", "--config.model.dims=(8,8,12,16)"]
    flags += [
        f"--config.model.connector.{name}=(0,0,0,0)" for name in ("stride", "start")
    ]
    # In each layer a scan and three convolutions.
    mamba, kernels = "--config=configs/digits.py", 4 * (1 + 3)
    _, found = rehearse(tmp_path, mamba, *flags, **NO_FLAGS)
    train, evaluation = found["steps"]["none"]["train"], found["steps"]["eval"]["eval"]
    assert (train["kernels"], evaluation["kernels"]) == (2 * kernels, kernels)
    assert "all-gather" not in train["collectives"]
