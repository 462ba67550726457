import subprocess
import sys
from xml.etree import ElementTree

from matplotlib.figure import Figure

from pipelines.index.chart import draw, lines, svg
from pipelines.index.manifest import Coding, CurvePoint, Recall, Release, Rerank
from tests.unit.index.test_release import release

CURVE = {"nprobe=1": (0.5, 0.2, 0.3), "nprobe=4": (1.5, 0.42, 0.92), "nprobe=16": (1.2, 0.5, 0.97)}


def measured(reranked: bool) -> Release:
    return release("v0001").model_copy(
        update={
            "search_params": "nprobe=4",
            "recall": Recall(queries={"image": 9, "text": 7}, figures={}),
            "rerank": Rerank(coding=Coding(dtype="float16"), factor=10, query_ms=0.25) if reranked else None,
            "curve": tuple(
                CurvePoint(
                    search_params=params,
                    query_ms=ms,
                    recall={"image": alone, "text": alone / 2},
                    reranked={"image": better, "text": better / 2} if reranked else {},
                )
                for params, (ms, alone, better) in CURVE.items()
            ),
        }
    )


def test_every_point_of_the_curve_is_drawn_by_the_time_that_it_takes() -> None:
    drawn = {label: (dashed, points, chosen) for label, _, dashed, points, chosen in lines(measured(True))}
    assert list(drawn) == ["image queries", "image queries, re-ranked", "text queries", "text queries, re-ranked"]
    assert drawn["image queries"] == (True, [(0.5, 0.2), (1.2, 0.5), (1.5, 0.42)], (1.5, 0.42))
    assert drawn["image queries, re-ranked"] == (False, [(0.75, 0.3), (1.45, 0.97), (1.75, 0.92)], (1.75, 0.92))
    assert [label for label, *_ in lines(measured(False))] == ["image queries", "text queries"]


def test_what_was_chosen_has_a_ring_and_what_is_not_re_ranked_a_dashed_line() -> None:
    axes = Figure().subplots()
    draw(axes, measured(True))
    curves, rings = axes.lines[::2], axes.lines[1::2]
    assert [curve.is_dashed() for curve in curves] == [dashed for _, _, dashed, _, _ in lines(measured(True))]
    assert [ring.get_fillstyle() for ring in rings] == ["none"] * len(curves)
    assert [tuple(*ring.get_xydata()) for ring in rings] == [chosen for *_, chosen in lines(measured(True))]


def test_a_chart_is_whole_and_the_same_for_the_same_figures() -> None:
    drawn = svg(measured(True))
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and drawn == svg(measured(True))
    assert drawn != svg(measured(False))


def test_drawing_costs_nothing_until_something_is_drawn() -> None:
    code = "import pipelines.index.build, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
