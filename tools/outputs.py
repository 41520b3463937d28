"""Tidies the outputs of executed notebooks, in place: `make notebooks` runs it on what it has executed.

What a cell prints comes in as many pieces as the kernel sent, and each would be a block of its own on the page: the
pieces of one stream become one. A progress bar leaves its style sheet and a table in HTML; for their sake Quarto would
load scripts from another host. The style sheet goes, the table stays, in Markdown.
"""
import json, sys
from html.parser import HTMLParser
from pathlib import Path

class Table(HTMLParser):
    "The rows of an HTML table."
    def __init__(self, html):
        super().__init__()
        self.rows, self.in_cell = [], False
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('th', 'td'):
            self.rows[-1].append('')
            self.in_cell = True
    def handle_endtag(self, tag):
        if tag in ('th', 'td'): self.in_cell = False
    def handle_data(self, data):
        if self.in_cell: self.rows[-1][-1] += data.strip()

def lines(text): return text.splitlines(keepends=True)

def joined(text): return text if isinstance(text, str) else ''.join(text)

def html_of(output): return joined(output.get('data', {}).get('text/html', ''))

def merge_streams(outputs):
    "What was printed between two displays, as one output for each stream."
    merged = []
    for output in outputs:
        if output['output_type'] != 'stream':
            merged.append(output)
            continue
        earlier = None
        for candidate in reversed(merged):
            if candidate['output_type'] != 'stream': break
            if candidate['name'] == output['name']: earlier = candidate
        if earlier is None: merged.append(dict(output))
        else: earlier['text'] = lines(joined(earlier['text']) + joined(output['text']))
    return merged

def is_style(output):
    "Whether an output is a progress bar's style sheet and nothing else."
    html = html_of(output).strip()
    return html.startswith('<style>') and html.endswith('</style>')

def as_markdown(output):
    "The table that a progress bar leaves, in Markdown; any other output as it is."
    if 'class="fastprogress"' not in html_of(output): return output
    head, *rows = Table(html_of(output)).rows
    rows = [head, ['---']*len(head), *rows]
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
    plain = output['data'].get('text/plain', ['<table>'])
    return {**output, 'data': {'text/markdown': lines(table), 'text/plain': plain}}

def tidy(outputs): return merge_streams([as_markdown(o) for o in outputs if not is_style(o)])

def tidy_notebook(path):
    "Tidy a notebook's outputs; True if there was something to do."
    before = path.read_text(encoding='utf-8')
    nb = json.loads(before)
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': cell['outputs'] = tidy(cell['outputs'])
    after = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if json.loads(before) == nb: return False
    path.write_text(after, encoding='utf-8')
    return True

if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    for path in map(Path, sys.argv[1:] or sorted((root/'nbs').rglob('[!.]*.ipynb'))):
        if tidy_notebook(path): print('tidied', path)
