"The wheel: what it holds, and that it works from a new environment, away from this folder."
import os, re, shutil, subprocess, sys, sysconfig, zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
root = Path(__file__).resolve().parents[1]
settings = ConfigParser(interpolation=None)
settings.optionxform = str
settings.read(root/'settings.ini', encoding='utf-8')
version = re.search(r'__version__ = "(.+)"', (root/'simclr_nb/__init__.py').read_text())[1]
found = sorted(p.relative_to(root) for p in (root/'simclr_nb').rglob('*') if p.is_file())
files = [p for p in found if '__pycache__' not in p.parts]
modules = ['.'.join(p.with_suffix('').parts) for p in files if p.suffix == '.py' and not p.stem.startswith('_')]
def lines(text): return text.strip().splitlines()

def run(*command, **kw):
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

def pip(*command, **kw): return run(sys.executable, '-m', 'pip', '--disable-pip-version-check', *command, **kw)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Made from a copy of what git holds, so that an old build/ cannot slip in and no file can be missing."
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for name in run('git', 'ls-files', '-coz', '--exclude-standard', cwd=root).split('\0'):
        if not name or not (root/name).is_file() or name.startswith('nbs/'): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, source/name)
    run(sys.executable, '-m', 'build', '--no-isolation', '--sdist', '--outdir', out, source)
    sdist, = out.glob('*.tar.gz')
    pip('wheel', sdist, '--no-deps', '--no-build-isolation', '-w', out)
    pip('wheel', source, '--no-deps', '--no-build-isolation', '-w', out/'direct')
    direct, = (out/'direct').glob('*.whl')
    assert contents(direct) == contents(next(out.glob('*.whl'))), 'the source distribution makes another wheel'
    return direct

def contents(wheel): return sorted(zipfile.ZipFile(wheel).namelist())

@pytest.fixture(scope='module')
def env(wheel, tmp_path_factory):
    "A new environment with the wheel in it; only the dependencies come from the present one."
    folder = tmp_path_factory.mktemp('env')
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    python = folder/'bin/python'
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    pip('--python', python, 'install', '--no-deps', '--no-index', wheel)
    dependencies = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    (site/'dependencies.pth').write_text('\n'.join(dependencies) + '\n')
    return folder

def away(folder, *command):
    "What a command of the new environment prints, away from this folder."
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'VIRTUAL_ENV'))}
    return run(*command, cwd=folder, env=clean).strip()

def python(env, code, tmp_path): return away(tmp_path, env/'bin/python', '-c', code)

def test_wheel_holds_the_package_only(wheel):
    tops = {name.split('/')[0] for name in contents(wheel)}
    assert tops == {'simclr_nb', f'simclr_nb-{version}.dist-info'}
    assert {p.suffix for p in files} >= {'.py', '.html', '.yaml'} and len(modules) > 50
    assert {str(p) for p in files} == {n for n in contents(wheel) if n.startswith('simclr_nb/')}
    assert any(name.endswith('licenses/LICENSE') for name in contents(wheel))

def test_metadata_is_what_settings_say(wheel):
    meta = message_from_bytes(zipfile.ZipFile(wheel).read(f'simclr_nb-{version}.dist-info/METADATA'))
    project = settings['project']
    assert (meta['Name'], meta['Version'], meta['Summary']) == ('simclr_nb', version, project['description'])
    assert (meta['Author'], meta['License-Expression']) == (project['author'], project['license'])
    assert meta['Requires-Python'] == f">={project['min_python']}"
    assert meta.get_all('Classifier') == lines(project['classifiers'])
    assert set(meta.get_all('Project-URL')) == {f'{name}, {url}' for name, url in settings['links'].items()}
    assert meta['Description-Content-Type'] == 'text/markdown' and meta.get_payload().strip()
    def parts(requirement): return frozenset(re.split('[,<>=!~]+', re.sub(r'[\s"\']', '', requirement)))
    required = {parts(r) for r in meta.get_all('Requires-Dist') if 'extra ==' not in r}
    assert required == {parts(r) for r in lines(project['requirements'])}
    assert set(meta.get_all('Provides-Extra')) == set(settings['extras'])

def test_torch_is_left_to_pip():
    for name in ('torch', 'torchvision'):
        required, = [r for r in lines(settings['project']['requirements']) if re.match(rf'{name}\b', r)]
        assert re.fullmatch(rf'{name}>=[\d.]+', required), 'a lower bound only, no build and no index'

def test_imports_from_anywhere(env, tmp_path):
    code = 'from simclr_nb.learner import simclr_learner; import simclr_nb; print(simclr_nb.__file__)'
    found = python(env, code, tmp_path)
    assert Path(found).is_relative_to(env)

def test_everything_a_user_needs_in_one_import(env, tmp_path):
    assert python(env, 'from simclr_nb.all import *; print(load_encoder.__module__)', tmp_path) == 'simclr_nb.encoder'

def test_every_module_imports(env, tmp_path):
    code = f'import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)'
    assert all(Path(found).is_relative_to(env) for found in python(env, code, tmp_path).splitlines())

def test_there_is_one_command(): assert dict(settings['console_scripts']) == {'simclr': 'simclr_nb.commands.main:main'}

@pytest.mark.parametrize('command', ['pretrain', 'plot', 'evaluate', 'transfer', 'convert'])
def test_commands_answer(env, tmp_path, command):
    assert f'simclr {command}' in away(tmp_path, env/'bin/simclr', command, '--help')

def test_the_package_is_the_command(env, tmp_path):
    said = away(tmp_path, env/'bin/python', '-m', 'simclr_nb', '--help')
    assert said == away(tmp_path, env/'bin/simclr', '--help') and 'pretrain' in said

def test_recipes_are_found(env, tmp_path):
    said = away(tmp_path, env/'bin/simclr', 'pretrain', '--recipe', 'imagenet', '--help')
    assert 'default: 4096' in said
