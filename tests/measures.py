"""How large the library is and how its parts hang together, read from its source alone.

    python tests/measures.py [PATH]     a table of scoresde/, or of another tree: compare before and after
    python tests/measures.py --all      with every entry of every list
    python tests/measures.py --check    compare with the budgets in pyproject.toml; part of `make check`

A count named "about" is a guess by the look of the code, and lists what it counted.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SHOWN = 8  # entries of a list that are shown without --all
OPEN = {
    "_build",
    "_checks",
    "_doors",
    "_names",
    "_files",
    "_numerics",
    "_printing",
    "_progress",
}  # private to the library, open to every module of it
OF_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public names of named tuples

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Measure:
    """One line of the table: a number, the budget's name if it may have one, and what was counted."""

    name: str
    value: int
    budget: str = ""
    note: str = ""
    entries: list[str] = field(default_factory=list)


@dataclass
class Module:
    """A source file: its dotted name below the package, the package itself being ""."""

    name: str
    path: Path
    source: str
    tree: ast.Module
    is_package: bool

    @property
    def room(self) -> str:
        """The folder or file at the top that it belongs to."""
        return self.name.split(".")[0] or "__init__"


@dataclass
class Place:
    """A function, with the classes and functions around it."""

    module: Module
    node: Function
    around: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module.path.as_posix()}:{self.node.lineno} {'.'.join((*self.around, self.node.name))}"


class Library:
    """A package read from its files; nothing of it is imported."""

    def __init__(self, root: Path) -> None:
        self.package = root.name
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if package else parts)
            source = path.read_text(encoding="utf-8")
            self.modules[name] = Module(name, path.relative_to(root), source, ast.parse(source), package)
        if "" not in self.modules:
            sys.exit(f"{root} is not a package: it has no __init__.py")
        self.places = [place for module in self.modules.values() for place in functions(module, module.tree)]

    def inside(self, dotted: str) -> str | None:
        """The part of a dotted name below the package; None if it is another's."""
        first, _, rest = dotted.partition(".")
        return rest if first == self.package else None

    def owner(self, name: str) -> str:
        """The module that a dotted name below the package is in, or is."""
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name

    def imports(self, module: Module) -> Iterator[tuple[str, str, str]]:
        """Of each name imported from the package, at any depth: (module, name in it or "", local name)."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    below = self.inside(alias.name)
                    if below is not None:
                        yield self.owner(below), "", alias.asname or alias.name.split(".")[0]
            elif isinstance(node, ast.ImportFrom):
                below = self.inside(node.module or "")
                if node.level:  # relative
                    up = module.name.split(".")[: None if node.level == 1 and module.is_package else -1]
                    below = ".".join([*up[: len(up) - node.level + 1], *(node.module or "").split(".")]).strip(".")
                if below is None:
                    continue
                for alias in node.names:
                    whole = f"{below}.{alias.name}".strip(".")
                    if whole in self.modules:
                        yield whole, "", alias.asname or alias.name
                    else:
                        yield self.owner(below), alias.name, alias.asname or alias.name


# Small parts.


def functions(module: Module, node: ast.AST, around: tuple[str, ...] = ()) -> Iterator[Place]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield Place(module, child, around)
        named = isinstance(child, (Function, ast.ClassDef))
        yield from functions(module, child, (*around, child.name) if named else around)


def own(node: Function) -> Iterator[ast.AST]:
    """What a function consists of, without the functions inside it."""
    waiting = list(node.body)
    while waiting:
        part = waiting.pop()
        yield part
        if not isinstance(part, (Function, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(part))


def lines(node: Function) -> int:
    """Lines of a function from its `def` on, without its docstring."""
    first = node.body[0]
    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return (node.end_lineno or 0) - node.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if doc else 0)


def arguments(node: Function) -> list[ast.arg]:
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    return [*(plain[1:] if plain and plain[0].arg in ("self", "cls") else plain), *args.kwonlyargs]


def is_dataclass(node: ast.ClassDef) -> bool:
    return any(re.search(r"\bdataclass\b", ast.unparse(d)) for d in node.decorator_list)


def fields(node: ast.ClassDef) -> list[str]:
    """Fields of a dataclass that its caller may give."""
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
        and not (line.value is not None and re.search(r"\binit=False\b", ast.unparse(line.value)))
    ]


def loops(node: Function) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, iterable) of every loop and comprehension of a function."""
    for part in own(node):
        if isinstance(part, (ast.For, ast.comprehension)):
            yield part.target, part.iter


def attributes(node: ast.AST) -> set[str]:
    return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def calls(node: Function) -> list[ast.Call]:
    return [part for part in own(node) if isinstance(part, ast.Call)]


