"""What our code uses of TensorRT, against the real Python bindings of every supported line.

The bindings come from the package index and meet stub libraries: classes, enumerations, signatures and documentation
are real, but nothing can be built. See tests/tensorrt_stubs. XCOS_TENSORRT_BINDINGS=required makes a skip a failure.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorrt_stubs.bindings import RELEASES, Bindings, Unavailable, probe
from tensorrt_stubs.fakes import fake_tensorrt
from tensorrt_stubs.usage import MODULE, Member, Parameter, Use, collect, declared

FOUND = collect()
PROTOCOLS = declared()
#: Of protocols that are not named like what they stand for.
NAMES = {"LoggerClass": "ILogger"}
#: What our types are called in the bindings' signatures, which depend on the pybind11 that made them.
TYPES = {
    "int": {"int", "typing.SupportsInt", "typing.SupportsInt | typing.SupportsIndex"},
    "str": {"str"},
    "bool": {"bool"},
    "None": {"None"},
    "bytes": {"buffer", "typing_extensions.Buffer", "collections.abc.Buffer"},
    "tuple[int, ...]": {"tuple", "Dims"},  # a sequence of numbers becomes a Dims
    "ParserError": {"ParserError", "nvonnxparser::IParserError"},  # documented before the class was known
}
#: Attributes of our own and of Python's objects that TensorRT's classes have too.
HARMLESS = {
    *("append", "pop", "read", "write", "start", "__init__"),
    *("name", "shape", "dtype", "min", "opt", "max", "type", "stride", "nbytes"),
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


def enum_of(protocol: str) -> str | None:
    """The enumeration that a protocol stands for."""
    return protocol.removesuffix("Enum") if protocol.endswith("Enum") else None


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


def fits(ours: str, theirs: str, enums: dict[str, Any]) -> bool:
    """Whether a type of the protocols is what a signature says."""
    wanted = ours.removesuffix(" | None")
    if wanted == "Any":
        return True
    if wanted == "EnumMember":
        return theirs in enums
    if wanted.startswith("list["):
        return theirs.startswith("list[") and fits(wanted[5:-1], theirs[5:-1], enums)
    return theirs in TYPES.get(wanted, {wanted})


def accepts(member: Member, signature: str, enums: dict[str, Any]) -> bool:
    """Whether a signature takes what a protocol's method is given, and gives what is expected."""
    theirs, result = parameters_of(signature)
    ours: tuple[Parameter, ...] = member.parameters or ()
    return (
        fits(member.type, result, enums)
        and [p.name for p in ours] == [name for name, _, _ in theirs[: len(ours)]]
        and all(fits(p.type, kind, enums) for p, (_, kind, _) in zip(ours, theirs, strict=False))
        and all(default for _, _, default in theirs[len(ours) :])
    )


def test_the_bindings_are_the_ones_asked_for(release: Bindings, real: dict[str, Any]) -> None:
    assert real["version"] == release.version


def test_every_class_and_enumeration_is_there(real: dict[str, Any]) -> None:
    for name in PROTOCOLS:
        if name in ("EnumMember", MODULE):
            continue
        enum = enum_of(name)
        if enum is not None:
            assert enum in real["enums"], enum
        else:
            assert NAMES.get(name, name) in real["classes"], name


def test_every_use_is_of_something_that_is_there(real: dict[str, Any]) -> None:
    everything = {*real["classes"], *real["enums"], "__version__"}
    for use in FOUND.uses:
        if use.how == "optional" or use.owner == "EnumMember":
            continue
        enum = enum_of(use.owner)
        if use.owner == MODULE:
            assert use.member in everything, use
        elif enum is not None:
            assert use.member in real["enums"][enum], use
        elif use.owner != "LoggerClass":
            assert use.member in real["classes"][use.owner], use


