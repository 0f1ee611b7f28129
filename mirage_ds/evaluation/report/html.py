"""HTML pages in one file that needs nothing else: of `mirage inspect`, and of `mirage-data preview`. Needs no torch."""

import base64
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

REPORT = "mirage_ds.evaluation.report"


def render_page(package: str, template: str, script: str, filters: dict[str, Callable[..., str]], **values: Any) -> str:
    """A page from a template, which escapes every text.

    Args:
        package: whose folder `templates` has the template and the script; it may include those of REPORT.
        template: gets `style`, `script`, `script_digest` and the values.
        filters: functions for the template, by name.
    """
    code = (resources.files(package) / "templates" / script).read_text()
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(REPORT)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(
        script=code,
        # Only this script runs, and nothing is loaded from anywhere, whatever stands in the rows.
        script_digest=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
        style=(resources.files(REPORT) / "templates" / "page.css").read_text(),
        **values,
    )
