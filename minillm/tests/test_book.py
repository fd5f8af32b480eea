"""The book: all links lead somewhere, it shows nothing of a machine, and replaces only itself."""
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minillm.course import book
from minillm.course.contents import ROOT, chapters

needs_sphinx = pytest.mark.skipif(
    any(book.importlib.util.find_spec(name) is None for name in book.NEEDED),
    reason='the packages for the book are missing: pip install -e ".[book]"')


FETCHED = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The book of the course."""
    folder = tmp_path_factory.mktemp("whole") / "book"
    book.build(folder, "https://github.com/someone/minillm")
    return folder


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    python = {"name": "python", "pygments_lexer": "ipython3"}
    notebook = new_notebook(cells=list(cells), metadata={"language_info": python})
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    nbformat.write(notebook, path)


RETURN = "[the chapter](../notebooks/03_positions.ipynb#03-positions)"
MODULE = '"""RoPE."""\n\n\ndef apply_rope():\n    return "turned"\n'
CHAPTER = "# 03 Positions\n\nTo [the exercises](../exercises/03_positions.ipynb), $\\sqrt{x}$."


@pytest.fixture
def course(tmp_path):
    """A course of one chapter."""
    root = tmp_path / "course"
    shown = new_output("stream", text="shown, not run\n")
    write_notebook(root / "notebooks/03_positions.ipynb", new_markdown_cell(CHAPTER),
                   new_code_cell("#| default_exp rope"),
                   new_code_cell("1 / 0", execution_count=1, outputs=[shown]))
    write_notebook(root / "exercises/03_positions.ipynb", new_markdown_cell(
        f"# 03 Positions: exercises\n\nTo {RETURN}."))
    write_notebook(root / "solutions/03_positions.ipynb", new_markdown_cell("# Secret answers"))
    (root / "minillm/tests").mkdir(parents=True)
    (root / "minillm/__init__.py").write_text('"""A package."""\n')
    (root / "minillm/tests/__init__.py").write_text('"""Tests."""\n')
    (root / "minillm/rope.py").write_text(MODULE)
    (root / "LICENSE").write_text("free")
    (root / "README.md").write_text("# The course\n\n[03](notebooks/03_positions.ipynb), "
                                    "[code](minillm/rope.py), [LICENSE](LICENSE)\n")
    return root


def text_of(path):
    return path.read_text(encoding="utf-8")


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# ---- the course

@needs_sphinx
def test_each_chapter_its_exercises_and_each_module_has_a_page(whole):
    for chapter in chapters():
        assert chapter.title in text_of(whole / f"notebooks/{chapter.name}.html")
        exercises = (ROOT / f"exercises/{chapter.name}.ipynb").exists()
        assert (whole / f"exercises/{chapter.name}.html").exists() == exercises
        assert all((whole / f"minillm/{module}.html").exists() for module in chapter.modules)
    home = text_of(whole / "index.html")
    assert all(chapter.part in home for chapter in chapters()), "a part is not in the sidebar"
    assert not (whole / "solutions").exists()


@needs_sphinx
def test_nothing_of_this_machine_and_nothing_fetched(whole):
    assert book.broken_links(whole) == []
    for name, data in everything(whole).items():
        if "_static" in name:
            continue                                      # files of the theme
        assert str(whole.parent).encode() not in data and b"/.book-" not in data, name
        if name.endswith(".html"):
            fetched = re.findall(FETCHED, data.decode())
            assert not fetched, f"{name}: {fetched}"


@needs_sphinx
def test_pages_lead_to_their_file_in_the_repository(whole):
    page = text_of(whole / "notebooks/03_positions.html")
    assert "https://github.com/someone/minillm" in page


# ---- a small course

@needs_sphinx
def test_pages_of_a_small_course(course, tmp_path):
    assert book.build(tmp_path / "book", root=course) > 4
    chapter = text_of(tmp_path / "book/notebooks/03_positions.html")
    assert "shown, not run" in chapter and "ZeroDivisionError" not in chapter
    assert "<msqrt>" in chapter, "a formula is not MathML"
    assert re.search(r'href="\.\./exercises/03_positions\.html"', chapter)
    code = text_of(tmp_path / "book/minillm/rope.html")
    assert 'href="#L-4"' in code and 'id="L-4"' in code, "no link to the line of a definition"
    assert "Secret" not in "".join(map(str, everything(tmp_path / "book").values()))
    assert '"apply_rop' in text_of(tmp_path / "book/searchindex.js"), "code is not searched"


@needs_sphinx
def test_the_same_book_twice(course, tmp_path):
    for name in "one", "two":
        book.build(tmp_path / name, root=course)
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


@needs_sphinx
@pytest.mark.parametrize("planted, said", [
    ("[gone](../notebooks/99_gone.ipynb)", "99_gone"),
    ("[gone](../minillm/gone.py)", "gone.py"),
    ("[gone](#no-such-section)", "no-such-section"),
    ("$\\nosuchcommand{x}$", "a formula"),
    ('<a href="gone.html">gone</a>', "gone.html does not exist"),
    ('<a href="../index.html#gone">gone</a>', "no such place"),
])
def test_a_fault_is_found(course, tmp_path, planted, said):
    write_notebook(course / "exercises/03_positions.ipynb", new_markdown_cell(f"# 03\n\n{planted}"))
    with pytest.raises(ValueError, match=said):
        book.build(tmp_path / "book", root=course)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["course"], "left something behind"


@needs_sphinx
def test_a_book_is_replaced_whole_or_not_at_all(course, tmp_path):
    folder = tmp_path / "book"
    folder.mkdir()
    book.build(folder, root=course)
    (folder / "from-before.html").write_text("old")
    text = course / "README.md"
    text.write_text(text_of(text) + "[gone](gone.md)")
    with pytest.raises(ValueError, match="gone.md"):
        book.build(folder, root=course)
    assert (folder / "from-before.html").exists(), "the earlier book is damaged"
    text.write_text(text_of(text).replace("[gone](gone.md)", "New."))
    book.build(folder, root=course)
    assert not (folder / "from-before.html").exists() and "New." in text_of(folder / "index.html")


@needs_sphinx
def test_other_folders_are_refused(course, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for target in tmp_path / "mine", tmp_path / "mine/letter.txt":
        with pytest.raises(ValueError, match="holds other files"):
            book.build(target, root=course)
    assert everything(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "NEEDED", ("sphinx_of_no_kind",))
    with pytest.raises(ValueError, match=r'needs sphinx_of_no_kind: .*"\.\[book\]"'):
        book.build(tmp_path / "book")
    assert list(tmp_path.iterdir()) == []


def test_broken_links(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there">1</a><a href="#here">2</a>'
        '<a href="https://x.org">3</a>'
        '<img src="no.png"><a href="b.html#here">4</a>')
    (tmp_path / "b.html").write_text('<a name="there"></a>')
    assert book.broken_links(tmp_path) == [
        "a.html: no.png does not exist", "a.html: b.html#here: no such place on that page"]


def test_the_workflow_installs_the_extra_and_names_this_command():
    text = text_of(ROOT / ".github/workflows/book.yml")
    assert '".[book]"' in text and "python -m minillm.course.book book" in text


