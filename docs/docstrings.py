"""Lets the API pages show what docstrings call ``Example:`` as code, which Griffe expects under ``Examples:``."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ShowExamples(griffe.Extension):
    """Renames the section before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
