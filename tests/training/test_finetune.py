"""Laws of fine-tuning: what is taken over, what starts anew, what stays as it is."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sparx_jax import create_model, load_run
from sparx_jax.errors import UserError
from sparx_jax.interop.names import to_torch, torch_name
from sparx_jax.interop.windows import resize_position_bias
from sparx_jax.layers.norm import BatchNorm
from sparx_jax.training import finetune, loop
from sparx_jax.training import state as states
from sparx_jax.training.checkpoint import Checkpoints
from sparx_jax.training.config import OptimizerConfig, as_dict
from sparx_jax.training.logging import read_metrics
from sparx_jax.training.optimizer import (
    is_frozen,
    layer_numbers,
    learning_rate,
    make_optimizer,
    trainable,
)
from sparx_jax.training.step import compile_train_step
from tests.training.conftest import digest, tiny_settings

HEAD = {"head.kernel", "head.bias"}


def scrambled(weights, seed):
    """Other values for all arrays, so that none is what a fresh network has."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (np.asarray(a) + rng.normal(size=a.shape)).astype(a.dtype), weights
    )


def fresh(run, seed=5, **changes):
    """The state of a new run with another number of classes, or what `changes` say."""
    model = dataclasses.replace(run.config.model, **{"num_classes": 4} | changes)
    mesh = run.setup.mesh
    return states.init(model, run.optimizer, seed=seed, use_ema=True, mesh=mesh)[1]


def place(array):
    return array.shape, array.dtype, array.sharding


def flat(weights):
    return {k: np.asarray(v) for k, v in (weights.params | weights.batch_stats).items()}


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A run's folder, and the averaged weights of the better of its checkpoints."""
    workdir, state = tmp_path_factory.mktemp("saved"), run.init()

    def put(weights, like):
        return jax.tree.map(lambda w, a: jax.device_put(w, a.sharding), weights, like)

    state = state._replace(
        weights=put(scrambled(state.weights, 1), state.weights),
        ema=put(scrambled(state.ema, 2), state.ema),
        step=jax.device_put(np.int32(7), state.step.sharding),
    )
    later = run.init()._replace(step=jax.device_put(np.int32(9), state.step.sharding))
    checkpoints = Checkpoints(str(workdir))
    for each, top1 in ((state, 1.0), (later, 0.5)):
        names = dict(class_names="0123456789")
        checkpoints.save(each, as_dict(run.config), {"top1": top1}, **names)
    checkpoints.close()
    return workdir, flat(state.ema)


def test_a_trained_network_is_loaded_by_its_folder(saved, tmp_path):
    folder, average = saved
    model = load_run(folder)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
    assert norms and all(norm.use_running_average for norm in norms)
    found = flat(states.split(model)[1])
    raw = flat(states.split(load_run(folder, step=7, weights="raw"))[1])
    assert found.keys() == average.keys() == raw.keys()
    for path, array in average.items():
        np.testing.assert_array_equal(found[path], array, strict=True)
        assert not np.array_equal(raw[path], array)
    with pytest.raises(UserError, match="holds no checkpoints"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="weights='avg' must be one of raw"):
        load_run(folder, weights="avg")


