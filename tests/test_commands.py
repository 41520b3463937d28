"The commands as a hostile or hurried user meets them: nothing is lost, and what is wrong is said in one line."
import io, os, shutil, signal, subprocess, sys, time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np, pytest
from PIL import Image

import forks

from simclr_nb.commands import main as cli
from simclr_nb.commands import report
from simclr_nb.commands import run as runs
from simclr_nb.core import write_json
from simclr_nb.training.folder import locked, read_json

pytestmark = pytest.mark.usefixtures('quick_figures')
settings = '--arch resnet18_0.125x --size 32 -b 8 --epochs 1 --lr 0.1 --num-workers 0'.split()


def simclr(*args):
    "Run a command in this process: its exit status, and what it says."
    said, code = io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(said):
        try: cli.main(args)
        except SystemExit as e: code = e.code
    if isinstance(code, str): return 1, said.getvalue() + code
    return code or 0, said.getvalue()


def pretrain(images, out, *more): return simclr('pretrain', images, '--out', out, *settings, *more)


def works(result):
    code, said = result
    assert code == 0, said
    return said


def refused(result, *words):
    code, said = result
    plain = ' '.join(said.replace('│', '').split())
    assert code in (1, 2) and all(word in plain for word in words), said
    assert 'Traceback' not in said
    return said


def contents(folder):
    "All that is below a folder, with the times of change."
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b'')
            for f in folder.rglob('*')}


def files(folder): return {name for name in contents(folder) if (folder/name).is_file()}


