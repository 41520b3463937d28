"What run.sh runs: each part in its own process, with its own time limit and log; one JSON and one table of it all."
import argparse, datetime, json, os, platform, re, signal, subprocess, sys, time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

root = Path(__file__).resolve().parents[2]
SECONDS = 525       # for all parts together


class Part(NamedTuple):
    name:str
    limit:float # seconds
    command:list
    needs:tuple = ()                   # modules of other packages, whose absence leaves the part out
    read:Callable|None = None          # (standard output, device) to facts; None: it is JSON
    left_out:str|None = None           # why the part cannot run here
    env:dict = {}


# What there is to run

fastai = 'fastai', 'fastcore', 'timm', 'sklearn', 'matplotlib', 'cv2', 'safetensors', 'google_crc32c', 'tyro', 'yaml'
plain = 'fastcore', 'PIL', 'cv2', 'safetensors', 'torchvision'

def python(*words): return [sys.executable, *map(str, words)]

def tests_for_gpus():
    "Test files that have tests for a GPU."
    return [f for f in sorted((root/'tests').glob('test_*.py')) if 'needs_gpu' in f.read_text(encoding='utf-8')]

def cells_for_gpus():
    "Notebooks that have cells for a GPU."
    def flagged(file):
        cells = json.loads(file.read_text(encoding='utf-8'))['cells']
        return any(re.search(r'^#\|\s*cuda\s*$', ''.join(c['source']), re.M) for c in cells)
    return [f for f in sorted((root/'nbs').rglob('[0-9]*.ipynb')) if flagged(f)]

def counts(said, device):
    "What pytest has counted in its last line."
    found = {word: int(n) for n, word in re.findall(r'(\d+) (passed|failed|skipped|errors?)', said[-300:])}
    if not found: raise ValueError('pytest counted nothing')
    if device == 'cuda' and not found.get('passed'): raise ValueError(f'no test passed on the GPU: {found}')
    return found

def notebooks_passed(said, device): return dict(notebooks=said.count('.ipynb'))

def all_parts(a, device):
    "The parts, in the order in which they run: what is short and sure first."
    bench, tiny = root/'bench', a.tiny
    notebooks = cells_for_gpus()
    tests = python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests_for_gpus(), '-k', 'cuda or gpu')
    cells = python('-c', 'import sys; from nbdev.test import nbdev_test\n'
                   'for path in sys.argv[1:]: print(path), nbdev_test(path, flags="cuda", n_workers=0)', *notebooks)
    loss = ['--rows', '64,256', '--reps', 2, '--together', '--contestants', 'plain', '--threads', 1] if tiny else \
        ['--rows', '4096,8192,16384,32768,65536', '--seconds', 100]
    pipeline = ['--size', 32, '--limit', 4, '--repeats', 1, '--batch-size', 2] if tiny else ['--size', 224]
    optim = ['--arch', 'resnet18_0.125x', '--rounds', 2] if tiny else []
    images = ['--images', a.images] if a.images else []
    photos = ['--images', a.photos] if a.photos else []
    to = ['--device', device]
    return [
        Part('tests', 80, tests, ('pytest', *fastai), counts, env=dict(SIMCLR_TEST_CUDA='1')),
        Part('optim', 30, python(bench/'optim.py', *to, *optim), plain),
        Part('step', 150, python(bench/'step.py', *to, *(['--tiny'] if tiny else [])), plain),
        Part('cifar', 70, python(bench/'gpu'/'rate.py', *images, *(['--tiny'] if tiny else [])), fastai),
        Part('loss', 115, python(bench/'loss.py', *to, '--dtype', 'fp32,bf16', '--rounds', 1, *loss)),
        Part('pipeline', 40, python(bench/'pipeline.py', *to, *pipeline, *photos), (*plain, 'sklearn')),
        Part('cells', 40, cells, ('nbdev', *fastai), notebooks_passed,
             None if notebooks else 'no notebook has a cell flagged cuda'),
    ]


# One part

def end(process):
    "End a process and all that it started."
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try: os.killpg(process.pid, number)
        except ProcessLookupError: return
        try: process.wait(patience)
        except subprocess.TimeoutExpired: pass

