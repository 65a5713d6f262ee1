"""The stubs say what the compiled modules have, and a type checker reads them as users need."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llamacancel.cancel import token
from llamacancel.llama import context, memory, model, result, sampler, state

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "llamacancel"
MODULES: list[ModuleType] = [token, model, result, context, memory, state, sampler]

# What every object has, and what Python makes of `__init__`, `__del__` and the like.
IMPLIED = {
    "__init__",
    "__new__",
    "__repr__",
    "__doc__",
    "__module__",
    "__qualname__",
    "__dict__",
    "__weakref__",
    "__del__",
}
IMPLIED |= {
    "__reduce__",
    "__reduce_ex__",
    "__reduce_cython__",
    "__setstate_cython__",
    "__setstate__",
    "__pyx_vtable__",
    "__test__",
}


def source_of(module: ModuleType, suffix: str) -> str:
    return SOURCE.joinpath(*module.__name__.split(".")[1:]).with_suffix(suffix).read_text()


def stub(module: ModuleType) -> dict[str, ast.ClassDef]:
    tree = ast.parse(source_of(module, ".pyi"))
    return {
        node.name: node for node in tree.body if isinstance(node, ast.ClassDef) if "TypedDict" not in ast.unparse(node)
    }


def classes(module: ModuleType) -> dict[str, type]:
    """The public classes that the module makes."""
    made = re.findall(r"^(?:cdef )?class ([A-Z]\w*)", source_of(module, ".pyx"), re.MULTILINE)
    return {name: getattr(module, name) for name in made}


def stubbed(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list)


def is_own(name: str) -> bool:
    return name not in IMPLIED and (not name.startswith("_") or (name.startswith("__") and name.endswith("__")))


def pairs() -> list[object]:
    both = [(module, name) for module in MODULES for name in classes(module)]
    return [pytest.param(module, name, id=name) for module, name in both if name != "Cause"]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_stub_has_the_classes_of_the_module(module: ModuleType) -> None:
    assert set(stub(module)) == set(classes(module))


@pytest.mark.parametrize(("module", "name"), pairs())
def test_the_stub_has_the_methods_and_properties_of_the_class(module: ModuleType, name: str) -> None:
    compiled = {key for key in vars(getattr(module, name)) if is_own(key)}
    assert {key for key in stubbed(stub(module)[name]) if is_own(key)} == compiled


@pytest.mark.parametrize(("module", "name"), pairs())
def test_the_stub_tells_properties_from_methods(module: ModuleType, name: str) -> None:
    for key, node in stubbed(stub(module)[name]).items():
        if is_own(key):
            compiled = inspect.getattr_static(getattr(module, name), key)
            assert is_property(node) == (not callable(compiled) and not isinstance(compiled, staticmethod)), key


def _source(module: ModuleType) -> ast.Module:
    """The .pyx as Python: C declarations are dropped, the signatures of `def` are kept."""
    text = source_of(module, ".pyx")
    found: list[str] = []
    where = ""
    for match in re.finditer(r"^(?:cdef )?class (\w+)|^( *)def (\w+)\(((?:[^()]|\([^()]*\))*)\)", text, re.MULTILINE):
        if match[1]:
            where = match[1]
        elif match[2] and where:
            arguments = re.sub(r"\b[A-Z]\w* (\w+) not None", r"\1", match[4])
            arguments = re.sub(r"\b(?:object|str|bint|double|Model|Context) (\w+)(?=[,=)]|$)", r"\1", arguments)
            found.append(f"def {where}__{match[3]}({arguments}): ...")
        elif match[2] == "":
            where = ""
    return ast.parse("\n".join(found))


def _shape(arguments: ast.arguments) -> list[tuple[str, str, str]]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    named = zip(["positional"] * len(positional), positional, defaults, strict=True)
    keywords = zip(["keyword"] * len(arguments.kwonlyargs), arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    public = [pair for pair in (*named, *keywords) if not pair[1].arg.startswith("_")]
    return [(kind, arg.arg, ast.unparse(default) if default else "") for kind, arg, default in public]


@pytest.mark.parametrize("module", [model, context, memory, state, sampler], ids=lambda module: module.__name__)
def test_the_stub_has_the_arguments_and_defaults_of_the_source(module: ModuleType) -> None:
    written = {node.name: node for node in _source(module).body if isinstance(node, ast.FunctionDef)}
    checked = 0
    for class_name, node in stub(module).items():
        for name, method in stubbed(node).items():
            source = written.get(f"{class_name}__{name}")
            if source is None or name == "__exit__" or (class_name, name) == ("Model", "context"):
                continue
            assert _shape(method.args) == _shape(source.args), f"{class_name}.{name}"
            checked += 1
    assert checked >= 4


def test_model_context_takes_what_a_context_takes() -> None:
    made = stubbed(stub(context)["Context"])["__init__"].args
    wrapped = stubbed(stub(model)["Model"])["context"].args
    assert _shape(wrapped)[1:] == _shape(made)[2:]
    assert [ast.unparse(a.annotation) for a in wrapped.kwonlyargs if a.annotation] == [
        ast.unparse(a.annotation) for a in made.kwonlyargs if a.annotation
    ]


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", ["tests/typing/usage.py", "src/llamacancel"])
def test_mypy_is_content(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path), what]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
