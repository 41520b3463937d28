"The interactive map: one file, no network; in a browser a click shows neighbors, and names stay text."
import json, re, shutil, subprocess, sys
from html import unescape
from html.parser import HTMLParser

import numpy as np, pytest, torch
from PIL import Image

import forks
from simclr_nb.features.neighbors import NeighborIndex
from simclr_nb.pictures.pages import html_map
from simclr_nb.pictures.plots import plot_confusion, plot_label_fractions, plot_map, project_2d, save_figure

evil = ['<b>&"', '</script><script>document.title = "broken"</script>', 'plain']
browsers = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
browser = next(filter(None, map(shutil.which, browsers)), None)
needs_browser = pytest.mark.skipif(browser is None, reason='there is no Chromium to open the page in')

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "300 images, each of one gray; image i lies at angle i, so that its neighbors are i ± 1, i ± 2."
    angle = torch.linspace(0, 6, 300)
    xy = torch.stack([angle.cos(), angle.sin()], 1)
    grays = [Image.new('RGB', (20, 30), (i*255//299,)*3) for i in range(300)]
    path = tmp_path_factory.mktemp('map')/'map.html'
    near = NeighborIndex(xy).search_each(4)[1]
    return html_map(path, xy, grays, np.arange(300) % 3, evil, near, title='Grays & <i>angles</i>')

def data_of(text): return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])

def opened(page, fragment='', script='', *flags):
    "The page's DOM after its scripts, and one that the test adds, have run."
    page.with_name('tried.html').write_text(page.read_text() + f'<script>{script}</script>')
    command = [browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
        '--disable-background-networking', '--disable-component-update', '--disable-sync',
        '--virtual-time-budget=3000', f'--user-data-dir={page.parent/"user"}', '--window-size=1200,800', *flags,
        '--dump-dom', page.with_name('tried.html').as_uri() + fragment]
    try: return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    finally: shutil.rmtree(page.parent/'user', ignore_errors=True)

def body(dom): return dom[dom.index('<main>'):dom.index('<noscript>')]
def neighbors(dom):
    near = re.search(r'<div id="near">(.*?)</div>', dom, re.S)[1]
    return [(int(i), kind) for kind, i in re.findall(r'<button class="(same|other)" data-i="(\d+)"', near)]

# Without a browser

def test_one_file_without_network(page):
    text = page.read_text()
    without_pictures = re.sub(r'[\w+/=]{500,}', '', text)
    assert not re.search(r'https?:|//[a-z]+\.|@import|url\(|<link|<img|<script[^>]+src', without_pictures)
    assert "default-src 'none'" in text
    data = data_of(text)
    assert [len(data[k]) for k in ('x', 'y', 'labels', 'near')] == [300]*4 and len(data['sheets']) == 2
    assert all(s.startswith('/9j/') for s in data['sheets'])        # JPEG

def test_names_end_no_element(page):
    class Scripts(HTMLParser):
        found, bold = 0, 0
        def handle_starttag(self, tag, attrs):
            self.found += tag == 'script'
            self.bold += tag in ('b', 'i')
    parser = Scripts()
    parser.feed(page.read_text())
    assert (parser.found, parser.bold) == (2, 0)
    assert data_of(page.read_text())['classes'] == evil
    assert '<title>Grays &amp; &lt;i&gt;angles&lt;/i&gt;</title>' in page.read_text()

def test_ten_thousand_points_in_a_few_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:32, :32]/32
    def texture(a, b):
        waves = 127 + 60*np.sin(a*xx + b*yy)[..., None]
        return Image.fromarray(np.uint8(waves + rng.normal(0, 12, (32, 32, 3))))
    textures = [texture(a, b) for a, b in rng.uniform(-25, 25, (100, 2))]
    n = 10_000
    images, xy, near = [textures[i % 100] for i in range(n)], rng.normal(size=(n, 2)), rng.integers(0, n, (n, 12))
    path = html_map(tmp_path/'map.html', xy, images, np.arange(n) % 10, list('abcdefghij'), near)
    assert path.stat().st_size < 16e6, f'{path.stat().st_size/1e6:.1f} MB'
    if browser:
        dom = opened(path, '#9999')
        assert '10,000 images' in dom and len(neighbors(dom)) == 12

# In a browser

@needs_browser
def test_address_selects_and_shows_neighbors(page):
    dom = opened(page, '#12')
    assert sorted(neighbors(dom)) == [(10, 'other'), (11, 'other'), (13, 'other'), (14, 'other')]
    assert '0 of the 4 nearest share its class' in dom and body(dom).count('✗') == 4
    assert not neighbors(opened(page)) and not neighbors(opened(page, '#300'))

