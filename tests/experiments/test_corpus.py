"""The corpus: what is in it, that validation is held out, and that its cache can be trusted."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments import corpus
from experiments.corpus import Corpus, Document, Domain, open_corpus, user_domains


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(cache=tmp_path_factory.mktemp("cache"))


def text(encoded: Corpus, domain: str, split: str) -> str:
    return bytes(encoded.read(domain, split)).decode(errors="replace")


def long_paragraphs(encoded: Corpus) -> Iterator[str]:
    for domain in encoded.domains:
        for split in corpus.SPLITS:
            for paragraph in re.split(r"\n[ \t]*\n", text(encoded, domain, split)):
                words = " ".join(paragraph.split())
                if len(words) >= corpus.PARAGRAPH_BYTES:
                    yield words


def write_domain(root: Path, name: str, *texts: str) -> None:
    (root / name).mkdir(parents=True)
    for number, content in enumerate(texts):
        (root / name / f"{number}.txt").write_text(content, encoding="utf-8")


def lines(name: str, count: int) -> str:
    """Paragraphs that differ from each other and say which file they are of."""
    return "\n\n".join(
        f"paragraph {i} of the file {name}, which is long enough to count as text of its own" for i in range(count)
    )


def test_every_built_in_domain_has_enough_text_for_the_default_target(built_in: Corpus) -> None:
    assert built_in.domains == tuple(corpus.DOMAINS)
    assert len(built_in.domains) >= 5
    for size in built_in.sizes.values():
        assert 150_000 <= size["train"] <= corpus.TRAIN_BYTES
        assert 16_384 <= size["validation"] <= corpus.VALIDATION_BYTES


def test_sizes_in_the_manifest_are_those_of_the_files(built_in: Corpus) -> None:
    for domain, size in built_in.sizes.items():
        assert size == {split: len(built_in.read(domain, split)) for split in corpus.SPLITS}


def test_no_long_paragraph_of_the_built_in_corpus_occurs_twice(built_in: Corpus) -> None:
    repeated = [words for words, times in Counter(long_paragraphs(built_in)).items() if times > 1]
    assert repeated == []


def test_a_file_is_never_in_both_splits(tmp_path: Path) -> None:
    names = [f"{domain}-{number}" for domain in ("a", "b") for number in range(12)]
    for domain in ("a", "b"):
        write_domain(tmp_path / "text", domain, *(lines(name, 60) for name in names if name.startswith(domain)))
    encoded = open_corpus(tmp_path / "text", tmp_path / "cache")
    found = {
        split: set(re.findall(r"the file ([ab]-\d+),", "".join(text(encoded, domain, split) for domain in "ab")))
        for split in corpus.SPLITS
    }
    assert found["train"] | found["validation"] == set(names)
    assert not found["train"] & found["validation"]


def test_text_copied_into_another_file_or_domain_is_kept_once(tmp_path: Path) -> None:
    shared = lines("shared", 30)
    for domain in ("a", "b"):
        own = [lines(f"{domain}-{number}", 60) for number in range(12)]
        write_domain(tmp_path / "text", domain, *(f"{shared}\n\n{one}\n\n{shared.replace(' ', '  ')}" for one in own))
    encoded = open_corpus(tmp_path / "text", tmp_path / "cache")
    everything = "".join(text(encoded, domain, split) for domain in "ab" for split in corpus.SPLITS)
    assert len(re.findall(r"paragraph\s+7\s+of\s+the\s+file\s+shared,", everything)) == 1


def test_the_hash_is_that_of_the_text_and_not_of_where_it_lies(own_text: Path, tmp_path: Path) -> None:
    first = open_corpus(own_text, tmp_path / "one")
    assert open_corpus(own_text, tmp_path / "two").sha256 == first.sha256
    for domain in ("code", "prose", "tables"):
        (tmp_path / "copy" / domain).mkdir(parents=True)
        for file in (own_text / domain).iterdir():
            (tmp_path / "copy" / domain / file.name).write_bytes(file.read_bytes())
    assert open_corpus(tmp_path / "copy", tmp_path / "one").sha256 == first.sha256
    (tmp_path / "copy" / "code" / "new.txt").write_text(lines("new", 60), encoding="utf-8")
    assert open_corpus(tmp_path / "copy", tmp_path / "one").sha256 != first.sha256


def test_processes_that_start_at_once_share_one_cache(own_text: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from experiments.corpus import open_corpus\n"
        "found = open_corpus(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(found.folder, found.sha256, [int(found.read(d, 'train').sum()) for d in found.domains])"
    )
    command = [sys.executable, "-c", program, str(own_text), str(tmp_path / "cache")]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        for _ in range(3)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_whoever_finishes_second_uses_what_the_first_one_built(
    own_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, first = corpus._build, []

    def overtaken(directory: Path | None, folder: Path) -> None:
        build(directory, folder)
        if not first:
            first.append(None)
            first[0] = open_corpus(own_text, tmp_path)  # another process gets there before the rename

    monkeypatch.setattr(corpus, "_build", overtaken)
    second = open_corpus(own_text, tmp_path)
    assert second == first[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [second.folder.name]


def test_a_second_opening_builds_nothing(own_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_corpus(own_text, tmp_path)
    monkeypatch.setattr(corpus, "_build", lambda *_: pytest.fail("built again"))
    assert open_corpus(own_text, tmp_path) == first


def test_the_cache_lies_where_the_environment_says(
    own_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDTUNNEL_CACHE", str(tmp_path / "here"))
    assert open_corpus(own_text).folder.parent == tmp_path / "here"
    monkeypatch.delenv("WINDTUNNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert open_corpus(own_text).folder.parent == tmp_path / "there" / "windtunnel"


def test_the_text_is_memory_mapped_and_cannot_be_written(own_text: Path, tmp_path: Path) -> None:
    encoded = open_corpus(own_text, tmp_path).read("code", "train")
    assert isinstance(encoded, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        encoded[0] = 0


def test_the_table_names_every_domain_its_epochs_and_the_hash(own_text: Path, tmp_path: Path) -> None:
    encoded = open_corpus(own_text, tmp_path)
    shown = encoded.table(tokens=2 * encoded.sizes["prose"]["train"])
    assert all(domain in shown for domain in encoded.domains)
    assert re.search(r"^prose .* 2\.00$", shown, re.MULTILINE)
    assert encoded.sha256 in shown


def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        user_domains(tmp_path / "nowhere")


def test_a_corpus_of_one_domain_is_refused(tmp_path: Path) -> None:
    write_domain(tmp_path, "only", lines("only", 300))
    (tmp_path / ".git").mkdir()
    with pytest.raises(ValueError, match=r"has 1 folder\(s\); a mixture needs at least 2"):
        user_domains(tmp_path)


def test_a_domain_without_files_is_refused_and_leaves_no_cache(tmp_path: Path) -> None:
    write_domain(tmp_path / "text", "full", lines("a", 300), lines("b", 300))
    write_domain(tmp_path / "text", "empty")
    with pytest.raises(ValueError, match=r"Domain 'empty' has 0 bytes of validation text from 0 file\(s\)"):
        open_corpus(tmp_path / "text", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_domain_of_one_file_is_refused_because_nothing_is_left_to_train_on(tmp_path: Path) -> None:
    write_domain(tmp_path / "text", "a", lines("a", 300))
    write_domain(tmp_path / "text", "b", lines("b", 300), lines("c", 300))
    with pytest.raises(ValueError, match=r"Domain 'a' has 0 bytes of train text from 1 file\(s\).*more or longer"):
        open_corpus(tmp_path / "text", tmp_path / "cache")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    write_domain(tmp_path / "text", "a", lines("a", 300), lines("b", 300))
    write_domain(tmp_path / "text", "b", lines("c", 300), lines("d", 300))
    (tmp_path / "text" / "b" / "image.bin").write_bytes(b"abc\xff\xfe")
    with pytest.raises(ValueError, match=r"image\.bin is not UTF-8 text \(byte 3\)"):
        open_corpus(tmp_path / "text", tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(own_text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/cache cannot be written .* set WINDTUNNEL_CACHE"):
        open_corpus(own_text, tmp_path / "file" / "cache")


def test_a_built_in_domain_that_is_missing_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = Domain(lambda: [Document(str(i), lambda i=i: lines(str(i), 300)) for i in range(9)], "nothing")
    monkeypatch.setattr(corpus, "DOMAINS", {"plenty": plenty, "headers": Domain(list, "a torch wheel")})
    with pytest.raises(ValueError, match=r"Domain 'headers' has 0 bytes .*; it needs a torch wheel\."):
        open_corpus(cache=tmp_path)
