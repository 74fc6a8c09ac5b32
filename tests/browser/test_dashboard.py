"""The dashboard as people meet it: in a browser, on a desk and on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from nitsum.engine.fake_client import FakeEngineClient
from tests.browser.conftest import ANSWER, PLANS

pytestmark = pytest.mark.browser


def until(browser: Chrome, true: Callable[[], object]) -> None:
    WebDriverWait(browser, 10, 0.05).until(lambda _: true())


def at(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def pressed(browser: Chrome) -> str:
    found = browser.find_elements(By.CSS_SELECTOR, "#plans [aria-pressed=true]")
    return found[0].text if found else ""


def opened(browser: Chrome, url: str, *, width: int = 1300, mobile: bool = False) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser")
    browser.get(url)
    browser.execute_script("sessionStorage.clear()")


def ask(browser: Chrome, tier: str) -> None:
    at(browser, f"#tier-choice input[value={tier}]").find_element(By.XPATH, "..").click()
    at(browser, "#prompt").send_keys("hi", Keys.ENTER)


def test_it_shows_plans_lanes_ranks_and_tiers(browser: Chrome, url: str) -> None:
    opened(browser, url)
    until(browser, lambda: pressed(browser) == PLANS[0])
    assert [b.text for b in browser.find_elements(By.CSS_SELECTOR, "#plans button")] == [*PLANS]
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#time rect.tp1"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#ranks .rank")) == 1
    tiers = [row.get_attribute("data-tier") for row in browser.find_elements(By.CLASS_NAME, "tier")]
    assert tiers == [None, "priority", "default", "flex", "batch"]
    assert at(browser, "#health").text == "serving"
    assert at(browser, "#model").text == "tiny"


def test_a_button_switches_the_plan(browser: Chrome, url: str, engine: FakeEngineClient) -> None:
    opened(browser, url)
    until(browser, lambda: pressed(browser) == PLANS[0])
    at(browser, "#plans button[value=TP2]").click()
    until(browser, lambda: at(browser, "#said").text.startswith("Now TP2"))
    until(browser, lambda: pressed(browser) == "TP2")
    until(browser, lambda: at(browser, "#plans button[value='2xTP1']").is_enabled())


def test_a_chat_streams_as_its_tier(browser: Chrome, url: str, engine: FakeEngineClient) -> None:
    opened(browser, url)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#tier-choice input"))
    ask(browser, "flex")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".turn.assistant.live p"))
    answer = at(browser, ".turn.assistant p")
    until(browser, lambda: 0 < len(answer.text) < len(ANSWER.strip()))  # on its way
    until(browser, lambda: answer.text.strip() == ANSWER.strip())
    assert at(browser, ".turn.assistant small").text.startswith("flex · first token")
    (request,) = engine.requests
    assert request.tier == "flex"


def test_stop_ends_the_answer_and_the_request(
    browser: Chrome, url: str, engine: FakeEngineClient
) -> None:
    opened(browser, url)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#tier-choice input"))
    ask(browser, "priority")
    until(browser, lambda: at(browser, ".turn.assistant p").text)
    at(browser, "#send").click()
    until(browser, lambda: engine.aborted)
    until(browser, lambda: at(browser, "#send").text == "Send")


def test_a_dead_engine_is_said(browser: Chrome, url: str, engine: FakeEngineClient) -> None:
    opened(browser, url)
    until(browser, lambda: at(browser, "#health").text == "serving")
    engine.die()
    until(browser, lambda: at(browser, "#health").text == "engine does not answer")


def test_strangers_need_the_admin_key(browser: Chrome, url: str) -> None:
    stranger = f"http://stranger.test:{urlsplit(url).port}"
    opened(browser, stranger)
    until(browser, lambda: at(browser, "#locked").is_displayed())
    assert not at(browser, "#layout").is_displayed()
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#tier-choice input"))
    at(browser, "#unlock").click()
    at(browser, "#admin-key").send_keys("secret")
    at(browser, "#keys [value=save]").click()
    until(browser, lambda: at(browser, "#layout").is_displayed())
    until(browser, lambda: pressed(browser) == PLANS[0])


@pytest.mark.parametrize(("width", "mobile"), [(1300, False), (390, True), (320, True)])
def test_it_fits_the_screen(browser: Chrome, url: str, width: int, mobile: bool) -> None:
    opened(browser, url, width=width, mobile=mobile)
    until(browser, lambda: pressed(browser) == PLANS[0])
    wide = browser.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter(e => e.offsetWidth &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className || e.tagName)"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_it_loads_nothing_from_elsewhere_and_complains_of_nothing(
    browser: Chrome, url: str
) -> None:
    opened(browser, url)
    until(browser, lambda: pressed(browser) == PLANS[0])
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded: list[str] = browser.execute_script(script)
    assert all(name.startswith((url, "data:")) for name in loaded), loaded
    assert browser.get_log("browser") == []


def test_the_page_in_the_package_names_no_other_host() -> None:
    page = Path(__file__).parents[2] / "src/nitsum/server/dashboard.html"
    text = page.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "//" not in "".join(line for line in text.splitlines() if "src=" in line)
    assert "http://" not in text
    assert "https://" not in text
