"""The stand-ins for TensorRT that other tests run our code on, against the real Python bindings of every version line.

What our code uses is what the stand-ins have, so this holds our code to the real API. The bindings come from the
package index and meet stub libraries: classes, enumerations and signatures are real, but nothing can be built. See
tests/support/tensorrt_stubs. XCOS_TENSORRT_BINDINGS=required makes a skip a failure.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stubs.bindings import RELEASES, Bindings, Unavailable, probe
from tensorrt_stubs.fakes import fake_tensorrt

from xcos_ext.deploy import tensorrt

pytestmark = pytest.mark.thorough  # fetches TensorRT's bindings from the package index

#: What our types are called in the bindings' signatures, which depend on the pybind11 that made them.
TYPES = {
    "int": {"int", "typing.SupportsInt", "typing.SupportsInt | typing.SupportsIndex"},
    "bytes": {"buffer", "typing_extensions.Buffer", "collections.abc.Buffer"},
    "tuple[int, ...]": {"tuple", "Dims"},  # a sequence of numbers becomes a Dims
    "ParserError": {"ParserError", "nvonnxparser::IParserError"},  # documented before the class was known
}
#: Attributes of our own and of Python's objects that TensorRT's classes have too.
HARMLESS = {
    *("append", "pop", "clear", "start", "write", "update", "__init__"),
    *("min", "opt", "max", "type", "stride", "nbytes"),
    *("log", "logger", "DEBUG", "INFO", "WARNING", "ERROR"),
}


@pytest.fixture(scope="module", params=RELEASES, ids=str)
def release(request: pytest.FixtureRequest) -> Bindings:
    return request.param


@pytest.fixture(scope="module")
def real(release: Bindings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bindings as probe.py saw them."""
    try:
        return probe(release, tmp_path_factory.mktemp("stubs"))
    except Unavailable as reason:
        if os.environ.get("XCOS_TENSORRT_BINDINGS") == "required":
            pytest.fail(f"no TensorRT bindings: {reason}")
        pytest.skip(f"no TensorRT bindings: {reason}")


def plain(name: str) -> str:
    """A type in a signature without its module."""
    return re.sub(r"\btensorrt_bindings\.tensorrt\.(ILogger\.)?", "", name.strip()).replace("List[", "list[")


def parameters_of(signature: str) -> tuple[list[tuple[str, str, bool]], str]:
    """Name, type and whether there is a default, of what comes after self; and the type of the result."""
    inside, _, result = signature.rpartition(" -> ")
    inside = inside[inside.index("(") + 1 : inside.rindex(")")]
    parts, depth = [""], 0
    for sign in inside:
        depth += (sign in "[(<") - (sign in "])>")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    found = []
    for part in (part.strip() for part in parts[1:]):
        if part not in ("/", "*"):
            name, _, kind = part.partition(":")
            kind, default, _ = kind.partition(" = ")
            found.append((name.strip(), plain(kind), bool(default)))
    return found, plain(result)


def fits(ours: str, theirs: str) -> bool:
    """Whether a stand-in's type is what a signature says."""
    wanted = ours.removesuffix(" | None")
    return wanted == "Any" or theirs in TYPES.get(wanted, {wanted})


def accepts(fake: Any, signature: str) -> bool:
    """Whether a signature takes what a stand-in's method takes, and gives what it gives."""
    theirs, result = parameters_of(signature)
    found = inspect.signature(fake)
    ours = list(found.parameters.values())[1:]
    return (
        fits(found.return_annotation, result)
        and [p.name for p in ours] == [name for name, _, _ in theirs[: len(ours)]]
        and all(fits(p.annotation, kind) for p, (_, kind, _) in zip(ours, theirs, strict=False))
        and all(default for _, _, default in theirs[len(ours) :])
    )


def members(kind: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in vars(kind).items() if not name.startswith("_") or name == "__init__")


