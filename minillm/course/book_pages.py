"""What the book's pages have that Sphinx does not: an extension of Sphinx, used by book.py.

Pages of source code, formulas as MathML, and the exercises below their chapter in the sidebar.
"""
import ast
import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import toctree
from sphinx.application import Sphinx
from sphinx.parsers import Parser
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


class ModulePage(Parser):
    """The page of a Python file: what it defines, then its lines, with numbers and anchors."""
    supported = ("python",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Fill `document` from the text of a file."""
        name = document.settings.env.docname + ".py"
        page = nodes.section(ids=["code"], names=["code"])
        page += nodes.title(name, name)
        definitions = nodes.paragraph(classes=["definitions"])
        for node in ast.parse(inputstring).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                link = nodes.reference(node.name, refuri=f"#L-{node.lineno}", internal=True)
                link.children = [nodes.literal(node.name, node.name)]
                definitions += [link, nodes.Text(" ")]
        page += definitions
        # options of the HTML formatter of Pygments: a link at each line's number
        page += nodes.literal_block(inputstring, inputstring, language="python", linenos=True,
                                    highlight_args={"lineanchors": "L", "anchorlinenos": True})
        document += page


def mathml(writer: HTML5Translator, node: nodes.Node, block: bool) -> None:
    """Put a formula into the page. If it cannot be translated, a warning stops the book."""
    tex = node.astext()
    # (docutils knows \bigl( and \bigr), but not \big: give it the side of its parenthesis)
    tex = re.sub(r"\\([bB]ig)(?=[(\[])", r"\\\1l", tex)
    tex = re.sub(r"\\([bB]ig)(?=[)\]])", r"\\\1r", tex)
    try:
        formula = tex2mathml(tex, as_block=block)
    except MathError as error:
        logger.warning("a formula that docutils cannot translate: %s: %s", error, node.astext(),
                       location=node)
        raise nodes.SkipNode from None
    writer.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def inline_math(writer: HTML5Translator, node: nodes.Node) -> None:
    """A formula within a line."""
    mathml(writer, node, block=False)


def block_math(writer: HTML5Translator, node: nodes.Node) -> None:
    """A formula on lines of its own."""
    mathml(writer, node, block=True)


def add_exercises(app: Sphinx, doctree: nodes.document) -> None:
    """Put the exercises of a chapter below it in the sidebar."""
    chapter = app.env.docname
    exercises = chapter.replace("notebooks/", "exercises/")
    if chapter.startswith("notebooks/") and exercises in app.env.found_docs:
        section = next(doctree.findall(nodes.section))
        section += toctree(parent=chapter, entries=[(None, exercises)], includefiles=[exercises],
                           maxdepth=-1, caption=None, glob=False, hidden=True, includehidden=False,
                           numbered=0, titlesonly=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_source_suffix(".py", "python")
    app.add_source_parser(ModulePage)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("doctree-read", add_exercises, priority=100)     # before the sidebar is collected
    return {"parallel_read_safe": True}