def name_of(node: ast.expr) -> str:
    """The last name of what is called: "b" of a.b(...)."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name.strip("_") != ""


def by_file(found: Sequence[tuple[Module, str]]) -> list[str]:
    """Counts of a list of (module, name), the file with most of them first."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for module, name in found:
        files[module.path.as_posix()][name] += 1
    order = sorted(files.items(), key=lambda item: (-item[1].total(), item[0]))
    return [
        f"{path}: {names.total()} ({', '.join(n if k == 1 else f'{n} ×{k}' for n, k in sorted(names.items()))})"
        for path, names in order
    ]


# The measures.


def size(library: Library) -> Iterator[Measure]:
    modules = library.modules.values()
    total = sum(len(m.source.splitlines()) for m in modules)
    largest = sorted(modules, key=lambda m: -len(m.source.splitlines()))
    yield Measure("lines", total, entries=[f"{m.path.as_posix()}: {len(m.source.splitlines())}" for m in largest])
    flat = [m.path.as_posix() for m in modules if "." not in m.name and m.name and not m.is_package]
    yield Measure("modules", len(modules), note=f"{len(flat)} of them beside the folders", entries=flat)
    folders = [f"{m.name}/" for m in modules if m.is_package and m.name]
    yield Measure("folders", len(folders), entries=folders)