@pytest.fixture(scope="module")
def torch_file(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "weights.safetensors"
    save_file(to_torch(saved[1]), path)
    return path


@pytest.mark.parametrize("kind", ["run", "step", "file"])
def test_all_but_the_head_is_taken_over(run, saved, torch_file, kind, capsys):
    """With another number of classes; BatchNorm's averages come along."""
    workdir, expected = saved
    source = {"run": workdir, "step": workdir / "checkpoints/7", "file": torch_file}
    new = fresh(run)
    before = jax.device_get(new)
    state = finetune.start_from(str(source[kind]), new)
    assert "a new head: 10 classes there, 4 here" in capsys.readouterr().out
    for found in (flat(state.weights), flat(state.ema)):
        assert found.keys() == expected.keys()
        for path, array in found.items():
            wanted = flat(before.weights) if path in HEAD else expected
            np.testing.assert_array_equal(array, wanted[path], err_msg=path)
    assert state.step == 0
    assert digest(state.opt_state) == digest(before.opt_state)
    assert jax.tree.map(place, state) == jax.tree.map(place, new)
    ema, weights = (jax.tree.leaves(t) for t in (state.ema, state.weights))
    # Apart in memory, as a step gives both back.
    assert not {id(a) for a in ema} & {id(a) for a in weights}


def test_as_many_other_classes_get_a_new_head(run, saved, capsys):
    workdir, expected = saved
    new = fresh(run, num_classes=10)
    before = flat(new.weights)
    state = finetune.start_from(str(workdir), new, "012345678x")
    assert "a new head: class 9 is '9' there, 'x' here" in capsys.readouterr().out
    for path, array in flat(state.weights).items():
        wanted = before if path in HEAD else expected
        np.testing.assert_array_equal(array, wanted[path], err_msg=path)


def test_with_the_same_classes_the_head_is_taken_too(run, saved, capsys):
    workdir, expected = saved
    state = finetune.start_from(str(workdir), fresh(run, num_classes=10), "0123456789")
    assert "new head" not in capsys.readouterr().out
    for path, array in flat(state.weights).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_a_file_without_head_serves_as_well(run, saved, tmp_path, capsys):
    arrays = {k: v for k, v in saved[1].items() if k not in HEAD}
    save_file(to_torch(arrays), tmp_path / "backbone.safetensors")
    state = finetune.start_from(str(tmp_path / "backbone.safetensors"), fresh(run))
    assert "no classes there, 4 here" in capsys.readouterr().out
    np.testing.assert_array_equal(
        state.weights.params["stem.convs.0.kernel"], arrays["stem.convs.0.kernel"]
    )


def test_biases_of_other_windows_are_stretched():
    path = "stages.0.blocks.0.mixer.position_bias"
    arrays = {path: np.random.default_rng(0).normal(size=(13, 13, 2))}
    head = {k: np.zeros(3) for k in HEAD}
    own = {path: np.zeros((7, 7, 2))} | head
    fitted, new_head = finetune._fit(arrays | head, own, "x")
    np.testing.assert_array_equal(fitted[path], resize_position_bias(arrays[path], 4))
    assert not new_head


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"dims": (8, 8, 12, 20)},
            r"another network: .*\(16,\) there, \(20,\) here",
        ),
        ({"depths": (1, 1, 2, 1)}, r"stages\.2\.blocks\.1\.\S+ \(absent there"),
    ],
)
def test_weights_of_another_network_are_refused(run, saved, change, message):
    with pytest.raises(UserError, match=message):
        finetune.start_from(str(saved[0]), fresh(run, **change))


def test_a_source_that_does_not_exist_is_refused(run, saved):
    for source, message in (("/nowhere/x.pth", "does not exist"), ("/tmp", "holds no")):
        with pytest.raises(UserError, match=message):
            finetune.start_from(source, fresh(run))
    state = run.init()
    assert finetune.start_from("", state) is state


# Of timm 1.0.31, param_groups_layer_decay of swin_tiny_patch4_window7_224: how often a
# group's rate is multiplied by the decay.
TIMM_EXPONENTS = {
    "patch_embed": 13,
    "layers.0.blocks.0": 12,
    "layers.0.blocks.1": 11,
    "layers.1.downsample": 10,
    "layers.1.blocks.0": 10,
    "layers.1.blocks.1": 9,
    "layers.2.downsample": 8,
    "layers.2.blocks.0": 8,
    "layers.2.blocks.1": 7,
    "layers.2.blocks.2": 6,
    "layers.2.blocks.3": 5,
    "layers.2.blocks.4": 4,
    "layers.2.blocks.5": 3,
    "layers.3.downsample": 2,
    "layers.3.blocks.0": 2,
    "layers.3.blocks.1": 1,
    "norm": 1,
    "head": 0,
}


def test_layers_are_numbered_as_timm_does():
    model = nnx.eval_shape(lambda: create_model("swin_t"))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    numbers = layer_numbers([".".join(map(str, path)) for path, _ in flat])
    seen = set()
    for path, number in numbers.items():
        name = torch_name(path, "timm")
        prefix = next(p for p in TIMM_EXPONENTS if name.startswith(f"{p}."))
        assert max(numbers.values()) - number == TIMM_EXPONENTS[prefix], name
        seen.add(prefix)
    assert seen == TIMM_EXPONENTS.keys()


SHAPES = {
    "stem.kernel": (3, 4),
    "stages.0.blocks.0.kernel": (2, 2),
    "downsamples.0.kernel": (2,),
    "stages.1.blocks.0.kernel": (5,),
    "stages.1.blocks.1.bias": (3,),
    "head_norm.scale": (3,),
    "head.bias": (2,),
}
LAYERS = dict(zip(SHAPES, (0, 1, 2, 2, 3, 3, 4), strict=True))


