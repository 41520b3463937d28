"The small tools that the Makefile calls: the lowest versions, the findings."
import importlib.util, re
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

def tool(name):
    spec = importlib.util.spec_from_file_location(name, root/f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

lowest, findings = tool('lowest'), tool('findings')

# The lowest versions

planted = """
[project]
requirements =
    torch>=2.4
    # why it is here
    Scikit_Learn>=1.3
[extras]
depth =
    pydicom>=2.4
dev =
    nbdev>=3,<4
    pytest
"""

def test_what_is_asked_for():
    asked, runner = lowest.requirements(planted)
    assert asked == ['torch>=2.4', 'Scikit_Learn>=1.3', 'pydicom>=2.4'] and runner == ['nbdev>=3,<4']

def test_pins_are_those_of_what_is_asked_for():
    solved = ['# by uv', 'numpy==1.0', 'scikit-learn==1.3.0', '    # via me', 'torch==2.4.0', 'torchvision==0.1']
    assert lowest.pins(solved, ['torch>=2.4', 'Scikit_Learn>=1.3']) == ['scikit-learn==1.3.0', 'torch==2.4.0']

def test_every_requirement_of_ours_has_a_bound():
    asked, runner = lowest.requirements((root/'settings.ini').read_text())
    assert len(asked) > 20 and runner and not lowest.unbounded(asked)
    assert lowest.unbounded(['torch>=2', 'scipy', 'numpy<3']) == ['scipy', 'numpy<3']

# The findings

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'findings').mkdir()
    (tmp_path/'findings/b.sh').write_text('echo two; pwd > where; which python > python\n')
    (tmp_path/'findings/a.sh').write_text('echo one; exit 3\n')
    (tmp_path/'findings/notes.md').write_text('not one')
    return tmp_path

def test_all_are_run_and_counted(folder, capfd):
    assert findings.main([], folder) == 1
    said = re.sub(r'\(\d+ s\)', '(s)', capfd.readouterr().out)
    assert said == '== a\none\n== b\ntwo\n\nFAIL a (s)\nok   b (s)\n1 findings hold, 1 do not\n'
    assert (folder/'where').read_text().strip() == str(folder)
    assert Path((folder/'python').read_text().strip()).parent == Path(findings.sys.executable).parent

def test_some_are_chosen_by_name(folder, capfd):
    assert findings.main(['b'], folder) == 0 and 'one' not in capfd.readouterr().out
    with pytest.raises(SystemExit, match='called c; there are: a, b'): findings.main(['c'], folder)

def test_none_is_no_failure(tmp_path): assert findings.main([], tmp_path) == 0
