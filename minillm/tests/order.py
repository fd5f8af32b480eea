"""The order of the chapters, read from the imports of the package."""
import ast
import re
from pathlib import Path

HEADER = re.compile(r"File to edit: \.\./notebooks/(\d+)_")


def forward_imports(package, chapters=None, loans=()):
    """A line for each exported module that imports what a later chapter exports.

    package: the folder of the package. A module's chapter is the number in its header ("File to
    edit: ../notebooks/NN_name.ipynb"); chapters: {module: number} for those that have no header
    yet. All others are written by hand and have no number, but what they import counts for whoever
    imports them, also through several of them. Imports inside of functions count, too. loans: pairs
    (module, what it imports), such as ("attention", "rope.apply_rope"), that are allowed.
    """
    package = Path(package)
    files = {name_of(path.relative_to(package)): path for path in sorted(package.rglob("*.py"))}
    numbers = {name: chapter_of(path) for name, path in files.items() if path.parent == package}
    numbers |= chapters or {}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    imports = {name: imports_of(path, package, files) for name, path in files.items()}

    problems = []
    for module in sorted(numbers, key=lambda name: (numbers[name], name)):
        # What is still to be looked at: what is imported, and through which modules.
        waiting = [(target, what, ()) for target, what in imports[module]
                   if (module, what) not in loans]
        seen = set()
        while waiting:
            target, what, through = waiting.pop(0)
            if target in seen:
                continue
            seen.add(target)
            if target not in numbers:
                steps = imports.get(target, [])
                waiting += [(later, name, (*through, target)) for later, name in steps]
            elif numbers[target] > numbers[module]:
                by_way_of = f" through {', '.join(through)}" if through else ""
                problems.append(f"{module} ({numbers[module]:02}) imports {target} "
                                f"({numbers[target]:02}){by_way_of}")
    return problems


def name_of(path):
    """arc/stages.py -> "arc.stages", arc/__init__.py -> "arc", __init__.py -> ""."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def chapter_of(path):
    """The number of the chapter that exports a module, None if it is written by hand."""
    header = HEADER.search(path.read_text(encoding="utf-8"))
    return int(header[1]) if header else None


def imports_of(path, package, modules):
    """The modules of the package that a file imports, as pairs (module, what it asks for).

    To import a.b is to import a, too: what is written in a/__init__.py runs first.
    """
    here = path.relative_to(package).parent.parts
    wanted = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted += [absolute(alias.name.split("."), package.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module.split(".") if node.module else []
            if node.level:
                source = [package.name, *here[:len(here) - node.level + 1], *source]
            wanted += [absolute([*source, alias.name], package.name) for alias in node.names]
    found = []
    for parts in wanted:
        for n in range(1, len(parts or ()) + 1):
            module = ".".join(parts[:n])
            if module in modules:
                found.append((module, ".".join(parts)))
    return found


def absolute(parts, package):
    """The names after that of the package, None for what is imported from elsewhere."""
    return parts[1:] if parts[0] == package else None
