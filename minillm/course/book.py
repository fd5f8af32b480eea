"""The course as a book: a website to read and search, from the stored outputs of the notebooks.

    pip install -e ".[book]"
    python -m minillm.course.book FOLDER [ADDRESS]

Nothing is executed, and the website fetches nothing. FOLDER is new, empty, or an earlier book,
which is replaced when the new one is complete. With the ADDRESS of the repository
(https://github.com/OWNER/NAME), each page has a link to its file there.

The pages are README.md, the chapters with their exercises, and the modules of minillm/. The
solutions are left out: a search for an exercise should not show its answer.
"""
import ast
import importlib.util
import io
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from minillm.course.contents import ROOT, chapters

MARK = ".minillm-book"                 # a file that tells a book from other folders
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme")


# ---- the sources, as Sphinx wants them

def write_sources(root: Path, folder: Path) -> None:
    """Copy README.md (as index.md), chapters, exercises and modules; add tables of contents."""
    for name in "notebooks", "exercises":
        (folder / name).mkdir()
        for path in root.glob(f"{name}/*.ipynb"):
            shutil.copy(path, folder / name)
    for package in packages(root):
        (folder / package).mkdir(parents=True)
        for path in (root / package).glob("*.*"):
            if path.suffix in (".py", ".svg") and path.name != "__init__.py":
                shutil.copy(path, folder / package)
        page = package_page(root, package)
        (folder / package / "index.md").write_text(page, encoding="utf-8")
    shutil.copy(root / "LICENSE", folder)
    readme = (root / "README.md").read_text(encoding="utf-8")
    parts = {}
    for chapter in chapters(root):
        parts.setdefault(chapter.part, []).append(f"notebooks/{chapter.name}")
    parts["The code"] = ["minillm/index"]
    trees = [toctree(names, caption) for caption, names in parts.items()]
    (folder / "index.md").write_text("\n".join([readme, *trees]), encoding="utf-8")


def toctree(names: list[str], caption: str = "") -> str:
    """Entries of the sidebar, in MyST's Markdown."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, *names, "```", ""])


def packages(root: Path) -> list[str]:
    """minillm and its subfolders, without the tests."""
    folders = [path.parent for path in sorted(root.glob("minillm/**/__init__.py"))]
    return [path.relative_to(root).as_posix() for path in folders if path.name != "tests"]


def package_page(root: Path, name: str) -> str:
    """The page of a package of modules, such as "minillm/arc": what each says of itself."""
    lines, names = [f"# {name}/", "", first_line(root / name / "__init__.py"), ""], []
    for path in sorted((root / name).iterdir()):
        if path.suffix == ".py" and path.name != "__init__.py":
            lines.append(f"- [{path.name}]({path.name}): {first_line(path)}")
            names.append(f"{path.name} <{path.stem}>")
        elif path.name != "tests" and (path / "__init__.py").exists():
            text = first_line(path / "__init__.py")
            lines.append(f"- [{path.name}/]({path.name}/index.md): {text}")
            names.append(f"{path.name}/ <{path.name}/index>")
    return "\n".join([*lines, toctree(names)])


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


# ---- what Sphinx does with them

SETTINGS = {
    "project": "minillm",
    "author": "",
    "copyright": "",
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_last_updated_fmt": None,
    "html_title": "minillm",
    "html_theme": "sphinx_book_theme",
    "html_static_path": [str(Path(__file__).with_name(name)) for name in ("book.css", "book.js")],
    "html_css_files": ["book.css"],
    "html_js_files": ["book.js"],
    "html_use_index": False,
    "html_context": {"default_mode": "auto"},        # light or dark as the reader's system is
    "html_math_renderer": "mathml",
    "extensions": ["myst_nb", "minillm.course.book_pages"],
    "exclude_patterns": [],
    "highlight_language": "text",
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},
    "suppress_warnings": ["mystnb.unknown_mime_type"],
}
THEME = {
    "logo": {"text": "minillm"},
    "home_page_in_toc": True,
    "navbar_persistent": [],            # the sidebar has a search field, too
    "use_download_button": True,
    "use_fullscreen_button": False,
}




def build(folder: Path, address: str = "", root: Path = ROOT) -> int:
    """Write the book of the course in `root` to a folder. Returns the number of pages.

    address: of the repository, for a link to each page's file there. Raises ValueError if the
    folder holds something else, packages for the book are missing, or a link leads nowhere.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the book needs {', '.join(missing)}: in the top folder of the course, "
                         'run pip install -e ".[book]"')
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    folder = Path(folder).absolute()
    if folder.exists() and not (folder / MARK).exists() and (
            not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds other files: name a new folder, an empty one, or one "
                         "with an earlier book")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".book-") as scratch:
        scratch = Path(scratch)
        source, target = scratch / "source", scratch / "html"
        source.mkdir()
        write_sources(root, source)
        theme = THEME | ({"repository_url": address, "use_source_button": True} if address else {})
        warnings = io.StringIO()
        with docutils_namespace():                         # so that one process can build two books
            app = Sphinx(source, None, target, scratch / "doctrees", "html",
                         SETTINGS | {"html_theme_options": theme}, status=None, warning=warnings)
            app.build()
        (target / ".buildinfo").unlink()              # for rebuilding in place, which we never do
        problems = [re.sub("\x1b\\[[0-9;]*m", "", line).replace(f"{source}/", "")
                    for line in warnings.getvalue().splitlines() if line.strip()]
        problems += broken_links(target)
        if problems:
            raise ValueError("the book was not written:\n" + "\n".join(problems))
        (target / MARK).write_text("python -m minillm.course.book replaces this folder\n")
        if folder.exists():
            folder.rename(scratch / "earlier")
        target.rename(folder)
    return len(list(folder.rglob("*.html")))


# ---- links

class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called at each tag."""
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id"), attributes.get("name")} - {None}
        links = [attributes.get("href"), attributes.get("src")]
        self.links += [link for link in links if link is not None]


def broken_links(folder: Path) -> list[str]:
    """Links of the pages in a folder to files or anchors that are not there."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))
             if "_static" not in path.parts}
    problems = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                problems.append(f"{path.relative_to(folder)}: {link} does not exist")
            elif parts.fragment and target in pages and (
                    unquote(parts.fragment) not in pages[target].anchors):
                problems.append(f"{path.relative_to(folder)}: {link}: no such place on that page")
    return problems


def main(folder: str, address: str = "") -> None:
    """The command."""
    pages = build(Path(folder), address)
    print(f"{folder}: {pages} pages, open {Path(folder) / 'index.html'}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m minillm.course.book FOLDER [ADDRESS]")
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
