import re

import pytest

from experiments.show_space import SHOWN, main, show
from search_spaces import Choice, Integer, Mixture, MixtureSchedule, Real, Space
from search_spaces.codec import KINDS


def test_every_kind_of_parameter_is_drawn(tmp_path, capsys):
    main(["--out", str(tmp_path), "--samples", "40"])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"Open {tmp_path / 'index.html'}\n"
    drawn = re.findall(r"<h2>(.*?)</h2>", page)
    assert drawn == [place.name if not place.when else SHOWN.columns[place.start].name for place in SHOWN.placed]
    for name in drawn:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {type(place.parameter) for place in SHOWN.placed} == {
        row.made for kind, row in KINDS.items() if kind != "fixed"
    }


def test_a_training_file_s_space_is_drawn(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from bo import Minimize\nfrom search_spaces import Real, Space\n"
        "space = Space(lr=Real(1e-4, 1e-2, log=True), seed=3)\nobjective = Minimize('loss')\n"
        "def train(trial):\n    return {'loss': 0.0}\n"
    )
    main([str(file), "--out", str(tmp_path / "page"), "--samples", "10"])
    assert [path.name for path in (tmp_path / "page").glob("*.png")] == ["lr.png"]


@pytest.mark.parametrize("samples", [1, 7])
def test_few_samples_are_enough(tmp_path, samples):
    space = Space(x=Real(0, 1), data=Mixture("a", "b"), constraints=["x <= 0.5"])
    text = show(space, tmp_path, samples, seed=1).read_text(encoding="utf-8")
    assert "x &lt;= 0.5" in text


def test_many_sources_and_long_or_odd_names_have_room(tmp_path):
    space = Space(
        x=Real(0, 1),
        few=Integer(1, 3, log=True),
        grid=Choice(*range(256), ordered=True),
        model=Choice(
            *(f"organisation/{size}B-instruct-v0.{size}-with-a-long-name" for size in range(6)), "$\\odd$", 1, "1"
        ),
        data=Mixture(*(f"source_number_{i}" for i in range(22))),
    )
    show(space, tmp_path, 30, seed=1)  # matplotlib warns, an error here, when a picture has no room for its texts


def test_the_page_says_no_more_than_there_is(tmp_path):
    space = Space(data=MixtureSchedule(Mixture("a", "b"), Mixture("a", "b"), switch=0.8))
    text = show(space, tmp_path, 5, seed=1).read_text(encoding="utf-8")
    assert "takes over at 0.8 of the run" in text
    assert re.search(r"5 samples of \d+ coordinates\.</p>", text)  # and no scale


@pytest.mark.parametrize("wrong", [["--samples", "0"], ["--seed", "-1"]])
def test_samples_that_cannot_be_drawn_are_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*wrong, "--out", str(tmp_path / "page")])
    assert "--samples must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
