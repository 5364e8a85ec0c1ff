"""Stage 5 in a real browser: keys, clicks, phone, reload and back, lost connections, accessibility.

SCREENSHOTS=DIR keeps a picture of every page at desktop and phone width.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import waitress

import arena_world as world
from arena_world import KEYS, arena, make_world

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER) and not os.environ.get("CI"), reason="needs chromium and chromedriver"
)
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-sync
  --disable-background-networking --disable-component-update --hide-scrollbars""".split()


class Browser:
    """A headless Chromium on one arena."""

    def __init__(self, home: str):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.home = home

    def look(self, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Set the size of the window and the color scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def fresh(self) -> None:
        """A browser without a past."""
        self.driver.get(self.home + "/thanks")
        self.driver.execute_script("localStorage.clear()")
        self.driver.delete_all_cookies()
        self.driver.get_log("browser")

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, script: str, seconds: float = 20):
        """Wait until the expression is true; returns it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.run(f"return {script}")
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}; status: {self.status()}; {self.driver.get_log('browser')}")

    def status(self) -> str:
        return self.run("return document.getElementById('status')?.textContent")

    def token(self) -> str:
        """Of the trial on the page, once its pictures are there and may be judged or only skipped."""
        self.until("document.querySelector('[data-choice=N]')?.ariaDisabled === 'false'")
        return self.run("return document.querySelector('#row-a img').src.split('/').at(-2)")

    def ready(self) -> str:
        """As `token`, and open for A, B and T."""
        self.until("document.querySelector('[data-choice=A]')?.ariaDisabled === 'false'")
        return self.token()

    def key(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def next_after(self, token: str) -> str:
        self.until(f"!document.querySelector('#row-a img')?.src.includes('{token}')")
        return self.token()

    def start(self, name: str = "") -> str:
        self.driver.get(self.home + "/")
        if name:
            self.find("#name").send_keys(name)
        self.find("form button.primary").click()
        return self.token()

    def keep(self, name: str) -> None:
        """A screenshot, where SCREENSHOTS asks for them."""
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(f"{folder}/{name}.png")

    def axe(self) -> list[str]:
        """What axe-core finds of serious or critical impact."""
        spec = importlib.util.find_spec("axe_core_python")
        self.run((Path(spec.origin).parent / "axe.min.js").read_text())
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}).then(done)"
        )
        assert len(found["passes"]) > 8
        return [
            f"{v['id']}: {v['nodes'][0]['html'][:200]}"
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]


class Served:
    """An arena behind waitress, in a thread that ends with this process; it can be told to fail."""

    def __init__(self, setup):
        self.app = arena.create_app(setup)
        self.place = self.app.extensions["arena"]
        self.failing = False
        self.seen: list[tuple[str, str]] = []
        server = waitress.create_server(self.door, host="127.0.0.1", port=0, threads=6, ident=None)
        self.home = f"http://127.0.0.1:{server.effective_port}"
        threading.Thread(target=server.run, daemon=True).start()

    def door(self, environ, start_response):
        environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix("/arena") or "/"  # as a proxy would
        self.seen.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if self.failing and environ["REQUEST_METHOD"] == "POST":
            start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
            return [b"not now"]
        return self.app(environ, start_response)

    def choices(self) -> list[str]:
        return [vote["choice"] for vote in self.place.log.votes(self.place.number)]

    def standing(self) -> list[str]:
        return [v["choice"] for v in self.place.log.votes(self.place.number) if not v["revoked"]]


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), count=240)


@pytest.fixture
def served(catalogue, tmp_path):
    return Served(world.setup(*catalogue, tmp_path / "a.sqlite", picture_size=96))


@pytest.fixture(scope="module")
def chromium():
    browser = Browser("")
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium, served):
    chromium.home = served.home
    chromium.look()
    chromium.fresh()
    return chromium


def test_votes_with_keys_alone(browser, served):
    from selenium.webdriver.common.keys import Keys

    browser.driver.get(browser.home + "/")
    browser.key(Keys.TAB, Keys.TAB)  # past the skip link to the name
    browser.key("Ada", Keys.ENTER)
    token, tokens = browser.ready(), []
    assert browser.run("return document.activeElement.id") == "question"
    for key in "abtn":
        tokens.append(token)
        browser.key(key)
        token = browser.next_after(token)
        assert "Saved" in browser.status()
        browser.ready()
    assert served.choices() == ["A", "B", "T", "N"]
    browser.key("u")
    again = browser.next_after(token)
    assert "Taken back" in browser.status() and served.standing() == ["A", "B", "T"]
    assert again == tokens[-1]  # the same trial
    browser.ready()
    browser.key("a")
    assert browser.next_after(again) == token  # the one that waited
    browser.key("?")
    browser.until("document.getElementById('keys').open")
    browser.key("a")  # the help is in front: no vote
    browser.key(Keys.ESCAPE)
    browser.until("!document.getElementById('keys').open")
    browser.ready()
    browser.key("q")
    browser.until("location.pathname === '/thanks'")
    assert browser.find("#own-count").text == "4"
    assert served.standing() == ["A", "B", "T", "A"]
    assert served.place.log.votes(1)[0]["judge_name"] == "Ada"
    assert not browser.driver.get_log("browser")


def test_votes_with_clicks(browser, served):
    token = browser.start()
    for choice in "BATN":
        browser.ready()
        browser.find(f"[data-choice={choice}]").click()
        token = browser.next_after(token)
    browser.find("#undo").click()
    token = browser.next_after(token)
    browser.ready()
    browser.find("[data-choice=B]").click()
    browser.next_after(token)
    assert served.choices() == ["B", "A", "T", "N", "B"] and served.standing() == ["B", "A", "T", "B"]
    assert "4 by you" in browser.find("#count").text
    browser.find("#quit button").click()
    browser.until("location.pathname === '/thanks'")
    assert browser.find("#own-count").text == "4"
    browser.find("form button").click()
    browser.ready()
    assert browser.find("#undo").get_attribute("aria-disabled") == "true"  # another session
    browser.key("u")
    assert "nothing to undo" in browser.status()


def test_votes_below_a_path(browser, served):
    """As behind a proxy that serves the arena at /arena/."""
    browser.home += "/arena"
    token = browser.start("Ada")
    assert browser.ready() == token and browser.run("return document.styleSheets.length") == 1
    browser.key("a")
    token = browser.next_after(token)
    browser.ready()
    browser.find("#undo").click()
    browser.next_after(token)
    assert served.choices() == ["A"] and not served.standing()
    browser.ready()
    browser.key("q")
    browser.until("location.pathname === '/arena/thanks'")
    browser.find("form button").click()
    browser.until("location.pathname === '/arena/'")
    browser.driver.get(f"{browser.home}/results?token={KEYS['admin_token']}")
    browser.until("location.pathname === '/arena/results' && document.styleSheets.length === 1")
    assert not browser.driver.get_log("browser")


def test_repeats_modifiers_fields_and_switched_off_keys_do_nothing(browser, served):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    token = browser.start()
    browser.ready()
    for modifier in (Keys.CONTROL, Keys.ALT, Keys.SHIFT, Keys.META):
        ActionChains(browser.driver).key_down(modifier).send_keys("b").key_up(modifier).perform()
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', repeat: true, bubbles: true}))")
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', isComposing: true, bubbles: true}))")
    browser.run("const i = document.createElement('input'); i.id = 'typed'; document.body.append(i); i.focus()")
    browser.key("a")
    assert browser.run("return document.getElementById('typed').value") == "a"
    browser.run("document.getElementById('typed').remove()")
    browser.key("x", "1")
    browser.find("#help").click()
    browser.find("#use-keys").click()
    browser.find("#keys button").click()
    browser.key("a", "q", "?")
    assert browser.token() == token and not served.choices()
    assert browser.run("return getComputedStyle(document.querySelector('.votes kbd')).display") == "none"
    browser.driver.refresh()
    browser.ready()
    browser.key("a")
    assert browser.token() == token and not served.choices()  # remembered
    browser.find("#help").click()
    browser.find("#use-keys").click()
    browser.find("#keys button").click()
    browser.key("a")
    browser.next_after(token)
    browser.until("true")
    browser.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ф', code: 'KeyA', bubbles: true}))")
    browser.until("document.getElementById('count').textContent.startsWith('2 ')")
    assert served.choices() == ["A", "A"]  # another alphabet's key in A's place


def test_reload_back_and_a_second_tab_show_the_same_trial(browser, served):
    token = browser.start()
    browser.driver.refresh()
    assert browser.ready() == token
    browser.driver.get(browser.home + "/thanks")
    browser.driver.back()
    assert browser.ready() == token
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(browser.home + "/")
    assert browser.ready() == token
    browser.key("a")
    after = browser.next_after(token)
    second = browser.driver.current_window_handle
    browser.driver.switch_to.window(first)
    browser.key("b")  # the first tab has not heard of it: another choice is refused, and it catches up
    assert browser.next_after(token) == after
    assert "already" in browser.status() and served.choices() == ["A"]
    browser.driver.switch_to.window(second)
    browser.driver.close()
    browser.driver.switch_to.window(first)


def test_the_next_trial_is_fetched_ahead(browser, served):
    token = browser.start()
    browser.ready()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len({p.split("/")[2] for m, p in served.seen if "/picture/" in p}) < 2:
        time.sleep(0.02)
    fetched = {path.split("/")[2] for _, path in served.seen if "/picture/" in path}
    assert len(fetched) == 2
    places = [path for _, path in served.seen if "/picture/" in path]
    while time.monotonic() < deadline and len(places) < 18:
        places = [path for _, path in served.seen if "/picture/" in path]
    browser.key("t")
    assert browser.next_after(token) in fetched


def test_a_vote_is_kept_until_it_is_acknowledged(browser, served):
    token = browser.start()
    browser.ready()
    served.failing = True
    browser.key("a")
    browser.until("!document.getElementById('banner').hidden")
    assert "not saved yet" in browser.find("#trouble").text
    browser.keep("desktop-banner")
    assert not browser.axe()
    browser.key("b", "n")  # one vote at a time
    assert not served.choices()
    browser.driver.refresh()  # kept over a reload
    browser.until("!document.getElementById('banner').hidden")
    served.failing = False
    browser.find("#retry").click()
    browser.until("document.getElementById('banner').hidden")
    browser.next_after(token)
    assert served.choices() == ["A"] and "saved" in browser.status()


def test_a_kept_vote_that_the_server_refuses_is_not_called_saved(browser, served):
    token = browser.start()
    browser.ready()
    for kept, error in ((token, "already, with another choice"), ("0" * 32, "no such trial")):
        judge = served.place.log.one("SELECT id FROM judges")[0]
        if kept == token:
            served.place.log.vote(served.place.number, judge, token, "B")
        browser.run("localStorage.setItem('pending', JSON.stringify({trial: arguments[0], choice: 'A'}))", kept)
        browser.driver.refresh()
        browser.ready()
        assert error in browser.status() and "saved" not in browser.status()
    assert served.choices() == ["B"]


@pytest.mark.parametrize("width", [320, 375])
def test_on_a_phone_rows_are_two_by_two_and_voting_opens_when_both_were_seen(browser, served, width):
    browser.look(width, 640)
    token = browser.start()
    for row in ("row-a", "row-b"):
        boxes = browser.run(
            f"return [...document.querySelectorAll('#{row} img')].map(i => i.getBoundingClientRect().toJSON())"
        )
        assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]
        assert boxes[0]["x"] == boxes[2]["x"] < boxes[1]["x"] == boxes[3]["x"]
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.keep(f"{width}-vote")
    browser.key("a")
    assert "Scroll" in browser.status() and not served.choices()
    browser.find("[data-choice=A]").click()
    assert not served.choices()
    browser.run("document.getElementById('row-a').scrollIntoView({block: 'center'})")
    browser.keep(f"{width}-vote-row-a")
    time.sleep(0.3)
    assert browser.find("[data-choice=A]").get_attribute("aria-disabled") == "true"  # row B has not been seen
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    browser.ready()
    browser.keep(f"{width}-vote-row-b")
    browser.find("[data-choice=A]").click()
    browser.next_after(token)
    assert served.choices() == ["A"]
    assert browser.find("[data-choice=A]").get_attribute("aria-disabled") == "true"  # anew for each trial


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (320, False), (320, True)])
def test_axe_finds_nothing_serious_and_targets_are_large(browser, served, catalogue, tmp_path, width, dark):
    browser.look(width, 800, dark)
    name = f"{'dark' if dark else 'light'}-{width}"

    def check(page: str) -> None:
        browser.keep(f"{name}-{page}")
        assert not browser.axe(), page
        small = browser.run(
            "return [...document.querySelectorAll('button, a.button, input:not([type=file]), summary')].filter(e => {"
            "const box = (e.closest('label') ?? e).getBoundingClientRect();"
            "return box.width && (box.height < 43.9 || box.width < 43.9)}).map(e => e.outerHTML)"
        )
        assert not small, small
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), page
        assert browser.run("return document.querySelectorAll('h1').length"), page

    browser.driver.get(f"{browser.home}/results?token={KEYS['admin_token']}")
    browser.until("document.querySelector('h1')?.textContent === 'No votes yet'")
    check("results-empty")
    browser.driver.get(browser.home + "/")
    check("start")
    browser.start("Ada")
    check("vote")
    alts = browser.run("return [...document.images].map(i => i.alt)")
    assert alts == ["Query picture", *(f"Row {row}, result {i} of 4" for row in "AB" for i in (1, 2, 3, 4))]
    browser.find("#help").click()
    check("help")
    browser.find("#keys button").click()
    judge = served.place.log.connection.execute("SELECT id FROM judges").fetchone()["id"]
    for number in range(25):
        token = served.place.trial(judge)["trial"]
        served.place.log.vote(served.place.number, judge, token, "ABTNA"[number % 5])
    browser.driver.get(browser.home + "/")
    browser.token()
    browser.find("#quit button").click()
    browser.until("location.pathname === '/thanks'")
    check("thanks")
    browser.driver.get(browser.home + "/nowhere")
    check("message")
    browser.driver.get(f"{browser.home}/results?token={KEYS['admin_token']}")
    browser.until("location.search === '' && document.querySelector('svg.chart') !== null")
    check("results")
    browser.run("document.querySelector('details').open = true")
    check("results-open")


def test_the_search_page_is_as_accessible(browser, catalogue, tmp_path, monkeypatch):
    """With answers that need no models: what is under test is the page."""
    hits = [{"row": row, "score": 0.5, "title": "<i>Sofa</i>", "object_type": "sofa"} for row in range(8)]
    monkeypatch.setattr(arena.Items, "load_model", lambda *_: None)
    monkeypatch.setattr(arena, "search", lambda *_: [("one", hits), ("two", hits)])
    one = Served(world.setup(*catalogue, tmp_path / "a.sqlite", reveal=True))
    for width, dark in ((1280, False), (320, True)):
        browser.look(width, 800, dark)
        browser.driver.get(one.home + "/search?q=red+sofa")
        browser.until("[...document.images].filter(i => i.complete).length >= 8")
        browser.keep(f"{'dark' if dark else 'light'}-{width}-search")
        assert not browser.axe() and browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert "<i>Sofa</i>" in browser.find("figcaption").text
    picture = tmp_path / "drop.jpg"
    world.draw_picture(picture, 5)
    browser.find("#picture").send_keys(str(picture))  # chosen is sent
    browser.until("document.querySelector('img.asked')?.naturalWidth > 0")


def test_text_queries_show_words_that_stay_words(browser, tmp_path):
    nasty = "<b onclick=x>grey</b> sofa"
    master, images = make_world(tmp_path, prompt=[nasty] * 160)
    one = Served(world.setup(master, images, tmp_path / "a.sqlite", query="text"))
    browser.home = one.home
    browser.start()
    assert browser.find("#words").text == nasty
    assert browser.run("return document.images.length") == 8
    browser.ready()
    browser.keep("desktop-words")
    assert not browser.axe()
    browser.key("b")
    browser.until("document.getElementById('count').textContent.startsWith('1 ')")


def test_when_everything_is_judged_the_page_says_so(browser, tmp_path):
    master, images = make_world(tmp_path, count=24)
    one = Served(world.setup(master, images, tmp_path / "a.sqlite"))
    browser.home = one.home
    token = browser.start()
    for left in range(5, 0, -1):
        browser.ready()
        browser.key("a")
        token = browser.next_after(token)
        assert len(one.choices()) == 6 - left
    browser.ready()
    browser.key("a")
    browser.until("document.getElementById('trial').hidden")
    assert "judged everything" in browser.status()
    browser.key("u")
    browser.ready()
    assert len(one.standing()) == 5
