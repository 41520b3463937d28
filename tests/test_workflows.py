"""The files for GitHub and for pre-commit: they parse, and they call what is there.

A workflow runs targets of the Makefile and nothing else, so that what fails there can be run at home.
"""
import re
from configparser import ConfigParser
from pathlib import Path

import pytest, yaml

root = Path(__file__).resolve().parents[1]
kinds = 'textarea', 'input', 'dropdown', 'checkboxes', 'markdown'       # of the fields of a form

def read(file): return yaml.safe_load(file.read_text(encoding='utf-8'))

def targets(makefile):
    "What can be made."
    return set(re.findall(r'^([a-z]+):', makefile, re.M))


# The checks; each returns what is wrong

def in_workflow(flow, targets):
    "A workflow that is not what GitHub expects, or that calls what is not there."
    on = flow.get(True, flow.get('on'))                  # YAML 1.1 takes the word `on` for true
    if not on: yield 'no event starts it'
    if flow.get('permissions') != {'contents': 'read'}: yield 'it may do more than read'
    for name, job in flow.get('jobs', {}).items():
        if 'runs-on' not in job: yield f'{name} runs nowhere'
        if 'timeout-minutes' not in job: yield f'{name} has no time limit'
        for other in [job.get('needs', [])] if isinstance(job.get('needs'), str) else job.get('needs', []):
            if other not in flow['jobs']: yield f'{name} needs {other}, which is not there'
        for step in job.get('steps', []): yield from in_step(name, step, targets)

def in_step(job, step, targets):
    if 'uses' in step:
        if not re.fullmatch(r'[\w-]+/[\w/-]+@v\d+', step['uses']): yield f'{job}: {step["uses"]} has no version'
        version = step.get('with', {}).get('python-version')
        if version is not None and not isinstance(version, str): yield f'{job}: Python {version} is a number'
    for line in step.get('run', '').splitlines():
        command = line.split()
        if command[:1] != ['make']: yield f'{job}: `{line}` is not a target of the Makefile'
        else: yield from (f'{job}: make {word} is not there' for word in command[1:] if word not in targets)
    if not step.keys() & {'uses', 'run'}: yield f'{job}: a step does nothing'

def in_form(form):
    "A form for issues that GitHub would refuse."
    yield from (f'no {key}' for key in ('name', 'description', 'body') if not form.get(key))
    fields = form.get('body', [])
    ids = [field.get('id') for field in fields if field['type'] != 'markdown']
    if None in ids or len(set(ids)) < len(ids): yield 'a field has no id of its own'
    for field in fields:
        if field['type'] not in kinds: yield f'{field["type"]} is not a kind of field'
        elif field['type'] != 'markdown' and not field.get('attributes', {}).get('label'): yield 'a field has no label'

def pythons(flow):
    "The versions of Python that the jobs of a workflow run on."
    matrices = [job['strategy']['matrix'] for job in flow['jobs'].values() if 'strategy' in job]
    return [version for matrix in matrices for version in matrix['python']]


# The files

makefile = (root/'Makefile').read_text(encoding='utf-8')
workflows = sorted((root/'.github/workflows').glob('*.yml'))
forms = sorted(f for f in (root/'.github/ISSUE_TEMPLATE').glob('*.yml') if f.stem != 'config')

def none(problems):
    problems = list(problems)
    assert not problems, '\n' + '\n'.join(problems)

def test_there_are_some(): assert [f.stem for f in workflows] == ['docs', 'test', 'weekly'] and len(forms) == 2

@pytest.mark.parametrize('file', workflows, ids=lambda f: f.stem)
def test_workflows(file): none(in_workflow(read(file), targets(makefile)))

@pytest.mark.parametrize('file', forms, ids=lambda f: f.stem)
def test_forms(file): none(in_form(read(file)))

def test_every_python_that_we_name_is_tested():
    settings = ConfigParser(interpolation=None)
    settings.read(root/'settings.ini')
    project, tested = settings['project'], pythons(read(root/'.github/workflows/test.yml'))
    assert tested == re.findall(r'Python :: (3\.\d+)', project['classifiers'])
    assert tested[0] == project['min_python']
    weekly = read(root/'.github/workflows/weekly.yml')['jobs']
    versions = {name: job['steps'][1]['with']['python-version'] for name, job in weekly.items()}
    assert versions == dict(lowest=tested[0], newest=tested[-1])

def test_pre_commit():
    repos = read(root/'.pre-commit-config.yaml')['repos']
    assert all(re.fullmatch(r'v?\d+\.\d+\.\d+', repo['rev']) for repo in repos)
    assert {hook['id'] for repo in repos for hook in repo['hooks']} == {
        'nbdev-clean', 'nbdev-export', 'ruff-check', 'codespell', 'check-added-large-files'}

def test_every_target_says_what_it_does():
    described = set(re.findall(r'^([a-z]+):.*## \w', makefile, re.M))
    phony = set(re.search(r'^\.PHONY: (.*)', makefile, re.M)[1].split())
    assert phony - described == set() and described == phony


# The checks find what is planted

good = '''
on: push
permissions: {contents: read}
jobs:
  one:
    runs-on: ubuntu-latest
    timeout-minutes: 5
    steps:
      - uses: actions/checkout@v7
      - run: make test
'''

def said(text): return list(in_workflow(yaml.safe_load(text), {'test'}))

def test_a_good_workflow_passes(): assert said(good) == []

@pytest.mark.parametrize('old, new, problem', [
    ('on: push', '', 'no event'), ('contents: read', 'contents: write', 'more than read'),
    ('    runs-on: ubuntu-latest\n', '', 'nowhere'), ('    timeout-minutes: 5\n', '', 'no time limit'),
    ('checkout@v7', 'checkout@main', 'no version'), ('checkout@v7', 'checkout', 'no version'),
    ('make test', 'make tests', 'make tests is not there'), ('make test', 'pytest', 'not a target'),
    ('- run: make test', '- name: nothing', 'does nothing'), ('    steps', '    needs: two\n    steps', 'needs two'),
    ('@v7', '@v7\n        with:\n          python-version: 3.10', 'is a number')])
def test_faults_of_a_workflow_are_seen(old, new, problem):
    assert old in good
    found, = said(good.replace(old, new))
    assert problem in found

@pytest.mark.parametrize('form, problem', [
    (dict(name='a', description='b', body=[dict(type='textarea', id='x', attributes=dict(label='X'))]), None),
    (dict(name='a', body=[dict(type='input', id='x', attributes=dict(label='X'))]), 'no description'),
    (dict(name='a', description='b', body=[dict(type='text', id='x', attributes=dict(label='X'))]), 'kind of field'),
    (dict(name='a', description='b', body=[dict(type='input', id='x', attributes={})]), 'no label'),
    (dict(name='a', description='b', body=[dict(type='input', attributes=dict(label='X'))]*2), 'id of its own')])
def test_faults_of_a_form_are_seen(form, problem):
    found = list(in_form(form))
    assert len(found) == bool(problem) and all(problem in f for f in found)
