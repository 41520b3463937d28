"""Images per second of `simclr pretrain` on CIFAR-10, or on as small JPEG files made for it. Prints JSON.

    python bench/gpu/rate.py --images DIR
"""
import argparse, csv, json, statistics, subprocess, sys, tempfile
from pathlib import Path

import numpy as np, torch
from PIL import Image


def pictures(folder, n, size=32, classes=2, seed=0):
    "Small JPEG files in one folder for each class: a color of the class, a gradient, noise."
    rng = np.random.default_rng(seed)
    for i in range(n):
        base = 60 + 120*np.eye(3)[i % classes % 3] + np.linspace(-40, 40, size)[:, None, None]
        im = (base + rng.normal(0, 20, (size, size, 3))).clip(0, 255).astype(np.uint8)
        file = Path(folder)/f'class{i % classes}'/f'{i:05}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im).save(file, quality=95)
    return folder


def rates(run):
    "Images per second at each line of a run's history, without the first half: workers start, kernels are chosen."
    with open(Path(run)/'history.csv', newline='') as f:
        found = [float(line['images_per_second']) for line in csv.DictReader(f) if line['images_per_second']]
    return found[len(found)//2:]


def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--images', help='a folder of pictures, with train/ below it or without')
    ask.add_argument('--arch', default='resnet18')
    ask.add_argument('--batch-size', type=int, default=512)
    ask.add_argument('--epochs', type=int, help='default: 1, or 6 of the pictures that are made')
    ask.add_argument('--tiny', action='store_true')
    a = ask.parse_args()
    if a.tiny: a.arch, a.batch_size, a.epochs = 'resnet18_0.125x', 8, 1
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as tmp:
        source = a.images or pictures(f'{tmp}/images', 24 if a.tiny else 8192)
        epochs = a.epochs or (1 if a.images else 6)
        settings = dict(arch=a.arch, size=32, augment='cifar10', batch_size=a.batch_size, epochs=epochs,
                        lr=a.batch_size/256, temperature=.5, knn_every=0, measure_every=0,
                        precision='bf16' if gpu else 'fp32', out=f'{tmp}/run') | (dict(num_workers=0) if a.tiny else {})
        words = [w for k, v in settings.items() for w in (f'--{k.replace("_", "-")}', str(v))]
        done = subprocess.run([sys.executable, '-m', 'simclr_nb', 'pretrain', source, *words], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode: sys.exit(f'{done.stdout}\nsimclr pretrain failed')
        found = rates(settings['out'])
    print(json.dumps(dict(images_per_second=round(statistics.median(found), 1), slowest=round(min(found), 1),
                          fastest=round(max(found), 1), lines=len(found), arch=a.arch, batch_size=a.batch_size,
                          precision=settings['precision'], pictures='given' if a.images else 'made'), indent=1))


if __name__ == '__main__': main()
