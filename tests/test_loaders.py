"Loaders whose workers are started afresh, as on macOS, on Windows and with Python 3.14, instead of forked."
import os, signal, subprocess, sys, time

import pytest

import forks

pytestmark = pytest.mark.process

common = '''
import os, signal, sys, time
from pathlib import Path
import numpy as np, torch.multiprocessing as mp
from PIL import Image
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.datasets import eval_loader, train_loader
from simclr_nb.data.sets import folder_images

def make(n):
    "Images in the folder that the command names."
    folder = Path(sys.argv[1])
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{i:02}.png')
    return folder
'''

every_image = common + '''
if __name__ == '__main__':
    mp.set_start_method(sys.argv[2])
    folder = make(12)
    (folder/'broken.png').write_text('not a picture')
    images = folder_images(folder)
    loader = train_loader(images, simclr_augmentations(32), batch_size=13, num_workers=1)
    seconds = []
    for epoch in range(4):
        began = time.perf_counter()
        seen = sorted(int(i) for *_, idxs in loader for i in idxs)
        seconds.append(time.perf_counter() - began)
        assert len(seen) == 13 and set(seen) == set(range(12)), seen    # an image takes the place of the broken one
    assert max(seconds[1:]) < seconds[0]/2, f'start-up is paid once: {seconds}'
    assert [f.name for f in loader.dataset.unreadable_files()] == ['broken.png']
    assert sum(len(x) for x, _ in eval_loader(images, 32, batch_size=5, num_workers=1)) == 12
    print('all seen')
'''

waits = common + '''
if __name__ == '__main__':
    mp.set_start_method(sys.argv[2])
    loader = train_loader(folder_images(make(4)), simclr_augmentations(32), batch_size=2, num_workers=2)
    for batch in loader: pass
    print(*(worker.pid for worker in loader._iterator._workers), flush=True)
    input()
    print(len(list(loader)), flush=True)
    time.sleep(60)
'''

others = common + '''
if __name__ == '__main__':
    mp.set_start_method(sys.argv[2])
    loader = train_loader(folder_images(make(4)), simclr_augmentations(32), batch_size=2, num_workers=1)
    for batch in loader: pass
    other = mp.Process(target=time.sleep, args=(60,))
    other.start()
    time.sleep(1)
    other.terminate()
    other.join(20)
    print('exit code', other.exitcode)
    other.kill()
'''

def started(tmp_path, script, method):
    "A script that runs in a process group of its own."
    file = tmp_path/'script.py'
    file.write_text(script)
    (tmp_path/'images').mkdir()
    command, pipe = [sys.executable, str(file), str(tmp_path/'images'), method], subprocess.PIPE
    return forks.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT,
                            start_new_session=True)

def end_all(process):
    "Whatever is left of a script's process group."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.communicate()

def output(process, seconds):
    "What a script and its workers print until the last of them has left; an error if they stay longer."
    try: return process.communicate(timeout=seconds)[0]
    finally: end_all(process)

@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_loaders_work_when_workers_are_started_afresh(tmp_path, method):
    process = started(tmp_path, every_image, method)
    said = output(process, 120)
    assert process.returncode == 0 and said.strip().endswith('all seen'), said

@pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='signals have no sender here')
@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_workers_leave_with_the_process_that_trains_and_not_before(tmp_path, method):
    "They go on when somebody else sends SIGTERM, and they leave when the process that trains is killed."
    process = started(tmp_path, waits, method)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers: os.kill(pid, signal.SIGTERM)
        time.sleep(1)
        process.stdin.write('another epoch\n')
        process.stdin.flush()
        assert process.stdout.readline() == '2\n'        # batches
        process.kill()
        process.communicate(timeout=30)                  # the pipe is open as long as a worker is there
    finally: end_all(process)


@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_other_processes_of_the_program_still_hear_sigterm(tmp_path, method):
    said = output(started(tmp_path, others, method), 120)
    assert said.strip() == f'exit code {-signal.SIGTERM}', said


left = common + """
if __name__ == '__main__':
    import gc
    from simclr_nb.learner import simclr_learner
    learn = simclr_learner(folder_images(make(8)), 'resnet18_0.125x', size=32, num_workers=2)
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.pretrain(1, batch_size=4, lr=.1)
    began = time.perf_counter()
    print(mp.active_children())
    del learn
    gc.collect()
    print(time.perf_counter() - began < 3)
"""

def test_a_fit_leaves_no_workers_behind_that_would_be_waited_for(tmp_path):
    done = forks.run([sys.executable, '-c', left, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == ['[]', 'True'], done.stdout + done.stderr
