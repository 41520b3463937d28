"A forked command is what a fresh one is: all that a program can see of itself is compared."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

import forks

pytestmark = pytest.mark.process
root = Path(__file__).resolve().parents[1]

seen = '''
import json, logging, multiprocessing as mp, os, random, signal, sys, threading, warnings
import numpy, torch
main = sys.modules['__main__']
with warnings.catch_warnings(record=True) as once:
    for _ in range(3): warnings.warn('again')
facts = dict(
    argv=sys.argv, path=sys.path, name=__name__, main=vars(main) is globals(), file=globals().get('__file__'),
    folder=os.getcwd(), group=os.getpgrp(), session=os.getsid(0), variables=dict(os.environ),
    parent=mp.parent_process(), process=mp.current_process().name, children=len(mp.active_children()),
    method=mp.get_start_method(allow_none=True), threads=[t.name for t in threading.enumerate()],
    is_main=threading.current_thread() is threading.main_thread(), umask=os.umask(0o22),
    handlers=[str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), executable=sys.executable, flags=str(sys.flags),
    descriptors=sorted(map(int, os.listdir('/proc/self/fd')))[:-1], recursion=sys.getrecursionlimit(),
    streams=[(s.encoding, s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)],
    seed=torch.initial_seed() == 67280421310721, number_of_threads=torch.get_num_threads(),
    gradients=torch.is_grad_enabled(), dtype=str(torch.get_default_dtype()), warned=len(once),
    level=logging.getLogger().level, logs=len(logging.getLogger().handlers))
chance = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
print(json.dumps(facts | dict(chance=chance)))
'''

ways = {'-c': lambda folder: ['-c', seen, 'a', 'b c'], 'script': lambda folder: [folder/'seen.py', 'a'],
        '-m': lambda folder: ['-m', 'seen', '--a']}

def both(command, **kwargs):
    "What a fresh process gives, and a forked one."
    kwargs = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL) | kwargs
    return [start([sys.executable, *map(str, command)], **kwargs) for start in (subprocess.run, forks.run)]

@pytest.fixture(autouse=True)
def there():
    if not sys.platform.startswith('linux'): pytest.skip('processes are forked on Linux only')
    assert forks.known in os.environ, 'there is no server'


@pytest.mark.parametrize('way', ways)
def test_a_fork_sees_what_a_fresh_process_sees(tmp_path, way):
    (tmp_path/'seen.py').write_text(seen)
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'CUDA_VISIBLE_DEVICES': '', 'WORD': 'caf\udce9', 'EMPTY': ''}
    fresh, forked = (json.loads(done.stdout) for done in both(ways[way](tmp_path), cwd=tmp_path, env=env))
    chances = fresh.pop('chance'), forked.pop('chance')
    assert fresh == forked
    again = json.loads(forks.run([sys.executable, *map(str, ways[way](tmp_path))], env=env, cwd=tmp_path,
                                 stdout=subprocess.PIPE).stdout)['chance']
    for three in zip(*chances, again):                          # each process has chances of its own,
        assert len(set(three)) == 3 or fresh['seed'] and three[0] == chances[0][2]  # but for older torch's

def test_one_that_is_started_without_buffers_writes_at_once():
    code = 'import sys; print(sys.argv, [s.write_through for s in (sys.stdin, sys.stdout, sys.stderr)]); 1/0'
    fresh, forked = both(['-u', '-c', code, 'a'])
    assert (fresh.stdout, fresh.returncode) == (forked.stdout, forked.returncode) and 'True' in forked.stdout
    assert is_forked([sys.executable, '-u', *loaded[1:]]) == 'True'

@pytest.mark.parametrize('code', [
    '', 'import sys; sys.exit(7)', 'import sys; sys.exit("so it is")', 'import sys; sys.exit(None)', '1/0',
    'import os; os._exit(9)', 'raise KeyboardInterrupt', 'import os; os.kill(os.getpid(), 9)', 'syntax error',
    'import os; os.abort()', 'import sys; sys.stdout.write("no end of line"); sys.exit(300)',
    'import atexit; atexit.register(print, "at exit"); print("before"); 1/0',
    'import threading, time; threading.Thread(target=lambda: (time.sleep(.3), print("late"))).start()',
    'import warnings; warnings.warn("mind"); warnings.warn("mind")', 'import nowhere',
    'print(input()); print(input())', 'import sys; print(sys.stdin.read().upper(), file=sys.stderr)'])
def test_what_it_says_and_its_exit_code_are_those_of_a_fresh_process(code):
    fresh, forked = both(['-c', code], stdin=None, input='one\ntwo')
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)

