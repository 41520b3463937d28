"""What positives from a group are worth: one picture's two views, against a second view from another of its group.

    python bench/groups.py                    # CIFAR-10; --seeds 0,1,2 --out FILE, where finished runs are kept

A stand-in for parts that were photographed from several sides: of each of 1,250 training pictures of CIFAR-10 there are
four photographs, turned by up to 90 degrees either way and tilted. The recipe's augmentations do not turn pictures.
`none` takes both views from one photograph; `sides` the second one from another of the same picture; `chance` from any
of four at random, as with a column that means nothing. The rest is the same. Graded on test pictures that are turned
and tilted too: 20 neighbors by vote, and a linear classifier on the features of the 5,000. Prints a table, and
differences to `none` within seeds with 95% intervals.
"""
import argparse, json
from dataclasses import replace
from pathlib import Path

import numpy as np, torch
from simclr_nb.studies.grids import Training
from simclr_nb.studies.points import images_of, measure, train_point
from simclr_nb.studies.results import half_interval
from simclr_nb.data.tables import array_images

base = Training(images=5_000, arch='resnet18_0.25x', stem='small', batch_size=128, epochs=10)
ways, sides = ('none', 'sides', 'chance'), 4

def photographed(images, times):
    "Photographs of each picture, turned and tilted; they keep its label."
    from torchvision.transforms.v2 import Compose, RandomAffine, RandomPerspective
    camera = Compose([RandomAffine(90, scale=(.8, 1)), RandomPerspective(.4, p=1)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        taken = [np.asarray(camera(images[i])) for i in range(len(images)) for _ in range(times)]
    return array_images(taken, np.repeat(images.labels, times), images.classes)

def grouped(images, way):
    "The same pictures, each with the number of its group."
    if way == 'none': return images
    order = np.random.default_rng(0).permutation(len(images)) if way == 'chance' else np.arange(len(images))
    groups = np.empty(len(images), int)
    groups[order] = np.arange(len(images))//sides
    return replace(images, groups=groups)

def run(way, t):
    "Percent of the test pictures."
    images, test = images_of(replace(t, images=t.images//sides))
    images, test = photographed(images, sides), photographed(test.subset(range(0, len(test), 2)), 1)
    learn = train_point(t, grouped(images, way))
    found = measure(dict(h=learn.encoder), t, images, test)
    return {name: round(found[name], 2) for name in ('neighbors', 'linear')}

def table(lines):
    for name in ('neighbors', 'linear'):
        by_way = {way: {o['seed']: o[name] for o in lines if o['way'] == way} for way in ways}
        for way, scores in by_way.items():
            x = np.array([*scores.values()])
            text = f'{name:10} {way:7} {x.mean():5.1f} ± {half_interval(x):.1f}'
            both = sorted(scores.keys() & by_way['none'].keys())
            gain = np.array([scores[s] - by_way['none'][s] for s in both])
            print(text if way == 'none' else f'{text}   minus none {gain.mean():+.1f} ± {half_interval(gain):.1f}')

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--out', default='runs/groups.jsonl')
    parser.add_argument('--images', type=int, default=base.images)
    parser.add_argument('--epochs', type=int, default=base.epochs)
    args = parser.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for way in ways:
        for seed in map(int, args.seeds.split(',')):
            t = replace(base, images=args.images, epochs=args.epochs, seed=seed)
            known = dict(way=way, seed=seed, images=t.images, epochs=t.epochs)
            if any(known.items() <= line.items() for line in lines): continue
            lines.append(known | run(way, t))
            with out.open('a') as f: f.write(json.dumps(lines[-1]) + '\n')
    table([line for line in lines if (line['images'], line['epochs']) == (args.images, args.epochs)])

if __name__ == '__main__': main()
