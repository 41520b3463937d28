"bench/gpu: every part of run.sh runs at tiny sizes, what fails is told, and cifar10.sh goes on where it stopped."
import csv, importlib.util, json, math, os, subprocess, sys, time
from pathlib import Path

import pytest

import forks

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
root = Path(__file__).resolve().parents[1]
gpu = root/'bench'/'gpu'
PATIENCE = 600   # seconds; a hang is a failure
names = ['tests', 'optim', 'step', 'cifar', 'loss', 'pipeline', 'cells']


def module(name):
    "A file of bench/gpu as a module."
    spec = importlib.util.spec_from_file_location(name, gpu/f'{name}.py')
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found

parts, rate = module('parts'), module('rate')


def script(name, *args, cwd):
    "Start a script of bench/gpu, from another folder."
    env = os.environ | {'PYTHON': str(forks.stand_in(cwd)), 'OMP_NUM_THREADS': '1', forks.nested: '1'}
    return subprocess.Popen(['bash', gpu/name, *map(str, args)], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

def ended(process):
    "Its exit code and what it said."
    try: said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, said


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('bench')

@pytest.fixture(scope='module')
def started(folder):
    "run.sh, which goes on while cifar10.sh is tested."
    process = script('run.sh', '--tiny', '--out', 'results', cwd=folder)
    yield process
    if process.poll() is None: process.terminate()
    process.communicate(timeout=PATIENCE)

@pytest.fixture(scope='module')
def results(folder, started):
    code, said = ended(started)
    assert code == 0, said
    return json.loads((folder/'results'/'results.json').read_text())


# cifar10.sh

def steps_of(run):
    with open(run/'history.csv', newline='') as f: return [int(line['step']) for line in csv.DictReader(f)]

def test_cifar10_goes_on_where_it_stopped(folder, started):
    for seed, (split, n) in enumerate(dict(train=64, test=16).items()):
        rate.pictures(folder/'cifar'/split, n, seed=seed)
    run = folder/'out'/'run'
    code, said = ended(script('cifar10.sh', '--tiny', '--steps', 3, 'cifar', 'out', cwd=folder))
    assert code == 75 and 'stopped as asked' in said, said
    first = steps_of(run)
    assert 3 <= len(first) < 16 and not (run/'report.json').exists(), first
    code, said = ended(script('cifar10.sh', '--tiny', 'cifar', 'out', cwd=folder))
    assert code == 0, said
    assert steps_of(run) == list(range(1, 17)), 'a step is missing or repeated'
    report = json.loads((run/'report.json').read_text())
    assert report['resumed_from_step'] == len(first) and report['steps'] == 16
    assert {row['protocol'] for row in report['scores']} == {'knn', 'linear'}


@pytest.mark.parametrize('args, words', [
    (['nowhere', 'out'], 'there is no nowhere'), (['.', 'out'], 'no train/'), ([], 'DATA and OUT'),
    (['--minute', 3, '.', 'out'], 'unknown option --minute'), (['file', 'out'], 'no archive')])
def test_cifar10_refuses_what_it_cannot_train_on(tmp_path, args, words):
    (tmp_path/'file').write_text('no archive')
    code, said = ended(script('cifar10.sh', *args, cwd=tmp_path))
    assert code == 2 and words in said and 'Traceback' not in said, said


# run.sh

def test_every_part_is_in_the_results(folder, results):
    assert list(results['parts']) == names
    table = (folder/'results'/'results.md').read_text()
    for name, part in results['parts'].items():
        assert part['status'] in ('ok', 'left out'), part
        assert 'result' in part or part['reason'], part
        assert f'| {name} | {part["status"]} |' in table
    for name in ('step', 'loss', 'optim', 'pipeline'): assert results['parts'][name]['status'] == 'ok'
    assert 'ours_images_per_s' in table and results['parts']['pipeline']['result']['ours_images_per_s']['median'] > 0
    assert results['parts']['optim']['result']['ms']['ours'] > 0
    assert results['machine']['torch'] and results['machine']['date'] and results['tiny']
    limits = sum(part['limit'] for part in results['parts'].values())
    assert limits <= parts.SECONDS < 9*60, 'all limits together'


at_least = dict(augmentation=.001, forward=.1, loss=.001, backward=.2, lars=.004)       # of a step, however busy it is

def test_the_step_adds_up(results):
    runs = {run['variant']: run for run in results['parts']['step']['result']['runs']}
    assert {'fp32', 'bf16', 'fp32+contiguous', 'fp32+global'} <= set(runs)
    for run in runs.values():
        if 'left_out' in run: continue
        assert sum(run['shares'].values()) == pytest.approx(1, abs=.002)
        for part, least in at_least.items(): assert run['shares'][part] > least, (part, run)
        assert sum(run['parts_ms'].values()) == pytest.approx(run['ms']*(1 - run['between_steps']), rel=.02)
        assert run['images_per_second']*run['ms']/1e3 == pytest.approx(run['images'], rel=.02)
        assert .5 < run['memory_mb'] < 500
    for variant in ('fp32+contiguous', 'fp32+global'):
        assert runs[variant]['loss'] == pytest.approx(runs['fp32']['loss'], abs=.02), 'the same step, taken otherwise'
    if 'left_out' not in runs['fp32+sync']:
        assert runs['fp32+sync']['loss'] == pytest.approx(runs['fp32']['loss'], abs=.02)


def test_the_losses_are_measured_at_every_size(results):
    sizes = results['parts']['loss']['result']['sizes']
    assert [(at['dtype'], at['rows']) for at in sizes] == [(t, r) for t in ('fp32', 'bf16') for r in (64, 256)]
    for at in sizes:
        assert {'ours', 'plain'} <= set(at['runs']) and at['peak_tflops'] > 0
        for run in at['runs'].values():
            assert run['ms'] > 0 and abs(run['loss'] - math.log(at['rows'] - 1)) < 1
            needed = 2*2*at['rows']**2*at['dim']/1e12
            share = needed/(run['ms']/1e3)/at['peak_tflops']
            assert run['share_of_peak'] == pytest.approx(share, rel=.02, abs=.001)


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path):
    code, said = ended(script('run.sh', '--tiny', '--only', 'pipeline,cells', '--photos', 'missing', '--out', '.',
                              cwd=tmp_path))
    assert code == 1 and 'failed: pipeline' in said, said
    found = json.loads((tmp_path/'results.json').read_text())['parts']
    assert found['pipeline']['status'] == 'failed' and found['pipeline']['reason'] and found['pipeline']['log']
    assert list(found) == ['pipeline', 'cells'] and found['cells']['status'] != 'failed'
    assert '| pipeline | failed |' in (tmp_path/'results.md').read_text()


