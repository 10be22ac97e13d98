"""The README is true: its example runs as printed, and no command is missing from it."""

import re
from pathlib import Path

import pytest

from integrations.command_line import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

    for _ in range(2):  # the second time it goes on, and finds nothing left to do
        names = {"__name__": "__main__"}
        exec(compile(block, "README.md", "exec"), names)
        names["study"].close()

    assert capsys.readouterr().out.count("'schedule': ") == 2
    assert (tmp_path / "studies" / "mine" / "journal.jsonl").read_bytes().count(b'"kind":"finished"') == 16


def test_every_command_and_option_of_a_run_is_in_the_readme():
    (commands,) = (action.choices for action in parser()._actions if action.choices)
    for name in commands:
        assert f"windtunnel {name}" in README
    for option in ("--study", "--trials", "--budget", "--hours", "--workers", "--seed", "--executor", "--ray"):
        assert option in README
        assert option in commands["run"].format_help()


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)", README))
def test_every_linked_file_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("folder", re.findall(r"^    (\w+)/  ", README, flags=re.MULTILINE))
def test_the_folder_map_names_folders_that_are_there(folder):
    assert (ROOT / folder).is_dir() or folder == "trials"
