"""The architecture: who may import whom, and which parts of NNX are used where."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sparx_jax"

# train/eval -> training -> models -> layers -> ops -> typing, and what stands beside.
ALLOWED = {
    "typing": set(),
    "errors": set(),
    "checks": {"errors"},
    "locks": set(),
    "ops": {"typing", "errors"},
    "layers": {"ops", "typing"},
    "models": {"layers", "ops", "typing", "errors", "checks"},
    "data": {"errors", "locks"},
    "parallel": {"typing", "errors"},
    "interop": {"errors"},
    "training": {
        *("models", "layers", "ops", "data", "parallel", "interop", "plots"),
        *("typing", "errors", "checks", "locks", "plots_results"),
    },
    "plots": {"models"},
    "plots_sweep": {"plots"},
    "plots_results": {"plots"},
    "sweep": {"training", "plots", "plots_sweep", "errors"},
    "chips": {"errors"},
    "compile": {"chips", "errors", "ops", "parallel", "training"},
    "summary": {"models", "plots", "errors", "checks"},
    "__init__": {"models", "interop"},
}

# Packages from outside that a part of ours must do without.
FORBIDDEN_PACKAGES = {"tensorflow", "torch"}
FORBIDDEN = {
    "data": {"jax", "flax", "optax", "orbax"},
    "plots": {"jax", "flax", "optax", "orbax"},
    "plots_sweep": {"jax", "flax", "optax", "orbax"},
    "plots_results": {"jax", "flax", "optax", "orbax"},
    "ops": {"flax", "optax", "orbax"},
    "layers": {"optax", "orbax"},
    "models": {"optax", "orbax"},
    "interop": {"optax", "orbax"},
    "typing": {"jax", "flax"},
}

# NNX's own transformations lose to plain JAX in dispatch and hide what is updated.
FORBIDDEN_NNX = {"jit", "grad", "value_and_grad", "scan", "vmap", "Optimizer", "sow"}
# Networks are taken apart and put together in these places only.
SURGERY_NNX = {"split", "merge", "update"}
SURGEONS = {
    "sparx_jax/training/state.py",
    "sparx_jax/models/backbone.py",
    "sparx_jax/interop/torch_weights.py",
    "sparx_jax/summary.py",
}


def files():
    programs = [path for path in (ROOT / "train.py", ROOT / "eval.py") if path.exists()]
    return [*sorted((ROOT / PACKAGE).rglob("*.py")), *programs]


def part_of(path):
    """The part of the package that a file belongs to: "ops", or "train" outside."""
    relative = path.relative_to(ROOT)
    inside = relative.parts[0] == PACKAGE
    return Path(relative.parts[1] if inside else relative.parts[0]).stem


def imports(path):
    """Every imported module, dotted; with `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(path):
    known = {part_of(file) for file in files()}
    for name in imports(path):
        head, *rest = name.split(".")
        if head == PACKAGE and rest and rest[0] in known:
            yield rest[0]


def nnx_uses(path):
    """Names looked up in `nnx`, and methods called `sow`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "nnx":
                yield node.attr
            elif node.attr == "sow":
                yield "sow"
        elif isinstance(node, ast.ImportFrom) and node.module == "flax.nnx":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_to_the_right(path):
    part = part_of(path)
    if part in ("train", "eval"):
        return
    assert part in ALLOWED, f"say in {Path(__file__).name} what {part!r} may import"
    assert set(imported_parts(path)) - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_foreign_packages_stay_where_they_belong(path):
    heads = {name.split(".")[0] for name in imports(path)}
    assert not heads & (FORBIDDEN_PACKAGES | FORBIDDEN.get(part_of(path), set()))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nnx_is_used_functionally(path):
    used = set(nnx_uses(path))
    assert not used & FORBIDDEN_NNX
    if str(path.relative_to(ROOT)) not in SURGEONS:
        assert not used & SURGERY_NNX


def test_nothing_imports_programs_or_tests():
    for path in files():
        heads = {name.split(".")[0] for name in imports(path)}
        assert not heads & {"train", "eval", "tests", "configs"}, path


@pytest.mark.parametrize(
    "source, use",
    [
        ("nnx.jit(f)", "jit"),
        ("self.sow('a', 1)", "sow"),
        ("from flax.nnx import merge", "merge"),
    ],
)
def test_the_search_finds_what_it_forbids(tmp_path, source, use):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert use in set(nnx_uses(path))
