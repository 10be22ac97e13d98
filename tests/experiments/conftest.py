"""A small corpus of a user's own, from text that every Python has."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of four files: code, prose and numbers."""
    import argparse
    import json
    import pydoc_data.topics

    root = tmp_path_factory.mktemp("own-text")
    code = [
        Path(argparse.__file__).read_text(encoding="utf-8"),
        Path(json.decoder.__file__).read_text(encoding="utf-8"),
    ]
    topics = sorted(pydoc_data.topics.topics.values(), key=len)
    texts = {
        "code": [code[0][i::1][:20_000] for i in (0, 25_000, 50_000)] + [code[1]],
        "prose": [topic[:20_000] for topic in topics[-4:]],
        "tables": ["\n".join(f"{i},{i * i % 97},{i * seed % 101}" for i in range(1500)) for seed in (3, 5, 7, 11)],
    }
    for domain, documents in texts.items():
        (root / domain).mkdir()
        for number, text in enumerate(documents):
            (root / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    return root
