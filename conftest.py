"""Notebooks and tests in one pool: `pytest nbs/04_ntxent.ipynb` runs its cells, as `nbdev-test` does.

With `-n 2 --dist loadfile --no-loadscope-reorder` the files that take longest come first, as
`tests/seconds.json` has them.
"""
import json, os, signal, subprocess, sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent
workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
threads = max(1, (os.cpu_count() or 1)//workers)
if workers > 1: os.environ.setdefault('OMP_NUM_THREADS', str(threads))
sys.path.insert(0, str(root/'tests'))
import forks                                                                          # noqa: E402


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='cells to run that are skipped otherwise: "slow cuda"')
    parser.addoption('--seconds', action='store_true', help='write tests/seconds.json')


# Notebooks

class Notebook(pytest.File):
    def collect(self): yield Cells.from_parent(self, name='cells')


class Wrong(Exception): pass


class Cells(pytest.Item):
    "All cells of a notebook, in a process of their own."
    def runtest(self):
        flags = self.config.getoption('--flags').split()
        command = [sys.executable, root/'tests/notebooks.py', self.path, *flags]
        env = {**os.environ, forks.nested: '1'}
        done = forks.run(command, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode or 'Success.' not in done.stdout: raise Wrong(done.stdout + done.stderr)

    def repr_failure(self, excinfo, style=None):
        if excinfo.errisinstance(Wrong): return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self): return self.path, None, self.nodeid


def pytest_collect_file(file_path, parent):
    if file_path.suffix == '.ipynb' and root/'nbs' in file_path.parents:
        return Notebook.from_parent(parent, path=file_path)


# The server

def serve(config):
    if not hasattr(config, 'forks'):
        config.forks = ExitStack()
        config.add_cleanup(config.forks.close)
        config.forks.enter_context(forks.server())


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:       # as for what a shell starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, 'numprocesses', None): serve(config)


def pytest_collection_finish(session):
    if any(isinstance(item, Cells) or item.get_closest_marker('process') for item in session.items):
        if not (session.config.option.collectonly or "SIMCLR_TEST_CUDA" in os.environ): serve(session.config)


# The order

table = root/'tests/seconds.json'

def place_of(item, seconds):
    "The longest file first; one that is not in the table may take long."
    name = item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else item.path.name
    return -seconds.get(name, 30 if item.path.suffix == '.py' else 10)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if workers == 1: return
    seconds = json.loads(table.read_text()) if table.exists() else {}
    items.sort(key=lambda item: place_of(item, seconds))


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, sched):
    "A test that ends its process has failed; the rest of its file goes on in a new one."
    for name, unit in list(sched.workqueue.items()):
        if crashitem in unit: unit[crashitem] = True
        if all(unit.values()): del sched.workqueue[name]


# How long each file takes: processor time, so that it matters little what else the machine does

def used():
    "Processor seconds of this process, of those that it has waited for, and of its forks."
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + sum(forks.spent)

last, spent = [0.], defaultdict(float)

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    report.used, last[0] = used() - last[0], used()
    return report


def pytest_runtest_logstart(): last[0] = last[0] or used()


def pytest_runtest_logreport(report):
    used = getattr(report, 'used', 0.)              # the report of a worker that has died lacks it
    spent[report.nodeid.split('::')[0]] += used


def pytest_sessionfinish(session):
    config = session.config
    if not config.getoption('--seconds') or hasattr(config, 'workerinput'): return
    known = json.loads(table.read_text()) if table.exists() else {}
    known = {name: s for name, s in known.items() if (root/name).exists()}
    known |= {name: round(s) for name, s in spent.items() if round(s)}
    longest = dict(sorted(known.items(), key=lambda pair: (-pair[1], pair[0])))
    table.write_text(json.dumps(longest, indent=0) + '\n')
