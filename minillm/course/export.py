"""Write the modules that notebooks export.

    python -m minillm.course.export notebooks/08_generation.ipynb ...

nbdev does the work. We add two things. A chapter can export a second module (`#| export
fast_decode`), to which nbdev's own command would append the same cells again at each run. And the
docstring with which the first exported cell begins becomes the module's, so that
`help(minillm.train)` and an editor show it.
"""
import ast
import re
import sys
import textwrap
from pathlib import Path

from nbdev.export import ExportModuleProc
from nbdev.maker import ModuleMaker
from nbdev.process import NBProcessor

FIRST_CELL = re.compile(r'\n\n(# %% \S+ #\S+\n)(""".*?""")\n+', re.DOTALL)


def write_modules(notebook: str | Path, folder: str | Path = "minillm") -> list[str]:
    """Write each module that a notebook exports to `folder`; returns their file names.

    Raises ValueError if the notebook has exported cells but no `#| default_exp` (or the other way
    round), and for a module whose first exported cell does not begin with a docstring.
    """
    found = ExportModuleProc()
    NBProcessor(notebook, found).process()
    if ("#" in found.in_all) != hasattr(found, "default_exp"):
        raise ValueError(f"{Path(notebook).name}: `#| default_exp NAME` names the module of the "
                         "cells that begin with `#| export`: it needs both, or neither")
    names = {module: found.default_exp if module == "#" else module for module in found.in_all}
    for module, name in names.items():
        cells = found.modules[module]
        first = next(cell.source for cell in cells if cell.cell_type == "code")
        if ast.get_docstring(ast.parse(first)) is None:
            raise ValueError(f"{Path(notebook).name}: the first cell exported to {name}.py must "
                             "begin with a docstring that says what the module holds")
        ModuleMaker(folder, name, notebook).make(cells, found.in_all[module], lib_path=folder)
        path = Path(folder) / f"{name}.py"
        path.write_text(arrange(path.read_text(encoding="utf-8")), encoding="utf-8")
    return [f"{name}.py" for name in names.values()]


def arrange(source: str) -> str:
    """The text of a module as nbdev writes it, arranged for a reader.

    The docstring of the first cell moves to the top, and `__all__` gets lines of at most 100
    characters.
    """
    docstring = FIRST_CELL.search(source)
    source = source.replace(docstring[0], "\n\n" + docstring[1], 1)
    names = re.search(r"__all__ = \[(.*?)\]", source, re.DOTALL)
    lines = textwrap.wrap(" ".join(names[1].split()), 99, initial_indent="__all__ = [",
                          subsequent_indent=" " * 11)
    return docstring[2] + "\n" + source.replace(names[0], "\n".join(lines) + "]", 1)


if __name__ == "__main__":
    for path in sys.argv[1:] or sys.exit(__doc__):
        print(f"{path}: {', '.join(write_modules(path))}")
