"""The page in a headless Chromium: two characters answer side by side, and nothing is loaded from elsewhere."""

import shutil

import pytest
from serving import SYSTEMS, fleet, persona, personas, serving, wait_for

from persona_pruner.fleet import DENSE
from persona_pruner.formats.persona_file import SUFFIX
from persona_pruner.serve.http import Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

UNNAMED = """[...document.querySelectorAll('button, select, textarea, input')].filter(
    (e) => !(e.labels?.[0]?.textContent || e.ariaLabel || e.textContent).trim()).map((e) => e.outerHTML)"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser):
    found = browser.new_page()
    found.set_default_timeout(30_000)
    found.asked, found.wrong = [], []
    found.on("request", lambda request: found.asked.append(request.url))
    found.on("pageerror", lambda error: found.wrong.append(str(error)))
    found.on("console", lambda line: line.type == "error" and found.wrong.append(line.text))
    yield found
    found.close()


def say(page, text):
    """What the two sides answered last."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send", state="hidden")
    page.wait_for_selector("#send", state="visible")
    return [page.locator(".side").nth(i).locator(".assistant").last.text_content() for i in (0, 1)]


def test_two_sides(tmp_path, page):
    with serving(personas(tmp_path)) as server:
        page.goto(server.url)
        page.wait_for_selector("text=2 characters on tiny")
        left, right = (page.locator(".side").nth(i) for i in (0, 1))
        assert left.locator("option").all_text_contents() == ["tiny (dense base)", "Bram (bram)", "Lyra (lyra)"]
        assert left.locator("[data-is=share]").text_content() == "50 %"
        size = server.engine.characters["bram"].bytes
        assert left.locator("[data-is=bytes]").text_content() == f"{size} B"
        assert "with the prompt of Bram" in right.locator(".note").text_content()
        page.evaluate("document.getElementById('temperature').value = 0")
        page.evaluate("document.getElementById('tokens').value = 16")

        def alone(name, *turns, system=""):
            mine = fleet()
            mine.add("bram", persona("bram", 0)), mine.add("lyra", persona("lyra", 1))
            roles = ("assistant", "user")
            talk = [{"role": "system", "content": system}] if system else []
            talk += [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            return "".join(event.text for event in mine.stream([(name, talk)], 16, temperature=0))

        first = say(page, "Who are you?")
        opening = ("Hail!", "Who are you?")
        assert first == [alone("bram", *opening), alone(DENSE, *opening, system=SYSTEMS["bram"])]
        assert float(left.locator("[data-is=speed]").text_content()) > 0
        assert left.locator("[data-is=first]").text_content().endswith(" ms")
        second = say(page, "What is iron?")  # the conversation goes on
        assert second[0] == alone("bram", *opening, first[0], "What is iron?")

        right.locator("select").select_option("lyra")
        assert right.locator("li").all_text_contents() == ["Hail!"]
        assert left.locator("li").count() == 5
        third = say(page, "<b>Sing</b> & dance")
        assert third[1] == alone("lyra", "Hail!", "<b>Sing</b> & dance")
        assert right.locator(".user").last.text_content() == "<b>Sing</b> & dance"
        page.click("#clear")
        assert left.locator("li").all_text_contents() == ["Hail!"]

        persona("nell", 5).save(tmp_path / f"nell{SUFFIX}")  # a character that comes while the page is open
        page.wait_for_selector("text=3 characters on tiny")
        assert right.locator("select").input_value() == "lyra"
        assert all(url.startswith(f"{server.url}/") for url in page.asked)
        assert page.wrong == []


def test_problems_are_shown_and_an_answer_can_be_stopped(tmp_path, page):
    with serving(personas(tmp_path), Limits(tokens=4000), pause=0.02) as server:
        page.goto(server.url)
        page.wait_for_selector("text=2 characters on tiny")
        page.evaluate("document.getElementById('tokens').value = 5000")
        page.fill("#text", "Who are you?")
        page.press("#text", "Enter")
        problem = page.locator(".side").first.locator(".problem")
        problem.wait_for()
        assert problem.text_content() == "max_tokens is at most 4000 here, not 5000"
        page.wait_for_selector("#send", state="visible")
        page.evaluate("document.getElementById('tokens').value = 1500")
        page.fill("#text", "Who are you?")
        page.press("#text", "Enter")
        wait_for(lambda: server.engine.stats["running"] == 2)
        page.click("#stop")
        page.wait_for_selector("#send", state="visible")
        wait_for(lambda: server.engine.stats["running"] == 0)


def test_a_token_is_asked_for(tmp_path, page):
    with serving(personas(tmp_path), token="sesame") as server:
        page.goto(server.url)
        page.wait_for_selector("text=a bearer token is needed")
        page.fill("#token", "sesame")
        page.press("#token", "Tab")
        page.wait_for_selector("text=2 characters on tiny")


def test_narrow_screens_and_the_policy(tmp_path, browser):
    with serving(personas(tmp_path)) as server:
        found = browser.new_page(viewport={"width": 360, "height": 700})
        response = found.goto(server.url)
        found.wait_for_selector("text=2 characters on tiny")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        width = found.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        boxes = [found.locator(".side").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # below each other
        assert found.evaluate(UNNAMED) == []
        found.click("#settings summary")
        panel = found.locator(".panel").bounding_box()
        assert panel["x"] >= 0 and panel["x"] + panel["width"] <= 360
        found.close()
