"""The page "Define a search space" is true: its snippets run as printed, and no kind is missing from it."""

from pathlib import Path

import pytest

import search_spaces
from search_spaces import FAMILIES
from search_spaces.codec import KINDS

PAGE = (Path(search_spaces.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_every_snippet_runs_as_printed(tmp_path):
    # Everything but the snippets is blanked, so that a traceback has the page's own line numbers.
    lines, inside = [], False
    for line in PAGE.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    script = tmp_path / "define_a_search_space.py"  # in a file, since functions are stored by their source
    script.write_text("\n".join(lines), encoding="utf-8")
    names = {"__name__": "define_a_search_space"}
    exec(compile(script.read_text(encoding="utf-8"), script, "exec"), names)
    assert names["space"].columns


@pytest.mark.parametrize("kind", [kind.made.__name__ for name, kind in KINDS.items() if name != "fixed"])
def test_every_kind_of_parameter_is_on_the_page(kind):
    assert f"`{kind}(" in PAGE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_schedules_is_on_the_page(family):
    assert f"`{family}`" in PAGE
