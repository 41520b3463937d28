"The version is the same everywhere; a release is checked, built and tagged, on a toy project, and never sent."
import importlib.util, re, subprocess, zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('release', root/'tools/release.py')
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

def run(folder, *command): subprocess.run(command, cwd=folder, check=True, capture_output=True)

def commit(folder, message='toy'):
    run(folder, 'git', 'add', '-A')
    run(folder, 'git', 'commit', '-qm', message)

@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A project of one module; its `make test` notes that it ran, and fails where a file `broken` is."
    for who in ('AUTHOR', 'COMMITTER'):
        monkeypatch.setenv(f'GIT_{who}_NAME', 'toy')
        monkeypatch.setenv(f'GIT_{who}_EMAIL', 'toy@example.com')
    files = {
        'simclr_nb/__init__.py': '__version__ = "1.2.0"\n', 'simclr_nb/core.py': 'x = 1\n',
        'CITATION.cff': 'cff-version: 1.2.0\nversion: 1.2.0\n',
        'CHANGELOG.md': '# Notes\n\n## 1.2.0\n\n### New\n\n- One thing\n\n## 1.1.0\n\nAn older one\n',
        'README.md': '# Toy\n', 'LICENSE': 'Free\n', 'settings.ini': '', '.gitignore': 'dist/\nran\n.tested\n',
        'MANIFEST.in': 'include settings.ini\n',
        'setup.py': 'from setuptools import setup\nsetup()\n',
        'pyproject.toml': '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            '[project]\nname = "simclr_nb"\nreadme = "README.md"\ndynamic = ["version"]\n'
            '[tool.setuptools]\npackages = ["simclr_nb"]\n'
            '[tool.setuptools.dynamic]\nversion = {attr = "simclr_nb.__version__"}\n',
        'Makefile': 'test:\n\techo test >> ran\n\ttest ! -e broken\n'}
    folder = tmp_path/'toy'
    for name, text in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text(text)
    run(folder, 'git', 'init', '-q')
    commit(folder)
    return folder

def tags(folder): return release.said(folder, 'tag').split()

def runs(folder): return len((folder/'ran').read_text().split()) if (folder/'ran').exists() else 0

def released(folder): release.main(['--tested', str(folder/'.tested')], folder)

def refused(folder):
    "What is said where no release is made."
    before = tags(folder)
    with pytest.raises(SystemExit) as stop: released(folder)
    assert tags(folder) == before
    return str(stop.value)

def test_versions_agree_here(): assert not list(release.differing(root)), list(release.differing(root))

def test_a_release_is_tested_built_and_tagged(toy, capsys):
    released(toy)
    assert tags(toy) == ['v1.2.0'] and runs(toy) == 1
    assert release.said(toy, 'rev-parse', 'v1.2.0^{commit}') == release.said(toy, 'rev-parse', 'HEAD')
    told = release.said(toy, 'tag', '-n99', 'v1.2.0')
    assert '### New' in told and 'One thing' in told and 'older' not in told
    assert sorted(p.name for p in (toy/'dist').iterdir()) == \
        ['simclr_nb-1.2.0-py3-none-any.whl', 'simclr_nb-1.2.0.tar.gz']
    assert 'git push origin HEAD v1.2.0' in capsys.readouterr().out
    assert release.said(toy, 'status', '--porcelain') == ''

def test_a_commit_is_tested_once(toy):
    (toy/'.tested').write_text(release.said(toy, 'rev-parse', 'HEAD') + '\n')
    released(toy)
    assert runs(toy) == 0
    run(toy, 'git', 'tag', '-d', 'v1.2.0')
    run(toy, 'git', 'commit', '--allow-empty', '-qm', 'another')
    released(toy)
    assert runs(toy) == 1

@pytest.mark.parametrize('file, old, new, words', [
    ('simclr_nb/__init__.py', '1.2.0', '1.3.0', 'the version differs: 1.3.0 in simclr_nb/__init__.py'),
    ('CITATION.cff', '\nversion: 1.2.0', '\nversion: 1.1.0', '1.1.0 in CITATION.cff'),
    ('CITATION.cff', '\nversion: 1.2.0', '', 'None in CITATION.cff'),
    ('CHANGELOG.md', '## 1.2.0', '## 1.3.0', '1.3.0 in CHANGELOG.md'),
    ('CHANGELOG.md', '### New\n\n- One thing', '', 'nothing to say under `## 1.2.0`'),
    ('CHANGELOG.md', 'One thing', 'TODO: the things', 'a TODO under `## 1.2.0`'),
    ('LICENSE', 'Free', 'Not free', 'the tree is not clean'), ('new.py', '', 'x = 1', 'the tree is not clean'),
    ('broken', '', 'yes', 'the tests do not pass')])
def test_what_is_wrong_is_named(toy, file, old, new, words):
    text = (toy/file).read_text() if (toy/file).exists() else ''
    assert old in text
    (toy/file).write_text(text.replace(old, new))
    if 'clean' not in words: commit(toy)
    assert words in refused(toy)
    assert not (toy/'dist').exists() and runs(toy) == ('tests' in words)

def test_a_version_is_released_once(toy):
    released(toy)
    assert 'the tag v1.2.0 is there already' in refused(toy)

def test_tests_that_leave_something_behind_are_seen(toy):
    (toy/'Makefile').write_text('test:\n\techo left > behind\n')
    commit(toy)
    assert 'behind' in refused(toy)

def test_what_is_not_committed_is_not_built(toy):
    (toy/'simclr_nb/own.py').write_text('x = 1\n')
    (toy/'.git/info/exclude').write_text('own.py\n')
    released(toy)
    assert 'simclr_nb/own.py' not in zipfile.ZipFile(toy/'dist/simclr_nb-1.2.0-py3-none-any.whl').namelist()

def test_a_wheel_that_lacks_a_file_is_refused(toy):
    (toy/'simclr_nb/page.html').write_text('<p>')
    commit(toy)
    said = refused(toy)
    assert re.findall(r'lacks (\S+)', said) == ['simclr_nb/page.html']*2
    text = (toy/'MANIFEST.in').read_text()
    (toy/'MANIFEST.in').write_text(text + 'include simclr_nb/*.html\n')
    commit(toy)
    released(toy)

def test_nothing_is_sent(toy, monkeypatch):
    "Of all commands that a release starts, none pushes or uploads."
    started, real = [], subprocess.run
    def noted(command, *args, **kw):
        started.append(' '.join(map(str, command)))
        return real(command, *args, **kw)
    monkeypatch.setattr(subprocess, 'run', noted)
    released(toy)
    assert any(c.startswith('git tag -a') for c in started) and any(' build ' in c for c in started)
    assert not [c for c in started if re.search(r'\b(push|upload|fetch|remote)\b', c)]
