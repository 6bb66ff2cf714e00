"""Rooms know only the rooms below them, and files of a room only files that do not know them."""

import ast
from pathlib import Path

import xcos_ext

PACKAGE = Path(xcos_ext.__file__).parent
# From the ground up. A file directly in the package is a room of its own.
ROOMS = (
    *("io", "card", "ops", "devices", "onnx", "backbones", "model", "faces", "deploy"),
    *("gallery", "explain", "evaluation", "training", "bench", "api", "cli"),
)


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it; names of ``from a import b`` count as ``a``."""
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = {f"{module}.{name.name}" for name in node.names}
            modules = {name for name in names if _file(name)}
            found |= modules or {module}
    return {name for name in found if name.partition(".")[0] == "xcos_ext"}


def _file(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def _arrows() -> dict[Path, set[Path]]:
    return {
        path: {target for module in _imports(path) if (target := _file(module)) is not None} - {path}
        for path in PACKAGE.rglob("*.py")
    }


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(ROOMS)


def test_rooms_know_only_rooms_below_them() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} -> {target.relative_to(PACKAGE)}"
        for path, targets in _arrows().items()
        for target in targets
        if _room(path) in ROOMS and _room(target) in ROOMS and ROOMS.index(_room(target)) > ROOMS.index(_room(path))
    ]
    assert not upward, "\n".join(sorted(upward))


def test_no_files_know_each_other() -> None:
    # The package's own __init__ takes names from everywhere, when they are asked for.
    arrows = {path: targets - {PACKAGE / "__init__.py"} for path, targets in _arrows().items()}
    while leaves := [path for path, targets in arrows.items() if not targets & arrows.keys()]:
        for path in leaves:
            del arrows[path]
    assert not arrows, "\n".join(sorted(str(path.relative_to(PACKAGE)) for path in arrows))
