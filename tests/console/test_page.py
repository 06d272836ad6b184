"""The page in a real browser, over a mesh that says what the test tells it to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from expertmesh.deployments.controller.events import Kind
from expertmesh.platform.access import ADMIN, INFER
from tests.access.test_keys import make, write
from tests.console.chromium import Visit, visit
from tests.console.scripted import ScriptedMesh, scripted

LAYERS, EXPERTS, SHARDS = 60, 256, 16
WAIT_MS = 60_000
GRID = "[role=grid]"

Open = Callable[..., Visit]


@pytest.fixture
def mesh() -> ScriptedMesh:
    return ScriptedMesh(LAYERS, EXPERTS, SHARDS)


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Open]:
    """Opens the console of a mesh; at the end nothing must have gone wrong in any page."""
    visits, contexts = [], []

    def visited(url: str, **options: object) -> Visit:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})  # type: ignore[arg-type]
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        seen = visit(context, url)
        visits.append(seen)
        seen.page.goto(f"{url}/console")
        return seen

    expect.set_options(timeout=WAIT_MS)
    yield visited
    for seen in visits:
        assert seen.errors == []
        assert seen.elsewhere == []
    for context in contexts:
        context.close()


def draws(page: Page) -> int:
    """How often the heat map was drawn."""
    return int(page.locator("canvas[data-draws]").first.get_attribute("data-draws") or 0)


def drawn(page: Page, times: int) -> None:
    """Waits until the heat map was drawn so often. A string for `wait_for_function` would be refused by the page's
    content security policy as soon as it isn't true at the first look."""
    expect(page.locator("canvas[data-draws]").first).to_have_attribute("data-draws", str(times))


def looked(mesh: ScriptedMesh, page: Page, times: int = 2) -> None:
    """Returns when the page has asked so many times more, and has shown what it was answered."""
    target = mesh.asked.count("heat") + times
    while mesh.asked.count("heat") < target:
        page.wait_for_timeout(50)
    page.wait_for_timeout(50)


def test_a_large_table_is_drawn_when_it_changes_and_only_then(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url).page
        page.wait_for_selector("canvas[data-draws]")
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        print(f"console: ready to run after {timing:.0f} ms")
        looked(mesh, page)
        before = draws(page)
        box = page.locator("canvas[data-draws]").bounding_box()
        assert box is not None
        page.evaluate(
            "window.frames = 0; const count = () => { window.frames += 1; requestAnimationFrame(count); };"
            "requestAnimationFrame(count)"
        )
        told = set()
        for step in range(60):
            page.mouse.move(box["x"] + box["width"] * step / 60 + 2, box["y"] + box["height"] * step / 60 + 2)
            told.add(page.get_by_test_id("inspector").inner_text())
        for _ in range(10):
            page.mouse.wheel(0, 60)
        looked(mesh, page)
        print(f"console: {page.evaluate('window.frames')} frames while pointing and scrolling")
        assert len(told) > 30, "the pointer is followed"
        assert draws(page) == before, "pointing, scrolling and looks that bring nothing new draw nothing"
        mesh.rows = mesh.rows + 1
        looked(mesh, page)
        drawn(page, before + 1)
        page.get_by_role("button", name="Placement").click()
        drawn(page, before + 2)
        mesh.rows = mesh.rows + 1
        looked(mesh, page)
        assert draws(page) == before + 2, "loads aren't shown"


