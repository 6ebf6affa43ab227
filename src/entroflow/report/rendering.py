"""A page from a template: one HTML file that works offline."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import entroflow
from entroflow.streams import HANDLER


def rendered(template: str, content: dict[str, Any]) -> str:
    """The page that a template of this folder makes of some content."""
    # Only pages need plotly: importing it takes longer than most commands do.
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("entroflow", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = {"version": entroflow.__version__, "plotly_js": get_plotlyjs()}
    page = environment.get_template(template).render(**known, **content)
    # A folder's name may be in another encoding than the page.
    return page.encode("utf-8", HANDLER).decode("utf-8", "replace")