@needs_browser
def test_names_are_text(page):
    dom = opened(page, '#12')
    assert '<title>Grays &amp; &lt;i&gt;angles&lt;/i&gt;</title>' in dom
    assert '<h1 id="title">Grays &amp; &lt;i&gt;angles' in dom
    legend = re.search(r'<div id="legend">(.*?)</div>', dom, re.S)[1]
    names = re.findall(r'<span class="">(.*?)</span>', legend) or re.findall(r'<span>(.*?)</span>', legend)
    assert [unescape(c) for c in names] == evil

@needs_browser
def test_hover_click_keys_and_legend(page):
    say = 'document.body.dataset.said = JSON.stringify(said)'
    script = '''const said = [], box = map.getBoundingClientRect(), wait = ms => new Promise(f => setTimeout(f, ms))
        function mouse(type, i, dx = 0) {
            const [x, y] = place(i), there = {clientX: box.left + x + dx, clientY: box.top + y}
            map.dispatchEvent(new PointerEvent(type, {...there, bubbles: true, pointerId: 1}))
        }
        function key(k) { map.dispatchEvent(new KeyboardEvent('keydown', {key: k, bubbles: true})) }
        map.setPointerCapture = () => {};
        (async () => {
            await wait(200)
            mouse('pointermove', 40); said.push(+$('tip').dataset.i, $('tip').hidden)
            mouse('pointerdown', 40); mouse('pointerup', 40); await wait(100); said.push(selected, location.hash)
            const before = place(40); key('+'); said.push(view.k, place(0)[0] !== before[0])
            key('0'); said.push(view.k)
            key('ArrowRight'); await wait(100); said.push(selected !== 40 && place(selected)[0] > place(40)[0])
            const there = {clientX: box.left + before[0], clientY: box.top + before[1]}
            map.dispatchEvent(new WheelEvent('wheel', {deltaY: -500, ...there, cancelable: true}))
            const now = place(40), moved = Math.hypot(now[0] - before[0], now[1] - before[1])
            said.push(view.k > 2, moved < 2)                                   // wheel events have whole pixels
            key('0'); mouse('pointerdown', 40); mouse('pointermove', 40, 50)
            const x = view.x; mouse('pointerup', 40); said.push(x)
            key('0'); document.querySelectorAll('#legend button')[1].click()
            const [a, b] = place(40); said.push(data.labels[40], at(a, b, 1e9) !== 40)
            key('Escape'); await wait(100); said.push(selected, $('selection').hidden, location.hash)
            ''' + say + '''
        })()'''
    said = json.loads(unescape(re.search(r'data-said="(.*?)"', opened(page, '', script))[1]))
    assert said == [40, False, 40, '#40', 1.5, True, 1, True, True, True, 50, 1, True, -1, True, '']

@needs_browser
def test_a_thumbnail_is_the_image(page):
    script = '''setTimeout(() => {
        const pen = document.querySelector('#chosen canvas').getContext('2d')
        document.body.dataset.said = pen.getImageData(32, 32, 1, 1).data.join()
    }, 800)'''
    for i in (12, 280):
        said = re.search(r'data-said="(.*?)"', opened(page, f'#{i}', script))[1]
        red, green, blue, alpha = map(int, said.split(','))
        assert abs(red - i*255//299) < 6 and alpha == 255, (i, red)


# What a collapsed or foreign set must not break

@pytest.mark.process
@pytest.mark.parametrize('h', ['zeros(40, 8)', 'ones(40, 8)', 'rand(40, 1)*torch.ones(8)'])
def test_vectors_of_one_direction_are_one_point_and_a_warning(h):
    "In a process of its own: t-SNE ended the interpreter (exit 139)."
    code = f'import torch; from simclr_nb.pictures.plots import project_2d; print(abs(project_2d(torch.{h})).max())'
    done = forks.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == '0.0' and 'all 40 vectors have one direction' in done.stderr

def test_a_map_of_nan_is_refused():
    h = torch.rand(20, 4)
    h[7] = torch.nan
    for method in ('tsne', 'pca'):
        with pytest.raises(ValueError, match='1 of 20 rows of features are not finite .*, the first is row 7'):
            project_2d(h, method)
    with pytest.raises(ValueError, match='not finite'): NeighborIndex(h).search_each()

def test_names_that_are_not_utf8_are_drawn(tmp_path):
    "Python holds a byte that is not UTF-8 as a lone surrogate, which no font and no encoder takes."
    xy, y, names = torch.rand(6, 2), np.arange(6) % 2, ['caf\udce9', 'tea']
    save_figure(plot_map(None, y, names, xy=xy), tmp_path/'map.png')
    save_figure(plot_confusion(y, y, names), tmp_path/'confusion.png')
    save_figure(plot_label_fractions({'caf\udce9': {.1: (50., 1.)}}), tmp_path/'fractions.png')
    images = [Image.new('RGB', (8, 8))]*6
    page = html_map(tmp_path/'map.html', xy, images, y, names, title='caf\udce9').read_bytes().decode()
    assert r'caf\\udce9' in page
