"""The environments of the rivals: a virtual environment each, from the pinned requirements beside the methods.

    python -m experiments.compare.environments [--environments DIR] [NAMES ...]

An environment that is there as it is pinned is left alone; one that cannot be built is reported, and the others are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from experiments.compare.methods import LIBRARIES, requirements, requirements_hash


def default_folder() -> Path:
    """$WINDTUNNEL_CACHE, or a folder in the user's cache."""
    given = os.environ.get("WINDTUNNEL_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "windtunnel" / "compare"


def build(environment: str, folder: Path) -> str:
    """What came of it, in words."""
    place, mark = folder / environment, folder / environment / "complete"
    text = requirements_hash(environment)
    if mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return "is there"
    mark.unlink(missing_ok=True)
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(requirements(environment))],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            return f"could not be built: {' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}"
    mark.write_text(text, encoding="utf-8")
    return "was built"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=sorted(set(LIBRARIES)), help="which ones (default: all)")
    parser.add_argument("--environments", type=Path, default=default_folder())
    options = parser.parse_args()
    options.environments.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        print(f"{name} {build(name, options.environments)}", flush=True)


if __name__ == "__main__":
    main()
