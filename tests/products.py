"""What a traced program does, counted without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

UNKNOWN = object()
_CALLS = ("jit", "checkpoint", "remat", "custom", "call")
_SMALL = 64  # elements: loop counters and layer indices are worth following, tensors are not


def flops(jaxpr: Any, *known: Any) -> int:
    """Operations of the matrix products of a closed jaxpr, a multiply-add counted as two.

    Small integers are followed through the program (they are all that its loops and branches hang on), so a loop counts
    once a turn it makes, and of a branch only the side that is taken.

    Args:
      known: a value an argument, or UNKNOWN; those that are left out are.
    """
    rest = [UNKNOWN] * (len(jaxpr.jaxpr.invars) - len(known))
    return _run(jaxpr.jaxpr, jaxpr.consts, [*known, *rest])[1]


def operations(product: Any) -> int:
    """Operations of one `dot_general`."""
    (contracted, _), _ = product.params["dimension_numbers"]
    return 2 * product.outvars[0].aval.size * math.prod(product.invars[0].aval.shape[i] for i in contracted)


def every_equation(jaxpr: Any) -> Iterator[Any]:
    """Equations of a jaxpr and of all that are inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inside(eqn):
            yield from every_equation(inner)


def _inside(eqn: Any) -> list[Any]:
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [v for v in (getattr(value, "jaxpr", value) for value in values) if hasattr(v, "eqns")]


def _followed(aval: Any) -> bool:
    return np.dtype(getattr(aval, "dtype", float)).kind in "ib" and aval.size <= _SMALL


def _small(value: Any) -> Any:
    array = np.asarray(value) if value is not UNKNOWN and not isinstance(value, jax.core.Tracer) else None
    return array if array is not None and _followed(array) else UNKNOWN


def _run(jaxpr: Any, consts: Any, arguments: Any) -> tuple[list[Any], int]:
    values: dict[Any, Any] = {}
    total = 0

    def read(atom: Any) -> Any:
        return _small(atom.val) if hasattr(atom, "val") else values.get(atom, UNKNOWN)

    values |= dict(zip(jaxpr.constvars, map(_small, consts), strict=True))
    values |= dict(zip(jaxpr.invars, map(_small, arguments), strict=True))
    for eqn in jaxpr.eqns:
        out, cost = _equation(eqn, [read(atom) for atom in eqn.invars])
        total += cost
        values |= dict(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], total


def _equation(eqn: Any, given: list[Any]) -> tuple[list[Any], int]:
    nothing = [UNKNOWN] * len(eqn.outvars)
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return nothing, operations(eqn)
    if name == "scan":
        return _scan(eqn, given)
    if name == "while":
        return _while(params, given)
    if name == "cond":
        assert given[0] is not UNKNOWN, "a branch on something that is not followed"
        branch = params["branches"][int(given[0])]
        return _run(branch.jaxpr, branch.consts, given[1:])
    inner = [value for value in params.values() if hasattr(getattr(value, "jaxpr", value), "eqns")]
    if inner and any(word in name for word in _CALLS):  # a program called with these arguments
        body = inner[0]
        return _run(getattr(body, "jaxpr", body), getattr(body, "consts", ()), given)
    if all(value is not UNKNOWN for value in given) and all(_followed(v.aval) for v in eqn.outvars):
        try:
            out = eqn.primitive.bind(*given, **params)
        except Exception:  # an operation that needs more than values, as random keys do
            return nothing, 0
        return [_small(value) for value in (out if eqn.primitive.multiple_results else [out])], 0
    return nothing, 0


def _scan(eqn: Any, given: list[Any]) -> tuple[list[Any], int]:
    params, body, length, total = eqn.params, eqn.params["jaxpr"], eqn.params["length"], 0
    # What is carried has the same shape inside; what is read or written row by row has an axis more outside.
    same = lambda outer, inner: sum(o.aval.shape == i.aval.shape for o, i in zip(outer, inner, strict=True))  # noqa: E731
    outputs, carried = len(eqn.outvars), same(eqn.outvars, body.jaxpr.outvars)
    consts = same(eqn.invars, body.jaxpr.invars) - carried
    fixed, carry, rows = given[:consts], given[consts : consts + carried], given[consts + carried :]
    stacks: list[list[Any]] = [[] for _ in range(outputs - carried)]
    if not any(each.primitive.name in ("while", "cond") for each in every_equation(body.jaxpr)):
        return [UNKNOWN] * outputs, length * _run(body.jaxpr, body.consts, [UNKNOWN] * len(given))[1]
    turns = range(length)
    for turn in reversed(turns) if params["reverse"] else turns:
        row = [value if value is UNKNOWN else value[turn] for value in rows]
        out, cost = _run(body.jaxpr, body.consts, fixed + carry + row)
        total, carry = total + cost, out[:carried]
        for stack, value in zip(stacks, out[carried:], strict=True):
            stack.append(value)
    whole = []
    for stack in stacks:
        known = all(value is not UNKNOWN for value in stack)
        whole.append(_small(np.stack(stack[::-1] if params["reverse"] else stack)) if known else UNKNOWN)
    return carry + whole, total


def _while(params: Any, given: list[Any]) -> tuple[list[Any], int]:
    tests, bodies = params["cond_nconsts"], params["body_nconsts"]
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    carry, total = given[tests + bodies :], 0
    while True:
        (goes_on,), cost = _run(test.jaxpr, test.consts, given[:tests] + carry)
        assert goes_on is not UNKNOWN, "a loop whose end is not followed"
        total += cost
        if not goes_on:
            return carry, total
        carry, cost = _run(body.jaxpr, body.consts, given[tests : tests + bodies] + carry)
        total += cost
