"""The race: the same SimCLR trained by this library and by other libraries' parts, from files to an encoder.

    python bench/train.py --data cifar10 --images 10000 --lengths 4,8 --seeds 5
    python bench/train.py --data DIR --size 224 --batch-size 64 --images 1600 --contestants torchvision,lightly

The same images, network, weights at the start, batch, optimizer (Adam, constant rate), temperature and epochs for all.
Contestants: ours with each definition of the colors (`simclrv1`, `simclrv2`, `torchvision`); `lightly`, its transform
and loss in a plain loop, with workers that stay between epochs; `stable` likewise with stable-pretraining's; `bare`,
the network with its loss and optimizer on views that are there already.
Each run is a process of its own, and all read the same files. Contestants take turns, seed by seed. A finished run is a
line of `--out`; what is there already is not run again. The judge is scikit-learn's nearest neighbors (cosine, k = 20)
on features of images as Pillow and torchvision read them. It asks about test images, for results, and about training
images that nobody trained on (`validation`), for choices.
"""
import argparse, json, os, statistics, subprocess, sys, threading, time
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

ours = 'simclrv1', 'simclrv2', 'torchvision'
others = 'lightly', 'stable', 'bare'


def small(size): return size <= 32


# In the process of one run

def pictures(args):
    "The images to train on; those to judge on, by part: none where a folder has no classes."
    import numpy as np
    from simclr_nb.data.sources import load_images, train_test_splits
    rng = np.random.default_rng(0)                         # the same images whatever the seed of the run
    def some(images, idxs): return images.subset([int(i) for i in idxs])
    images = load_images(args.data)
    if images.labels is None:
        return some(images, np.resize(rng.permutation(len(images)), args.images)), {}
    train, test = train_test_splits(args.data)
    order = rng.permutation(len(train))
    queries = dict(test=some(test, rng.permutation(len(test))[:args.queries]),
                   validation=some(train, order[args.images:][:args.queries]))
    return some(train, order[:args.images]), {k: v for k, v in queries.items() if len(v)}


def recipe(args, colors):
    "The augmentation of the run; its numbers are those that the other libraries get."
    from simclr_nb.augmentations import simclr_augmentations
    from simclr_nb.data.sources import solar_augmentations
    if args.data == 'solar_cells': return solar_augmentations(args.size, implementation=colors)
    strength = .5 if small(args.size) else 1.
    return simclr_augmentations(args.size, strength, blur=not small(args.size), implementation=colors)


def network(args):
    "Encoder and head, their weights from the seed."
    import torch
    from simclr_nb.encoder import build_encoder
    from simclr_nb.projection import projection_head
    torch.manual_seed(args.seed)
    encoder = build_encoder(args.arch, args.size, args.stem)
    return encoder, projection_head(encoder.num_features, 'nonlinear', 128)


def train_ours(args, images, encoder, head, looks):
    from fastai.callback.core import Callback
    from simclr_nb.learner import simclr_learner
    class Look(Callback):
        def before_fit(self): self.began = time.perf_counter()
        def after_epoch(self): looks(self.epoch + 1, time.perf_counter() - self.began)
    class Parts(Callback):
        "Seconds in which the step waits for crops, makes views, does the rest."
        order = -100
        def before_fit(self): self.parts = dict(wait=0., views=0., rest=0.)
        def before_epoch(self): self.mark = time.perf_counter()
        def add(self, part):
            now = time.perf_counter()
            self.parts[part], self.mark = self.parts[part] + now - self.mark, now
        def before_batch(self): self.add('wait')
        def after_batch(self): self.add('rest')
    class ViewsMade(Callback):
        order = 100
        def before_batch(self): self.learn.parts.add('views')
    learn = simclr_learner(images, encoder, args.size, recipe(args, args.only), head, temperature=args.temperature,
        optimizer='adam', seed=args.seed, num_workers=args.workers, memory_format=args.memory_format)
    learn.set_batch_size(args.batch_size)
    learn.add_cbs([Look(), Parts(), ViewsMade()])
    with learn.no_bar(), learn.no_logging(): learn.fit(max(args.lengths), lr=args.lr)
    whole = sum(learn.parts.parts.values())
    return dict(shares={k: round(v/whole, 3) for k, v in learn.parts.parts.items()}, drop=0)


