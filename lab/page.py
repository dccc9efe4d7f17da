"""The page: lecture.html, which holds all that it shows, pictures and style included, and needs no network and no
script.
"""

import base64
import inspect
import os

from engine.files import write_text
from lab.claims import ROOT, picture_of, sentence
from lab.formulas import mathml
from lab.show import COLOUR

TITLE = "Large language models, by hand: the lecture, measured"


def code_of(function):
    """(file, line, source coloured as HTML) of a function, found by its name in its module."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    function = inspect.unwrap(function)
    lines, start = inspect.getsourcelines(function)
    file = os.path.relpath(inspect.getsourcefile(function), ROOT)
    return file, start, highlight("".join(lines), PythonLexer(), HtmlFormatter(cssclass="highlight"))


def style(name):
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")


def data_uri(path):
    """A picture as text that can stand in a page."""
    with open(path, "rb") as file:
        return f"data:image/png;base64,{base64.b64encode(file.read()).decode()}"


def shown(claim, finding, function):
    """What the page says of a claim."""
    path, (file, line, code) = picture_of(claim, finding), code_of(function)
    bounds = [
        f"at {word} {bound:g}"
        for word, bound in (("least", finding.least), ("most", finding.most))
        if abs(bound) < 1e300
    ]
    return {
        "name": claim.__name__,
        "sentence": sentence(claim),
        "says": finding.says,
        "holds": finding.holds,
        "range": f": {finding.number:.3g}, {' and '.join(bounds)}" if finding.number is not None and bounds else "",
        "picture": data_uri(path) if path and os.path.exists(path) else None,
        "lines": COLOUR.sub("", "\n".join(finding.lines)),
        "file": file,
        "line": line,
        "code": code,
    }


def html(slides, found, command="python lecture.py --page"):
    """The page of the slides of which claims were found, as a text."""
    import jinja2
    from markupsafe import Markup

    parts = [
        {
            "name": name,
            "title": slide.title,
            "files": slide.files.split(),
            "formulas": [Markup(mathml(formula)) for formula in slide.formulas],
            "claims": [
                (said := shown(claim, found[claim], function)) | {"code": Markup(said["code"])}
                for claim, function in slide.claims.items()
            ],
        }
        for name, slide in slides.items()
        if found.keys() >= slide.claims.keys()
    ]
    held = [finding.holds for finding in found.values()]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(os.path.join(ROOT, "lab")), autoescape=True)
    return environment.get_template("page.html").render(
        title=TITLE, slides=parts, found=found, held=held.count(True), missing=held.count(None), command=command,
        light=Markup(style("friendly")), dark=Markup(style("github-dark")),
    )  # fmt: skip


def write(slides, found, chosen=None):
    command = f"python lecture.py {chosen} --page" if chosen else "python lecture.py --page"
    try:
        write_text("lecture.html", html(slides, found, command))
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs {error.name}: pip install -r requirements.txt") from None
    print("lecture.html")