def strings(node: ast.expr, known: dict[str, list[str]]) -> list[str]:
    """The strings of a literal list, of sums of lists, and of names of lists."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return [s for part in node.elts for s in strings(part, known)]
    if isinstance(node, ast.Starred):
        return strings(node.value, known)
    if isinstance(node, ast.BinOp):
        return strings(node.left, known) + strings(node.right, known)
    if isinstance(node, ast.Call) and node.args:  # sorted(...), list(...)
        return strings(node.args[0], known)
    if isinstance(node, ast.Name):
        return known.get(node.id, [])
    return []


def top_names(library: Library) -> Iterator[Measure]:
    known: dict[str, list[str]] = {}
    for line in library.modules[""].tree.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            known[line.targets[0].id] = strings(line.value, known)
        elif isinstance(line, ast.AugAssign) and isinstance(line.target, ast.Name):
            known[line.target.id] = known.get(line.target.id, []) + strings(line.value, known)
    imported = {local for _, name, local in library.imports(library.modules[""]) if name}
    public = sorted(set(known.get("__all__", [])))
    modules = [name for name in public if name in library.modules and name not in imported]
    names = [name for name in public if name not in modules]
    note = f"{len(names)} names and {len(modules)} modules"
    yield Measure("names at the top", len(public), "names-at-the-top", note, [", ".join(modules), *names])


def longest(library: Library) -> Iterator[Measure]:
    order = sorted(library.places, key=lambda place: -lines(place.node))
    entries = [f"{lines(place.node)} {place}" for place in order[:20]]
    yield Measure("longest function, lines", lines(order[0].node), note="without its docstring", entries=entries)


def most_arguments(library: Library) -> Iterator[Measure]:
    counted = [(len(arguments(place.node)), str(place)) for place in library.places]
    counted += [
        (len(fields(node)), f"{module.path.as_posix()}:{node.lineno} {node.name} (fields)")
        for module in library.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and is_dataclass(node)
    ]
    counted.sort(key=lambda pair: -pair[0])
    entries = [f"{count} {where}" for count, where in counted if count > 8]
    note = "of a function, or fields of a dataclass"
    yield Measure("most arguments", counted[0][0], "most-arguments", note, entries)


def reads_rows(place: Place) -> bool:
    """Whether it walks the rows of a plan and adds up what each of them reads: a state for every row."""
    node = place.node
    over = [iterable for _, iterable in loops(node)]
    if any(re.search(r"\b_?program\b", ast.unparse(iterable)) for iterable in over):
        return True
    walked = "rows" in {a for iterable in over for a in attributes(iterable)} or any(
        isinstance(part, ast.Subscript) and name_of(part.value) == "rows" and isinstance(part.value, ast.Attribute)
        for part in own(node)
    )
    read: dict[str, set[str]] = defaultdict(set)
    for part in own(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            read[part.value.id].add(part.attr)
    rows = {name for name, columns in read.items() if {"x", "d"} <= columns}
    if not walked or not rows or {"Row", "_Line", "replace"} & {name_of(call.func) for call in calls(node)}:
        return False  # the latter write rows anew
    terms = {  # the k of `for k, w in ...`, of which a state is looked up
        target.elts[0].id
        for target, _ in loops(node)
        if isinstance(target, ast.Tuple) and len(target.elts) == 2 and isinstance(target.elts[0], ast.Name)
    }
    described = {id(part.value) for part in own(node) if isinstance(part, ast.Attribute)}
    return any(
        isinstance(part, ast.Subscript)
        and isinstance(part.ctx, ast.Load)
        and isinstance(part.slice, ast.Name)
        and part.slice.id in terms
        and id(part) not in described  # rows[k].evaluates looks at the row
        for part in own(node)
    )


def accepts_steps(place: Place) -> bool:
    """Whether it decides `error <= 1` and makes the next step of a power of the error, itself or by a `factor`."""
    decides = powers = False
    for part in own(place.node):
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Compare):
            right = part.value.comparators[0]
            less = isinstance(part.value.ops[0], (ast.Lt, ast.LtE))
            decides |= less and isinstance(right, ast.Constant) and right.value == 1
        powers |= isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow)
        powers |= isinstance(part, ast.Call) and name_of(part.func) == "factor"
    return decides and powers


def draws_start(place: Place) -> bool:
    """Whether it draws from the prior, or from a stream named START."""
    priors = {  # prior = sde.prior(t)
        target.id
        for part in own(place.node)
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Call) and name_of(part.value.func) == "prior"
        for target in part.targets
        if isinstance(target, ast.Name)
    }
    for call in calls(place.node):
        if name_of(call.func) == "sample" and isinstance(call.func, ast.Attribute):
            made = call.func.value
            if isinstance(made, ast.Call) and name_of(made.func) == "prior":
                return True
            if isinstance(made, ast.Name) and made.id in priors:
                return True
        if name_of(call.func) == "fork" and call.args and "start" in name_of(call.args[0]).lower().split("_"):
            return True
    return False


def slices_trees(place: Place) -> bool:
    """Whether it indexes every leaf of a tree."""
    inner = {part.name: part for part in ast.walk(place.node) if isinstance(part, Function)}
    for call in calls(place.node):
        if name_of(call.func) != "tree_map" or not call.args:
            continue
        mapped = call.args[0]
        work: ast.AST | None = mapped if isinstance(mapped, ast.Lambda) else inner.get(name_of(mapped))
        if not isinstance(work, (ast.Lambda, ast.FunctionDef)):
            continue
        leaf = work.args.args[0].arg
        for part in ast.walk(work):
            if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name) and part.value.id == leaf:
                return True
            if isinstance(part, ast.Call) and name_of(part.func) in ("index_select", "take"):
                return True
    return False


def jobs(library: Library) -> Iterator[Measure]:
    for name, test in {
        "row interpreters, about": reads_rows,
        "adaptive loops, about": accepts_steps,
        "draws of a start, about": draws_start,
        "slicers of conditions, about": slices_trees,
    }.items():
        found = [str(place) for place in library.places if test(place)]
        yield Measure(name, len(found), entries=found)


def defined(tree: ast.Module) -> set[str]:
    """Names that a file makes: functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (Function, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("__setattr__", "setattr", "register_buffer"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return names


def hidden(source: str, module: Module) -> str:
    """The private part of a module's name that is not for this one to import, "" if there is none."""
    home = module.name if module.is_package else module.name.rpartition(".")[0]
    parts = source.split(".")
    for i, part in enumerate(parts):
        inside = i > 0 and f"{home}.".startswith(".".join([*parts[:i], ""]))
        if private(part) and part not in OPEN and not inside:
            return part
    return ""


def touched(module: Module) -> Iterator[tuple[ast.expr, str]]:
    """(object, name) of every private attribute that is read, written or asked for with getattr, but for one's own."""
    for node in ast.walk(module.tree):
        base: ast.expr
        if isinstance(node, ast.Attribute):
            base, attr = node.value, node.attr
        elif isinstance(node, ast.Call) and name_of(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            base, word = node.args[:2]
            attr = word.value if isinstance(word, ast.Constant) and isinstance(word.value, str) else ""
        else:
            continue
        if private(attr) and attr not in OF_TUPLES and ast.unparse(base) not in ("self", "cls", "super()"):
            yield base, attr


def private_names(library: Library) -> Iterator[Measure]:
    makes = {name: defined(module.tree) for name, module in library.modules.items()}
    everywhere = set().union(*makes.values())
    crossing: list[tuple[Module, str]] = []
    foreign: list[tuple[Module, str]] = []
    for name, module in library.modules.items():
        imported = list(library.imports(module))
        crossing += [(module, what) for source, what, _ in imported if private(what) and source != name]
        crossing += [(module, hidden(source, module)) for source, *_ in imported if hidden(source, module)]
        aliases = {local: source for source, what, local in imported if not what}
        others = {  # local names of what other libraries define
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(module.tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        } - {local for *_, local in imported}
        for base, attr in touched(module):
            root = re.split(r"\W", ast.unparse(base), maxsplit=1)[0]
            if root in others or (attr not in everywhere and root not in aliases):
                foreign.append((module, attr))
            elif root in aliases or attr not in makes[name]:
                crossing.append((module, attr))
    note = f"in {len({module.name for module, _ in crossing})} files"
    budget = "private-names-across-modules"
    yield Measure("private names across modules", len(crossing), budget, note, by_file(crossing))
    yield Measure("private names of other libraries", len(foreign), entries=by_file(foreign))


def any_in_signatures(library: Library) -> Iterator[Measure]:
    found: list[tuple[Module, str]] = []
    alone = 0
    for place in library.places:
        args = place.node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        written = [arg.annotation for arg in every if arg is not None] + [place.node.returns]
        for text in (ast.unparse(annotation) for annotation in written if annotation is not None):
            if re.search(r"\bAny\b", text):
                found.append((place.module, ".".join((*place.around, place.node.name))))
                alone += text == "Any"
    note = f"annotations that mention it; {alone} are nothing else"
    yield Measure("Any in signatures", len(found), "any-in-signatures", note, by_file(found))


def arrows(library: Library) -> Iterator[Measure]:
    between: set[tuple[str, str]] = set()
    rooms: set[tuple[str, str]] = set()
    for module in library.modules.values():
        for source, *_ in library.imports(module):
            other = library.modules[source]
            if other is not module:
                between.add((module.name, source))
            if other.room != module.room:
                rooms.add((module.room, other.room))
    names = {module.room for module in library.modules.values()}
    yield Measure("rooms", len(names), note="files and folders at the top", entries=sorted(names))
    into = Counter(target for _, target in rooms)
    out = Counter(source for source, _ in rooms)
    entries = [
        f"{room}: imports {out[room]}, imported by {into[room]}" for room in sorted(names, key=lambda r: (-out[r], r))
    ]
    yield Measure("arrows between rooms", len(rooms), entries=entries)
    yield Measure("arrows between modules", len(between))


def measure(root: Path) -> list[Measure]:
    library = Library(root)
    parts = (size, top_names, longest, most_arguments, jobs, private_names, any_in_signatures, arrows)
    return [found for part in parts for found in part(library)]


# The page, and the check.


def table(found: Sequence[Measure], budgets: dict[str, int], everything: bool) -> str:
    out = []
    for m in found:
        notes = [m.note] if m.note else []
        if m.budget in budgets:
            notes.append(f"budget {budgets[m.budget]}")
        out.append(f"{m.name:34} {m.value:7,}" + (f"   {'; '.join(notes)}" if notes else ""))
        shown = m.entries if everything else m.entries[:SHOWN]
        out += [f"    {entry if everything or len(entry) <= 110 else entry[:107] + '...'}" for entry in shown]
        if len(m.entries) > len(shown):
            out.append(f"    ... and {len(m.entries) - len(shown)} more; --all shows them")
    return "\n".join(out)


def read_budgets(path: Path) -> dict[str, int]:
    """The numbers of one table of a TOML file; Python 3.10 has no reader of its own."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = re.search(r"^\[tool\.scoresde\.budgets\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S)
    return {k: int(v) for k, v in re.findall(r"^([\w-]+) = (\d+)", section[1] if section else "", re.M)}


def compare(found: Sequence[Measure], budgets: dict[str, int]) -> tuple[list[str], list[str]]:
    """(what is over its budget, what is under it)."""
    values = {m.budget: m for m in found if m.budget}
    over = [
        f"`{name}` is the budget of no measure; there are {', '.join(values)}" for name in budgets if name not in values
    ]
    under = []
    for name, m in values.items():
        if name not in budgets:
            over.append(f"{m.name} has no budget; write {name} = {m.value}")
        elif m.value > budgets[name]:
            over.append(
                f"{m.name}: {m.value}, the budget is {budgets[name]}; python tests/measures.py --all lists them"
            )
        elif m.value < budgets[name]:
            under.append(f"{m.name}: {m.value} of {budgets[name]}; the budget can be lowered to {m.value}")
    return over, under


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=HERE / "scoresde", help="folder of the package")
    parser.add_argument("--all", action="store_true", help="show every entry of every list")
    parser.add_argument(
        "--check", action="store_true", help="compare with [tool.scoresde.budgets]; 1 if one is exceeded"
    )
    options = parser.parse_args()
    found, budgets = measure(options.path.resolve()), read_budgets(HERE / "pyproject.toml")
    if not options.check:
        print(table(found, budgets, options.all))
        return 0
    over, under = compare(found, budgets)
    for line in under:
        print(f"measures: {line} in pyproject.toml, [tool.scoresde.budgets]")
    for line in over:
        print(f"measures: {line}", file=sys.stderr)
    if not over:
        print("measures: within the budgets of pyproject.toml")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
