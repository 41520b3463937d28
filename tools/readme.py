"Makes README.md and its pictures from the executed nbs/index.ipynb; with --check it only compares."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
warning = '<!-- Made from nbs/index.ipynb by `make readme`. Do not edit. -->\n\n'

def shown(cell):
    "The cell as a reader should see it, or None: nbdev's and Quarto's directives are followed and taken out."
    if cell.cell_type != 'code': return cell
    lines = cell.source.splitlines()
    flags = dict((line[2:].strip() + ': true').split(': ')[:2] for line in lines if line.startswith('#|'))
    if 'hide' in flags or flags.get('include') == 'false': return None
    cell.source = '\n'.join(line for line in lines if not line.startswith('#|'))
    cell.metadata = {'alt': flags.get('fig-alt', 'figure').strip('"'),
                     'transient': {'remove_source': flags.get('echo') == 'false'}}
    if flags.get('output') == 'false': cell.outputs = []
    return cell

def readme():
    "README.md and its pictures: {path: bytes}."
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [cell for cell in map(shown, nb.cells) if cell]
    nb.metadata['language_info'] = {'name': 'python'}
    text, extra = MarkdownExporter().from_notebook_node(nb, dict(unique_key='readme', output_files_dir='nbs/images'))
    from_root = lambda m: m[1] + 'nbs/' + m[2] if (root/'nbs'/m[2].split('#')[0]).exists() else m[0]
    alt = lambda m: f'![{nb.cells[int(m[2])].metadata["alt"]}]({m[1]})'
    text = re.sub(r'(\]\()([\w./-]+[^)\s]*)', from_root, text)
    text = re.sub(r'!\[png\]\((nbs/images/readme_(\d+)_\d+\.png)\)', alt, text)
    text = re.sub(r'\n\s*\n', '\n\n', text).strip()
    pictures = {root/name: data for name, data in extra['outputs'].items()}
    return {root/'README.md': f'{warning}{text}\n'.encode(), **pictures}

if __name__ == '__main__':
    files = readme()
    stale = {path for path, data in files.items() if not path.exists() or path.read_bytes() != data}
    stale |= set((root/'nbs/images').glob('readme_*')) - set(files)
    if sys.argv[1:] == ['--check']:
        for path in sorted(stale):
            print(f'{path.relative_to(root)} is not what nbs/index.ipynb makes: run `make readme`')
        sys.exit(bool(stale))
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        if path in files: path.write_bytes(files[path])
        else: path.unlink()