def run_in_group(command, limit, out, log, env):
    "The exit code of a command, or None where it ran out of time; nothing that it started outlives it."
    with open(out, 'wb') as o, open(log, 'wb') as e:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=o, stderr=e, cwd=root, env=env,
                                   start_new_session=True)
        try: return process.wait(limit)
        except subprocess.TimeoutExpired: return None
        finally: end(process)

def text(path): return path.read_text(encoding='utf-8', errors='replace')

def json_of(said, device):
    "The JSON object that ends some output."
    start = re.search(r'^\{', said, re.M)
    if not start: raise ValueError('it printed no result')
    return json.loads(said[start.start():])

def absent_package(log):
    "The package that a program failed to import, if that is how it ended."
    found = re.findall(r"^(?:E\s+)?ModuleNotFoundError: No module named '(\w+)", log, re.M)
    own = {'simclr_nb', *(f.stem for f in [*(root/'bench').rglob('*.py'), *(root/'tests').glob('*.py')])}
    return found[-1] if found and found[-1] not in own else None

def last_words(log): return next((line for line in reversed(log.splitlines()) if line.strip()), '')[:300]

def run_part(part, folder, device, left=SECONDS):
    "Run a part, and say how it went: status is ok, failed, or left out."
    command = ' '.join(map(str, part.command)).replace(f'{root}{os.sep}', '').replace(sys.executable, 'python')
    facts = dict(status='left out', seconds=0, limit=round(min(part.limit, left)), command=command)
    absent = [name for name in part.needs if not find_spec(name)]
    why = part.left_out or (f'not installed: {", ".join(absent)}' if absent else None)
    if why: return facts | dict(reason=why)
    if left < 5: return facts | dict(status='failed', reason='no time was left')
    out, log, began = folder/f'{part.name}.out', folder/f'{part.name}.log', time.monotonic()
    code = run_in_group(part.command, min(part.limit, left), out, log, os.environ | part.env)
    facts |= dict(status='ok', seconds=round(time.monotonic() - began, 1))
    said, logged = text(out), text(log)
    try: facts['result'] = (part.read or json_of)(said, device)
    except ValueError as e: facts |= dict(status='failed', reason=str(e))
    if code is None: facts |= dict(status='failed', reason=f'out of time after {facts["limit"]} s')
    elif code:
        absent = absent_package(said + logged)
        facts |= dict(status='left out', reason=f'not installed: {absent}') if absent else \
            dict(status='failed', reason=f'exit code {code}: {last_words(logged) or last_words(said)}')
    if facts['status'] == 'failed': facts['log'] = (said + logged)[-3000:]
    return facts


# The machine

def said_by(*command):
    "What a command prints; None where it fails or is not there."
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    except (OSError, subprocess.TimeoutExpired): return None
    return done.stdout.strip() if done.returncode == 0 else None

