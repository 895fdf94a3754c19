"""One-sentence errors for the fields of a frozen configuration."""

import dataclasses
import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sparx_jax.errors import UserError


def require(name: str, value: Any, ok: bool, constraint: str) -> None:
    """Raises UserError unless `ok`: "name=value must be constraint"."""
    if not ok:
        raise UserError(f"{name}={value!r} must be {constraint}.")


def check_each(config: Any, prefix: str, constraints: Sequence[tuple]) -> None:
    """Checks fields one by one, by rows of names, test, and what they must be."""
    for names, ok, constraint in constraints:
        for name in names.split():
            value = attrgetter(name)(config)
            require(prefix + name, value, ok(value), constraint)


def check_types(config: Any, prefix: str) -> None:
    """Checks the fields of a dataclass against their annotations, also nested ones.

    Knows int, float, bool, str, Literal, `X | None`, tuples of one type, dataclasses.
    Numbers must be finite.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, path = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(hint):
            ok, text = isinstance(value, hint), f"a {hint.__name__}, or its fields"
            require(path, value, ok, text)
            check_types(value, f"{path}.")
        elif get_origin(hint) is Literal:
            choices = get_args(hint)
            require(path, value, value in choices, "one of " + ", ".join(choices))
        elif get_origin(hint) is tuple:
            element = get_args(hint)[0]
            ok = isinstance(value, tuple) and all(_is(v, element) for v in value)
            require(path, value, ok, f"a tuple of {_called(element)}")
        else:
            require(path, value, _is(value, hint), f"of type {_called(hint)}")
        numbers = value if isinstance(value, tuple) else (value,)
        ok = all(math.isfinite(v) for v in numbers if isinstance(v, float))
        require(path, value, ok, "finite")


def _is(value, kind):
    kinds = get_args(kind) or (kind,)
    if float in kinds:
        kinds += (int,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _called(kind):
    return getattr(kind, "__name__", str(kind))
