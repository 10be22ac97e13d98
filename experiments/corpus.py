"""Real text for the training job, in domains that differ, from what `pip install -e .` leaves on every machine.

A domain is a list of documents. Its documents are ordered by a hash of their names; the first ones become the held-out
validation text, the others the training text, so a file is never on both sides. A paragraph that occurred before, in
any domain or split, is left out: licence headers and copied docstrings would otherwise leak from training into
validation. Text is encoded once, as bytes, into a memory-mapped cache shared by all workers of a machine.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPLITS = ("validation", "train")
TRAIN_BYTES = 1_000_000  # cap of a built-in domain's training text, so that no domain is large by accident
DOCUMENT_BYTES = 64_000  # cap of one built-in document, so that no file is most of its domain
VALIDATION_BYTES = 64_000  # wanted for validation, but not more than a tenth of the domain
LEAST_BYTES = {"validation": 2_000, "train": 10_000}
PARAGRAPH_BYTES = 64  # shorter paragraphs ("return None") may repeat

# fmt: off
LICENSED = (  # what an install brings along, by the names of its distributions
    "attrs", "botorch", "certifi", "charset-normalizer", "click", "filelock", "fsspec", "gpytorch", "idna",
    "jinja2", "joblib", "jsonschema", "linear-operator", "markupsafe", "mpmath", "msgpack", "networkx", "numpy",
    "packaging", "pandas", "protobuf", "pyarrow", "pydantic", "pyyaml", "ray", "referencing", "requests",
    "scikit-learn", "scipy", "setuptools", "sympy", "tensorboardx", "threadpoolctl", "torch", "typing-extensions",
    "urllib3",
)
# fmt: on


@dataclass(frozen=True)
class Document:
    """A named text; `text` is called only when the document is needed."""

    name: str
    text: Callable[[], str]


@dataclass(frozen=True)
class Domain:
    """Where a built-in domain's documents come from, and what to install when there are too few."""

    documents: Callable[[], Sequence[Document]]
    needs: str


@dataclass(frozen=True)
class Corpus:
    """An encoded corpus: `read(domain, split)` gives a memory-mapped (bytes,) uint8 array."""

    folder: Path
    sha256: str
    sizes: Mapping[str, Mapping[str, int]]  # domain -> split -> bytes

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def read(self, domain: str, split: str) -> NDArray[np.uint8]:
        return np.memmap(self.folder / _file_name(domain, split), dtype=np.uint8, mode="r")

    def table(self, tokens: float) -> str:
        """The domains as text; `epochs` is how often `tokens` bytes would pass the training text at share 1."""
        width = max(map(len, self.domains))
        rows = [
            f"{'domain':{width}}  {'train bytes':>12}  {'validation':>10}  epochs of {tokens:,.0f} tokens at share 1"
        ]
        rows += [
            f"{name:{width}}  {size['train']:12,}  {size['validation']:10,}  {tokens / size['train']:.2f}"
            for name, size in self.sizes.items()
        ]
        return "\n".join([*rows, f"corpus sha256 {self.sha256}"])


def open_corpus(directory: Path | None = None, cache: Path | None = None) -> Corpus:
    """The built-in corpus, or the one of a user's `directory` with one folder a domain; encoded at the first call.

    Several processes may call this at once: each builds in a folder of its own, the first rename wins, and the others
    use the winner's. Raises ValueError when there is too little text, OSError when the cache cannot be written.
    """
    cache = cache or _cache_folder()
    folder = cache / f"corpus-{_fingerprint(directory)[:16]}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
        except OSError as error:
            raise OSError(
                f"The corpus cache {cache} cannot be written ({error.strerror}); set WINDTUNNEL_CACHE to another."
            ) from error
        try:
            _build(directory, building)
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return Corpus(folder, manifest["sha256"], manifest["sizes"])


def user_domains(directory: Path) -> tuple[str, ...]:
    """Names of the domains in a user's corpus: its folders, sorted. Raises ValueError unless there are two or more."""
    if not directory.is_dir():
        raise ValueError(f"--corpus {directory} is not a folder; give the absolute path of one with a folder a domain.")
    names = tuple(sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if len(names) < 2:
        raise ValueError(
            f"--corpus {directory} has {len(names)} folder(s); a mixture needs at least 2, one for each domain."
        )
    return names


# ---------------------------------------------------------------------------------------------- the built-in domains


def _standard_library() -> list[Document]:
    folder = Path(os.__file__).parent
    return _files(folder, folder.glob("*.py"))


def _torch_headers() -> list[Document]:
    folder = _package("torch") / "include"
    return _files(folder, (folder / "c10").rglob("*.h"))


def _language_reference() -> list[Document]:
    try:
        from pydoc_data.topics import topics  # ~0.5 MB of text, wanted only when the corpus is built
    except ImportError:
        return []
    return [Document(name, partial(str, text)) for name, text in topics.items()]


def _docstrings() -> list[Document]:
    modules = [
        (package.parent, path)
        for package in map(_package, ("numpy", "scipy"))
        for path in package.rglob("*.py")
        if "tests" not in path.parts
    ]
    return [Document(path.relative_to(root).as_posix(), partial(_prose, path)) for root, path in modules]


def _licences() -> list[Document]:
    documents = []
    for name in LICENSED:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # which of them come along differs by platform and extras
        documents.append(Document(f"{name}/METADATA", partial(_description, distribution)))
        for file in distribution.files or ():
            if ".dist-info" in file.parts[0] and re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name):
                located = Path(str(file.locate()))
                documents.append(Document(f"{name}/{'/'.join(file.parts[1:])}", partial(_text, located)))
    return documents