def test_every_method_takes_the_arguments_and_gives_the_result_that_we_expect(real: dict[str, Any]) -> None:
    checked = 0
    for owner, members in PROTOCOLS.items():
        if owner in ("EnumMember", MODULE, "LoggerClass") or enum_of(owner):
            continue
        for name, member in members.items():
            if member.parameters is None or name in ("__buffer__", "__iter__"):
                continue
            signatures = real["classes"][owner][name]["signatures"]
            assert any(accepts(member, text, real["enums"]) for text in signatures) or (
                name == "__len__" and signatures
            ), f"{owner}.{name}{member}: {signatures}"
            checked += 1
    assert checked > 35


def test_every_property_has_the_type_that_we_expect_and_can_be_set_where_we_set_it(real: dict[str, Any]) -> None:
    written = {(use.owner, use.member) for use in FOUND.uses if use.how == "set"}
    assert written == {("IBuilderConfig", "progress_monitor"), ("Runtime", "engine_host_code_allowed")}
    for owner, members in PROTOCOLS.items():
        if owner in ("EnumMember", MODULE, "LoggerClass") or enum_of(owner):
            continue
        for name, member in members.items():
            if member.parameters is not None:
                continue
            found = real["classes"][owner][name]
            assert found["kind"] == "property", f"{owner}.{name}"
            assert found["writable"] or (owner, name) not in written
            for text in found["signatures"]:
                assert fits(member.type, parameters_of(text)[1], real["enums"]), f"{owner}.{name}: {text}"


def test_calls_give_as_many_arguments_as_the_protocols_have() -> None:
    """What mypy finds too, for whoever does not run it."""
    calls = [use for use in FOUND.uses if use.how == "call"]
    assert len(calls) > 25
    for use in calls:
        member = PROTOCOLS[use.owner][use.member]
        assert member.parameters is not None and use.arguments == len(member.parameters) and not use.keywords, use


def test_methods_that_we_override_have_the_bases_names_and_arguments(real: dict[str, Any]) -> None:
    assert {(o.base, o.method) for o in FOUND.overrides} == {
        ("ILogger", "log"),
        ("IProgressMonitor", "phase_start"),
        ("IProgressMonitor", "step_complete"),
        ("IProgressMonitor", "phase_finish"),
    }
    for override in FOUND.overrides:
        (signature,) = real["classes"][override.base][override.method]["signatures"]
        assert [name for name, _, _ in parameters_of(signature)[0]] == list(override.parameters)


def test_what_only_some_versions_have_is_asked_for(release: Bindings, real: dict[str, Any]) -> None:
    flags = real["enums"]["NetworkDefinitionCreationFlag"]
    assert "STRONGLY_TYPED" in flags
    assert ("EXPLICIT_BATCH" in flags) == (release.major == 10)
    asked = {use.member for use in FOUND.uses if use.how == "optional"}
    assert asked == {"STRONGLY_TYPED", "EXPLICIT_BATCH", "IProgressMonitor", "__version__"}


def test_precision_is_no_flag_of_the_builder_any_more(release: Bindings, real: dict[str, Any]) -> None:
    precisions = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}
    there = precisions & set(real["enums"]["BuilderFlag"])
    assert not there if release.major >= 11 else {"FP16", "BF16", "INT8", "FP8"} <= there
    used = {use.member for use in FOUND.uses if use.owner == "BuilderFlagEnum"}
    assert used == {"REFIT", "TF32", "VERSION_COMPATIBLE"}


def test_objects_behave_as_our_code_takes_for_granted(real: dict[str, Any]) -> None:
    assert real["buffer"], "memoryview(plan)"
    assert real["dims"] == [-1, 3, 112], "a Dims of a tuple, and its numbers"
    assert real["hashable"] and real["named"] == "HALF", "members as keys of a dict, and their names"


