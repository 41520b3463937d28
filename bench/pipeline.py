"""From JPEG files to two finished views of each: images per second, in one process and one thread.

    python bench/pipeline.py --images DIR --size 224

Ours beside lightly's SimCLRTransform and torchvision's own transforms, on the same files in the same run. Prints JSON.
Without --images, 128 pictures of 500 x 375 pixels are cut out of scikit-learn's two photographs.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, json, statistics, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')

import cv2, numpy as np, torch
from fastai.data.transforms import get_image_files
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2
from simclr_nb.augmentations import ColorDistortion, RandomBlur, make_views, simclr_augmentations
from simclr_nb.data import ImageSet, TwoCropDataset, open_image, open_lazy, decode_crops
from simclr_nb.augmentations import keyed_rng
from simclr_nb.core import pixels


def sample_images(folder, n=128, size=(500, 375)):
    "Pictures of ordinary ImageNet size."
    photos = [Image.fromarray(load_sample_image(f'{name}.jpg')) for name in ('china', 'flower')]
    for i in range(n):
        im, rng = photos[i % 2], keyed_rng(0, index=i)
        w = rng.uniform(.6, .85)*im.width
        h = w*size[1]/size[0]
        left, top = rng.random(2)*(im.width - w, im.height - h)
        im.resize(size, Image.BICUBIC, box=(left, top, left + w, top + h)).save(Path(folder)/f'{i:03}.jpg', quality=92)
    return folder


def small(size): return size <= 32


def ours(files, size, bs, device):
    augment = simclr_augmentations(size, strength=.5 if small(size) else 1., blur=not small(size))
    pairs = TwoCropDataset(ImageSet(files), augment)
    def run():
        for i in range(0, len(files), bs):
            crops, rows, _ = zip(*[pairs[k] for k in range(i, min(i + bs, len(files)))])
            views = make_views(augment, torch.stack(crops).to(device), torch.from_numpy(np.stack(rows)).to(device))
        return views
    return run, augment


def lightlys(files, size, bs, device):
    from lightly.transforms import SimCLRTransform
    transform = SimCLRTransform(input_size=size, **(dict(cj_strength=.5, gaussian_blur=0.) if small(size) else {}))
    def run():
        for i in range(0, len(files), bs):
            pairs = [transform(Image.open(f).convert('RGB')) for f in files[i:i + bs]]
            views = torch.stack([v for pair in zip(*pairs) for v in pair]).to(device)
        return views
    return run


def torchvisions(files, size, bs, device):
    s = .5 if small(size) else 1.
    blur = [] if small(size) else [v2.RandomApply([v2.GaussianBlur(2*(size//20) + 1, (.1, 2.))], p=.5)]
    transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(.8*s, .8*s, .8*s, .2*s)], p=.8),
        v2.RandomGrayscale(.2), *blur, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    def run():
        for i in range(0, len(files), bs):
            ims = [Image.open(f).convert('RGB') for f in files[i:i + bs]]
            views = torch.stack([transform(im) for _ in range(2) for im in ims]).to(device)
        return views
    return run


def per_image(f, files, repeats):
    "Median milliseconds of f for one file."
    f(0)
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(len(files)): f(i)
        took.append((time.perf_counter() - start)/len(files)*1e3)
    return round(statistics.median(took), 3)


def stages(files, augment, repeats):
    "Milliseconds per image of each stage alone: two views where the stage works on views."
    size, crops = augment.size, TwoCropDataset(ImageSet(files), augment)[0][0]
    views = [np.ascontiguousarray(c.permute(1, 2, 0).numpy()/np.float32(255)) for c in crops]
    def draw(i): return augment.draw_views((0, 0, i), 500, 375)
    def decode_and_cut(i):
        with open_lazy(files[i]) as im: decode_crops(im, augment.draw_views((0, 0, i), *im.size)[0], size)
    def of(kind):
        step = next((s for s in augment.steps if isinstance(s, kind)), None)
        if step is None: return None
        drawn = [step.params(keyed_rng(0, index=i)) for i in range(len(files))]
        return per_image(lambda i: [step.apply_cv(v, drawn[i]) for v in views], files, repeats)
    return dict(draw=per_image(draw, files, repeats), decode=per_image(lambda i: pixels(open_image(files[i])), files, repeats),
        decode_draw_and_cut_two=per_image(decode_and_cut, files, repeats), colour_of_two=of(ColorDistortion), blur_of_two=of(RandomBlur))


def measure(files, size, bs, repeats, device):
    mine, augment = ours(files, size, bs, device)
    runs = dict(ours=mine, lightly=lightlys(files, size, bs, device), torchvision=torchvisions(files, size, bs, device))
    rates = {name: [] for name in runs}
    for run in runs.values():
        views = run()
        assert views.shape[1:] == (3, size, size) and views.dtype == torch.float32
    for _ in range(repeats):                             # in turns, so that a busy moment hits all of them
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device != 'cpu': torch.cuda.synchronize()
            rates[name].append(len(files)/(time.perf_counter() - start))
    result = {name: round(statistics.median(r), 1) for name, r in rates.items()}
    for name in ('lightly', 'torchvision'):
        result[f'ratio_{name}'] = round(statistics.median(a/b for a, b in zip(rates['ours'], rates[name])), 2)
    return result | dict(ms_per_image=stages(files, augment, repeats))


if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--images', help='a folder of JPEG files; without it, pictures are made')
    args.add_argument('--size', type=int, default=224, help='side of the views; up to 32, the recipe for CIFAR-10')
    args.add_argument('--limit', type=int, default=256, help='how many files to take')
    args.add_argument('--batch', type=int, default=32)
    args.add_argument('--repeats', type=int, default=5)
    args.add_argument('--device', default='cpu', help='where the views are finished: cpu or cuda')
    a = args.parse_args()
    torch.set_num_threads(1); cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as tmp:
        found = [f for f in sorted(get_image_files(a.images or sample_images(tmp))) if f.suffix.lower() in ('.jpg', '.jpeg')]
        if not found: args.error(f'no JPEG files in {a.images}')
        files = found[::max(1, len(found)//a.limit)][:a.limit]
        print(json.dumps(dict(size=a.size, files=len(files), device=a.device) | measure(files, a.size, a.batch, a.repeats, a.device), indent=2))
