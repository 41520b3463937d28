"""A million pictures: how long until they are listed, what the list weighs, and small files against tar shards.

    python bench/sources.py --files 1000000 --folder DIR

makes a folder of small JPEG files and the same ones as tar shards (below DIR, kept and used again; without --folder a
temporary one), and prints JSON. Every measurement is a process of its own: `seconds`, and `MB`, the resident memory
that is there afterwards and was not before. `first batch` is from the order of a data set to its first 256 pairs of
crops. Reading is in random order, the same for both; `cold` after the kernel was told to forget the files' contents.
"""
import argparse, gc, io, json, os, random, statistics, subprocess, sys, tarfile, tempfile, time
from importlib import import_module
from pathlib import Path

import numpy as np, psutil
from PIL import Image

in_folder, in_shard = 1_000, 10_000        # files

def picture(rng):
    "A small JPEG file, as bytes: smooth noise, about a kilobyte."
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    data = io.BytesIO()
    coarse.resize((32, 32), Image.Resampling.BICUBIC).save(data, 'jpeg', quality=90)
    return data.getvalue()

def name_of(i): return f'{i//in_folder:04d}/{i:07d}.jpg'

def make(folder, n):
    "The folder and the shards, each written once."
    rng = np.random.default_rng(0)
    pictures = [picture(rng) for _ in range(1_000)]
    small, shards, done = folder/'small', folder/'shards', folder/'done'
    if done.exists() and done.read_text() == str(n): return small, shards
    shards.mkdir(parents=True, exist_ok=True)
    for first in range(0, n, in_folder):
        (small/name_of(first)).parent.mkdir(parents=True, exist_ok=True)
        for i in range(first, min(first + in_folder, n)): (small/name_of(i)).write_bytes(pictures[i % 1_000])
    for first in range(0, n, in_shard):
        with tarfile.open(shards/f'{first//in_shard:04d}.tar', 'w') as tar:
            for i in range(first, min(first + in_shard, n)):
                member = tarfile.TarInfo(name_of(i))
                member.size = len(pictures[i % 1_000])
                tar.addfile(member, io.BytesIO(pictures[i % 1_000]))
    done.write_text(str(n))
    return small, shards

# Listing: each of these makes the list that its owner would keep

def by_folder(small, shards):
    from simclr_nb.data.sets import folder_images
    return folder_images(small)

def by_shards(small, shards):
    from simclr_nb.data.stores import tar_images
    return tar_images(sorted(shards.glob('*.tar')))

def by_rglob(small, shards): return sorted(small.rglob('*.jpg'))

def by_torchvision(small, shards):
    from torchvision.datasets import ImageFolder
    return ImageFolder(small)

listings = {'simclr_nb, folder': by_folder, 'simclr_nb, shards': by_shards, 'sorted(Path.rglob)': by_rglob,
            'torchvision ImageFolder': by_torchvision}

def list_once(contestant, small, shards):
    for name in ('simclr_nb.data.datasets', 'simclr_nb.data.stores', 'torchvision.datasets'):
        import_module(name)                                                 # not what is measured
    gc.collect()
    resident = psutil.Process().memory_info
    before, start = resident().rss, time.perf_counter()
    found = listings[contestant](small, shards)
    seconds = time.perf_counter() - start
    gc.collect()
    return dict(files=len(found), seconds=round(seconds, 2), MB=round((resident().rss - before)/2**20))

def first_batch(contestant, small, shards):
    from simclr_nb.augmentations import simclr_augmentations
    from simclr_nb.data.datasets import TwoCropDataset
    start = time.perf_counter()
    images = listings[contestant](small, shards)
    crops = TwoCropDataset(images, simclr_augmentations(32))
    order = random.Random(0).sample(range(len(images)), min(256, len(images)))
    for i in order: crops[i]
    return dict(seconds=round(time.perf_counter() - start, 2))

def forget(files):
    "Ask the kernel to drop what it holds of files' contents."
    for file in files:
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)

def read(contestant, small, shards, n, cold):
    images = listings[contestant](small, shards)
    order = random.Random(0).sample(range(len(images)), min(n, len(images)))
    if cold:
        forget(sorted(shards.glob('*.tar')) if contestant.endswith('shards') else [images.files[i] for i in order])
    start = time.perf_counter()
    for i in order: images.files[i].read_bytes()
    return len(order)/(time.perf_counter() - start)

def child(task, *args, cache):
    "What one task prints, in a process of its own."
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', XDG_CACHE_HOME=str(cache))
    done = subprocess.run([sys.executable, __file__, '--task', json.dumps([task, *args])], env=env,
                          capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--files', type=int, default=100_000)
    parser.add_argument('--folder', help='where the files are made, and kept')
    parser.add_argument('--reads', type=int, default=20_000)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--task', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task, contestant, small, shards, *rest = json.loads(args.task)
        print(json.dumps(globals()[task](contestant, Path(small), Path(shards), *rest)))
        return
    with tempfile.TemporaryDirectory() as tmp:
        small, shards = map(str, make(Path(args.folder or tmp), args.files))
        result = dict(files=args.files, listing={}, read={})
        for name in listings:
            cache = Path(tmp)/'cache'                       # where the shards' index is kept: none at first
            result['listing'][name] = child('list_once', name, small, shards, cache=cache)
        again = child('list_once', 'simclr_nb, shards', small, shards, cache=cache)
        result['listing']['simclr_nb, shards, again'] = again
        ours = ['simclr_nb, folder', 'simclr_nb, shards']
        result['first batch'] = {name: child('first_batch', name, small, shards, cache=cache) for name in ours}
        for state in ('warm', 'cold'):
            rates = {name: [] for name in ours}
            for _ in range(args.repeats + 1):                # in turns; the first round warms up
                for name in ours:
                    rates[name].append(child('read', name, small, shards, args.reads, state == 'cold', cache=cache))
            folder, tar = (rates[name][1:] for name in ours)
            ratios = sorted(t/f for f, t in zip(folder, tar))
            result['read'][state] = dict(folder_per_s=round(statistics.median(folder)),
                shards_per_s=round(statistics.median(tar)), ratio=round(statistics.median(ratios), 2),
                ratios=[round(ratios[0], 2), round(ratios[-1], 2)])
        print(json.dumps(result, indent=2))

if __name__ == '__main__': main()
