"""The page at / in a real browser: chat, thinking apart, tokens/s, stop. Skipped where there is no chromium or selenium."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.processes import Server

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if binary is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Server) -> Any:
    browser.get(server.url + "/")
    wait(browser, lambda: element(browser, "model").text == "tiny")
    return browser


def element(page: Any, name: str) -> Any:
    return page.find_element("id", name)


def wait(page: Any, condition: Any) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    # The page may write anew what is just being read.
    WebDriverWait(page, 60, ignored_exceptions=[StaleElementReferenceException]).until(lambda _: condition())


def say(page: Any, text: str, most: int) -> None:
    page.execute_script("document.getElementById('most').value = arguments[0]", most)
    element(page, "prompt").send_keys(text)
    element(page, "send").click()


def texts(page: Any, kind: str) -> list[str]:
    return [found.text for found in page.find_elements("css selector", f"#log .{kind}")]


def ended(page: Any) -> bool:
    return element(page, "send").is_enabled()


def test_thinking_is_shown_apart_with_the_speed(page: Any):
    assert element(page, "thinking").is_selected(), "K-EXAONE thinks by default"
    say(page, "대한민국의 수도는?", 40)
    wait(page, lambda: texts(page, "reasoning") and ended(page))
    assert texts(page, "user") == ["대한민국의 수도는?"]
    assert texts(page, "reasoning")[0].startswith("Thinking")
    assert "tokens/s" in element(page, "speed").text
    assert not texts(page, "error")


def test_without_thinking_there_is_an_answer_alone(page: Any):
    element(page, "thinking").click()
    say(page, "안녕 <b>markup</b>", 12)
    wait(page, lambda: texts(page, "assistant") and ended(page))
    assert texts(page, "user") == ["안녕 <b>markup</b>"], "what is said is text, never markup"
    assert not texts(page, "reasoning")


def test_stop_ends_an_answer(page: Any, server: Server):
    say(page, "tell me everything", 3000)
    wait(page, lambda: "tokens/s" in element(page, "speed").text)
    element(page, "stop").click()
    wait(page, lambda: ended(page))
    with server.client() as http:

        def idle() -> bool:
            return 'num_requests_running{engine="0",model_name="tiny"} 0.0' in http.get("/metrics").text

        wait(page, idle)


def test_an_error_is_shown(page: Any):
    say(page, "x", 100_000)
    wait(page, lambda: texts(page, "error"))
    assert "context" in texts(page, "error")[0]


def test_the_page_asks_nothing_of_the_network(page: Any, server: Server):
    script = "return performance.getEntriesByType('resource').map(found => found.name)"
    assert all(name.startswith(server.url) for name in page.execute_script(script))
    severe = [
        line for line in page.get_log("browser") if line["level"] == "SEVERE" and "favicon" not in line["message"]
    ]
    assert not [line for line in severe if "Content Security Policy" in line["message"]]
