"Builds the docs site in _docs (with Quarto where it is installed, else with smalldocs) and checks its internal links."
import html, os, re, shutil, subprocess, sys
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

def anchors(text, name):
    "Mark the definitions on page `name` with the ids that nbdev's links end in, as in ntxent.html#nt_xent."
    from nbdev.config import get_config
    index = {}
    exec((get_config().lib_path/'_modidx.py').read_text(encoding='utf-8'), index)
    links = {symbol.removeprefix(module + '.'): link for module, symbols in index['d']['syms'].items()
             for symbol, (link, _) in symbols.items()}
    for symbol in sorted(links, key=lambda o: o.count('.')):  # classes before their methods
        page, anchor = links[symbol].split('#')
        owner, _, attr = symbol.rpartition('.')
        start = max(text.find(f'id="{owner.lower()}"'), 0) if owner else 0
        definition = rf'(<span class="kw">(?:def|class)</span> )((?:<span class="\w+">)?{attr}\b)'
        if page == name: text = text[:start] + re.sub(definition, rf'\1<a id="{anchor}"></a>\2', text[start:], count=1)
    return text

def finish(page, names):
    "Give a page what it lacks: formulas, ids, and nbdev's file names (04_ntxent.html is ntxent.html)."
    name, text = names.get(page.name, page.name), page.read_text(encoding='utf-8')
    text = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, text, flags=re.S)
    text = re.sub(r'<(link|script)[^>]*katex[^>]*>(</script>)?', '', text)
    for old, new in names.items(): text = text.replace(old, new)
    page.write_text(anchors(text, name), encoding='utf-8')
    page.rename(page.with_name(name))

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

if __name__ == '__main__':
    os.chdir(root)
    build()
    wrong = list(broken(site))
    if wrong: sys.exit('\n'.join(['Broken links:', *wrong]))
    print(f'{len(list(site.rglob("*.html")))} pages, every internal link holds: {site/"index.html"}')
