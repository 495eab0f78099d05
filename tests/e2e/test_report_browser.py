"""The page about runs in a real browser: it draws, its controls work, it asks for nothing and lets nothing in."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import PROGRAM, Browser, browser
from written_run import EVIL, lines, write

from megatron_scratch.report.build import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed: apt-get install chromium")

# Pixels of each chart that are not empty; 0 where a chart is not drawn.
INK = """[...document.querySelectorAll('.plot, .heat')].map(box => {
  const from = box.querySelector('canvas'), to = document.createElement('canvas');
  const all = [0, 0, to.width = from.width, to.height = from.height];
  const paper = to.getContext('2d', {willReadFrequently: true});
  paper.drawImage(from, 0, 0);
  const {data} = paper.getImageData(...all);
  let n = 0; for (let i = 3; i < data.length; i += 4) n += data[i] > 0; return n; })"""
LABELS = "[...document.querySelectorAll('.plot')].map(box => box.dataset.x)"
SPIKE = "(u => (r => [r.left + u.valToPos(355, 'x'), r.top + 60])(u.over.getBoundingClientRect()))(state.drawn[0])"
SCALES = "state.drawn.map(u => [u.scales.x.min, u.scales.x.max])"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> URL."""
    home = tmp_path_factory.mktemp("pages")
    runs = [write(home / name, lr=lr, seed=lr) for name, lr in (("base", 3e-4), ("low", 1e-4))] + [write(home / "short", steps=400)]
    evil = write(home / EVIL.replace("/", "_"), text=EVIL)
    (home / "empty").mkdir()
    lines(home / "empty" / "ledger.jsonl", [{"event": "start", "time": "2025-01-01T00:00:00+0000", "step": 0, "world": 1}])
    old = home / "old"
    old.mkdir()
    lines(old / "metrics.jsonl", [*({"step": s, "loss": 9 / s, "lr": 0.1, "grad_norm": 1.0} for s in range(1, 50)),
                                  {"step": 49, "val_loss": 3.0}])  # fmt: skip
    given = {
        "one": runs[:1],
        "several": runs,
        "evil": [evil],
        "empty": [home / "empty"],
        "old": [old],
        "mixed": [old, home / "empty", *runs],
    }
    return {name: write_report(paths, home / "out" / name)[0].as_uri() for name, paths in given.items()}


def choose(tab: Browser, axis: str) -> None:
    tab.run(f"document.querySelector('input[name=x][value={axis}]').click()")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", ["one", "several", "evil", "empty", "old", "mixed"])
def test_every_page_draws_and_says_and_asks_for_nothing(
    tab: Browser, pages: dict[str, str], name: str, width: int, dark: bool
) -> None:
    tab.open(pages[name], width, dark)
    ink = tab.run(INK)
    assert len(ink) == {"one": 9, "several": 11, "evil": 9, "empty": 0, "old": 3, "mixed": 11}[name] and all(n > 500 for n in ink)
    assert tab.complaints() == []
    assert tab.requests() == [pages[name]]
    assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")  # nothing sticks out sideways


def test_the_axis_is_switched_in_every_chart(tab: Browser, pages: dict[str, str]) -> None:
    tab.open(pages["several"])
    seen = {}
    for axis in ("step", "tokens", "wall", "train", "flops"):
        choose(tab, axis)
        labels, ends = tab.run(LABELS), tab.run("state.drawn.map(u => u.data[0][u.data[0].length - 1])")
        assert len(set(labels)) == 1 and min(tab.run(INK)) > 500
        seen[axis] = (labels[0], max(ends))
    assert {axis: label for axis, (label, _) in seen.items()} == {
        "step": "step", "tokens": "million tokens", "wall": "time since the first start (minutes)",
        "train": "time in steps (minutes)", "flops": "compute (PFLOP)"}  # fmt: skip
    assert seen["step"][1] == 1000 and seen["tokens"][1] == pytest.approx(65.536)
    assert seen["train"][1] == pytest.approx(500 / 60, rel=1e-4) and seen["flops"][1] == pytest.approx(65.536e6 * 8.1e8 / 1e15)
    assert seen["wall"][1] > seen["train"][1] + 1.5  # down for 90 s
    assert tab.complaints() == []


def test_a_drag_zooms_all_charts_and_the_button_goes_back(tab: Browser, pages: dict[str, str]) -> None:
    tab.open(pages["one"])
    before = tab.run(SCALES)
    left, top, width = tab.run("(r => [r.left, r.top, r.width])(state.drawn[0].over.getBoundingClientRect())")
    for kind, part in (
        ("mouseMoved", 0.2),
        ("mousePressed", 0.2),
        ("mouseMoved", 0.5),
        ("mouseMoved", 0.6),
        ("mouseReleased", 0.6),
    ):
        tab.mouse(kind, left + part * width, top + 100)
    zoomed = tab.run(SCALES)
    assert all(170 < low < 240 and 560 < high < 640 for low, high in zoomed), zoomed
    assert not tab.run("document.getElementById('reset').hidden")
    tab.run("(s => { s.value = 80; s.dispatchEvent(new Event('input')); })(document.getElementById('smooth'))")
    assert sorted(tab.run(SCALES)) == sorted(zoomed)  # smoothing stays where one looks
    tab.run("document.getElementById('reset').click()")
    assert tab.run(SCALES) == before and tab.run("document.getElementById('reset').hidden")
    assert tab.complaints() == []


