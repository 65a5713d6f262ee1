"""Imports the modules that are compiled into one shared library, `_llama`.

llama.cpp is linked statically and must exist once in a process. So `_model`, `_result`, `_context`, `_memory` and
`_sampler` have no file of their own: CPython is told to look for their init functions in `_llama`'s.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

from . import _llama

for _name in ("_model", "_result", "_context", "_memory", "_sampler"):
    _full = f"{__package__}.{_name}"
    _loader = importlib.machinery.ExtensionFileLoader(_full, _llama.__file__)
    _spec = importlib.util.spec_from_file_location(_full, _llama.__file__, loader=_loader)
    assert _spec is not None
    sys.modules[_full] = importlib.util.module_from_spec(_spec)
    _loader.exec_module(sys.modules[_full])
    setattr(sys.modules[__package__], _name, sys.modules[_full])
