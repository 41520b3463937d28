"The docs site: it builds from what git holds, reads without a network, and a link that leads nowhere is found."
import importlib.util, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('docs', root/'tools/docs.py')
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The project's own site, built in a copy."
    if not shutil.which('quarto'): pytest.importorskip('smalldocs')
    copy = tmp_path_factory.mktemp('docs')
    listed = subprocess.check_output(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=root, text=True)
    for name in listed.split('\0'):
        if not name or not (root/name).exists(): continue
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, copy/name, follow_symlinks=False)
    done = subprocess.run([sys.executable, 'tools/docs.py'], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy/'_docs'

def test_every_notebook_is_a_page_of_the_sidebar(site):
    from nbdev.config import nbpath2html
    pages = {nbpath2html(nb).name for nb in root.glob('nbs/[!_.]*.ipynb')}
    assert pages <= {page.name for page in site.glob('*.html')}
    assert pages <= set(re.findall(r'href="(?:\./)?([\w.]+)"', (site/'index.html').read_text()))

def test_pages_read_without_a_network(site):
    if shutil.which('quarto'): pytest.skip('this is about the site of smalldocs')
    for page in site.rglob('*.html'):
        text = page.read_text()
        outside = r'<script[^>]+src="http|<img[^>]+src="http|<link[^>]+stylesheet[^>]+href="http'
        assert not re.search(outside, text), page.name
        assert r'class="math' not in text, f'{page.name} holds TeX that is not drawn'

def test_links_lead_to_definitions(site):
    text = (site/'ntxent.html').read_text()
    assert 'id="nt_xent"' in text

def test_broken_links_are_found(tmp_path):
    (tmp_path/'there.html').write_text(
        '<h2 id="part">x</h2> <a href="index.html">back</a> <a href="https://example.com/no">out</a>')
    (tmp_path/'index.html').write_text('''
        <a href="there.html#part"></a> <a href="there.html?x=1"></a> <a href="./"></a> <img src="data:x">
        <a href="there.html#gone"></a> <a href="gone.html"></a> <img src="gone.png">
        <a href="#nowhere"></a> <a href="/there.html"></a>''')
    lost = '#nowhere', 'gone.html', 'gone.png', 'there.html#gone'
    assert list(docs.broken(tmp_path)) == [f'index.html: {target}' for target in lost]

def test_formulas_become_mathml():
    mathml = docs.formula(re.match(r'(inline) (.*)', r'inline \tau &lt; 1'))
    assert mathml.startswith('<math') and 'τ' in mathml.replace('&#x003C4;', 'τ')
    with pytest.raises(ValueError, match='nosuch'): docs.formula(re.match(r'(inline) (.*)', r'inline \nosuch{x}'))
