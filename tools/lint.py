"""What ruff and codespell find in the tree; `make lint` runs it. Their rules are in pyproject.toml.

ruff reads Python files and the code of notebooks; codespell the text files and, of notebooks, what people write:
the cells, without outputs. Nothing is changed: `ruff check --fix` and `codespell -w` do that.
"""
import json, re, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
spelled = '.py', '.md', '.toml', '.ini', '.cff', '.yml', '.yaml', '.sh', '.ipynb'

def run(*command, folder):
    "What a tool prints, by lines; an error if it could not work. Exit codes: 0 all is well, 1 or 65 findings."
    done = subprocess.run([sys.executable, '-m', *map(str, command)], cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1, 65): raise RuntimeError(f'{command[0]}: {done.stderr or done.stdout}')
    if 'No module named' in done.stderr: raise RuntimeError(f"{done.stderr.strip()}: pip install -e '.[dev]'")
    return done.stdout.splitlines()

def files(folder):
    "The files of the tree, new ones too, without what .gitignore names."
    command = 'git', 'ls-files', '-coz', '--exclude-standard'
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split('\0')
    return [name for name in names if name and (folder/name).is_file()]

def ruff(folder):
    found = run('ruff', 'check', '--no-cache', '--output-format', 'concise', '.', folder=folder)
    return [line for line in found if re.match(r'\S+\.(py|ipynb|toml):', line)]

def written(notebook):
    "The cells of a notebook as text, one after the other."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(f'[cell {n}]\n' + ''.join(cell['source']) for n, cell in enumerate(cells))

def codespell(folder):
    names = [name for name in files(folder) if Path(name).suffix in spelled]
    with tempfile.TemporaryDirectory() as copies:
        for name in names:
            text = written(folder/name) if name.endswith('.ipynb') else (folder/name).read_text(encoding='utf-8')
            (Path(copies)/name).parent.mkdir(parents=True, exist_ok=True)
            (Path(copies)/name).write_text(text, encoding='utf-8')
        return run('codespell_lib', '--toml', folder/'pyproject.toml', *names, folder=copies) if names else []

def problems(folder=root):
    "A line for each finding: none where all is well."
    return ruff(folder) + codespell(folder)

if __name__ == '__main__':
    found = problems()
    print(*found, f'{len(found)} findings of ruff and codespell', sep='\n')
    sys.exit(bool(found))