def test_the_stand_ins_have_nothing_that_the_real_thing_has_not(release: Bindings, real: dict[str, Any]) -> None:
    assert real["version"] == release.version
    fake, methods = fake_tensorrt(release.major), 0
    for name, value in vars(fake).items():
        if name.startswith("__") or name in ("script", "calls"):
            continue
        if hasattr(value, "__members__"):
            assert set(value.__members__) <= set(real["enums"][name]), name
            continue
        for member, ours in members(value):
            if name == "ILogger":
                assert set(ours.__members__) == set(real["enums"]["Severity"])
                continue
            theirs = real["classes"][name][member]
            if not callable(ours):
                assert theirs["kind"] == "property", f"{name}.{member}"
                assert theirs["writable"] or isinstance(ours, property), f"{name}.{member} can be set"
            elif member != "__init__" or list(inspect.signature(ours).parameters)[1:] in (
                ["logger"],
                ["network", "logger"],
            ):
                assert any(accepts(ours, text) for text in theirs["signatures"]), f"{name}.{member}: {theirs}"
                methods += 1
    assert methods > 25


def test_no_use_of_ours_escapes_the_stand_ins(release: Bindings, real: dict[str, Any]) -> None:
    """Whatever our sources ask an object for is in a stand-in, is no name of TensorRT's, or is known to be harmless."""
    names = {*real["classes"], *real["enums"]}
    names |= {name for group in ("classes", "enums") for owner in real[group].values() for name in owner}
    fake = fake_tensorrt(release.major)
    kinds = [value for value in vars(fake).values() if isinstance(value, type)]
    there = {*vars(fake), *real["enums"]["Severity"], *(name for kind in kinds for name in dir(kind))}
    escaped = [
        f"{path.name}:{node.lineno}: {node.attr}"
        for path in Path(str(tensorrt.__file__)).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in names - there - HARMLESS
    ]
    assert not escaped


def test_what_differs_between_versions(release: Bindings, real: dict[str, Any]) -> None:
    flags = real["enums"]["NetworkDefinitionCreationFlag"]
    assert "STRONGLY_TYPED" in flags
    assert ("EXPLICIT_BATCH" in flags) == (release.major == 10)
    assert ("EXPLICIT_BATCH" in fake_tensorrt(release.major).NetworkDefinitionCreationFlag.__members__) == (
        release.major == 10
    )
    there = {"FP16", "BF16", "INT8", "FP8"} & set(real["enums"]["BuilderFlag"])
    assert len(there) == (4 if release.major == 10 else 0), "precision is no flag of the builder any more"


def test_objects_behave_as_our_code_takes_for_granted(real: dict[str, Any]) -> None:
    assert real["buffer"], "memoryview(plan)"
    assert real["dims"] == [-1, 3, 112], "a Dims of a tuple, and its numbers"
    assert real["named"] == "HALF", "members have names"


def test_our_code_runs_on_the_real_classes(release: Bindings, real: dict[str, Any]) -> None:
    """Our logger and progress monitor derive from them; a builder that cannot start is explained."""
    found = dict(real["exercised"])
    overrides = found.pop("overrides")
    assert found == {
        "errors": "an error",
        "told": [0, 50],
        "went_on": [True, False],
        "failure": f"TensorRT {release.version} cannot start: TensorRT gave no reason",
    }
    monitor = ("phase_start", "step_complete", "phase_finish")
    assert set(overrides) == {"ILogger.log", *(f"IProgressMonitor.{name}" for name in monitor)}
    for name, ours in overrides.items():
        owner, _, method = name.partition(".")
        (signature,) = real["classes"][owner][method]["signatures"]
        assert [theirs for theirs, _, _ in parameters_of(signature)[0]] == ours, name


class Planted:
    def method(self, index: int) -> bool: ...


@pytest.mark.parametrize(
    ("signature", "fitting"),
    [
        ("f(self: tensorrt_bindings.tensorrt.A, index: typing.SupportsInt) -> bool", True),
        ("f(self: tensorrt_bindings.tensorrt.A, index: int, path: str = None) -> bool", True),
        ("f(self: tensorrt_bindings.tensorrt.A, index: int, path: str) -> bool", False),
        ("f(self: tensorrt_bindings.tensorrt.A, i: int) -> bool", False),
        ("f(self: tensorrt_bindings.tensorrt.A, index: str) -> bool", False),
        ("f(self: tensorrt_bindings.tensorrt.A, index: int) -> None", False),
        ("f(self: tensorrt_bindings.tensorrt.A) -> bool", False),
    ],
)
def test_the_comparison_of_signatures_can_fail(signature: str, fitting: bool) -> None:
    assert accepts(Planted.method, signature) == fitting