def test_our_code_runs_on_the_real_classes(release: Bindings, real: dict[str, Any]) -> None:
    """Our logger and progress monitor derive from them; a builder that cannot start is explained."""
    assert real["exercised"] == {
        "errors": "an error",
        "derived": True,
        "went_on": True,
        "done": 50,
        "stopped": True,
        "failure": f"TensorRT {release.version} cannot start: TensorRT gave no reason",
    }


def test_no_use_escapes_the_reading_of_our_source(real: dict[str, Any]) -> None:
    """Attributes of objects whose type is not known have no name that a class of TensorRT has, but harmless ones."""
    names = {name for group in ("classes", "enums") for owner in real[group].values() for name in owner}
    names |= {*real["classes"], *real["enums"]}
    escaped = sorted(place for name, place in FOUND.others if name in names - HARMLESS)
    assert not escaped


def test_the_fakes_of_the_other_tests_have_nothing_that_the_real_thing_has_not(
    release: Bindings, real: dict[str, Any]
) -> None:
    fake = fake_tensorrt(release.major)
    for name, value in vars(fake).items():
        if name.startswith("__") or name in ("script", "calls"):
            continue
        if hasattr(value, "__members__"):
            assert set(value.__members__) <= set(real["enums"][name]), name
        else:
            assert {member for member in vars(value) if not member.startswith("_")} <= set(real["classes"][name]), name
    assert set(fake.ILogger.Severity.__members__) == set(real["enums"]["Severity"])
    for flags in ("NetworkDefinitionCreationFlag", "BuilderFlag"):
        missing = set(getattr(fake, flags).__members__) ^ set(real["enums"][flags])
        assert not missing & {"STRONGLY_TYPED", "EXPLICIT_BATCH", "FP16", "BF16", "INT8", "FP8"}, flags


@pytest.mark.parametrize("major", [10, 11])
def test_the_fakes_have_exactly_the_members_that_the_protocols_list(major: int) -> None:
    """So a use that is not declared, and so not compared with the real thing, fails in the tests of the logic."""
    fake = fake_tensorrt(major)
    instance = {"IBuilderConfig": {"progress_monitor"}, "Runtime": {"engine_host_code_allowed"}}
    instance["ITensor"] = {"name", "shape", "dtype"}
    for owner, members in PROTOCOLS.items():
        kind = getattr(fake, owner, None)
        if kind is None or enum_of(owner):
            continue
        there = {name for name in vars(kind) if not name.startswith("_")} | instance.get(owner, set())
        assert there == {name for name in members if not name.startswith("_")}, owner


def test_the_protocols_list_nothing_that_is_not_used() -> None:
    used = {(use.owner, use.member) for use in FOUND.uses}
    idle = {
        (owner, name)
        for owner, members in PROTOCOLS.items()
        for name in members
        if (owner, name) not in used and not name.startswith("__")
    }
    assert not idle


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("def f(builder: Builder) -> None:\n    builder.build_engine(1)\n", Use("Builder", "build_engine", "get")),
        ("def f(trt: TensorRT) -> None:\n    trt.BuilderFlag.FP16\n", Use("BuilderFlagEnum", "FP16", "get")),
        (
            "def f(trt: TensorRT) -> None:\n    for n in trt.Builder(1).create_network(0).get_input(0).shape: pass\n",
            Use("INetworkDefinition", "get_input", "call", 1),
        ),
        (
            "class A:\n def __init__(self, e: ICudaEngine):\n  self._e = e\n def f(self):\n  self._e.x()\n",
            Use("ICudaEngine", "x", "get"),
        ),
    ],
)
def test_the_reading_of_source_sees_what_is_planted(
    planted: str, seen: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_stubs import usage

    shutil.copy(usage.SOURCES / "api.py", tmp_path)
    (tmp_path / "planted.py").write_text(planted)
    monkeypatch.setattr(usage, "SOURCES", tmp_path)
    assert seen in collect().uses


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
    assert accepts(Member("bool", (Parameter("index", "int"),)), signature, {}) == fitting
