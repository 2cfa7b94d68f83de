# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages: no script, no external resource, pictures inside the file."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("smoothrot_offline"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """The page that ``templates/<template>`` makes of the values; every value is escaped."""
    return _TEMPLATES.get_template(template).render(**values)


def embedded(png: bytes, alternative: str) -> Markup:
    """An ``img`` element that holds its PNG; ``alternative`` is its text for those who cannot
    see it."""
    data = base64.b64encode(png).decode("ascii")
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, alternative)