def machine():
    "The card, the versions, and what was measured; asked in processes of their own, to leave the GPU alone."
    code = '''import json, torch
gpu = torch.cuda.is_available()
p = torch.cuda.get_device_properties(0) if gpu else None
print(json.dumps(dict(device='cuda' if gpu else 'cpu', card=p and p.name, card_gb=p and round(p.total_memory/1e9, 1),
    multiprocessors=p and p.multi_processor_count, torch=torch.__version__, cuda=torch.version.cuda,
    cudnn=torch.backends.cudnn.version() if gpu else None)))'''
    facts = said_by(sys.executable, '-c', code)
    if facts is None: sys.exit(f'{sys.executable} cannot load PyTorch')
    driver = said_by('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
    changed, now = said_by('git', 'status', '--porcelain') or '', datetime.datetime.now(datetime.timezone.utc)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return json.loads(facts.splitlines()[-1]) | dict(driver=driver and driver.splitlines()[0], cores=cores,
        python=platform.python_version(), date=now.isoformat(timespec='seconds'),
        commit=said_by('git', 'rev-parse', 'HEAD'), changed_files=len(changed.splitlines()))


# The table

def cell(x): return '' if x is None else str(x).replace('|', '\\|').replace('\n', ' ')

def row(*cells): return f'| {" | ".join(map(cell, cells))} |'

def table(head, rows): return [row(*head), row(*['---']*len(head)), *(row(*r) for r in rows), '']

def percent(x): return None if x is None else f'{100*x:.1f}%'

def loss_rows(result):
    for at in result['sizes']:
        for name, run in at['runs'].items():
            yield (at['dtype'], at['rows'], name, run.get('ms', run.get('left_out')), run.get('memory_mb'),
                   percent(run.get('share_of_peak')), at['peak_tflops'] and f"{at['peak_tflops']:.3g}")

def step_rows(result):
    for run in result['runs']:
        if 'left_out' in run: yield run['variant'], run['left_out']
        else: yield (run['variant'], run['images'], run['images_per_second'], run['memory_mb'],
                     *map(percent, run['shares'].values()))

def markdown(facts):
    "All of it for a reader."
    m, parts = facts['machine'], facts['parts']
    lines = [f'# {m["card"] or "CPU"}{", tiny sizes: the numbers mean nothing" if facts["tiny"] else ""}', '',
             ', '.join(f'{k} {v}' for k, v in m.items() if v is not None and k != 'card'), '']
    lines += table(('part', 'how it went', 'seconds', 'why'),
                   [(name, p['status'], p['seconds'], p.get('reason')) for name, p in parts.items()])
    results = {name: p.get('result') for name, p in parts.items()}
    if r := results.get('step'):
        head = 'variant', 'images', 'images/s', 'MB', *next((x['shares'] for x in r['runs'] if 'shares' in x), {})
        rows = [(*cells, *['']*(len(head) - len(cells))) for cells in step_rows(r)]
        lines += [f'## A step: {r["arch"]} at {r["size"]} pixels', '', *table(head, rows)]
    if r := results.get('loss'):
        head = 'dtype', 'rows', 'contestant', 'ms', 'MB', 'of the peak', 'peak, TFLOP/s'
        lines += ['## The loss', '', *table(head, loss_rows(r))]
    if r := results.get('optim'): lines += ['## LARS, ms', '', *table(r['ms'], [r['ms'].values()])]
    for name in ('pipeline', 'cifar', 'tests'):
        if r := results.get(name):
            medians = {k: v['median'] if isinstance(v, dict) and 'median' in v else v for k, v in r.items()}
            flat = {k: v for k, v in medians.items() if isinstance(v, (int, float, str))}
            lines += [f'## {name}', '', *table(flat, [flat.values()])]
    return '\n'.join(lines)


def write(folder, facts):
    (folder/'results.json').write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    (folder/'results.md').write_text(markdown(facts), encoding='utf-8')

def run_all(parts, facts, folder, device, seconds=SECONDS):
    "Run the parts one after another; what is known is written after each. The names of those that failed."
    end = time.monotonic() + seconds
    for part in parts:
        facts['parts'][part.name] = found = run_part(part, folder, device, end - time.monotonic())
        print(f'{part.name:10}{found["status"]:10}{found["seconds"]:6} s  {found.get("reason", "")}', flush=True)
        write(folder, facts)
    return [name for name, found in facts['parts'].items() if found['status'] == 'failed']

def main():
    ask = argparse.ArgumentParser(prog='run.sh', description='Everything that a GPU has to show; see its header.')
    ask.add_argument('--out', type=Path, default=root/'runs'/'gpu', help='where the results go')
    ask.add_argument('--images', type=Path, help='CIFAR-10, or another folder of small pictures; else some are made')
    ask.add_argument('--photos', type=Path, help='JPEG photographs for the input pipeline; else its own')
    ask.add_argument('--only', help='some of the parts, with commas')
    ask.add_argument('--tiny', action='store_true', help='small sizes, on a CPU too')
    a = ask.parse_args()
    for name in ('images', 'photos'):
        if path := getattr(a, name): setattr(a, name, path.resolve())        # the parts run in another folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    about = machine()
    parts, folder = all_parts(a, about['device']), a.out.resolve()
    names = [part.name for part in parts]
    wanted = a.only.split(',') if a.only else names
    if unknown := set(wanted) - set(names): ask.error(f'no part {", ".join(unknown)}; there are {", ".join(names)}')
    folder.mkdir(parents=True, exist_ok=True)
    facts = dict(machine=about, tiny=a.tiny, parts={})
    failed = run_all([part for part in parts if part.name in wanted], facts, folder, about['device'])
    print(f'{folder/"results.json"} and results.md' + (f'; failed: {", ".join(failed)}' if failed else ''))
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
