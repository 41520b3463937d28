"""The docs site: it builds from what git holds, reads without a network, and what a reader would stumble over is found.

Every check of tools/docs.py is proved on a planted fault.
"""
import importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

def tool(name):
    spec = importlib.util.spec_from_file_location(name, root/f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

docs, outputs = tool('docs'), tool('outputs')
notebooks = [nb for nb in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in nb.parts]

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


# The site

def sidebar_of(text):
    "What the sidebar of a page shows: pairs of (page, text)."
    bar = text[text.index('id="quarto-sidebar"'):text.index('<main')]
    entry = r'<a [^>]*?href="(?:\./)?([\w./]+)"[^>]*>\s*<span class="menu-text">(.*?)</span>'
    links = re.findall(entry, bar, flags=re.S)
    return [(page, docs.html.unescape(label)) for page, label in links]

def docs_name(notebook):
    "The page of a notebook, below the site."
    from nbdev.config import nbpath2html
    return nbpath2html(notebook.relative_to(root/'nbs')).as_posix()

def title_of(notebook):
    first = next(c for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown')
    return ''.join(first['source']).splitlines()[0].removeprefix('# ')

@pytest.mark.process
def test_every_notebook_is_a_page_of_the_sidebar(site):
    pages = {docs_name(nb): nb for nb in notebooks}
    assert len(pages) == len(notebooks), 'two notebooks would be one page'
    shown = dict(sidebar_of((site/'index.html').read_text(encoding='utf-8')))
    assert set(pages) <= {page.relative_to(site).as_posix() for page in site.rglob('*.html')}
    assert set(pages) == set(shown)
    front = (site/'index.html').read_text(encoding='utf-8')
    assert 'Ten lines of Python' in front
    for page, nb in pages.items():
        relative, number = nb.relative_to(root/'nbs'), re.match(r'(\d+)_', nb.name)
        chapter = len(relative.parts) == 1 and number and int(number[1]) < 8
        if number: assert shown[page] == (f'{int(number[1])} ' if chapter else '') + title_of(nb)

@pytest.mark.process
def test_chapters_stand_in_order_and_every_folder_is_a_section(site):
    text = (site/'index.html').read_text(encoding='utf-8')
    labels = [label for page, label in sidebar_of(text) if '/' not in page]
    chapters = [int(number[1]) for number in (re.match(r'(\d+) ', label) for label in labels) if number]
    assert chapters == list(range(8))
    bar = text[text.index('id="quarto-sidebar"'):text.index('<main')]
    folders = [folder.name for folder in sorted((root/'nbs').iterdir()) if list(folder.glob('[0-9]*.ipynb'))]
    assert len(folders) == 9
    for folder in folders:
        pages = [page for page, _ in sidebar_of(text) if page.startswith(f'{folder}/')]
        of_folder = [docs_name(nb) for nb in sorted((root/'nbs'/folder).glob('[0-9]*.ipynb'))]
        assert [page for page in pages if page in of_folder] == of_folder, folder
    assert bar.count('sidebar-item-section') >= len(folders)

@pytest.mark.process
def test_pages_read_without_a_network(site):
    if shutil.which('quarto'): pytest.skip('this is about the site of smalldocs')
    assert not list(docs.fetched(site))

@pytest.mark.process
def test_no_formula_and_no_fence_is_left_raw(site): assert not list(docs.raw_tex(site))

def test_notebooks_are_tidy(): assert not [line for nb in notebooks for line in docs.untidy(nb)]

@pytest.mark.process
def test_every_page_has_an_icon(site):
    for page in site.rglob('*.html'):
        icon = re.search(r'<link[^>]*rel="icon"[^>]*>', page.read_text(encoding='utf-8'))
        assert icon and (page.parent/re.search('href="(.*?)"', icon[0])[1]).is_file(), page.name

@pytest.mark.process
def test_a_definition_is_what_a_search_finds_first(site):
    entries = json.loads((site/'search.json').read_text(encoding='utf-8'))
    found = {entry['title']: entry for entry in reversed(entries)}
    for name, page in dict(simclr_learner='learner', nt_xent='ntxent', LARS='lars').items():
        file, anchor = found[name]['href'].removeprefix('./').split('#')
        assert file == f'{page}.html' and f'id="{anchor}"' in (site/file).read_text(encoding='utf-8')

def test_names_in_tables_may_break():
    text = '<code>a_b.c</code><table><td><code>test_a.py::test_b</code> a_b</td></table>'
    broken = 'test_<wbr>a.<wbr>py::<wbr>test_<wbr>b'
    assert docs.breakable(text) == text.replace('test_a.py::test_b', broken)

@pytest.mark.process
def test_what_a_search_finds_is_not_clipped_and_tables_scroll(site):
    style = (site/'styles.css').read_text(encoding='utf-8')
    assert 'position: fixed' in re.search(r'\.smalldocs-search-results \{(.*?)\}', style, flags=re.S)[1]
    assert 'overflow-x: auto' in re.search(r'^table \{(.*?)\}', style, flags=re.S | re.M)[1]
    assert re.search(r'a:has\(> code\) \{ text-decoration: none', style)

@pytest.mark.process
def test_links_lead_to_definitions(site):
    text = (site/'ntxent.html').read_text()
    assert 'id="nt_xent"' in text


# The checks find what is planted

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

@pytest.mark.parametrize('text', [
    '<link rel="stylesheet" href="https://x.org/a.css">', '<script src="//x.org/a.js"></script>',
    '<img src="http://x.org/a.png">',
    '<style>@import "https://x.org/a.css";</style>', '<p style="background: url(https://x.org/a.png)"></p>'])
def test_what_a_page_fetches_is_found(tmp_path, text):
    link, shown = '<a href="https://x.org">out</a>', '<pre>&lt;img src="https://x.org"&gt;</pre>'
    (tmp_path/'page.html').write_text(link + shown + text)
    found, = docs.fetched(tmp_path)
    assert found.startswith('page.html: ') and 'x.org/a' in found

@pytest.mark.parametrize('text', [
    '@import url(https://x.org/f?a:wght@300;400;700&display=swap);', '@import "//x.org/f.css";'])
def test_what_a_style_sheet_fetches_is_found_and_taken_out(tmp_path, text):
    (tmp_path/'a.css').write_text(f'/* see https://x.org */{text}body{{margin:0}}@import "near.css";')
    assert len(list(docs.fetched(tmp_path))) == 1
    assert docs.local((tmp_path/'a.css').read_text()) == '/* see https://x.org */body{margin:0}@import "near.css";'

@pytest.mark.parametrize('text', ['<td>$v^+ - v^-$ if</td>', r'<p>\tau</p>', '<p>``` bash</p>'])
def test_raw_formulas_and_fences_are_found(tmp_path, text):
    code = r'<code>$x \tau ```</code><pre>a$b$</pre><math>x</math><script>"\n$"</script>'
    (tmp_path/'page.html').write_text(code + text)
    assert len(list(docs.raw_tex(tmp_path))) == 1

def test_bare_fences_are_found():
    assert not list(docs.bare_fences('```python\nx\n```\ntext\n````{.bash}\n```\n````'))
    assert list(docs.bare_fences('text\n```\nx\n```\n```bash\n```\n~~~\n~~~')) == [2, 7]

def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text)

def display(**data): return dict(output_type='display_data', metadata={}, data=data)

def planted(folder, *cells):
    "A notebook whose cells are given: a string is Markdown, a list the outputs of a code cell."
    made = [dict(cell_type='markdown', source=c) if isinstance(c, str)
            else dict(cell_type='code', source='', outputs=c) for c in cells]
    (folder/'nb.ipynb').write_text(json.dumps(dict(cells=made)))
    return folder/'nb.ipynb'

bar = {'text/html': '<style>\nprogress { }\n</style>'}
head, row = '<thead><tr><th>epoch</th><th>loss</th></tr></thead>', '<tr><td>0</td><td>8.3</td></tr>'
table = {'text/html': f'<table class="fastprogress">{head}{row}</table>'}

@pytest.mark.parametrize('cell, what', [
    ('```\nmake\n```', 'fence'), ([stream('a'), stream('b')], 'several blocks'), ([display(**bar)], 'progress bar'),
    ([stream('a'), stream('w', 'stderr'), stream('b')], 'several blocks'), ([display(**table)], 'progress bar')])
def test_untidy_notebooks_are_found_and_tidied(tmp_path, cell, what):
    nb = planted(tmp_path, '```bash\nmake\n```', [stream('a'), display(**{'text/plain': 'x'}), stream('b')], cell)
    found, = docs.untidy(nb)
    assert found.startswith('nb.ipynb, cell 2') and what in found
    if what == 'fence': return
    assert outputs.tidy_notebook(nb) and not list(docs.untidy(nb)) and not outputs.tidy_notebook(nb)

def test_tidying_keeps_what_is_said():
    figure = display(**{'image/png': 'x'})
    before = [stream('a\n'), stream('w\n', 'stderr'), stream(['b\n', 'c']), figure,
              stream('d'), display(**bar), stream('e')]
    merged = [stream(['a\n', 'b\n', 'c']), stream('w\n', 'stderr'), figure, stream(['de'])]
    assert outputs.tidy(before) == merged and before[0]['text'] == 'a\n'
    shown, = outputs.tidy([display(**table)])
    assert ''.join(shown['data']['text/markdown']) == '| epoch | loss |\n| --- | --- |\n| 0 | 8.3 |'

def test_definitions_stand_before_sections(monkeypatch):
    names = [('f', 'a.html#f', 'a.py'), ('C.m', 'a.html#c.m', 'a.py'), ('_g', 'a.html#_g', 'a.py')]
    monkeypatch.setattr(docs, 'symbols', lambda: names)
    monkeypatch.setattr(docs, 'docstrings', lambda file: {'f': 'What `f` does.'})
    found, = docs.definitions([dict(href='a.html#part', title='Chapter')])
    assert found == dict(objectID='a.html#f', href='a.html#f', title='f', section='defined in Chapter',
                         text='What f does.')


# The strip at the head of each chapter

strips = tool('strips')

def test_strips_are_in_step_and_a_stale_one_is_named(monkeypatch, tmp_path):
    assert not strips.main(check=True)
    monkeypatch.setattr(strips, 'folder', tmp_path)
    strips.main()
    (tmp_path/'ntxent.svg').write_text('<svg/>')
    assert [problem.split()[0] for problem in strips.main(check=True)] == ['ntxent.svg']

def test_every_page_of_the_strip_begins_with_its_own():
    pages = {name for group in (strips.step, *strips.around) for name, _ in group}
    found = {re.sub(r'^\d+_', '', nb.stem): nb for nb in notebooks if re.match(r'\d\d_', nb.name)}
    assert len(pages) == 14 and pages <= set(found)
    for name in pages:
        cells = json.loads(found[name].read_text(encoding='utf-8'))['cells']
        texts = [c for c in cells if c['cell_type'] == 'markdown']
        assert f'images/strips/{name}.svg)' in ''.join(texts[1]['source'])

def test_a_strip_fills_the_box_of_its_page_alone():
    for group in (strips.step, *strips.around):
        for name, label in group:
            assert strips.strip(name).count(strips.blue) == 1
            assert f'font-weight="600">{label}<' in strips.strip(name)