def test_smoothing_and_the_log_scale(tab: Browser, pages: dict[str, str]) -> None:
    tab.open(pages["one"])
    rough = "(d => d.slice(1).reduce((s, v, i) => s + Math.abs(v - d[i]), 0))(lossSmooth().filter(v => v != null))"
    tab.run("window.lossSmooth = () => state.drawn.find(u => u.root.closest('[data-chart=loss]')).data[2]")
    way = []
    for value in (10, 50, 90):
        tab.run(f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('input')); }})(document.getElementById('smooth'))")
        way.append(tab.run(rough))
    assert way[0] > way[1] > way[2] > 0
    assert "half-life" in tab.run("document.getElementById('smoothed').textContent")
    tab.run("document.getElementById('log').click()")
    assert tab.run("state.drawn.find(u => u.root.closest('[data-chart=loss]')).scales.y.distr") == 3 and min(tab.run(INK)) > 500
    assert tab.complaints() == []


def test_an_event_tells_itself_under_the_mouse(tab: Browser, pages: dict[str, str]) -> None:
    tab.open(pages["one"])
    tab.mouse("mouseMoved", *tab.run(SPIKE))
    assert tab.run("document.querySelector('.tip').textContent").startswith("spike, step 355\nloss 9.5")
    legend = tab.run("document.querySelector('[data-chart=loss] .u-legend').textContent")
    assert "355" in legend and "9.5" in legend
    marks = tab.run("document.getElementById('marks').textContent")
    assert all(word in marks for word in ("spike", "skip", "resume", "rewind", "save", "straggler", "finish"))


def test_layers_and_samples_follow_their_controls(tab: Browser, pages: dict[str, str]) -> None:
    tab.open(pages["several"])
    picture = "document.querySelector('.heat canvas').toDataURL()"
    seen = {tab.run(picture)}
    for kind in ("weight_norm", "activation_rms", "activation_max"):
        tab.run(f"(s => {{ s.value = '{kind}'; s.dispatchEvent(new Event('change')); }})(document.getElementById('layer-kind'))")
        seen.add(tab.run(picture))
    assert len(seen) == 4
    text = "document.getElementById('samples').textContent"
    assert tab.run(text) == "Once upon a time at step 1000 there was a model.\n"
    tab.run("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.getElementById('sample-step'))")
    assert "at step 100 " in tab.run(text)
    tab.run("(s => { s.value = '2'; s.dispatchEvent(new Event('change')); })(document.getElementById('sample-run'))")
    assert "at step 400 " in tab.run(text)
    assert tab.complaints() == []


def test_charts_follow_the_theme_and_paper_is_white(tab: Browser, pages: dict[str, str]) -> None:
    def background() -> str:
        return tab.run("getComputedStyle(document.querySelector('section')).backgroundColor")

    def line() -> Any:
        return tab.run("state.drawn[0].series[1].stroke()")

    tab.open(pages["one"])
    light = (background(), line())
    tab.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert background() != light[0] and line() != light[1]
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert (background(), line()) == light
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert (background(), line()) != light
    raw = base64.b64decode(tab.ask("Page.printToPDF")["data"])
    assert raw.startswith(b"%PDF") and tab.complaints() == []


def test_nothing_gets_in_and_nothing_gets_out(tab: Browser, pages: dict[str, str]) -> None:
    """A run's texts are text; and had one become markup all the same, the page's policy lets it neither run nor call."""
    tab.open(pages["evil"])
    tab.mouse("mouseMoved", *tab.run(SPIKE))
    assert EVIL.strip() in tab.run("document.querySelector('.tip').textContent")
    body = tab.run("document.body.innerText")
    assert EVIL in body and tab.run("document.querySelectorAll('script').length") == 4  # the data, uPlot, and our two
    assert tab.run("document.querySelectorAll('img, iframe, object, embed, link').length") == 0
    assert EVIL.strip() in tab.run("document.getElementById('samples').textContent")
    assert tab.complaints() == []
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.got = 1\">')")
    tab.run("(s => { s.textContent = 'window.got = 2'; document.body.append(s); })(document.createElement('script'))")
    assert tab.run("fetch('http://127.0.0.1:9/').then(() => 'out', () => 'kept')") == "kept"
    assert tab.run("window.got ?? null") is None
    assert len([c for c in tab.complaints() if "Content Security Policy" in str(c)]) >= 3
    stopped = [told["requestId"] for told in tab.said("Network.loadingFailed") if told.get("blockedReason") == "csp"]
    sent = [told for told in tab.said("Network.requestWillBeSent") if told["requestId"] not in stopped]
    assert [told["request"]["url"] for told in sent] == [pages["evil"]]