def part(name, code, limit=30, **kwargs): return parts.Part(name, limit, [sys.executable, '-c', code], **kwargs)

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] not in 'ZX'
    except OSError: return False

def test_how_parts_end(tmp_path):
    "Each in its own way; none of them takes another with it."
    child = 'import subprocess as s, sys; p = s.Popen([sys.executable, "-c", "import time; time.sleep(60)"])\n' \
            f'open({str(tmp_path/"pid")!r}, "w").write(str(p.pid)); p.wait()'
    planned = [part('slow', child, 3), part('wrong', 'print("{}"); raise ValueError("it broke")'),
               part('silent', ''), part('absent', 'import no_such_package'),
               part('ours_absent', 'import simclr_nb.no_such_module'),
               part('needy', 'print("{}")', needs=('json', 'no_such_package')),
               part('good', 'print("noise\\n{\\"a\\": 1}")')]
    facts = dict(machine=dict(card=None), tiny=False, parts={})
    began = time.monotonic()
    failed = parts.run_all(planned, facts, tmp_path, 'cpu')
    assert failed == ['slow', 'wrong', 'silent', 'ours_absent'] and time.monotonic() - began < 30
    assert facts == json.loads((tmp_path/'results.json').read_text())
    found = facts['parts']
    assert 'out of time after 3 s' in found['slow']['reason'] and 'it broke' in found['wrong']['reason']
    assert found['silent']['reason'] == 'it printed no result' and found['good']['result'] == {'a': 1}
    for name in ('absent', 'needy'):
        assert found[name]['status'] == 'left out' and 'no_such_package' in found[name]['reason']
    table = (tmp_path/'results.md').read_text()
    assert all(f'| {name} | {one["status"]} |' in table for name, one in found.items())
    assert not alive(int((tmp_path/'pid').read_text())), 'what a part started lives on'
    left = parts.run_all(planned[-1:], facts | dict(parts={}), tmp_path, 'cpu', seconds=1)
    assert left == ['good'], 'without time there is no part'


def test_tests_that_all_skip_on_a_gpu_are_a_failure():
    assert parts.counts('7 skipped, 4 deselected in 1.2s', 'cpu') == dict(skipped=7)
    assert parts.counts('7 passed, 4 deselected in 1.2s', 'cuda') == dict(passed=7)
    for said in ('7 skipped in 1.2s', 'nothing'):
        with pytest.raises(ValueError): parts.counts(said, 'cuda')
    assert root/'tests'/'test_distributed.py' in parts.tests_for_gpus()