def transform_of(name, size):
    "Two views of a picture, by another library; its own defaults where the recipe does not say."
    strength = .5 if small(size) else 1.
    if name == 'lightly':
        from lightly.transforms import SimCLRTransform
        return SimCLRTransform(input_size=size, normalize=None, cj_strength=strength,
                               gaussian_blur=0. if small(size) else .5)
    import torch
    from stable_pretraining.data import transforms as st
    jitter = [v*strength for v in (.8, .8, .8, .2)]
    one = st.Compose(st.RandomResizedCrop((size, size), scale=(.08, 1.)), st.RandomHorizontalFlip(p=.5),
        st.ColorJitter(*jitter, p=.8), st.RandomGrayscale(p=.2),
        *([] if small(size) else [st.GaussianBlur(kernel_size=2*(size//20) + 1, sigma=(.1, 2.), p=.5)]),
        st.ToImage(dtype=torch.float32, scale=True))
    def two(im): return [one(dict(image=im))['image'] for _ in range(2)]
    return two


def loss_of(name, temperature):
    if name == 'lightly':
        from lightly.loss import NTXentLoss
        return NTXentLoss(temperature)
    from stable_pretraining.losses import NTXEntLoss
    return NTXEntLoss(temperature)


class Pairs:
    "A data set of two views, as every library's example has one."
    def __init__(self, files, transform): self.files, self.transform = files, transform
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        from PIL import Image
        with Image.open(self.files[i]) as im: return self.transform(im.convert('RGB'))


def train_plain(args, images, encoder, head, looks):
    import torch
    from torch.utils.data import DataLoader
    loss_fn, model = loss_of(args.only, args.temperature), torch.nn.Sequential(encoder, head)
    model.to(memory_format=args.memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=1e-6)
    torch.manual_seed(args.seed)
    loader = DataLoader(Pairs(images.files, transform_of(args.only, args.size)), args.batch_size, shuffle=True,
        drop_last=True, num_workers=args.workers, persistent_workers=args.workers > 0)
    began = time.perf_counter()
    for epoch in range(max(args.lengths)):
        model.train()
        for view1, view2 in loader:
            x = torch.cat([view1, view2]).contiguous(memory_format=args.memory_format)
            loss = loss_fn(*model(x).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        looks(epoch + 1, time.perf_counter() - began)
    return dict(drop=len(images) % args.batch_size)


def train_bare(args, images, encoder, head, looks):
    "No input at all: how fast could it be?"
    import torch
    from simclr_nb.ntxent import nt_xent
    model = torch.nn.Sequential(encoder, head).to(memory_format=args.memory_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=1e-6)
    x = torch.rand(2*args.batch_size, 3, args.size, args.size).contiguous(memory_format=args.memory_format)
    began = time.perf_counter()
    for epoch in range(max(args.lengths)):
        for _ in range(len(images)//args.batch_size):
            optimizer.zero_grad()
            nt_xent(model(x), temperature=args.temperature).backward()
            optimizer.step()
        looks(epoch + 1, time.perf_counter() - began)
    return dict(drop=len(images) % args.batch_size)


def read(files, size):
    "Images as torchvision's examples read them for evaluation."
    import torch
    from PIL import Image
    from torchvision.transforms import v2
    to = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return torch.stack([to(Image.open(f).convert('RGB')) for f in files])


def judge(encoder, bank, parts, size):
    "Accuracy of scikit-learn's nearest neighbors on each part, percent."
    import torch
    from sklearn.neighbors import KNeighborsClassifier
    training = encoder.training
    encoder.eval()
    def features(images):
        pieces = [images.files[i:i + 500] for i in range(0, len(images), 500)]
        with torch.no_grad(): return torch.cat([encoder(read(piece, size)) for piece in pieces]).numpy()
    neighbors = KNeighborsClassifier(20, metric='cosine').fit(features(bank), bank.labels)
    marks = {name: round(100*float(neighbors.score(features(part), part.labels)), 2) for name, part in parts.items()}
    encoder.train(training)
    return marks


def one_run(args):
    "Train one contestant, in this process; prints a line of JSON."
    import torch, cv2
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    args.memory_format = torch.channels_last
    images, queries = pictures(args)
    encoder, head = network(args)
    seconds, accuracy, out = {}, {}, 0.
    def looks(epoch, since):
        nonlocal out                                       # the judge's time is not the contestant's
        seconds[epoch], begun = since - out, time.perf_counter()
        if epoch in args.lengths and queries and args.only != 'bare':
            for part, mark in judge(encoder, images, queries, args.size).items(): accuracy[f'{part} {epoch}'] = mark
        out += time.perf_counter() - begun
    train = train_ours if args.only in ours else train_bare if args.only == 'bare' else train_plain
    more = train(args, images, encoder, head, looks)
    seen = (len(images) - more.pop('drop'))*max(args.lengths)
    print(json.dumps(dict(seconds=round(seconds[max(args.lengths)], 2), accuracy=accuracy,
        images_per_second=round(seen/seconds[max(args.lengths)], 1), torch=torch.__version__) | more))


# In the process that is called

settings = ('data images queries size arch stem lengths batch_size lr temperature threads workers').split()


def key(args, name, seed): return {k: getattr(args, k) for k in settings} | dict(contestant=name, seed=seed)


def finished(path):
    "The runs of a file; a line that was cut off does not count."
    runs = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try: runs.append(json.loads(line))
        except ValueError: continue
    return runs


class PeakMemory(threading.Thread):
    "The most that a process and its children hold together; pages that they share count once."
    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peak, self.done = pid, 0, threading.Event()
    def run(self):
        import psutil
        while not self.done.wait(.5):
            total = 0
            try:
                process = psutil.Process(self.pid)
                for p in (process, *process.children(recursive=True)):
                    m = p.memory_full_info()
                    total += getattr(m, 'pss', m.uss)
            except psutil.Error: continue                  # one ended meanwhile
            self.peak = max(self.peak, total)


def in_own_process(args, name, seed):
    given = [(f'--{k.replace("_", "-")}', getattr(args, k)) for k in settings]
    def text(v): return ','.join(map(str, v)) if isinstance(v, list) else str(v)
    given = [word for name, v in given if v is not None for word in (name, text(v))]
    command = [sys.executable, __file__, *given, '--only', name, '--seed', str(seed)]
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), PYTHONWARNINGS='ignore')
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    memory = PeakMemory(process.pid)
    memory.start()
    out, err = process.communicate()
    memory.done.set()
    if process.returncode: sys.exit(f'{name}, seed {seed}, failed:\n{err[-3000:]}')
    return json.loads(out.splitlines()[-1]) | dict(peak_mb=round(memory.peak/1e6))


def interval(differences):
    "Mean of paired differences with its 95% interval (Student's t)."
    from simclr_nb.studies.results import half_interval
    return statistics.mean(differences), half_interval(differences) if len(differences) > 1 else None


def spread(values, digits=1):
    if len(values) == 1: return f'{values[0]:.{digits}f}'
    return f'{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}'


def table(runs, names):
    "Markdown: a line for each contestant, then what separates each two of them."
    by = {name: {r['seed']: r for r in runs if r['contestant'] == name} for name in names}
    by = {name: found for name, found in by.items() if found}
    marks = list(dict.fromkeys(mark for found in by.values() for r in found.values() for mark in r['accuracy']))
    yield '| contestant | seeds | images/s | ' + ''.join(f'{mark}, % | ' for mark in marks) + 'peak MB |'
    yield '|---'*(len(marks) + 4) + '|'
    for name, found in by.items():
        cells = [spread([r['images_per_second'] for r in found.values()], 0)]
        for mark in marks:
            got = [r['accuracy'][mark] for r in found.values() if mark in r['accuracy']]
            cells.append(spread(got) if got else '')
        memory = statistics.median(r['peak_mb'] for r in found.values())
        yield f'| {name} | {len(found)} | ' + ' | '.join(cells) + f' | {memory:.0f} |'
    yield ''
    for a, b in combinations(by, 2): yield from compared(a, b, by[a], by[b], marks)


def compared(a, b, runs_a, runs_b, marks):
    "What separates two contestants, seed by seed."
    both = sorted(runs_a.keys() & runs_b.keys())
    if not both: return
    ratios = sorted(runs_a[s]['images_per_second']/runs_b[s]['images_per_second'] for s in both)
    line = f'- {a} / {b}: {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})'
    for mark in marks:
        pairs = [(runs_a[s]['accuracy'], runs_b[s]['accuracy']) for s in both]
        gaps = [x[mark] - y[mark] for x, y in pairs if mark in x and mark in y]
        if not gaps: continue
        mean, half = interval(gaps)
        line += f'; {mark}: {mean:+.1f}' + (f' ± {half:.1f}' if half is not None else '')
    yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def numbers(text): return [int(v) for v in text.split(',')]
    def names(text): return text.split(',')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parser.add_argument('--data', default='solar_cells', help='a folder, or the name of a preset')
    parser.add_argument('--images', type=int, default=1476, help='training images; a folder of fewer is repeated')
    parser.add_argument('--queries', type=int, default=2000, help='images to judge on, at most')
    parser.add_argument('--size', type=int, default=32, help='side of the views; up to 32, the recipe for CIFAR-10')
    parser.add_argument('--arch', default='resnet18_0.5x')
    parser.add_argument('--stem', default='imagenet')
    parser.add_argument('--lengths', type=numbers, default=[1], help='epochs after which to judge; the last ends a run')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--temperature', type=float, default=.5)
    parser.add_argument('--threads', type=int, default=cores)
    parser.add_argument('--workers', type=int, default=cores)
    parser.add_argument('--seeds', type=int, default=1, help='how many: 0, 1, …')
    parser.add_argument('--contestants', type=names, help='names, separated by commas; default: all that are installed')
    parser.add_argument('--out', type=Path, help='a file of JSON lines, read and added to')
    parser.add_argument('--only', help='train one contestant in this process')
    parser.add_argument('--seed', type=int, default=0, help='with --only')
    args = parser.parse_args()
    if args.only: return one_run(args)
    installed = dict(lightly='lightly', stable='stable_pretraining')
    chosen = args.contestants or [n for n in (*ours, *others) if n not in installed or find_spec(installed[n])]
    if unknown := set(chosen) - {*ours, *others}: parser.error(f'no contestant {", ".join(sorted(unknown))}')
    runs = finished(args.out) if args.out else []
    for seed in range(args.seeds):
        for name in chosen:                                # in turns, so that a busy hour hits all of them
            this = key(args, name, seed)
            if any(this.items() <= run.items() for run in runs): continue
            runs.append(this | in_own_process(args, name, seed))
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with open(args.out, 'a') as f: f.write(json.dumps(runs[-1]) + '\n')
            print(json.dumps({k: v for k, v in runs[-1].items() if k not in settings}), file=sys.stderr, flush=True)
    same = [r for r in runs if all(r[k] == getattr(args, k) for k in settings)]
    print('\n'.join(table(same, chosen)))


if __name__ == '__main__': main()
