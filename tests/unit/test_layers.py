"""The house keeps its order: who imports whom, who knows llama.cpp, and how long a module gets (DESIGN.md)."""

from __future__ import annotations

import ast
import dataclasses
import pickle
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "llamacancel"
NATIVE = PACKAGE / "_native"

# The floors: what each may import of the package. One that is not listed has no place in the house.
GROUND = {"errors"}
LLAMA_AND_BELOW = {"cancel", "constraint", "llama", *GROUND}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": {"cancel"},  # for annotations alone: see the test
    "_native": set(),
    "cancel": {"_native", *GROUND},
    "constraint": set(),
    "llama": {"_native", "cancel", "chat", "constraint", *GROUND},  # a model's chat, where it is asked for
    "chat": {"_native", *LLAMA_AND_BELOW},
    "engine": {"chat", *LLAMA_AND_BELOW},
    "aio": {"chat", "engine", *LLAMA_AND_BELOW},
    "__init__": {"aio", "chat", "engine", *LLAMA_AND_BELOW},
    "server": {"__init__", "aio", "chat", "engine", *LLAMA_AND_BELOW},
    "conformance": set(),  # knows a server by its address alone
    "commands": {"__init__", "conformance", "server", "aio", "chat", "engine", *LLAMA_AND_BELOW},
    "__main__": {"commands"},
}
# The floors within a room.
INSIDE: dict[str, dict[str, set[str]]] = {
    "cancel": {
        "deadlines": set(),
        "token": {"deadlines"},
        "outcome": {"token"},
    },
    "llama": {
        "params": set(),
        "batch": {"params"},
        "_llama": set(),
        "result": set(),
        "call": {"_llama"},
        "model": {"_llama", "call", "params", "context"},  # what is above, where it is made: see the test
        "context": {"_llama", "call", "params", "batch", "result", "model", "memory", "state"},
        "memory": {"call", "params", "context"},
        "state": {"_llama", "call", "model", "context"},
        "sampler": {"_llama", "call", "params", "model", "context"},
    },
    "engine": {
        "scheduler": set(),
        "faults": set(),
        "joining": set(),
        "text": set(),
        "usage": set(),
        "views": {"scheduler"},
        "work": {"scheduler", "views", "desk"},  # desk for annotations alone
        "names": {"work"},
        "desk": {"scheduler", "views", "work", "names"},
        "handle": {"scheduler", "usage", "views", "work"},
        "masks": {"joining"},
        "generation": {"scheduler", "faults", "text", "usage", "work", "handle", "masks"},
        "conversation": {"generation"},
        "embedder": {"scheduler", "faults", "joining", "desk", "generation", "work"},
        "runner": {"scheduler", "faults", "work", "generation", "masks"},
        "thread": {"scheduler", "faults", "joining", "views", "work", "desk", "runner", "embedder"},
        "engine": {
            "scheduler",
            "views",
            "usage",
            "work",
            "desk",
            "handle",
            "generation",
            "conversation",
            "embedder",
            "runner",
            "thread",
        },
    },
    "server": {
        "errors": set(),
        "sse": set(),
        "protocol": set(),
        "disconnect": set(),
        "page": {"errors"},
        "bodies": {"errors"},
        "service": {"disconnect", "errors", "ops"},  # metrics
        "limits": {"errors", "page", "service"},
        "threads": {"service"},
        "ops": {"bodies", "disconnect", "errors", "service", "sse", "threads"},
        "openai": {"bodies", "disconnect", "errors", "service", "sse", "threads"},
        "app": {"bodies", "errors", "limits", "openai", "ops", "page", "service"},
        "run": {"app", "limits", "protocol", "service"},
    },
    "commands": {
        "arguments": set(),
        "gguf": set(),
        "make_model": {"gguf"},
        "rpc_server": {"arguments"},
        "serve": {"arguments"},
        "generate": set(),
        "demo": {"make_model"},
        "cli": {"serve", "generate", "demo", "rpc_server", "make_model"},
    },
}
# The floors of the native code: the folders whose headers each may include.
NATIVE_FLOORS: dict[str, set[str]] = {
    "cancel": set(),
    "process": {"cancel"},
    "words": {"cancel", "process"},
    "far": {"cancel", "process"},
    "memory": {"process"},
    "model": {"cancel", "process", "words", "far", "memory"},
    "guard": {"cancel", "process", "memory", "model"},
    "chat": {"cancel", "process", "model"},
}
# Rooms that are entered by a door of theirs: what others may import is in `__init__.py`.
WITH_A_DOOR = {"cancel", "llama", "chat", "engine", "constraint"}
LLAMA = ("llama.h", "llama-", "ggml", "gguf.h")


