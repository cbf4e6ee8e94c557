"""A sweep's curves: the arithmetic of mean and band, and the pictures."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flora.core.errors import UserError
from flora.report.curves import (
    BYTES,
    DASHES,
    MARKERS,
    MAX_LINES,
    MAX_PANELS,
    ROUNDS,
    Average,
    Curve,
    Points,
    _columns,
    _figure,
    _of_readable_size,
    average,
    averages,
    draw_curves,
    line_style,
    undrawn,
    zero_shot_levels,
)

NAMES = ["accuracy_over_bytes.png", "accuracy_over_rounds.png"]


def curve(
    accuracy: list[float], *, panel: str = "p", line: str = "a", rounds: Any = None, per_round: float = 1e6
) -> Curve:
    rounds = tuple(range(len(accuracy))) if rounds is None else tuple(rounds)
    return Curve(panel, line, rounds, tuple(per_round * round for round in rounds), tuple(accuracy))


def sweep(num_panels: int, num_lines: int, num_seeds: int, num_rounds: int = 20) -> list[Curve]:
    return [
        curve(
            [0.1 + 0.05 * line * (1 - math.exp(-round / 4)) + 0.002 * seed * round for round in range(num_rounds + 1)],
            panel=f"panel {panel}", line=f"line {line}", per_round=10.0 ** (4 + line % 4),
        )
        for panel in range(num_panels) for line in range(num_lines) for seed in range(num_seeds)
    ]  # fmt: skip


# Reading


def test_mean_and_deviation_by_hand() -> None:
    result = average([curve([0.1, 0.5], per_round=10), curve([0.1, 0.7], per_round=30), curve([0.1, 0.6], per_round=5)])
    assert result.rounds == (0, 1)
    assert result.sent_bytes == pytest.approx((0, 15))
    assert result.accuracy == pytest.approx((0.1, 0.6))
    assert result.deviation == pytest.approx((0, 0.1))  # sqrt((0.01 + 0.01 + 0) / 2)
    assert result.zero_shot == pytest.approx(0.1)


def test_one_run_has_no_band() -> None:
    assert average([curve([0.1, 0.5])]).deviation is None


def test_rounds_that_not_all_runs_evaluated_are_left_out() -> None:
    result = average(
        [curve([0.1, 0.2, 0.4, 0.6], rounds=[0, 2, 4, 6]), curve([0.1, 0.3, 0.8], rounds=[0, 3, 6], per_round=3e6)]
    )
    assert result.rounds == (0, 6)
    assert result.sent_bytes == pytest.approx((0, 12e6))
    assert result.accuracy == pytest.approx((0.1, 0.7))
    apart = average([curve([0.2], rounds=[1]), curve([0.3], rounds=[2])])
    assert apart.rounds == apart.accuracy == apart.deviation == () and apart.zero_shot is None


def test_runs_of_one_panel_and_line_are_seeds() -> None:
    curves = [
        curve([0.1, 0.4], panel="q", line="b"),
        curve([0.1, 0.2], panel="p", line="a"),
        curve([0.1, 0.6], panel="q", line="b"),
        curve([0.1, 0.3], panel="q", line="a"),
        curve([], panel="r", line="c"),
        curve([0.2], panel="r", line="d", rounds=[1]),
        curve([0.2], panel="r", line="d", rounds=[2]),
    ]
    grouped = averages(curves)
    assert [(panel, list(lines)) for panel, lines in grouped.items()] == [("q", ["b", "a"]), ("p", ["a"])]
    assert grouped["q"]["b"].accuracy == pytest.approx((0.1, 0.5))
    assert grouped["q"]["a"].deviation is None


def test_one_zero_shot_line_where_all_agree() -> None:
    def levels(*zero_shots: float) -> list[float]:
        return zero_shot_levels([average([curve([each, 0.9])]).zero_shot for each in zero_shots])

    assert levels(0.2, 0.2) == [0.2]
    assert levels(0.2, 0.204) == pytest.approx([0.202])
    assert levels(0.5, 0.2) == [0.2, 0.5]
    assert zero_shot_levels([average([curve([0.5], rounds=[3])]).zero_shot]) == []


def test_every_line_looks_different_without_colour() -> None:
    styles = [line_style(order) for order in range(2 * len(MARKERS) * len(DASHES))]
    seen = {(each["marker"], each["markerfacecolor"] == "white", str(each["linestyle"])) for each in styles}
    assert len(seen) == len(styles) == 70
    # The first 14 differ in their markers already.
    assert len({(each["marker"], each["markerfacecolor"] == "white") for each in styles[:14]}) == 14


def test_columns_of_a_legend() -> None:
    assert _columns([1, 2, 3, 4, 5], 2) == [[1, 2, 3], [4, 5]]
    assert _columns([1, 2, 3], 3) == [[1], [2], [3]]


# Pictures


@pytest.mark.parametrize(
    ("num_panels", "num_lines", "num_seeds"), [(1, 3, 1), (2, 14, 2), (3, 1, 3), (4, 2, 1), (5, 3, 2), (6, 12, 3)]
)
def test_pictures(num_panels: int, num_lines: int, num_seeds: int, tmp_path: Path) -> None:
    paths = draw_curves(sweep(num_panels, num_lines, num_seeds), tmp_path)
    assert [path.name for path in paths] == ["accuracy_over_rounds.png", "accuracy_over_bytes.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    for path in paths:
        with Image.open(path) as image:
            assert 900 <= image.width <= 1700 and 450 <= image.height <= 1300
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert "Software" not in image.info and "Creation Time" not in image.info


def drawn(curves: list[Curve], names: list[str], *, over_bytes: bool) -> Any:
    """The figure of curves over rounds or over bytes."""
    of, axis = (Average.over_bytes, BYTES) if over_bytes else (Average.over_rounds, ROUNDS)
    panels = {panel: {name: of(line) for name, line in lines.items()} for panel, lines in averages(curves).items()}
    return _figure(panels, names, axis)


def test_what_is_in_a_picture() -> None:
    names = ["line 0", "line 1", "line 2"]
    for over_bytes in (False, True):
        figure = drawn(sweep(2, 3, 2), names, over_bytes=over_bytes)
        top, bottom = figure.subfigs
        assert [axes.get_title() for axes in top.axes] == ["panel 0", "panel 1"]
        for axes in top.axes:
            zero_shot, *lines = axes.get_lines()
            assert list(zero_shot.get_ydata()) == pytest.approx([10, 10])
            assert [len(line.get_xdata()) for line in lines] == [20 if over_bytes else 21] * 3
            assert lines[1].get_xdata()[-1] == pytest.approx(2.0 if over_bytes else 20)  # 20 rounds of 0.1 MB
            assert len(axes.collections) == 3  # the bands
            assert axes.get_xscale() == ("log" if over_bytes else "linear")
        texts = [text.get_text() for text in bottom.legends[0].get_texts()]
        assert texts == [*names, "zero-shot", "± 1 standard deviation"]
    alone = drawn(sweep(1, 1, 1), ["line 0"], over_bytes=False)
    assert [text.get_text() for text in alone.subfigs[1].legends[0].get_texts()] == ["line 0", "zero-shot"]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]


def test_the_legend_has_what_is_drawn_and_nothing_else() -> None:
    """Who sends nothing has no place over bytes; whose rounds don't meet is named by `undrawn`."""
    curves = [
        curve([0.1, 0.5], line="sends"),
        curve([0.1, 0.6], line="centralised", per_round=0),
        curve([0.2], line="never at once", rounds=[1]),
        curve([0.2], line="never at once", rounds=[2]),
    ]
    names = ["sends", "centralised"]
    assert legend(drawn(curves, names, over_bytes=False)) == ["sends", "centralised", "zero-shot"]
    assert legend(drawn(curves, names, over_bytes=True)) == ["sends", "zero-shot"]
    assert undrawn(curves) == ["p: never at once"]
    assert undrawn(curves[:2]) == []