def test_figures_are_those_of_the_mesh(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url).page
        expect(page.get_by_test_id("health")).to_contain_text("ok")
        expect(page.get_by_test_id("fact-model")).to_have_text("synthetic")
        expect(page.get_by_test_id("fact-epoch")).to_have_text(str(mesh.epoch))
        expect(page.get_by_test_id("now-ratio")).to_have_text(f"1 : {SHARDS}")
        expect(page.locator("tr[data-shard]")).to_have_count(SHARDS)
        expect(page.locator("tr[data-replica]")).to_contain_text("212 ms")
        newest = mesh.samples[-1]
        expect(page.get_by_test_id("now-balance")).to_have_text(re.compile(r"^0\.\d\d$"))
        assert page.get_by_test_id("now-kv").inner_text().endswith(" %")
        assert abs(float(page.get_by_test_id("now-tokens").inner_text()) - newest["tokens_s"]) < 100
        hottest = page.locator(".hot button").first
        assert hottest.inner_text().split() == [f"{mesh.layers[LAYERS // 2]}·{EXPERTS // 3}", f"{mesh.rows.max():.0f}"]
        hottest.click()
        inspector = page.get_by_test_id("inspector")
        expect(inspector).to_contain_text(f"Layer {mesh.layers[LAYERS // 2]}, expert {EXPERTS // 3}")
        row = mesh.rows[LAYERS // 2]
        expect(inspector).to_contain_text(f"{100 * row.max() / row.sum():.1f} % of its layer")
        shard = EXPERTS // 3 % SHARDS
        expect(inspector).to_contain_text(f"on shard {shard} ({mesh.name(shard)[:8]})")


def test_keys_move_through_the_table(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url, reduced_motion="reduce").page
        grid = page.locator(GRID)
        grid.wait_for()
        assert (grid.get_attribute("aria-rowcount"), grid.get_attribute("aria-colcount")) == ("60", "256")
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.getAttribute('role') ?? document.activeElement.tagName")
            )
            if reached[-1] == "grid":
                break
        assert reached[-1] == "grid", reached
        assert page.evaluate(f"getComputedStyle(document.querySelector('{GRID}')).outlineStyle") == "solid"
        cell = page.locator("[role=gridcell]")

        def at(layer: int, expert: int) -> None:
            expect(cell).to_contain_text(f"Layer {mesh.layers[layer]}, expert {expert}:")
            assert cell.get_attribute("aria-colindex") == str(expert + 1)
            assert grid.get_attribute("aria-activedescendant") == cell.get_attribute("id")

        at(0, 0)
        for key, layer, expert in [
            ("ArrowUp", 0, 0),
            ("ArrowRight", 0, 1),
            ("ArrowDown", 1, 1),
            ("End", 1, 255),
            ("ArrowRight", 1, 255),
            ("PageDown", 16, 255),
            ("Control+End", 59, 255),
            ("ArrowLeft", 59, 254),
            ("Home", 59, 0),
            ("PageUp", 44, 0),
            ("Control+Home", 0, 0),
        ]:
            page.keyboard.press(key)
            at(layer, expert)
        page.keyboard.press("Escape")
        expect(cell).to_have_count(0)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_a_shard_is_picked_out(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url).page
        button = page.locator(f"tr[data-shard='{mesh.name(3)}'] button")
        button.focus()
        before = draws(page)
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "true")
        drawn(page, before + 1)
        page.keyboard.press("Enter")
        expect(button).to_have_attribute("aria-pressed", "false")


def test_starting_degraded_away_and_unreachable_are_told_apart(mesh: ScriptedMesh, opened: Open) -> None:
    mesh.health, mesh.ready = "starting", False
    with scripted(mesh) as url:
        page = opened(url).page
        health, note = page.get_by_test_id("health"), page.get_by_test_id("note")
        expect(note).to_contain_text("No attention replica is ready yet")
        mesh.health, mesh.ready = "ok", True
        expect(health).to_contain_text("ok")
        expect(note).to_have_count(0)
        mesh.lose(5)
        expect(health).to_contain_text("degraded")
        expect(note).to_contain_text(f"{LAYERS * EXPERTS // SHARDS} experts served by nobody")
        expect(page.locator("tr.vacant")).to_contain_text("nobody")
        expect(page.get_by_test_id("events").locator("li.bad")).to_contain_text("is lost")
        mesh.away = True
        expect(health).to_contain_text("controller away")
        expect(note).to_contain_text("Requests are served on")
        expect(page.locator("tr[data-shard]")).to_have_count(SHARDS - 1)
        mesh.away = False
        expect(health).to_contain_text("degraded")
    expect(page.get_by_test_id("health")).to_contain_text("unreachable")
    expect(page.get_by_test_id("note")).to_contain_text("can't be reached")


