"""What positives from a group are worth: one picture's two views, against a second view from another of its group.

    python bench/groups.py                    # CIFAR-10; --seeds 0,1,2 --out FILE, where finished runs are kept

5,000 training pictures of CIFAR-10 in groups of four. `none` knows no groups. In `kind` the four are pictures of one
class, as the pictures of one patient or one part share what is the matter; in `chance` they are any four, as in a
column that means nothing. The rest is the same. Graded on the 10,000 test pictures: 20 neighbors by vote, and a linear
classifier on the features of the 5,000. Prints a table, and differences to `none` within seeds with 95% intervals.
"""
import argparse, json
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import stats
from simclr_nb.grids import Training
from simclr_nb.points import images_of, measure, train_point

base = Training(images=5_000, arch='resnet18_0.25x', stem='small', batch_size=128, epochs=10)
ways = 'none', 'kind', 'chance'

def grouped(images, way, size=4):
    "The same pictures, each with the number of its group."
    if way == 'none': return images
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    if way == 'kind': order = order[np.argsort(images.labels[order], kind='stable')]
    images = images.subset(range(len(images)))
    images.groups = np.empty(len(images), int)
    images.groups[order] = np.arange(len(images))//size
    return images

def run(way, t):
    "Percent of the test pictures."
    images, test = images_of(t)
    learn = train_point(t, grouped(images, way))
    found = measure(dict(h=learn.encoder), t, images, test)
    return {name: round(found[name], 2) for name in ('neighbors', 'linear')}

def interval(x):
    "Half the width of a 95% interval of the mean."
    return stats.t.ppf(.975, len(x) - 1)*np.std(x, ddof=1)/len(x)**.5 if len(x) > 1 else float('nan')

def table(lines):
    for name in ('neighbors', 'linear'):
        by_way = {way: {l['seed']: l[name] for l in lines if l['way'] == way} for way in ways}
        for way, scores in by_way.items():
            x = np.array([*scores.values()])
            text = f'{name:10} {way:7} {x.mean():5.1f} ± {interval(x):.1f}'
            both = sorted(scores.keys() & by_way['none'].keys())
            gain = np.array([scores[s] - by_way['none'][s] for s in both])
            print(text if way == 'none' else f'{text}   minus none {gain.mean():+.1f} ± {interval(gain):.1f}')

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
    for seed in map(int, args.seeds.split(',')):
        for way in ways:
            t = replace(base, images=args.images, epochs=args.epochs, seed=seed)
            known = dict(way=way, seed=seed, images=t.images, epochs=t.epochs)
            if any(known.items() <= line.items() for line in lines): continue
            lines.append(known | run(way, t))
            with out.open('a') as f: f.write(json.dumps(lines[-1]) + '\n')
    table([line for line in lines if (line['images'], line['epochs']) == (args.images, args.epochs)])

if __name__ == '__main__': main()
