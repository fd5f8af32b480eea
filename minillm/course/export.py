"""Write the modules that notebooks export: python -m minillm.course.export notebooks/08_generation.ipynb ...

With nbdev, and as its own command does, but for a chapter with a second module (`#| export fast_decode`): nbdev appends to that one at each run.
"""
import sys
from pathlib import Path

from nbdev.export import ExportModuleProc
from nbdev.maker import ModuleMaker
from nbdev.process import NBProcessor


def write_modules(notebook, folder="minillm"):
    """Write each module that a notebook exports to `folder`, whole; returns their names, "generate.py" and so on.

    Raises ValueError if there are cells marked `#| export` and none that says `#| default_exp`, or the other way round."""
    found = ExportModuleProc()
    NBProcessor(notebook, found).process()
    if ("#" in found.in_all) != hasattr(found, "default_exp"):
        raise ValueError(f"{Path(notebook).name}: `#| default_exp NAME` names the module of the cells that begin with `#| export`; one has no other")
    names = {module: found.default_exp if module == "#" else module for module in found.in_all}
    for module, name in names.items():
        ModuleMaker(folder, name, notebook).make(found.modules[module], found.in_all[module], lib_path=folder)
    return [f"{name}.py" for name in names.values()]


if __name__ == "__main__":
    for path in sys.argv[1:] or sys.exit(__doc__):
        print(f"{path}: {', '.join(write_modules(path))}")
