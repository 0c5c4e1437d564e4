"""What a part's graph depends on besides the values of its weights, as one key.

Parts of equal structure have the same graph: another checkpoint of a known architecture need not be
exported again. Whatever a module holds counts; what is not understood makes no key, never a wrong
one.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections.abc import Mapping, Set
from typing import Any

import torch

from engines.families.part import Part

# Of every torch module, and of no consequence to what it computes once it is in eval mode.
_TORCH = set(vars(torch.nn.Module())) | {"forward_pre_hooks"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_ORIGINS = ("_name_or_path", "name_or_path", "_diffusers_version", "transformers_version")


class _Unknown(Exception):
    """Something whose meaning is not known here."""


def structure_of(part: Part) -> str | None:
    """64 hex digits; None where a module holds what cannot be compared."""
    digest = hashlib.sha256()
    try:
        for name, module in part.module.named_modules(remove_duplicate=False):
            digest.update(f"{name}: {_said_of_module(module)}\n".encode())
    except (_Unknown, RecursionError):
        return None
    given = {name: (tensor.shape, tensor.dtype) for name, tensor in part.example.items()}
    digest.update(f"{given} {dict(part.dynamic)} {part.outputs}".encode())
    return digest.hexdigest()


def _said_of_module(module: torch.nn.Module) -> str:
    if any(vars(module).get(hooks) for hooks in _HOOKS):
        raise _Unknown
    own = {name: value for name, value in vars(module).items() if name not in _TORCH}
    shapes = {
        name: None if weight is None else (tuple(weight.shape), weight.dtype)
        for name, weight in module._parameters.items()
    }
    return f"{_name(type(module))} {_said(own)} {shapes} {_said(module._buffers)}"


def _said(value: Any) -> str:
    """A value in words that are equal for equal values alone.

    Raises:
        _Unknown: a kind that is not among those below.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | enum.Enum():
            return repr(value)
        case torch.dtype() | torch.device() | torch.Size():
            return str(value)
        case torch.Tensor():
            held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return f"{tuple(value.shape)} {value.dtype} {_hash(held.numpy().tobytes())}"
        case Mapping():
            items = ((name, each) for name, each in value.items() if name not in _ORIGINS)
            return f"{{{', '.join(sorted(f'{_said(k)}: {_said(each)}' for k, each in items))}}}"
        case list() | tuple():
            return f"[{', '.join(map(_said, value))}]"
        case Set():
            return f"<{', '.join(sorted(map(_said, value)))}>"
        case functools.partial():
            return f"{_said(value.func)} {_said(value.args)} {_said(value.keywords)}"
        case types.BuiltinFunctionType() | type():
            return _name(value)
        case types.FunctionType() if value.__closure__ is None:
            return f"{_name(value)} {_hash(value.__code__.co_code)}"
        case _ if hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
            return f"{_name(type(value))} {_said(vars(value))}"
    raise _Unknown


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