def draw(folder, n=24):
    for i in range(n):
        (folder/f'class{i % 2}').mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder/f'class{i % 2}'/f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory): return draw(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def trained(images, tmp_path_factory):
    "A finished run; tests copy it."
    out = tmp_path_factory.mktemp('trained')/'run'
    works(pretrain(images, out))
    return out


@pytest.fixture
def run(trained, tmp_path): return shutil.copytree(trained, tmp_path/'run')


# --overwrite

@pytest.mark.parametrize('typo', ['--temperature 0', '--lr -1', '--epochs 0', '--log nothing', '--precision fp16',
    '--arch resnett', '-b 5000', '--recipe nothing', '--lr 1e30', '--num-workers -1'])
def test_a_typo_beside_overwrite_costs_nothing(images, run, typo):
    before = contents(run)
    refused(pretrain(images, run, '--overwrite', *typo.split()))
    after = contents(run)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    assert 'is complete' in works(pretrain(images, run))


def test_overwrite_replaces_all_of_the_old_run_and_nothing_else(images, run):
    old = ['transfer.json', 'transfer.md', 'transfer/Pets-linear-simclr-1.npz', 'wandb/run-1/files/x', 'report.md',
           'figures/labels_knn.png', 'tensorboard/events.out.1']
    mine = ['notes.txt', 'figures/mine.png', 'wandb/mine.txt']
    for name in old + mine:
        (run/name).parent.mkdir(parents=True, exist_ok=True)
        (run/name).write_text(name)
    works(pretrain(images, run, '--overwrite', '--seed', 1))
    assert read_json(run/'config.json')['seed'] == 1
    assert set(mine) <= files(run) and not set(old) & files(run)
    assert not [name for name in files(run) if name.startswith('.')]


def test_a_folder_that_is_no_run_is_left_alone(images, tmp_path):
    for name in ('figures/scores.png', 'checkpoints/step-000000001-00000000.pt', 'config.json'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text('{}')
    before = contents(tmp_path)
    refused(pretrain(images, tmp_path, '--overwrite'), 'no config.json of a run')
    assert contents(tmp_path) == before


# One folder

def test_two_runs_in_one_folder(images, run):
    with locked(run): refused(pretrain(images, run, '--overwrite'), 'another run is writing to', str(os.getpid()))
    assert 'is complete' in works(pretrain(images, run))


def test_a_first_try_that_fails_does_not_block_its_folder(images, tmp_path):
    refused(pretrain(images, tmp_path/'run', '--lr', '1e30'), 'not finite')
    works(pretrain(images, tmp_path/'run'))
    refused(pretrain(images, tmp_path/'run', '--lr', '0.2'), 'whose lr was 0.1, not 0.2')


def test_images_that_were_added_are_noticed(images, tmp_path):
    more = shutil.copytree(images, tmp_path/'more')
    works(pretrain(more, tmp_path/'new'))
    draw(more, 26)
    refused(pretrain(more, tmp_path/'new'), 'whose images was 24, not 26')


@pytest.mark.parametrize('name', ['config.json', 'report.json'])
@pytest.mark.parametrize('text', ['[1]', '{"a": ', '['*100_000, '"x"'])
def test_damaged_facts_are_named(images, run, name, text):
    (run/name).write_text(text)
    refused(pretrain(images, run), f'{run/name} is damaged')
    if name == 'report.json': refused(simclr('evaluate', run, images, '--num-workers', 0), f'{run/name} is damaged')


@pytest.mark.process
def test_half_written_files_are_swept(images, run):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    (run/'report.json').unlink()
    (run/f'.encoder.safetensors.{gone.pid}.part').write_text('half')
    (run/f'figures/.pairs.png.{gone.pid}.part').write_text('half')
    works(pretrain(images, run))
    assert not [name for name in files(run) if name.endswith('.part')]


def test_a_file_in_place_of_the_folder(images, tmp_path):
    (tmp_path/'file').write_text('')
    refused(pretrain(images, tmp_path/'file'), f'{tmp_path/"file"} is a file')


@pytest.mark.parametrize('name', ['encoder.safetensors', 'head.safetensors', 'report.json'])
def test_a_full_disk_names_the_file(images, tmp_path, monkeypatch, name):
    replace = os.replace
    def full(part, path):
        if str(path).endswith(name): raise OSError(28, 'No space left on device')
        replace(part, path)
    monkeypatch.setattr(os, 'replace', full)
    said = refused(pretrain(images, tmp_path/'run'), 'No space left on device')
    assert name in said or 'could not write the checkpoint of step 3' in said
    monkeypatch.undo()
    works(pretrain(images, tmp_path/'run'))
    assert read_json(tmp_path/'run/report.json')['resumed_from_step'] == 3


# Names, changed files, damaged history

def test_names_that_are_not_utf8(images, tmp_path):
    folder = shutil.copytree(images, tmp_path/'images')
    os.rename(folder/'class0/00.png', os.fsencode(folder/'class0') + b'/caf\xe9.png')
    (folder/'class1/broken.png').write_text('no picture')
    os.rename(folder/'class1/broken.png', os.fsencode(folder/'class1') + b'/br\xfcken.png')
    works(pretrain(folder, tmp_path/'run'))
    assert any('br' in name for name in read_json(tmp_path/'run/report.json')['left_out'])
    (tmp_path/'run/report.json').read_text().encode('ascii')


def test_a_picture_that_was_replaced_is_noticed(images, tmp_path):
    folder, run = shutil.copytree(images, tmp_path/'images'), tmp_path/'run'
    works(pretrain(folder, run))
    (run/'report.json').unlink()
    works(pretrain(folder, run))                                         # the same images
    (run/'report.json').unlink()
    Image.new('RGB', (40, 40)).save(folder/'class1/03.png')
    refused(pretrain(folder, run), 'class1/03.png', '1 of 24', '--accept-changed-files')
    works(pretrain(folder, run, '--accept-changed-files'))


def test_a_damaged_history_line_is_left_out(images, run):
    lines = (run/'history.csv').read_text().splitlines()
    (run/'history.csv').write_text('\n'.join([lines[0], lines[1], 'x'*9, '\x00,' + lines[2][2:], *lines[2:]]))
    (run/'report.json').unlink()
    assert ' 3 |' in works(simclr('plot', run))
    works(pretrain(images, run))


def test_a_run_just_begun_has_nothing_to_draw(run):
    (run/'history.csv').write_text((run/'history.csv').read_text().splitlines()[0] + '\n')
    refused(simclr('plot', run), 'nothing to draw', 'still to come')


# Evaluation

def test_evaluation_when_the_pretraining_images_are_gone(images, run, tmp_path, monkeypatch):
    config = read_json(run/'config.json')
    evaluate = 'evaluate', run, shutil.copytree(images, tmp_path/'images'), '--protocol', 'knn', '--k', 2
    evaluate += '--num-workers', 0
    load = report.load_images
    for source in ('/no/longer/there', 'cifar10'):
        write_json(run/'config.json', config | dict(source=source))
        def look(name):
            assert name != 'cifar10', 'this would download it'
            return load(name)
        monkeypatch.setattr(report, 'load_images', look)
        assert 'report:' in works(simclr(*evaluate))
        assert read_json(run/'report.json')['evaluated_on']['test_seen_in_pretraining'] is None


def test_figures_of_an_earlier_evaluation_go(images, run):
    for name in ('labels_finetune.png', 'mine.png'): (run/'figures'/name).write_text('old')
    works(simclr('evaluate', run, images, '--protocol', 'knn', '--k', 2, '--num-workers', 0))
    assert not (run/'figures/labels_finetune.png').exists() and (run/'figures/mine.png').exists()
    assert (run/'figures/pairs.png').exists() and (run/'figures/scores.png').exists()


# Settings

@pytest.mark.parametrize('option, value, words', [
    ('--temperature', '0', '--temperature must be above 0, got 0.0'), ('--temperature', 'inf', 'above 0, got inf'),
    ('--temperature', 'nan', 'above 0, got nan'), ('--lr', 'nan', '--lr must be above 0, got nan'),
    ('--lr', 'inf', '--lr must be above 0'), ('--lr', '0', '--lr must be above 0'),
    ('--epochs', '1' + '0'*25, '--epochs must be at most 1,000,000'), ('--epochs', '-3', 'must be 1 or more, got -3'),
    ('--projection-dim', '1' + '0'*9, '--projection-dim must be at most'), ('--save-every', '0', 'must be 1 or more'),
    ('--num-workers', '-1', '--num-workers must be 0 or more, got -1'), ('--processes', '-2', '--processes must be 1'),
    ('--warmup-epochs', '-1', '--warmup-epochs must be 0 or more, got -1'), ('--seed', '-1', '--seed must be 0'),
    ('--warmup-epochs', 'inf', '--warmup-epochs must be 0'), ('--seed', '1' + '0'*30, '--seed must be at most')])
def test_settings_of_pretraining(tmp_path, option, value, words):
    for more in ((), ('--dry-run', '--images', 50)):
        refused(simclr('pretrain', tmp_path, option, value, *more), words)


@pytest.mark.parametrize('option, value, words', [
    ('--crop', '0', '--crop must be at least 0.05, got 0.0'), ('--crop', '1e-9', '--crop must be at least 0.05'),
    ('--crop', 'nan', '--crop must be at least 0.05, got nan'), ('--crop', '-1', 'must be at least 0.05, got -1'),
    ('--crop', '2', '--crop must be at most 1, got 2'), ('--linear-epochs', '0', '--linear-epochs must be 1 or more'),
    ('--finetune-epochs', '-3', '--finetune-epochs must be 1 or more'), ('--k', '0', '--k must be 1 or more'),
    ('--seeds', 'x', "a seed is a whole number of 0 or more, got 'x'"), ('--label-fractions', 'nan', 'got nan'),
    ('--label-fractions', '2', 'at most 1, got 2')])
def test_settings_of_evaluation(tmp_path, option, value, words):
    refused(simclr('evaluate', tmp_path, tmp_path, option, value), words)


@pytest.mark.parametrize('option, value, words', [
    ('--lr', '0', 'above 0, got 0'), ('--lr', '0.1,nan', 'above 0, got nan'), ('--wd', '-1', '0 or more, got -1'),
    ('--wd', 'inf', '0 or more, got inf'), ('--steps', '0', '--steps must be 1 or more')])
def test_settings_of_transfer(tmp_path, option, value, words):
    refused(simclr('transfer', tmp_path, tmp_path, option, value), words)


@pytest.mark.parametrize('text, words', [
    ('', 'no recipe'), ('epochs: 1\nepochs: 2', 'epochs is set more than once'), ('~: 3', 'without the name'),
    ('batch-size: 8\nbatch_size: 16', 'batch_size is set more than once'), ('epochs:', 'epochs takes int, got None'),
    ('lr: .nan', 'lr must be above 0, got nan'), ('epochs: 0b_', 'is not YAML'), ('- epochs', 'no recipe')])
def test_recipes_that_are_wrong(tmp_path, text, words):
    (tmp_path/'mine.yaml').write_text(text)
    refused(simclr('pretrain', tmp_path, '--recipe', tmp_path/'mine.yaml'), str(tmp_path/'mine.yaml'), words)


def test_augment_is_honored(images, tmp_path):
    "The preset that is named, whatever the size."
    kinds = {}
    for preset in ('imagenet', 'cifar10'):
        s = cli.Pretrain(source=str(images), augment=preset, size=32, arch='resnet18_0.125x', num_workers=0)
        kinds[preset] = repr(vars(runs.make_learner(s, runs.load_images(str(images))).views.augment))
    assert kinds['imagenet'] != kinds['cifar10']


# The shell

def command(*args, **kwargs):
    return forks.Popen([sys.executable, '-m', 'simclr_nb', *map(str, args)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **kwargs)


@pytest.mark.process
@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_help_on_a_terminal_without_greek(encoding):
    for name in ('pretrain', 'transfer'):
        out, err = command(name, '--help', env={**os.environ, 'PYTHONIOENCODING': encoding}).communicate(timeout=60)
        assert not err and b'--seed' in out, err
    assert encoding != 'ascii' or b'\\u' not in out


@pytest.mark.process
def test_a_reader_that_leaves_does_not_end_a_training(images, tmp_path):
    run = command('pretrain', images, '--out', tmp_path/'run', *settings, '--epochs', 3)
    assert run.stdout.readline().startswith(b'epoch 1/3')
    run.stdout.close()
    assert run.wait(100) == 0 and run.stderr.read() == b''
    assert read_json(tmp_path/'run/report.json')['steps'] == 9


@pytest.mark.process
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_leaves(images, tmp_path, number):
    "As `timeout`, SLURM and Ctrl-C send it: to the processes that decode, too."
    out = tmp_path/'run'
    options = [*settings, '--epochs', 2000, '--save-every', 100_000, '--num-workers', 2]
    before = signal.signal(number, signal.SIG_DFL)      # as at a terminal; a shell ignores SIGINT in the background
    try: run = command('pretrain', images, '--out', out, *options, start_new_session=True)
    finally: signal.signal(number, before)
    history = out/'history.csv'
    try:
        while run.poll() is None and not (history.exists() and history.read_text().count('\n') > 3): time.sleep(.05)
        os.killpg(run.pid, number)
        said, errors = (text.decode() for text in run.communicate(timeout=60))
    finally:
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 128 + number, errors
    assert 'stopped as asked, after step' in said and 'the same command goes on' in said and errors == ''
    assert list((out/'checkpoints').glob('step-*.pt')) and not (out/'.lock').exists()
