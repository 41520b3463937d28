"Runs that die and go on: the same command, started again, ends with the same weights, bit for bit."
import json, os, random, resource, signal, subprocess, sys, time

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file

import forks

from simclr_nb.commands import main as cli
from simclr_nb.commands import run
from simclr_nb.training.history import HistoryCallback, read_history
from simclr_nb.training.resume import load_state

pytestmark = pytest.mark.process
STEPS = 18
settings = dict(arch='resnet18_0.125x', size=32, batch_size=16, epochs=6, lr=.1, num_workers=0, save_every=2)


def arguments(images, out, **changes):
    "The command line of a run."
    options = settings | changes
    return ['pretrain', str(images), '--out', str(out),
            *(str(word) for k, v in options.items() for word in (f"--{k.replace('_', '-')}", v))]


@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('resume')


@pytest.fixture(scope='module')
def images(place):
    folder = place/'images'
    folder.mkdir()
    for i in range(48):
        coarse = np.random.default_rng(i).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        (folder/f'class{i % 2}').mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((50, 40), Image.BICUBIC).save(folder/f'class{i % 2}'/f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def processes(): return forks


def killing_in(call, signal=signal.SIGKILL):
    "os.fsync that ends the process in its `call`-th call, in the middle of a write."
    fsync, calls = os.fsync, []
    def deadly(fd):
        calls.append(fd)
        if len(calls) == call: os.kill(os.getpid(), signal)
        fsync(fd)
    return deadly


def filling_at(call):
    "os.fsync after whose `call`-th call no file can grow beyond 50 kB any more, as on a full disk."
    fsync, calls = os.fsync, []
    def full(fd):
        calls.append(fd)
        if len(calls) == call: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        fsync(fd)
    return full


def slow_steps(seconds):
    "History.after_batch after which there is time to send a signal, however busy the machine is."
    write_line = HistoryCallback.after_batch
    def slow(self):
        write_line(self)
        time.sleep(seconds)
    return slow


def a_run(images, out, how, changes, seen):
    "`simclr pretrain` in a process of its own; what it prints goes to a file."
    torch.set_num_threads(1)
    if how.get('poor') and os.geteuid() == 0: os.setuid(65534)               # root may write anywhere
    sys.stdout = sys.stderr = open(seen, 'a', buffering=1)
    if how.get('kill_write'): os.fsync = killing_in(how['kill_write'])
    if how.get('full'): os.fsync = filling_at(how['full'])
    if how.get('slow'): HistoryCallback.after_batch = slow_steps(how['slow'])
    if not how.get('figures'):                      # they take as long as the training
        run.save_figure = lambda fig, path: None
        run.plot_history = lambda histories: None
    cli.main(arguments(images, out, **changes))


def start(processes, images, out, how=None, **changes):
    seen = log(out)
    seen.touch()
    seen.chmod(0o666)
    process = processes.Process(target=a_run, args=(images, out, how or {}, changes, str(seen)))
    process.start()
    return process


def log(out): return (out.parent if out.parent.name == 'locked' else out).with_suffix('.txt')


def ended(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, 'it hangs'
    return process.exitcode


def said(out): return log(out).read_text()


def weights(out):
    head = load_file(out/'head.safetensors')
    return load_file(out/'encoder.safetensors') | {f'head.{k}': v for k, v in head.items()}


def report(out): return json.loads((out/'report.json').read_text())


@pytest.fixture(scope='module')
def straight(processes, images, place):
    "A run in one go."
    assert ended(start(processes, images, place/'straight', dict(figures=True))) == 0, said(place/'straight')
    return place/'straight'


def same(out, straight):
    a, b = weights(out), weights(straight)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    one, two = (read_history(o/'history.csv') for o in (out, straight))
    for k in one.keys() - {'images_per_second'}: np.testing.assert_array_equal(one[k], two[k], k)
    assert report(out)['steps'] == STEPS and len({*one['step']}) == STEPS
    return True


def steps_logged(out):
    if not (out/'history.csv').exists(): return 0
    return len((out/'history.csv').read_text().splitlines()) - 1


def checkpoints_of(out): return sorted((out/'checkpoints').glob('step-*.pt'))


def test_a_run_says_what_it_did_and_a_complete_one_has_nothing_to_do(processes, images, straight):
    out = straight
    names = {'encoder.safetensors', 'head.safetensors', 'config.json', 'history.csv', 'report.json', 'checkpoints',
             'figures'}
    assert {p.name for p in out.iterdir()} >= names
    assert len(checkpoints_of(out)) == 3 and load_state(checkpoints_of(out)[-1])['step'] == STEPS
    before = (out/'encoder.safetensors').stat().st_mtime_ns
    assert ended(start(processes, images, out)) == 0 and 'is complete' in said(out)
    assert (out/'encoder.safetensors').stat().st_mtime_ns == before


def test_ten_kills_at_random_moments(processes, images, place, straight):
    out, chance, kills, resumed = place/'killed', random.Random(0), 0, 0
    while kills < 10 and not (out/'report.json').exists():
        begin = int(checkpoints_of(out)[-1].name.split('-')[1]) if checkpoints_of(out) else 0
        resumed += begin > 0
        process, stop = start(processes, images, out), begin + chance.randint(1, 3)
        while process.is_alive() and steps_logged(out) < stop: time.sleep(.005)
        time.sleep(chance.uniform(0, .1))                 # in the step after, or while that is saved
        process.kill()
        process.join()
        kills += 1
    assert kills > 5 and resumed > 3, 'it was hardly ever killed with a checkpoint on the disk'
    assert ended(start(processes, images, out)) == 0, said(out)
    assert same(out, straight) and not list((out/'checkpoints').glob('.*.part'))


@pytest.mark.parametrize('call', [8, 9, 11])
def test_a_kill_in_the_middle_of_a_write(processes, images, place, straight, call):
    "Of the folder with the new name of a checkpoint, of the encoder beside it, of the next checkpoint."
    out = place/f'write{call}'
    assert ended(start(processes, images, out, dict(kill_write=call))) == -signal.SIGKILL
    assert not (out/'report.json').exists()
    assert ended(start(processes, images, out)) == 0, said(out)
    assert same(out, straight) and report(out)['resumed_from_step'] in (2, 3)


def test_a_full_disk_is_told_and_leaves_the_last_good_checkpoint(processes, images, place, straight):
    out = place/'full'
    assert ended(start(processes, images, out, dict(full=8))) == 1
    good = checkpoints_of(out)[-1]
    assert 'could not write the checkpoint of step' in said(out) and str(good) in said(out), said(out)
    assert 'Traceback' not in said(out), said(out)
    assert load_state(good)['step'] > 0 and not list((out/'checkpoints').glob('.*.part'))
    assert ended(start(processes, images, out)) == 0 and same(out, straight)


def test_a_folder_that_cannot_be_written_to(processes, images, place):
    locked = place/'locked'
    locked.mkdir()
    locked.chmod(0o555)
    for folder in (place, *place.parents):
        ours = folder.stat().st_uid == os.getuid() and 'pytest' in str(folder)
        if ours and folder != folder.parent: folder.chmod(0o755)
    out = locked/'run'
    assert ended(start(processes, images, out, dict(poor=True))) == 1
    assert 'ermission denied' in said(out) and 'Traceback' not in said(out), said(out)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(processes, images, place, straight):
    out = place/'damaged'
    ended(start(processes, images, out, dict(kill_write=15)))
    *_, before, last = checkpoints_of(out)
    data = bytearray(last.read_bytes())
    data[len(data)//2] ^= 1
    last.write_bytes(data)
    assert ended(start(processes, images, out)) == 0, said(out)
    assert f'{last} is damaged' in said(out) and same(out, straight)
    assert report(out)['resumed_from_step'] == int(before.name.split('-')[1])


@pytest.mark.parametrize('field, value', [('batch_size', 24), ('temperature', .2), ('seed', 1)])
def test_another_configuration_is_refused_by_its_name(processes, images, place, straight, field, value):
    out = place/'other'
    if not out.exists(): ended(start(processes, images, out, dict(kill_write=9)))
    config = (out/'config.json').read_bytes()
    assert ended(start(processes, images, out, **{field: value})) == 1
    was = settings.get(field, dict(temperature=.1, seed=0).get(field))
    assert f'{field} was {was}, not {value}' in said(out)
    assert (out/'config.json').read_bytes() == config and checkpoints_of(out), 'nothing is touched'


def test_other_images_are_refused(processes, images, place):
    "The folder is the same, and something in it is not."
    out, more = place/'images_changed', place/'more'
    more.mkdir()
    for f in images.rglob('*.png'): (more/f.name).write_bytes(f.read_bytes())
    ended(start(processes, more, out, dict(kill_write=9)))
    (more/'00.png').rename(more/'zz.png')
    assert ended(start(processes, more, out)) == 1 and 'files was' in said(out)


def test_sigterm_saves_and_leaves(processes, images, place, straight):
    out = place/'term'
    process = start(processes, images, out, dict(slow=.5), save_every=1000)
    while steps_logged(out) < 5: time.sleep(.02)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    step = int(checkpoints_of(out)[-1].name.split('-')[1])
    assert 5 <= step < STEPS and f'stopped as asked, after step {step}' in said(out)
    assert ended(start(processes, images, out)) == 0 and same(out, straight)
    assert report(out)['resumed_from_step'] == step


# Several processes

script = '''
import os, signal, sys, torch
from simclr_nb.commands import main as cli
from simclr_nb.training.history import HistoryCallback
torch.set_num_threads(1)
write_line = HistoryCallback.after_batch
def dies(self):
    write_line(self)
    first = os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
    if first and self.step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
HistoryCallback.after_batch = dies
cli.main([*sys.argv[2:], '--overwrite'])
'''


slow_script = '''
import sys, time, torch
from simclr_nb.commands import main as cli
from simclr_nb.training.history import HistoryCallback
write_line = HistoryCallback.after_batch
def slow(self):
    write_line(self)
    time.sleep(.5)
HistoryCallback.after_batch = slow
cli.main(sys.argv[1:])
'''


def torchrun(log, *args):
    "Two processes; what they say goes to a file."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *map(str, args)]
    env = {**os.environ, forks.nested: '1'}                   # the processes that it starts are forked, too
    with open(log, 'w') as f: return forks.Popen(command, env=env, stdout=f, stderr=subprocess.STDOUT)


def test_torchrun_starts_the_group_again_where_it_was(images, place):
    (place/'dies.py').write_text(script)
    log = place/'torchrun.txt'
    assert torchrun(log, place/'dies.py', -1, *arguments(images, place/'two')).wait(200) == 0, log.read_text()
    again = torchrun(log, '--max-restarts', 3, place/'dies.py', 7, *arguments(images, place/'restarted'))
    assert again.wait(200) == 0, log.read_text()
    assert report(place/'two')['resumed_from_step'] == 0
    assert report(place/'restarted')['resumed_from_step'] == 6
    a, b = weights(place/'two'), weights(place/'restarted')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_torchrun_from_the_command_line_and_sigterm(images, place, straight):
    "The same files as one process, whether in one go or told to stop and started again."
    out = place/'cluster'
    (place/'slow.py').write_text(slow_script)
    options = arguments(images, out, save_every=1000)
    log = place/'cluster.txt'
    job = torchrun(log, place/'slow.py', *options)
    while job.poll() is None and steps_logged(out) < 3: time.sleep(.05)
    job.send_signal(signal.SIGTERM)
    job.wait(100)
    assert 'stopped as asked' in log.read_text(), log.read_text()
    step = int(checkpoints_of(out)[-1].name.split('-')[1])
    assert torchrun(log, '-m', 'simclr_nb', *options).wait(200) == 0, log.read_text()
    assert report(out)['resumed_from_step'] == step and report(out)['steps'] == STEPS
    names = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob('*') if p.suffix != '.pt'}
    assert names(out) == names(straight)
    a, b = (json.loads((o/'config.json').read_text()) for o in (out, straight))
    assert a == b
