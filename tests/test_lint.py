"ruff and codespell find nothing, and they find what is planted."
import importlib.util, json, shutil, subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('lint', root/'tools/lint.py')
lint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint)

@pytest.fixture
def toy(tmp_path):
    "A folder under git with the rules of this project, that reads `text` into a file."
    shutil.copy(root/'pyproject.toml', tmp_path)
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    def plant(name, text):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
        return lint.problems(tmp_path)
    return plant

def notebook(*cells):
    return json.dumps(dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5))

def cell(kind, source, **more): return dict(cell_type=kind, id='a', metadata={}, source=[source]) | more

def test_nothing_is_found():
    found = lint.problems()
    assert not found, '\n' + '\n'.join(found)

def test_all_of_the_tree_is_spelled():
    names = lint.files(root)
    assert {'README.md', 'tools/lint.py', 'nbs/00_tour.ipynb'} <= set(names)
    assert not any(name.startswith('.venv') for name in names)

@pytest.mark.parametrize('source, rule', [
    ('import os\n', 'F401'), ('def f(): return 1\ndef f(): return 2\nprint(f)\n', 'F811'), ('print(x)\n', 'F821'),
    ('def f(x=[]): return x\n', 'B006'), ('fs = [lambda: i for i in range(3)]\n', 'B023'),
    ('for i in range(3):\n    def f(): return i\n    print(f)\n', 'B023'), (f'x = "{"y"*120}"\n', 'E501'),
    ('x = 1 # noqa: F401\n', 'RUF100'), ('import os, sys; print(os, sys)\nf = lambda: 1\n', None)])
def test_faults_in_python_are_found(toy, source, rule):
    found = toy('tests/a.py', source)
    assert len(found) == bool(rule) and all('tests/a.py:' in f and rule in f for f in found)

def test_a_misspelled_word_is_found(toy):
    assert toy('a.md', 'All is well with docments.\n') == []
    word = 'recie' + 've'                                        # not in one piece, or this file has it, too
    said, = toy('docs/b.md', f'We {word} it.\n')
    assert said.startswith('docs/b.md:1: ') and 'receive' in said

def test_notebooks_are_read_without_their_outputs(toy):
    word = 'recie' + 've'
    output = dict(output_type='stream', name='stdout', text=[word])
    code = cell('code', '1 + 1', outputs=[output], execution_count=None)
    assert toy('nbs/a.ipynb', notebook(cell('markdown', 'Fine'), code)) == []
    said, = toy('nbs/b.ipynb', notebook(cell('markdown', 'Fine'), cell('markdown', f'To {word}')))
    assert said.startswith('nbs/b.ipynb:') and 'receive' in said

def test_what_git_ignores_is_not_read(toy):
    toy('.gitignore', 'mine.md\n')
    assert toy('mine.md', 'recie' + 've') == []

def test_a_tool_that_fails_is_no_clean_bill(toy):
    with pytest.raises(RuntimeError, match='ruff'): toy('pyproject.toml', '[tool.ruff]\nno-such-setting = 1\n')
