"""Variants of the demo's recipe `solar_cells`, judged on training cells that nobody trained on.

    python bench/recipe.py temperature=.1 lr=.004 crop=.08 temperature=.1,crop=.08 --seeds 0,1,2
    python bench/recipe.py                              # the table of what was run

A variant is a list of changes to the recipe; `recipe` is the recipe as it is; `pixels`, `pca` and `untrained` are the
baselines. A quarter of the training cells is held out; the test cells are not looked at. Neighbors choose k and
temperature on the part that was trained on; linear classifiers get 1%, 10% (five draws) and all of its labels.
Balanced accuracy, percent. Finished runs are lines of `--out`, and are not run again.
"""
import argparse, json, statistics, sys, time, warnings
from pathlib import Path

from train import finished

baselines = 'pixels', 'pca', 'untrained'
columns = {'neighbors': ('knn', 1.), '1%': ('logreg', .01), '10%': ('logreg', .1), '100%': ('logreg', 1.)}
own = dict(stem='imagenet', crop=.3, brightness=.3, contrast=.5, blur=.3, colors='torchvision')  # as the preset has it


def settings():
    "What the recipe says, and the numbers of its augmentation."
    import yaml
    from simclr_nb.commands.options import recipes
    known = yaml.safe_load(recipes()['solar_cells'].read_text())
    keys = 'arch', 'size', 'head', 'projection_dim', 'batch_size', 'optimizer', 'lr', 'epochs', 'temperature'
    return {k: known[k] for k in keys} | own


def changed(variant):
    "The settings of a variant, from text as temperature=.1,crop=.08."
    s = settings()
    for change in [] if variant == 'recipe' else variant.split(','):
        key, _, value = change.partition('=')
        if key not in s: sys.exit(f'{change!r} changes nothing that there is: {", ".join(s)}')
        s[key] = type(s[key])(value)
    return s


def parts():
    "Cells to train on, and cells to judge on; all of them training cells."
    from simclr_nb.data.sources import train_test_splits
    from simclr_nb.data.sets import stratified_split
    return stratified_split(train_test_splits('solar_cells')[0], .25, 0)


def augmentation(s):
    from simclr_nb import augmentations as a, operations as o
    color = a.ColorDistortion(s['brightness'], s['contrast'], 0, 0, implementation=s['colors'])
    return a.Augmentation(s['size'], a.RandomResizedCrop((s['crop'], 1.)), a.RandomFlip(), o.RandomQuarterTurn(), color,
                          a.RandomBlur(5, (.1, 1.), p=s['blur']))


def untrained(s, seed):
    import torch
    from simclr_nb.encoder import build_encoder
    torch.manual_seed(seed)
    return build_encoder(s['arch'], s['size'], s['stem'])


def trained(s, seed, fit):
    import torch
    from simclr_nb.learner import simclr_learner
    learn = simclr_learner(fit, untrained(s, seed), augment=augmentation(s), head=s['head'],
                           projection_dim=s['projection_dim'], temperature=s['temperature'], optimizer=s['optimizer'],
                           seed=seed, num_workers=0, cache_mb=1000, memory_format=torch.channels_last)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(s['epochs'], batch_size=s['batch_size'], lr=s['lr'])
    return learn.encoder


def run(variant, seed):
    "One line of the file: what a variant reaches, and how long its training took."
    from simclr_nb.evaluation.candidates import Candidate, pixels_encoder
    from simclr_nb.evaluation.protocols import EvalSettings, EvalSuite, run_protocol
    fit, held_out = parts()
    s = settings() if variant in baselines else changed(variant)
    began = time.perf_counter()
    if variant in ('pixels', 'pca'): encoder = pixels_encoder(32)
    else: encoder = untrained(s, seed) if variant == 'untrained' else trained(s, seed, fit)
    result = dict(variant=variant, seed=seed, train_seconds=round(time.perf_counter() - began, 1))
    suite = EvalSuite([Candidate(variant, encoder, s['size'])], fit, held_out, EvalSettings(num_workers=0))
    for column, (protocol, fraction) in columns.items():
        draws = range(5) if fraction < 1 else range(1)
        rows = run_protocol(suite, protocol, fraction, draws, log=lambda line: None)
        result[column] = round(statistics.mean(float(r['balanced_accuracy']) for r in rows), 2)
    return result


def table(runs):
    "Mean and standard deviation over seeds; the best neighbors first."
    from simclr_nb.core import markdown_table
    by = {}
    for r in runs: by.setdefault(r['variant'], []).append(r)
    def cell(rows, column):
        values = [r[column] for r in rows]
        return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')
    order = sorted(by, key=lambda v: -statistics.mean(r['neighbors'] for r in by[v]))
    rows = [[v, str(len(by[v])), *(cell(by[v], c) for c in columns)] for v in order]
    return markdown_table(['variant', 'seeds', *columns], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('variants', nargs='*', help='changes to the recipe, as temperature=.1,crop=.08')
    parser.add_argument('--seeds', default='0', help='0 or 0,1,2 (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.jsonl'))
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    for variant in args.variants:
        if variant not in baselines: changed(variant)                   # a typing error is told before anything is run
    import cv2, torch
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    for seed in map(int, args.seeds.split(',')):
        for variant in args.variants:
            if any((r['variant'], r['seed']) == (variant, seed) for r in finished(args.out)): continue
            result = run(variant, seed)
            with args.out.open('a') as f: f.write(json.dumps(result) + '\n')
            print(json.dumps(result), flush=True)
    print(table(finished(args.out)))


if __name__ == '__main__': main()