@pytest.mark.parametrize(("num_panels", "num_lines", "num_pictures"), [(1, 144, 1), (13, 2, 2), (30, 1, 3)])
def test_what_is_too_much_for_a_picture_goes_into_more(num_panels: int, num_lines: int, num_pictures: int) -> None:
    line = Points((1.0,), (0.5,))
    every = {f"panel {panel}": {f"line {each}": line for each in range(num_lines)} for panel in range(num_panels)}
    pictures = _of_readable_size(every)
    assert len(pictures) == num_pictures
    assert all(len(panels) <= MAX_PANELS for panels in pictures)
    assert all(len(lines) <= MAX_LINES for panels in pictures for lines in panels.values())
    assert sum(len(lines) for panels in pictures for lines in panels.values()) == num_panels * num_lines


def test_further_pictures_and_those_of_an_earlier_call(tmp_path: Path) -> None:
    written = draw_curves(sweep(13, 1, 1, num_rounds=2), tmp_path)
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    assert "accuracy_over_rounds-2.png" in {path.name for path in written}
    draw_curves(sweep(1, 1, 1, num_rounds=2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES


def test_the_same_curves_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    curves = sweep(2, 3, 2)
    first = [path.read_bytes() for path in draw_curves(curves, tmp_path)]
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)  # as a matplotlibrc would
    assert [path.read_bytes() for path in draw_curves(curves, tmp_path)] == first
    assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.filterwarnings("error")
def test_odd_input(tmp_path: Path) -> None:
    assert draw_curves([], tmp_path) == draw_curves([curve([])], tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    odd = [
        curve([0.3], line="only zero-shot"),
        curve([0.3, 0.5], line="sends nothing", per_round=0),
        curve([0.3, 1.0], line="_$x$ {", panel="$"),
        curve([0.3, 0.5, 0.6], line="long " * 30, rounds=[0, 10, 12], panel="long " * 30),
        curve([0.5], line="apart", rounds=[1], panel="apart"),
        curve([0.5], line="apart", rounds=[2], panel="apart"),
    ]
    assert len(draw_curves(odd, tmp_path)) == 2
    for each in [*odd, curve([0.5], rounds=[1], per_round=0)]:
        assert len(draw_curves([each], tmp_path)) == 2


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError) as caught:
        draw_curves(sweep(1, 1, 1), tmp_path)
    assert str(caught.value) == "curves need matplotlib: pip install 'flora-clip[report]' (or matplotlib)"
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_never_imported_and_matplotlib_only_to_draw(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from flora.report.curves import Curve, draw_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"draw_curves([Curve('p', 'a', (0, 1), (0, 5), (0.1, 0.2))], Path({str(tmp_path)!r}))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    written = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    draw_curves([Curve("p", "a", (0, 1), (0, 5), (0.1, 0.2))], tmp_path)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == written


def test_a_picture_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"accuracy_over_rounds\.png: can't be written: No such file or directory"):
        draw_curves(sweep(1, 1, 1), tmp_path / "nowhere")
    monkeypatch.setattr("flora.core.files.os.fsync", fail)
    with pytest.raises(UserError, match=r"accuracy_over_rounds\.png: can't be written: No space left on device"):
        draw_curves(sweep(1, 1, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []
