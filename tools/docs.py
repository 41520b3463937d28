"""Builds the docs site in _docs (with Quarto where it is installed, else with smalldocs) and checks it.

Internal links lead somewhere, nothing is fetched from another host, no formula is left as TeX; in the notebooks, a
block of code names its language and a cell's output is one block.
"""
import ast, html, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

root = Path(__file__).resolve().parents[1]
site = root/'_docs'

def formula(match):
    "Turn TeX into MathML, which browsers draw by themselves: the pages need no script and no network."
    from latex2mathml.converter import convert
    tex = html.unescape(match[2])
    mathml = convert(tex, display='block' if match[1] == 'display' else 'inline')
    if '\\' in mathml: raise ValueError(f'a formula holds a command that MathML does not know: {tex}')
    return mathml

def symbols():
    "What the library defines: (name, link, file), as in ('nt_xent', 'ntxent.html#nt_xent', 'simclr_nb/ntxent.py')."
    from nbdev.config import get_config
    index = {}
    exec((get_config().lib_path/'_modidx.py').read_text(encoding='utf-8'), index)
    return [(symbol.removeprefix(module + '.'), link, file) for module, found in index['d']['syms'].items()
            for symbol, (link, file) in found.items()]

def anchors(text, name):
    "Mark the definitions on the page at `name`, below the site, with the ids that nbdev's links end in."
    here = [(symbol, link.split('#')[1]) for symbol, link, _ in symbols() if link.split('#')[0] == name]
    for symbol, anchor in sorted(here, key=lambda found: found[0].count('.')):  # classes before their methods
        owner, _, attr = symbol.rpartition('.')
        start = max(text.find(f'id="{owner.lower()}"'), 0) if owner else 0
        definition = rf'(<span class="kw">(?:def|class)</span> )((?:<span class="\w+">)?{attr}\b)'
        text = text[:start] + re.sub(definition, rf'\1<a id="{anchor}"></a>\2', text[start:], count=1)
    return text

def breakable(text):
    "Let names in tables break after an underscore, a dot or a colon: a table then fits a narrow screen."
    def code(match): return re.sub(r'(_+|\.|:+|/)(?=\w)', r'\1<wbr>', match[0])
    def row(match): return re.sub(r'(?<=<code>)[^<>]+(?=</code>)', code, match[0])
    return re.sub(r'<td\b.*?</td>', row, text, flags=re.S)

def finish(page, names):
    "Give a page what it lacks: formulas, ids, and nbdev's file names (04_ntxent.html is ntxent.html)."
    name, text = names.get(page.name, page.name), page.read_text(encoding='utf-8')
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.S)
    text = re.sub(r'<(link|script)[^>]*katex[^>]*>(</script>)?', '', text)
    for old, new in names.items(): text = text.replace(old, new)
    if page.suffix == '.html': text = breakable(text)
    place = page.with_name(name)
    page.write_text(anchors(text, place.relative_to(site).as_posix()), encoding='utf-8')
    page.rename(place)

def docstrings(file):
    "First lines of the docstrings of a module's functions and classes, by name."
    body = ast.parse((root/file).read_text(encoding='utf-8')).body
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return {node.name: (ast.get_docstring(node) or '').split('\n')[0] for node in body if isinstance(node, kinds)}

def definitions(entries):
    "Search entries of the definitions: a name that is looked for is then a title, and the first hit."
    titles = {entry['href'].split('#')[0].removeprefix('./'): entry['title'] for entry in entries}
    pages = {file: docstrings(file) for file in {file for _, _, file in symbols()}}
    for name, link, file in symbols():
        page = link.split('#')[0]
        if name.startswith('_') or '.' in name or page not in titles: continue
        section, text = f'defined in {titles[page]}', pages[file].get(name, '').replace('`', '')
        yield dict(objectID=link, href=link, title=name, section=section, text=text)

def local(text):
    "A style sheet without the fonts it would fetch from another host; the next font in its list is taken."
    return re.sub(r'@import\s+(?:url\()?["\']?(?:https?:)?//[^;]*?(?:;(?=\d)[^;]*?)*\)?["\']?;', '', text)

def smalldocs():
    try: from smalldocs.site import build
    except ImportError: sys.exit('The docs need Quarto (quarto.org), or Python 3.11 and the extra `docs`.')
    from nbdev.serve import proc_nbs
    staged = proc_nbs(force=True)
    for warning in build(staged, quiet=True).warnings:
        if not re.search('output-file|broken link|html-math-method', warning): print('smalldocs:', warning)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(staged/'_docs', site)

def build():
    from nbdev.config import nbpath2html
    if shutil.which('quarto'): subprocess.run([Path(sys.executable).with_name('nbdev-docs')], check=True)
    else: smalldocs()
    pages = sorted(site.rglob('*.html'))
    names = {page.name: nbpath2html(page).name for page in pages}
    for file in [*pages, site/'search.json']: finish(file, names)
    for file in site.rglob('*.css'): file.write_text(local(file.read_text(encoding='utf-8')), encoding='utf-8')
    entries = json.loads((site/'search.json').read_text(encoding='utf-8'))
    text = json.dumps([*definitions(entries), *entries], ensure_ascii=False)
    (site/'search.json').write_text(text, encoding='utf-8')

class Links(HTMLParser):
    "The ids of a page and everything it links to."
    def __init__(self, page):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(page.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ('id', 'name') and value: self.ids.add(value)
            if key in ('href', 'src') and value and not re.match(r'[a-z]+:|//', value): self.targets.add(value)

def broken(site):
    "Every internal link and image of the site that leads nowhere, as `page: target`."
    site = site.resolve()
    pages = {page: Links(page) for page in sorted(site.rglob('*.html'))}
    for page, links in pages.items():
        for target in sorted(links.targets):
            path, anchor = map(unquote, urldefrag(target.replace('?', '#?')))
            base = site if path.startswith('/') else page.parent
            file = (base/path.lstrip('/')).resolve() if path else page
            if file.is_dir(): file = file/'index.html'
            lost = anchor and file in pages and not anchor.startswith('?') and anchor not in pages[file].ids
            if lost or not file.exists(): yield f'{page.relative_to(site)}: {target}'

remote = r'(?:https?:)?//[^\s"\'>)]+'

def fetched(site):
    "Everything that pages and style sheets of the site fetch from another host, as `file: address`."
    for file in sorted([*site.rglob('*.html'), *site.rglob('*.css')]):
        text = file.read_text(encoding='utf-8')
        if file.suffix == '.html':
            text = re.sub(r'<(pre|code)\b.*?</\1>', '', text, flags=re.S)
            tags = re.findall(r'<(?!a\b)[a-z][^<>]*>', text)
            styles = re.findall(r'<style\b.*?</style>', text, flags=re.S)
            found = [m for tag in tags for m in re.findall(rf'\b(?:src|href|srcset)=["\']({remote})', tag)]
            text = '\n'.join([*styles, *re.findall(r'style="[^"]*"', text)])
        else: found = []
        found += re.findall(rf'(?:url\(|@import)\s*["\']?({remote})', text)
        for address in found: yield f'{file.relative_to(site)}: {address}'

def raw_tex(site):
    "What is left of formulas, and of fences, in the text of the site's pages, as `page: text`."
    for page in sorted(site.rglob('*.html')):
        text = page.read_text(encoding='utf-8')
        text = re.sub(r'<(pre|code|script|style|svg|math|title)\b.*?</\1>', ' ', text, flags=re.S)
        text = html.unescape(re.sub(r'<[^>]+>', ' ', text))
        for match in re.finditer(r'.{0,30}(?:\$|\\[a-zA-Z]+|```).{0,30}', text):
            yield f'{page.relative_to(site)}: {match[0].strip()}'

def bare_fences(source):
    "The line numbers of the fences that open a block of code without saying in which language."
    opened = None
    for number, line in enumerate(source.splitlines(), 1):
        fence = re.match(r'\s*(`{3,}|~{3,})\s*(.*)', line)
        if not fence: continue
        if opened is None:
            opened = fence[1]
            if not fence[2]: yield number
        elif fence[1].startswith(opened) and not fence[2]: opened = None

def untidy(notebook):
    "What a reader of a notebook's page would stumble over, as `notebook, cell: what`."
    for number, cell in enumerate(json.loads(notebook.read_text(encoding='utf-8'))['cells']):
        where = f'{notebook.name}, cell {number}'
        if cell['cell_type'] == 'markdown':
            for line in bare_fences(''.join(cell['source'])): yield f'{where}, line {line}: a fence without a language'
        if cell['cell_type'] != 'code': continue
        outputs, names = cell['outputs'], []
        for output in outputs:
            names = [*names, output['name']] if output['output_type'] == 'stream' else []
            if len(names) > len(set(names)):
                yield f'{where}: one stream in several blocks; run tools/outputs.py'
                break
        for output in outputs:
            text = ''.join(output.get('data', {}).get('text/html', ''))
            if re.search(r'<style|<script|<progress|class="fastprogress"', text):
                yield f'{where}: a progress bar or a script in HTML; run tools/outputs.py'

def problems():
    "Everything that is wrong with the site and the notebooks, by kind."
    notebooks = [file for file in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in file.parts]
    return {'Broken links': list(broken(site)), 'Fetched from another host': list(fetched(site)),
            'Formulas left as TeX': list(raw_tex(site)),
            'Untidy notebooks': [line for file in notebooks for line in untidy(file)]}

if __name__ == '__main__':
    os.chdir(root)
    build()
    wrong = {kind: found for kind, found in problems().items() if found}
    if wrong: sys.exit('\n'.join(line for kind, found in wrong.items() for line in [f'{kind}:', *found]))
    print(f'{len(list(site.rglob("*.html")))} pages, every internal link holds: {site/"index.html"}')