def test_events_come_by_themselves_and_once(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url).page
        events = page.get_by_test_id("events").locator("li[data-kind]")
        expect(events).to_have_count(1)
        mesh.timeline.add(Kind.SCALE, "experts: 17 wanted instead of 16, by hand", deployment="experts")
        expect(events.first).to_contain_text("17 wanted")
        mesh.away = True
        expect(page.get_by_test_id("health")).to_contain_text("away")
        mesh.timeline.add(Kind.FREEZE, "experts stay where they are", frozen=1)
        mesh.away = False
        expect(events.first).to_contain_text("stay where they are")
        expect(events).to_have_count(3)
        mesh.timeline.add(Kind.EPOCH, "placement epoch 3000001", epoch=3000001)
        page.get_by_role("button", name="Epochs").click()
        expect(events.first).to_contain_text("placement epoch")


def test_themes(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url, color_scheme="dark").page
        page.wait_for_selector("canvas[data-draws]")

        def theme() -> str:
            return str(page.evaluate("document.documentElement.dataset.theme"))

        assert theme() == "dark"
        before = draws(page)
        page.get_by_role("button", name="Theme: auto; change to light").click()
        assert theme() == "light"
        expect(page.locator("canvas[data-draws]").first).not_to_have_attribute("data-draws", str(before))
        page.reload()
        page.wait_for_selector("canvas[data-draws]")
        assert theme() == "light", "it is remembered"
        page.get_by_role("button", name="Theme: light; change to dark").click()
        page.get_by_role("button", name="Theme: dark; change to auto").click()
        page.emulate_media(color_scheme="light")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_a_narrow_page_has_nothing_beyond_its_edge(mesh: ScriptedMesh, opened: Open) -> None:
    with scripted(mesh) as url:
        page = opened(url, viewport={"width": 390, "height": 844}).page
        page.wait_for_selector("canvas[data-draws]")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_key_that_is_over_its_limits_is_told_so(mesh: ScriptedMesh, opened: Open, tmp_path: Path) -> None:
    token, key = make("admin", scopes=[ADMIN], requests_per_minute=3)
    with scripted(mesh, keys_file=write(tmp_path / "keys.json", key)) as url:
        page = opened(url).page
        page.get_by_label("API key").fill(token)
        page.keyboard.press("Enter")
        expect(page.get_by_test_id("note")).to_contain_text("3 requests a minute")


def test_a_key_is_asked_for_and_kept_for_this_tab_only(mesh: ScriptedMesh, opened: Open, tmp_path: Path) -> None:
    admin, infer = make("admin", scopes=[ADMIN]), make("infer", scopes=[INFER])
    keys = write(tmp_path / "keys.json", admin[1], infer[1])
    with scripted(mesh, keys_file=keys) as url:
        page = opened(url).page

        def enter(key: str) -> None:
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")

        expect(page.locator("form.key")).to_contain_text("asks for a key")
        assert mesh.asked == [], "no data without a key"
        enter("xm-wrong")
        expect(page.locator("form.key")).to_contain_text("not known")
        enter(infer[0])
        expect(page.locator("form.key")).to_contain_text("may not look")
        enter(admin[0])
        expect(page.get_by_test_id("health")).to_contain_text("ok")
        expect(page.get_by_test_id("events").locator("li[data-kind]")).to_have_count(1)
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert page.evaluate("document.cookie") == ""
        assert admin[0] not in page.content()
        page.reload()
        expect(page.get_by_test_id("health")).to_contain_text("ok")
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("form.key")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0