def module_of(path: Path) -> str:
    """The floor that a file belongs to: its module, or the folder that it is in."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.split(".")[0]


def python_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_native" not in path.parts)


def cython_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd")])


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Modules of the package that a file imports, by their dotted names, and whether only a type checker does."""
    tree = ast.parse(path.read_text())
    checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    folders = path.relative_to(PACKAGE).parts[:-1]
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "llamacancel"]
        elif isinstance(node, ast.ImportFrom):
            base = ["llamacancel", *folders[: len(folders) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "llamacancel":
                names = [f"{module}.{alias.name}" for alias in node.names]
        found += [(_module_in(name), id(node) in checking) for name in names]
    return found


def _module_in(name: str) -> str:
    """The module that a dotted name is, or is in, without the package's own name; "__init__" for the package."""
    parts = name.split(".")[1:]
    while parts:
        place = PACKAGE.joinpath(*parts)
        if place.is_dir() or any(place.with_suffix(suffix).exists() for suffix in (".py", ".pyx")):
            return ".".join(parts)
        parts.pop()
    return "__init__"


def cimports_of(path: Path) -> list[str]:
    """Modules of the package that a compiled module imports or cimports, by their dotted names."""
    folders = path.relative_to(PACKAGE).parts[:-1]
    found = []
    for dots, module, names in re.findall(
        r"^ *from (\.+)([\w.]*) c?import (\([^)]*\)|.*)", path.read_text(), re.MULTILINE
    ):
        base = ".".join([*folders[: len(folders) - len(dots) + 1], *([module] if module else [])])
        found += [base] if module else [f"{base}.{name}" for name in re.findall(r"(\w+)(?: as \w+)?", names)]
    return found


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_downward_only(path: Path) -> None:
    room = module_of(path)
    assert room in MAY_IMPORT, f"{room} has no floor yet: name it in MAY_IMPORT"
    inside = INSIDE.get(room, {})
    place = path.relative_to(PACKAGE).with_suffix("").parts[1:2]
    for name, for_checking in imports_of(path):
        first, _, rest = name.partition(".")
        if first != room:
            allowed = MAY_IMPORT[room] - ({"_cancel"} if room == "errors" else set())
            assert for_checking or first in allowed, name
            assert not rest or first not in WITH_A_DOOR, f"{name}: import it from {first}'s door"
        elif inside and rest and place and place != ("__init__",):
            second = rest.split(".")[0]
            assert second == place[0] or for_checking or second in inside[place[0]], name


@pytest.mark.parametrize("path", cython_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_compiled_module_imports_downward_only(path: Path) -> None:
    room = module_of(path)
    for name in cimports_of(path):
        first, _, rest = name.partition(".")
        if first != room:
            assert first in MAY_IMPORT[room], name
        elif room in INSIDE:
            assert rest == path.stem or rest in INSIDE[room][path.stem], name


@pytest.mark.parametrize(("below", "above"), [("model", "context"), ("context", "memory"), ("context", "state")])
def test_what_is_above_is_imported_only_where_it_is_made(below: str, above: str) -> None:
    text = (PACKAGE / "llama" / f"{below}.pyx").read_text()
    assert set(re.findall(rf"^( *)from \.(?:{above}| import {above})\b", text, re.MULTILINE)) <= {" " * 8}
    assert f"from .{above} cimport" not in text


def test_the_scheduler_is_pure_python() -> None:
    for path in (PACKAGE / "engine" / "scheduler").rglob("*"):
        assert path.suffix in ("", ".py", ".typed") or "__pycache__" in path.parts, path
        if path.suffix == ".py":
            for name, _ in imports_of(path):
                assert name == "errors" or name.startswith("engine.scheduler"), (path, name)


@pytest.mark.parametrize(
    "path",
    sorted([*python_files(), *cython_files(), *NATIVE.rglob("*.?pp"), *PACKAGE.rglob("*.pyi")]),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_module_is_above_about_700_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 700


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def native_files() -> list[Path]:
    return sorted([*NATIVE.rglob("*.?pp"), *NATIVE.rglob("*.pxd")])


@pytest.mark.parametrize("path", native_files(), ids=lambda path: str(path.relative_to(NATIVE)))
def test_native_code_includes_downward_only(path: Path) -> None:
    if path.parent == NATIVE:
        return  # the declarations of llama.h
    if path.suffix == ".pxd":
        names = [name.split(".")[1] for name in cimports_of(path) if name != "_native.llama"]
    else:
        names = [include.split("/")[0] for include in includes_of(path) if (NATIVE / include).is_file()]
    folder = path.parent.name
    assert set(names) <= NATIVE_FLOORS[folder] | {folder}


def test_the_cancel_core_knows_neither_python_nor_llama_cpp() -> None:
    headers = sorted((NATIVE / "cancel").glob("*.hpp"))
    assert headers
    for path in headers:
        for include in includes_of(path):
            assert include != "Python.h", path
            assert not include.startswith(LLAMA), (path, include)


def test_native_code_never_includes_python() -> None:
    for path in NATIVE.rglob("*.?pp"):
        assert "Python.h" not in includes_of(path), path


def test_headers_hold_no_statics_of_their_own() -> None:
    for path in NATIVE.rglob("*.hpp"):
        code = re.sub(r"//.*", "", path.read_text())
        assert "thread_local" not in code, path
        for line in code.splitlines():
            assert not re.match(r"\s*static\s+(?!constexpr|const\b)[\w:<>*& ]+\s+\w+\s*(=|;|\{)", line), (
                f"{path}: {line}"
            )


def test_one_extension_links_llama_cpp() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    linked = re.findall(r"target_link_libraries\((\w+)[^)]*\b(?:llamacancel_llama|llama|ggml)\b[^)]*\)", cmake)
    assert linked == ["_llama"]


def test_the_cancel_extension_declares_nothing_of_llama_cpp() -> None:
    for path in [*(PACKAGE / "cancel").glob("*.p[yx][xd]"), *(NATIVE / "cancel").glob("*.pxd")]:
        assert not re.search(r"llama\.h|ggml|_llama", path.read_text()), path
        assert all(name.startswith(("cancel", "_native.cancel", "errors")) for name in cimports_of(path)), path


def test_the_public_names_are_those_of_the_package() -> None:
    import llamacancel

    assert sorted(llamacancel.__all__) == sorted(set(llamacancel.__all__))
    for name in llamacancel.__all__:
        assert getattr(llamacancel, name) is not None
    assert {name for name in vars(llamacancel) if name[0].isupper()} <= set(llamacancel.__all__)


def test_the_public_classes_show_the_public_module() -> None:
    import llamacancel

    for name in llamacancel.__all__:
        value = getattr(llamacancel, name)
        if isinstance(value, type) and not dataclasses.is_dataclass(value):
            assert value.__module__ == "llamacancel", name
            assert pickle.loads(pickle.dumps(value)) is value


def test_the_library_never_prints() -> None:
    allowed = {"commands", "conformance", "server", "__main__"}
    for path in python_files():
        if module_of(path) not in allowed:
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            assert not [node for node in calls if ast.unparse(node.func) == "print"], path
    for path in cython_files():
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path
