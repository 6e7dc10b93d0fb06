"""Draws the pictures of the documentation while MkDocs builds it; nothing is written into the sources."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import pictures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every picture to the files of the site."""
    for name, draw in pictures.PICTURES.items():
        files.append(File.generated(config, f"assets/generated/{name}.svg", content=pictures.as_svg(draw())))
    return files
