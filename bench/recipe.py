"""How the demo's recipe was chosen: variants of `solar_cells`, judged on training cells that nobody trained on.

    python bench/recipe.py temperature=.1 lr=.004 crop=.08 temperature=.1,crop=.08 --seeds 0,1,2
    python bench/recipe.py                              # the table of what was run

A variant is a list of changes to the recipe; `recipe` is the recipe as it is; `pixels`, `pca` and `untrained` are the
baselines. A quarter of the training cells is held out; the test cells are not looked at. Neighbors choose k and
temperature on the part that was trained on; linear classifiers get 1%, 10% (five draws) and all of its labels.
Balanced accuracy, percent. Finished runs are lines of `--out`, and are not run again.
"""
import argparse, json, statistics, sys, time, warnings
from pathlib import Path

baselines = 'pixels', 'pca', 'untrained'
columns = 'neighbors', '1%', '10%', '100%'
own = dict(stem='imagenet', crop=.3, brightness=.3, contrast=.5, blur=.3, colors='torchvision')  # as the preset has it


def settings():
    "What the recipe says, and the numbers of its augmentation."
    import yaml
    from simclr_nb.options import recipes
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
    from simclr_nb.data import stratified_split, train_test_splits
    return stratified_split(train_test_splits('solar_cells')[0], .25, 0)


def judge(h, y, q, t):
    "Balanced accuracies, percent, of features h with classes y on features q with classes t."
    from simclr_nb.features import balanced_accuracy, choose_neighbors, knn_predict
    from simclr_nb.labels import label_indices
    from simclr_nb.logistic import logistic_regression
    choice = choose_neighbors(h, y)
    out = dict(neighbors=100*balanced_accuracy(t, knn_predict(h, y, q, choice.k, choice.temperature).numpy()))
    fit, _ = parts()
    for fraction in (.01, .1, 1.):
        scores = []
        for draw in range(5 if fraction < 1 else 1):
            some = label_indices(fit, fraction, draw)
            probe = logistic_regression(h[some], y[some], draw, balanced=True, metric=balanced_accuracy)
            scores.append(100*balanced_accuracy(t, probe.predict(q)))
        out[f'{fraction:.0%}'] = statistics.mean(scores)
    return {k: round(float(v), 2) for k, v in out.items()}


def augmentation(s):
    from simclr_nb import augmentations as a, operations as o
    color = a.ColorDistortion(s['brightness'], s['contrast'], 0, 0, implementation=s['colors'])
    return a.Augmentation(s['size'], a.RandomResizedCrop((s['crop'], 1.)), a.RandomFlip(), o.RandomQuarterTurn(), color,
                          a.RandomBlur(5, (.1, 1.), p=s['blur']))


def network(s, seed):
    import torch
    from simclr_nb.encoder import build_encoder
    torch.manual_seed(seed)
    return build_encoder(s['arch'], s['size'], s['stem'])


def encoder_of(variant, seed, fit):
    "The encoder, its input size, and how long its training took, seconds."
    import torch
    from simclr_nb.learner import simclr_learner
    from simclr_nb.protocols import pixels_encoder
    if variant in ('pixels', 'pca'): return pixels_encoder(32), settings()['size'], 0.
    s = settings() if variant == 'untrained' else changed(variant)
    encoder = network(s, seed)
    if variant == 'untrained': return encoder, s['size'], 0.
    learn = simclr_learner(fit, encoder, augment=augmentation(s), head=s['head'], projection_dim=s['projection_dim'],
                           temperature=s['temperature'], optimizer=s['optimizer'], seed=seed, num_workers=0, cache=1000,
                           memory_format=torch.channels_last)
    began = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.pretrain(s['epochs'], batch_size=s['batch_size'], lr=s['lr'])
    return learn.encoder, s['size'], time.perf_counter() - began


def run(variant, seed):
    from simclr_nb.features import extract_features
    from simclr_nb.protocols import principal_components
    fit, held_out = parts()
    encoder, size, seconds = encoder_of(variant, seed, fit)
    h, q = (extract_features(encoder, images, size, num_workers=0)[0] for images in (fit, held_out))
    if variant == 'pca': h, q = principal_components(h, q)
    return dict(variant=variant, seed=seed, train_seconds=round(seconds, 1), **judge(h, fit.labels, q, held_out.labels))


def table(runs):
    "Mean and standard deviation over seeds; the best neighbors first."
    from simclr_nb.pictures import markdown_table
    by = {}
    for r in runs: by.setdefault(r['variant'], []).append(r)
    def cell(rows, column):
        values = [r[column] for r in rows]
        return f'{statistics.mean(values):.1f}' + (f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else '')
    order = sorted(by, key=lambda v: -statistics.mean(r['neighbors'] for r in by[v]))
    rows = [[v, str(len(by[v])), *(cell(by[v], c) for c in columns)] for v in order]
    return markdown_table(['variant', 'seeds', *columns], rows)


def finished(out):
    lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines]


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
