"""What our code uses of TensorRT, read from its source.

The protocols of xcos_ext/deploy/tensorrt/api.py say of which class a name is; from there the classes of expressions
follow, statement by statement. Every attribute of an object of TensorRT's is a use, every call with its arguments.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(str(getattr(find_spec("xcos_ext"), "origin", ""))).parent / "export" / "tensorrt"
MODULE = "TensorRT"  # the protocol that stands for the module itself

#: An expression's type: a protocol's name; "class X" for the class X; "list X" for a list of X.
Type = str | None


@dataclass(frozen=True)
class Parameter:
    """A declared parameter."""

    name: str
    type: str


@dataclass(frozen=True)
class Member:
    """A declared member: a method has parameters, anything else has none."""

    type: str
    parameters: tuple[Parameter, ...] | None = None
    writable: bool = False


@dataclass(frozen=True, order=True)
class Use:
    """One place where our code uses TensorRT.

    ``how`` is get, set, call, or optional: asked for by getattr, because not every version has it.
    """

    owner: str
    member: str
    how: str
    arguments: int = 0
    keywords: tuple[str, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Override:
    """A method of a class of ours that derives from one of TensorRT's."""

    base: str
    method: str
    parameters: tuple[str, ...]


def declared() -> dict[str, dict[str, Member]]:
    """The protocols: class -> member."""
    tree = ast.parse((SOURCES / "api.py").read_text())
    return {node.name: dict(_members(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _members(node: ast.ClassDef) -> Iterator[tuple[str, Member]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            assert isinstance(item.target, ast.Name)
            yield item.target.id, Member(ast.unparse(item.annotation), writable=True)
        elif isinstance(item, ast.FunctionDef):
            result = ast.unparse(item.returns) if item.returns else "None"
            if any(isinstance(d, ast.Name) and d.id == "property" for d in item.decorator_list):
                yield item.name, Member(result)
            else:
                parameters = tuple(
                    Parameter(a.arg, ast.unparse(a.annotation) if a.annotation else "Any") for a in item.args.args[1:]
                )
                yield item.name, Member(result, parameters)


@dataclass
class Found:
    """What was read.

    Attributes:
        uses: of TensorRT.
        overrides: of its methods.
        others: attributes of objects that are not known to be TensorRT's: (name, place).
    """

    uses: list[Use] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    others: set[tuple[str, str]] = field(default_factory=set)


def collect() -> Found:
    """All of our sources."""
    protocols, found = declared(), Found()
    for path in sorted(SOURCES.glob("*.py")):
        if path.name != "api.py":
            _Reader(path.name, protocols, found).read(ast.parse(path.read_text()))
    found.uses = sorted(set(found.uses))
    return found


class _Reader(ast.NodeVisitor):
    """Walks a module; ``self.types`` are the types of names in the scope, and of attributes of ``self``."""

    def __init__(self, file: str, protocols: dict[str, dict[str, Member]], found: Found) -> None:
        self.file, self.protocols, self.found = file, protocols, found
        self.types: dict[str, Type] = {}
        self.bases: dict[str, str] = {}
        self.returns: dict[str, Type] = {}

    def read(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):  # our own functions first: they may be called before they are read
            if isinstance(node, ast.FunctionDef) and node.returns:
                self.returns[node.name] = self.resolve(node.returns)
        self.visit(tree)

    def resolve(self, annotation: ast.expr | str) -> Type:
        """The type that an annotation names."""
        node = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.resolve(node.left) or self.resolve(node.right)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("list", "type"):
            inner = self.resolve(node.slice)
            return inner and f"{'class' if node.value.id == 'type' else 'list'} {inner}"
        name = node.id if isinstance(node, ast.Name) else None
        return name if name in self.protocols else None

    # Scopes

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self.types)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.types[argument.arg] = self.resolve(argument.annotation) if argument.annotation else None
        self.generic_visit(node)
        kept = {name: value for name, value in self.types.items() if name.startswith("self.")}
        self.types = {**outer, **kept}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.bases:
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                        names = tuple(argument.arg for argument in item.args.args[1:])
                        self.found.overrides.append(Override(self.bases[base.id], item.name, names))
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self.types[f"self.{item.target.id}"] = self.resolve(item.annotation)
        self.generic_visit(node)

    # What names are

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, self.type_of(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self.bind(node.target, self.resolve(node.annotation) or self.type_of(node.value))
            base = self._base(node.value)
            if base and isinstance(node.target, ast.Name):
                self.bases[node.target.id] = base

    def visit_For(self, node: ast.For) -> None:
        self.bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind_items(node.target, node.iter)
        self.generic_visit(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        for part in node.generators:  # they stand behind the element, which needs what they bind
            self.visit(part)
        self.visit(node.elt)

    def bind(self, target: ast.expr, kind: Type) -> None:
        if isinstance(target, ast.Name):
            self.types[target.id] = kind
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self.types[f"self.{target.attr}"] = kind

    def bind_items(self, target: ast.expr, items: ast.expr) -> None:
        kind = self.type_of(items)
        self.bind(target, kind.removeprefix("list ") if kind and kind.startswith("list ") else None)

    def _base(self, value: ast.expr) -> str | None:
        """The class of TensorRT's that an expression stands for, to be derived from."""
        if isinstance(value, ast.Attribute) and self.type_of(value.value) == MODULE:
            return value.attr
        if isinstance(value, ast.Call) and (asked := self._asked(value)) and asked[0] == MODULE:
            return asked[1]
        return None

    def _asked(self, call: ast.Call) -> tuple[str, str] | None:
        """Owner and member of a getattr with a literal name."""
        if isinstance(call.func, ast.Name) and call.func.id == "getattr" and isinstance(call.args[1], ast.Constant):
            owner = self.type_of(call.args[0])
            return (owner, str(call.args[1].value)) if owner else None
        return None

    def type_of(self, node: ast.expr) -> Type:
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and f"self.{node.attr}" in self.types:
                return self.types[f"self.{node.attr}"]
            member = self._member(node)
            return self.resolve(member.type) if member and member.parameters is None else None
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and (member := self._member(node.func)):
                kind = self.resolve(member.type)
                return kind.removeprefix("class ") if kind else None
            if isinstance(node.func, ast.Attribute) and self.types.get(ast.unparse(node.func.value)) is None:
                return self.returns.get(node.func.attr)
            if isinstance(node.func, ast.Name):
                if node.func.id == "cast":
                    return self.resolve(node.args[0])
                return self.returns.get(node.func.id)
        return None

    def _member(self, node: ast.Attribute) -> Member | None:
        owner = self.type_of(node.value)
        return self.protocols.get(owner, {}).get(node.attr) if owner else None

    # Uses

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.type_of(node.value)
        if owner and owner in self.protocols:
            how = "set" if isinstance(node.ctx, ast.Store) else "get"
            self.note(owner, node.attr, how, node)
        elif not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            self.found.others.add((node.attr, f"{self.file}:{node.lineno}: {ast.unparse(node)}"))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            owner, member = self.type_of(node.func.value), self._member(node.func)
            keywords = tuple(sorted(k.arg or "**" for k in node.keywords))
            if owner and member is not None:
                kind = self.resolve(member.type) or ""
                if kind.startswith("class "):
                    owner, name = kind.removeprefix("class "), "__init__"
                else:
                    name = node.func.attr
                self.note(owner, name, "call", node, len(node.args), keywords)
        if asked := self._asked(node):
            self.note(*asked, "optional", node)
        self.generic_visit(node)

    def note(
        self, owner: str, member: str, how: str, node: ast.expr, arguments: int = 0, keywords: tuple[str, ...] = ()
    ) -> None:
        self.found.uses.append(Use(owner, member, how, arguments, keywords, f"{self.file}:{node.lineno}"))
