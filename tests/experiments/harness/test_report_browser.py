"""The page of the report in a browser, at the widths of a phone and of a desk."""

import shutil

import finished
import pytest
import reported

from experiments.harness import run as runs
from experiments.harness.report import page

playwright = pytest.importorskip('playwright.sync_api', reason='needs Playwright: pip install playwright')
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium: apt-get install chromium'),
]


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'environment', lambda: finished.ENVIRONMENT)
        reported.folder_of(folder)
    (folder / 'report.html').write_text(page.page(folder), encoding='utf-8')
    return f'file://{folder}/report.html'


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.fixture(params=[(390, 'dark'), (1280, 'light')], ids=['phone', 'desk'])
def opened(request, browser, address):
    """The page; the test fails if the browser reports an error, asks for anything, or has to scroll sideways."""
    width, scheme = request.param
    context = browser.new_context(viewport={'width': width, 'height': 800}, color_scheme=scheme)
    opened, wrong = context.new_page(), []
    opened.on('console', lambda message: wrong.append(message.text))
    opened.on('pageerror', lambda error: wrong.append(str(error)))
    opened.on('request', lambda asked: wrong.append(asked.url) if asked.url[:5] not in ('data:', 'file:') else None)
    opened.goto(address)
    yield opened
    assert opened.evaluate('document.documentElement.scrollWidth') == width
    context.close()
    assert wrong == []


def first_cells(opened, table):
    return opened.locator('table').nth(table).locator('tbody th').all_inner_texts()


def test_headings_sort_by_number_up_down_and_back(opened):
    table = opened.locator('table').nth(1)
    heading = table.get_by_role('button', name='published')
    original = ['Fixed', reported.ODD, 'Axial']
    assert first_cells(opened, 1) == original
    heading.click()
    assert first_cells(opened, 1) == [reported.ODD, 'Fixed', 'Axial']
    heading.focus()
    opened.keyboard.press('Enter')
    assert first_cells(opened, 1) == ['Axial', 'Fixed', reported.ODD]
    assert table.locator('[aria-sort]').get_attribute('aria-sort') == 'descending'
    heading.click()
    assert first_cells(opened, 1) == original
    table.get_by_role('button', name='model').click()
    assert first_cells(opened, 1) == [reported.ODD, 'Axial', 'Fixed']
    cost = opened.locator('table').nth(2)
    timed = cost.get_by_role('button', name='compiling')
    timed.click()
    timed.click()
    assert first_cells(opened, 2)[0] == 'Fixed'  # the others have no value, and stay last both ways


def test_values_follow_the_pointer_and_the_arrow_keys(opened):
    chart = opened.locator('.chart')
    at, value = chart.locator('.at'), chart.locator('.legend .value').first
    assert (at.inner_text(), value.inner_text()) == ('step 100', '2.188 (2.125–2.250)')
    drawing = chart.locator('.drawing:visible')
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    opened.mouse.move(box['x'] + 0.55 * box['width'], box['y'] + 20)
    assert (at.inner_text(), value.inner_text()) == ('step 60', '5.000 (5.000–5.000)')
    assert chart.locator('circle.mark:visible').count() == 3
    opened.mouse.move(box['x'] + 0.95 * box['width'], box['y'] + 20)
    assert at.inner_text() == 'step 100'
    opened.mouse.move(0, 0)
    assert chart.locator('circle.mark').count() == 0
    drawing.focus()
    opened.keyboard.press('ArrowLeft')
    opened.keyboard.press('ArrowLeft')
    assert at.inner_text() == 'step 60'
    opened.keyboard.press('Escape')
    assert at.inner_text() == 'step 100'


def test_the_legend_hides_a_line(opened):
    chart = opened.locator('.chart')
    key, line = chart.locator('.legend button').first, chart.locator('.plot:visible .line[data-line="0"]')
    key.click()
    assert (key.get_attribute('aria-pressed'), line.is_visible()) == ('false', False)
    key.click()
    assert (key.get_attribute('aria-pressed'), line.is_visible()) == ('true', True)


def test_the_scale_is_linear_or_logarithmic(opened):
    chart = opened.locator('.chart')
    shown = chart.locator('.plot:visible')
    assert shown.get_attribute('data-scale') == 'linear'
    chart.get_by_role('button', name='log').click()
    assert shown.get_attribute('data-scale') == 'log'
    assert chart.get_by_role('button', name='log').get_attribute('aria-pressed') == 'true'
    shown.locator('.drawing').focus()
    opened.keyboard.press('Home')
    assert chart.locator('.at').inner_text() == 'step 60'
    assert shown.locator('circle.mark').count() == 3
    chart.get_by_role('button', name='linear').click()
    assert shown.get_attribute('data-scale') == 'linear'


def test_sliders_choose_layer_and_head(opened):
    viewer = opened.locator('.viewer')
    shown = viewer.locator('.map:visible figcaption')
    assert shown.all_inner_texts() == ['layer 0, head 0: rank 0, 25% of the weight direct']
    viewer.get_by_role('slider', name='layer').focus()
    opened.keyboard.press('ArrowRight')
    viewer.get_by_role('slider', name='head').fill('2')
    assert shown.all_inner_texts() == ['layer 1, head 2: rank 12, 25% of the weight direct']
    opened.emulate_media(media='print')
    assert shown.count() == 6  # on paper, all of them
    opened.emulate_media(media='screen')


def test_without_scripts_all_is_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(address)
    assert opened.locator('.map:visible').count() == 6
    assert opened.locator('input:visible').count() == 0
    assert opened.locator('.scales:visible').count() == 0
    assert opened.locator('.drawing:visible').count() == 1
    context.close()
