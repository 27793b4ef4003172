"""The page, in a real browser: a conversation as it streams, stopped, a task's form, a correction, errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import read_lines
from served_models import serving

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "rated.jsonl"


@pytest.fixture(scope="module")
def address(tuned_run: Path, rated: Path) -> Iterator[str]:
    with serving(f"demo={tuned_run}", feedback=rated) as (url, _):
        yield url


@pytest.fixture
def page(browser: Any, address: str, tmp_path: Path) -> Iterator[Any]:
    context = browser.new_context(locale="zh-CN", viewport={"width": 1000, "height": 800})
    opened = context.new_page()
    outside: list[str] = []
    opened.on("request", lambda request: outside.append(request.url) if not request.url.startswith(address) else None)
    failed: list[str] = []
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(address)
    opened.wait_for_selector("#tabs button >> nth=1")
    yield opened
    opened.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    context.close()
    assert not outside and not failed


def test_a_reply_streams_and_its_figures_are_told(page: Any) -> None:
    page.fill("#message", "你好")
    page.click("#send")
    page.wait_for_selector("#turns li:nth-child(2)")
    page.wait_for_selector("#stop[disabled]")
    assert page.inner_text("#turns li.user") == "你好"
    assert page.inner_text("#turns li.assistant").strip()
    assert "首字" in page.inner_text("#chat-figures")


def test_a_reply_can_be_stopped_and_the_conversation_goes_on(page: Any) -> None:
    page.evaluate(
        """() => { const real = window.fetch; window.fetch = (url, options) => {
            if (options?.body?.includes('"stream":true')) {
                options.body = JSON.stringify({...JSON.parse(options.body), max_tokens: 450, logit_bias: {"5": 100}});
            }
            return real(url, options); }; }"""
    )
    page.fill("#message", "说很多")
    page.click("#send")
    page.wait_for_selector("#turns li.assistant:not(:empty)")
    page.click("#stop")
    page.wait_for_selector("#stop[disabled]")
    assert "已停止" in page.inner_text("#turns li.assistant")


def test_a_tasks_form_answers_and_a_correction_is_kept(page: Any, rated: Path) -> None:
    page.click("#tabs button:has-text('objects')")
    page.fill("#text", "去年王安搬到了北京。")
    page.click("#run")
    page.wait_for_selector("#result:not([hidden])")
    assert "把握" in page.inner_text("#verdict") or "没有符合格式的答案" in page.inner_text("#verdict")
    page.click("#correct")
    fields = page.locator("#answer input")
    if fields.count() == 0:
        page.click("#answer button")
    fields.nth(0).fill("王安")
    fields.nth(1).fill("北京")
    page.click("#save")
    page.wait_for_selector("#thanks:not(:empty)")
    assert read_lines(rated)[-1]["messages"][-1]["content"] == '[{"人": "王安", "城": "北京"}]'


def test_labels_are_shown_with_their_confidence_and_rated(page: Any, rated: Path) -> None:
    page.click("#tabs button:has-text('labels')")
    page.fill("#text", "去年王安搬到了北京。")
    page.click("#run")
    page.wait_for_selector("#answer .chip .sure")
    assert page.inner_text("#answer .chip").strip() in ("北方", "南方")
    page.click("#up")
    page.wait_for_selector("#thanks:not(:empty)")
    assert read_lines(rated)[-1]["task"] == "labels"


def test_an_error_is_told_and_nothing_typed_is_lost(page: Any) -> None:
    page.fill("#message", "很长" * 2000)
    page.click("#send")
    page.wait_for_selector("#error:not([hidden])")
    assert "400" in page.inner_text("#error") and "Shorten" in page.inner_text("#error")
    assert page.input_value("#message").startswith("很长很长")


def test_the_page_speaks_english_too(page: Any) -> None:
    page.click("#language")
    assert page.inner_text("#send") == "Send" and page.inner_text("#tabs button >> nth=0") == "Chat"