def updates_of(config, grads, params):
    adamw = make_optimizer(config)
    state = adamw.init(params)
    scalars = dict(learning_rate=0.1, grad_norm=optax.tree.norm(grads))
    return *adamw.update(grads, state, params, **scalars), state


def test_updates_shrink_with_the_layers_below_the_head():
    """Weight decay too, as in the groups of torch."""
    rng = np.random.default_rng(0)
    params, grads = (
        {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
        for _ in range(2)
    )
    assert layer_numbers(SHAPES) == LAYERS
    plain, *_ = updates_of(OptimizerConfig(weight_decay=0.3), grads, params)
    config = OptimizerConfig(weight_decay=0.3, layer_decay=0.7)
    scaled, *_ = updates_of(config, grads, params)
    for path, update in scaled.items():
        factor = 0.7 ** (4 - LAYERS[path])
        np.testing.assert_allclose(update, factor * plain[path], rtol=1e-6)


def test_frozen_parameters_have_neither_updates_nor_moments():
    params = {k: np.ones(s, np.float32) for k, s in SHAPES.items()}
    config = OptimizerConfig(frozen=r"stem|stages\.0|downsamples\.0", layer_decay=0.7)
    grads = trainable(params, config.frozen)
    updates, state, _ = updates_of(config, grads, params)
    assert grads.keys() == updates.keys() == set(list(SHAPES)[3:])
    moments = [x.size for x in jax.tree.leaves(state) if x.ndim]
    full = updates_of(OptimizerConfig(), params, params)[1]
    assert sum(moments) < sum(x.size for x in jax.tree.leaves(full) if x.ndim)
    assert is_frozen("stem.kernel", "stem") and not is_frozen("head.stem", "stem")
    assert not is_frozen("stem.kernel", "")


@pytest.mark.parametrize("frozen, what", [("stages.7", "no"), (".", "every")])
def test_a_rule_that_freezes_nothing_or_everything_is_refused(frozen, what):
    with pytest.raises(UserError, match=rf"matches {what} parameter.*begin with down"):
        trainable(dict.fromkeys(SHAPES), frozen)


@pytest.mark.parametrize(
    "setting, message",
    [("layer_decay=0.0", r"in \(0, 1\]"), ("frozen='stem('", "no regular expression")],
)
def test_bad_settings_are_told(setting, message):
    name, value = setting.split("=")
    with pytest.raises(UserError, match=message):
        loop.prepare(tiny_settings(**{f"optimizer.{name}": eval(value)}))


@pytest.mark.slow
def test_what_is_frozen_keeps_its_bits_and_its_statistics(run, batch):
    optimizer_config = dataclasses.replace(
        run.config.optimizer, frozen=r"stem|stages\.0", layer_decay=0.8
    )
    config = dataclasses.replace(run.config, optimizer=optimizer_config)
    schedule = learning_rate(optimizer_config, 2, 12)
    optimizer, mesh = make_optimizer(optimizer_config), run.setup.mesh
    network, state = states.init(
        config.model, optimizer, seed=0, use_ema=True, mesh=mesh
    )
    step = compile_train_step(network, config, optimizer, schedule, state, mesh)
    before = flat(state.weights)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert np.isfinite(metrics["train_loss"])
    after, average = flat(state.weights), flat(state.ema)
    no_past = "stages.3.blocks.0.mixer.a_log"  # its map has one pixel
    for path in after.keys() - {no_past}:
        same = after[path].tobytes() == before[path].tobytes()
        assert same == is_frozen(path, optimizer_config.frozen), path
        if same:
            assert average[path].tobytes() == before[path].tobytes(), path
    assert {"stem.norms.0.mean", "downsamples.0.norm.mean"} <= after.keys()


@pytest.mark.slow
def test_a_run_starts_where_another_ended_but_goes_on_from_its_own(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    loop.train(tiny_settings(), str(first))
    last = first / "checkpoints/12"
    loop.train(tiny_settings(init_from=str(last)), str(second))
    assert f"starting from step 12 of {first} (ema" in capsys.readouterr().out
    before, after = (
        next(r["eval_loss"] for r in read_metrics(folder) if "eval_loss" in r)
        for folder in (first, second)
    )
    assert after != before  # which has the same seed
    shutil.rmtree(first)
    loop.train(tiny_settings(init_from=str(last)), str(second))
    assert "nothing to do" in capsys.readouterr().out


def test_weights_get_the_dtype_of_the_network(run):
    like = run.init().weights.params["head.bias"]
    placed = finetune._place(np.ones(10, np.float16), like)
    assert placed.dtype == np.float32 and placed.sharding == like.sharding