def test_a_reader_that_leaves_is_told_by_both():
    code = 'print("x\\n"*5); import time; time.sleep(.5); print("y")'
    said = []
    for start in (subprocess.Popen, forks.Popen):
        process = start([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        said.append((process.wait(30), b'BrokenPipeError' in process.stderr.read()))
        process.stderr.close()
    assert said[0] == said[1] and said[0][1]

def test_signals_waiting_and_the_end():
    waits = [sys.executable, '-c', 'import time; print("up", flush=True); time.sleep(60)']
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with forks.Popen(waits, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            assert process.stdout.readline() == b'up\n' and process.poll() is None
            assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
            with pytest.raises(subprocess.TimeoutExpired): process.wait(.1)
            os.killpg(process.pid, number)
            assert process.wait(30) == -number == process.poll()
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired): forks.run(waits, capture_output=True, timeout=.5)
    assert time.monotonic() - began < 20, 'it is ended, not waited for'

def test_errors_go_where_the_output_goes_and_into_files(tmp_path):
    code = 'import sys; print("out", flush=True); print("error", file=sys.stderr)'
    done = forks.run([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout == 'out\nerror\n'
    with open(tmp_path/'log', 'w') as f: forks.run([sys.executable, '-c', code], stdout=f, stderr=subprocess.STDOUT)
    assert (tmp_path/'log').read_text() == 'out\nerror\n'
    with pytest.raises(subprocess.CalledProcessError): forks.run([sys.executable, '-c', '1/0'], check=True, stderr=-3)

def test_workers_and_groups_of_processes_work_in_a_fork():
    code = '''
import os, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.utils.data import DataLoader
def join(rank, address):
    dist.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    x = torch.ones(1)*rank
    dist.all_reduce(x)
    assert x == 1
    dist.destroy_process_group()
if __name__ == '__main__':
    print(sum(DataLoader(range(10), batch_size=5, num_workers=2)).tolist())
    context = mp.start_processes(join, (f'file://{os.getcwd()}/group',), nprocs=2, start_method='fork')
    model = torch.nn.Linear(3, 1)
    model(torch.rand(2, 3)).sum().backward()
    print(model.weight.grad is not None)
'''
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        done = forks.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == '[5, 7, 9, 11, 13]\nTrue\n', done.stderr


loaded = [sys.executable, '-c', 'import sys; print("torch" in sys.modules)']

def is_forked(command, **kwargs): return forks.run(command, capture_output=True, text=True, **kwargs).stdout.strip()

def test_what_is_read_at_the_start_begins_afresh():
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    assert is_forked(loaded, env=env) == 'True'
    for name in ('PYTHONIOENCODING', 'PYTHONPATH', 'PYTHONWARNINGS', 'LC_ALL', 'MPLBACKEND', 'HF_HOME'):
        assert is_forked(loaded, env={**env, name: 'ascii'}) == 'False', name
    assert is_forked([sys.executable, '-W', 'error', *loaded[1:]], env=env) == 'False'
    assert is_forked(loaded, env={k: v for k, v in env.items() if k != forks.known}) == 'True'
    assert is_forked(loaded, env=env, preexec_fn=lambda: None) == 'False'

def test_what_a_fork_starts_is_forked_where_that_is_wanted():
    code = f'import subprocess; subprocess.run({loaded!r})'
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
    assert is_forked([sys.executable, '-c', code], env=env) == 'False'
    assert is_forked([sys.executable, '-c', code], env={**env, forks.nested: '1'}) == 'True'

def test_a_stand_in_for_python_in_a_shell(tmp_path):
    command = [forks.stand_in(tmp_path), *loaded[1:2], loaded[2] + '; sys.exit(3)']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert (done.stdout, done.stderr, done.returncode) == ('True\n', '', 3)
    waits = 'import time; print("up", flush=True); time.sleep(60)'
    with subprocess.Popen([forks.stand_in(tmp_path), '-c', waits], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'up\n'
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM

def test_a_fork_deletes_its_own_folders_and_none_of_the_server(tmp_path):
    (tmp_path/'makes.py').write_text('import tempfile\nfolder = tempfile.TemporaryDirectory()\n')
    code = f'''
import os, sys
sys.path[:0] = [{str(root/"tests")!r}, {str(tmp_path)!r}]
import forks
with forks.server():
    for code in ('print(sys.modules["makes"].folder.name)',
                 'import tempfile; own = tempfile.TemporaryDirectory(); print(own.name)'):
        place = forks.run([sys.executable, '-c', 'import sys; ' + code], capture_output=True, text=True).stdout.strip()
        print(os.path.isdir(place))
'''
    env = {k: v for k, v in os.environ.items() if k != forks.known}
    env |= dict(SIMCLR_PRELOAD='makes', PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ['True', 'False'], done.stderr

def test_without_a_server_processes_are_fresh(monkeypatch):
    monkeypatch.delenv(forks.known)
    assert is_forked(loaded) == 'False'

def test_the_server_goes_with_whoever_started_it(tmp_path):
    code = f'''
import os, sys
sys.path.insert(0, {str(root/"tests")!r})
import forks
with forks.server():
    print(forks.run([sys.executable, '-c', 'import os; print(os.getppid())'], capture_output=True, text=True).stdout)
    sys.stdout.flush()
    os._exit(0)
'''
    env = {k: v for k, v in os.environ.items() if k != forks.known} | dict(SIMCLR_PRELOAD='json')
    server = int(subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout)
    end = time.monotonic() + 10
    while Path(f'/proc/{server}').exists() and time.monotonic() < end: time.sleep(.05)
    assert not Path(f'/proc/{server}').exists()


def adds(rank, folder, how):
    if how == 'fails' and rank: raise ValueError('no')
    if how == 'hangs': time.sleep(60)
    (Path(folder)/str(rank)).write_text(str(os.getpid()))

def test_functions_in_processes(tmp_path):
    forks.together(adds, 3, (str(tmp_path), 'works'), 60)
    assert len({file.read_text() for file in tmp_path.iterdir()} - {str(os.getpid())}) == 3
    for how, seconds, words in (('fails', 60, 'one of the processes has failed'), ('hangs', 2, 'not done after 2 s')):
        with pytest.raises(AssertionError, match=words): forks.together(adds, 2, (str(tmp_path), how), seconds)