def _tables() -> list[Document]:
    numpy, sklearn = _package("numpy"), _package("sklearn")
    return [
        *_files(numpy, numpy.rglob("*.csv")),
        *_files(sklearn, (sklearn / "datasets").rglob("*.csv")),
    ]


DOMAINS: Mapping[str, Domain] = {
    "python": Domain(_standard_library, "a Python whose standard library is installed as source"),
    "headers": Domain(_torch_headers, "a torch wheel, which ships torch/include"),
    "reference": Domain(_language_reference, "the standard library's pydoc_data (on some systems its own package)"),
    "docstrings": Domain(_docstrings, "numpy and scipy"),
    "licences": Domain(_licences, "the packages that windtunnel depends on"),
    "tables": Domain(_tables, "numpy and scikit-learn wheels with their data files"),
}


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The built-in corpus takes text from {name}, which is not installed; pip install -e . brings it."
        )
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, paths: Iterator[Path]) -> list[Document]:
    return [Document(path.relative_to(root).as_posix(), partial(_text, path)) for path in paths]


def _text(path: Path) -> str:
    """A shipped file's text; the odd byte that is not UTF-8 in one must not stop a run."""
    return path.read_text(encoding="utf-8", errors="replace")


def _description(distribution: importlib.metadata.Distribution) -> str:
    """The prose of a distribution's METADATA: what stands below its headers."""
    return str(distribution.metadata.get_payload())  # type: ignore[attr-defined]  # the protocol leaves it out


def _prose(path: Path) -> str:
    """The docstrings of a module, its classes and functions, without the code between them."""
    nodes = ast.walk(ast.parse(_text(path)))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(doc for node in nodes if isinstance(node, kinds) and (doc := ast.get_docstring(node)))


# ------------------------------------------------------------------------------------------------ split and encoding


def _build(directory: Path | None, folder: Path) -> None:
    """Writes each domain and split as one file of bytes, and manifest.json, into `folder`."""
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    sizes: dict[str, dict[str, int]] = {}
    for name, documents in (_built_in() if directory is None else _user(directory)).items():
        texts = _split(name, documents, seen, capped=directory is None)
        sizes[name] = {split: len(data) for split, data in texts.items()}
        for split in SPLITS:
            if sizes[name][split] < LEAST_BYTES[split]:
                remedy = f"it needs {DOMAINS[name].needs}" if directory is None else "add more or longer text files"
                raise ValueError(
                    f"Domain {name!r} has {sizes[name][split]} bytes of {split} text from {len(documents)} file(s), "
                    f"duplicates left out, and needs at least {LEAST_BYTES[split]}; {remedy}."
                )
            (folder / _file_name(name, split)).write_bytes(texts[split])
            digest.update(f"{name}/{split}/{sizes[name][split]}\n".encode() + texts[split])
    manifest = {"sha256": digest.hexdigest(), "sizes": sizes}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _split(name: str, documents: Sequence[Document], seen: set[bytes], capped: bool) -> dict[str, bytes]:
    """Validation and training bytes of one domain; adds the paragraphs it keeps to `seen`."""
    ordered = sorted(documents, key=lambda document: hashlib.sha256(f"{name}/{document.name}".encode()).digest())
    texts = {split: bytearray() for split in SPLITS}
    total = sum(len(document.text()) for document in ordered) if not capped else TRAIN_BYTES
    wanted = {"validation": min(VALIDATION_BYTES, total / 10), "train": TRAIN_BYTES if capped else float("inf")}
    for document in ordered:
        split = next((split for split in SPLITS if len(texts[split]) < wanted[split]), None)
        if split is None:
            break
        text = document.text()[: DOCUMENT_BYTES if capped else None]
        texts[split] += "".join(_unseen(text, seen)).encode()
    return {split: bytes(text[: int(min(wanted[split], len(text)))]) for split, text in texts.items()}


def _unseen(text: str, seen: set[bytes]) -> Iterator[str]:
    """Paragraphs of a text that occurred nowhere before, whatever their spacing; short ones always pass."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        words = " ".join(paragraph.split())
        if len(words) >= PARAGRAPH_BYTES:
            mark = hashlib.blake2b(words.encode(), digest_size=16).digest()
            if mark in seen:
                continue
            seen.add(mark)
        if words:
            yield paragraph.strip("\n") + "\n\n"


def _built_in() -> dict[str, Sequence[Document]]:
    return {name: domain.documents() for name, domain in DOMAINS.items()}


def _user(directory: Path) -> dict[str, Sequence[Document]]:
    def read(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it or take it out.") from error

    return {
        name: [
            Document(path.relative_to(directory).as_posix(), partial(read, path))
            for path in _user_files(directory / name)
        ]
        for name in user_domains(directory)
    }


def _user_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


# ------------------------------------------------------------------------------------------------------------- cache

# Read once, at import: a process that still runs the old code must not fill the cache of an edited file.
_SOURCE = Path(__file__).read_bytes()


def _cache_folder() -> Path:
    if chosen := os.environ.get("WINDTUNNEL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "windtunnel"


def _fingerprint(directory: Path | None) -> str:
    """What decides the content, cheap to compute: this file, and versions of packages or the user's file stamps."""
    parts: list[object] = [_SOURCE]
    if directory is None:
        parts += [sys.version, *(f"{name} {_version(name)}" for name in LICENSED)]
    else:
        for name in user_domains(directory):
            for path in _user_files(directory / name):
                stat = path.stat()
                parts.append((path.relative_to(directory).as_posix(), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_name(domain: str, split: str) -> str:
    return f"{domain}.{split}.bytes"
