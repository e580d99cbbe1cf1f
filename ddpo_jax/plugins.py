"""Functions of the user's own, named in a config as `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from ddpo_jax.errors import UserError


def load_object(spec: str) -> Callable:
    """The function that `module:function` names; modules of the working directory are found too.

    Raises:
        UserError: the form is wrong, or the module or the function cannot be had.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"{spec!r}: expected module:function, such as my_rewards:brightness")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise UserError(f"{spec!r}: the module could not be imported ({type(error).__name__}: {error})") from error
    try:
        function = getattr(module, name)
    except AttributeError:
        raise UserError(f"{spec!r}: {module} has no {name!r}") from None
    if not callable(function):
        raise UserError(f"{spec!r}: expected a function, found {type(function).__name__}")
    return function
