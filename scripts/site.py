"""A hook of mkdocs: a page's links to files of the repository, outside ``docs/``, become their text on the site.

On the site such a file has no page. A link to a file that is not there stays a link, which the strict build refuses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([\w./-]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUTSIDE.sub(lambda link: link[1] if (REPOSITORY / link[2]).exists() else link[0], markdown)
