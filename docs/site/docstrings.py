"""Fills what stubs leave out: the docstrings of compiled classes, from the built package."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Signatures come from the `.pyi`, which have types; docstrings from the module that was built of the `.pyx`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        path = obj.filepath
        if obj.docstring is not None or obj.is_module or not isinstance(path, Path) or path.suffix != ".pyi":
            return
        found = importlib.import_module(obj.module.path)
        for name in obj.path.removeprefix(f"{obj.module.path}.").split("."):
            found = getattr(found, name, None)
        inherited = [inspect.getdoc(getattr(each, obj.name, None)) for each in (object, type(found))]
        text = inspect.getdoc(found)
        if text and text not in inherited:
            obj.docstring = griffe.Docstring(text, parent=obj, parser="google")
